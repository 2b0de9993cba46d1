"""Rows of a weight times rows of numbers, a few at once, written for vector registers.

Reading weights is what a decoding step spends its time on, so a weight that is read serves every row that is there,
and weights of 16, 8 and 4 bits become float32 only in a register. Sixteen products at a time go into sixteen running
sums (four sets of them in turn, so that a sum need not wait for the one before), and these are added up in one fixed
order, which depends on nothing but the length: a result's bits are the same whether it is computed alone or with
others. A compiler left to itself chooses another order in each place, so the instructions are written out here.

Four results are computed together, of one row and four outputs, two and two, or four and one: then their last
additions, of what stands in one register, share instructions.

What they say is in the plain Python functions (`products`, and `codes_at` and `scales_at` at the end), which run when
the JIT is off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minglm.fast.machine import array_at, compiled_as, matrix

LANES, SETS = 16, 4
AHEAD = 8  # rows of a weight between what is multiplied and what is asked for meanwhile
GROUP = 32  # numbers that share a scale in mxfp4
_FLOAT = ir.FloatType()
_I8, _I16, _I32, _WORD = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FUSE = ("contract",)  # a product and a sum may become one instruction; nothing may change places

# Weights are told apart by the dtype of their codes: float32; uint16, the bits of bfloat16; uint8, of e4m3fn; int8, two
# e2m1 in each byte.


# -- instructions ------------------------------------------------------------------------------------------------


def _vector(kind: Any, lanes: int = LANES) -> Any:
    return ir.VectorType(kind, lanes)


def _all(value: int, kind: Any, lanes: int = LANES) -> Any:
    return ir.Constant(_vector(kind, lanes), [value] * lanes)


def _load(builder: Any, pointer: Any, kind: Any, align: int, lanes: int = LANES) -> Any:
    return builder.load(builder.bitcast(pointer, _vector(kind, lanes).as_pointer()), align=align)


def _from_fp8(builder: Any, codes: Any, lanes: int = LANES) -> Any:
    """e4m3fn / 256: sign, exponent and fraction moved to where float16 has them, whose exponents are 8 more. (In
    float32's places the smallest codes would be numbers below the normal ones, which processors are slow with.)"""
    wide = builder.shl(builder.sext(codes, _vector(_I16, lanes)), _all(7, _I16, lanes))
    bits = builder.and_(wide, _all(-0x4080, _I16, lanes))
    return builder.fpext(builder.bitcast(bits, _vector(ir.HalfType(), lanes)), _vector(_FLOAT, lanes))


def _look_up(builder: Any, table: Any, indices: Any) -> Any:
    """table[i] for each of 16 indices below 16: one instruction where the processor can permute by a register."""
    found = ir.Constant(_vector(_FLOAT), ir.Undefined)
    for lane in range(LANES):
        value = builder.extract_element(table, builder.extract_element(indices, _I32(lane)))
        found = builder.insert_element(found, value, _I32(lane))
    return found


def _widened(builder: Any, kind: Any, pointer: Any, lanes: int = LANES) -> Any:
    """`lanes` weights from here on as float32 (e4m3fn: / 256)."""
    if kind == types.float32:
        return _load(builder, pointer, _FLOAT, 4, lanes)
    if kind == types.uint16:
        bits = builder.zext(_load(builder, pointer, _I16, 2, lanes), _vector(_I32, lanes))
        return builder.bitcast(builder.shl(bits, _all(16, _I32, lanes)), _vector(_FLOAT, lanes))
    return _from_fp8(builder, _load(builder, pointer, _I8, 1, lanes), lanes)


def _pieces(builder: Any, vector: Any) -> list[Any]:
    """A vector of n · 16 lanes as n of 16."""
    count = vector.type.count // LANES
    if count == 1:
        return [vector]
    masks = [ir.Constant(_vector(_I32), list(range(i * LANES, (i + 1) * LANES))) for i in range(count)]
    return [builder.shuffle_vector(vector, vector, mask) for mask in masks]


def _prefetch(builder: Any, pointer: Any) -> None:
    """Ask for the line of memory at a pointer, into the second cache."""
    byte, number = _I8.as_pointer(), _I32
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [builder.bitcast(pointer, byte), number(0), number(2), number(1)])


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FUSE), c, flags=_FUSE)


def _add_up(builder: Any, vectors: list[Any]) -> list[Any]:
    """The sum of all lanes of each of one, two or four vectors: halves onto halves. What is left of two vectors fits
    into one, and goes on there side by side."""
    length = LANES  # lanes that still belong to one sum
    while length > 1:
        length //= 2
        pairs = zip(vectors[::2], vectors[1::2], strict=True) if len(vectors) > 1 else [(vectors[0], None)]
        vectors = [_halve(builder, first, second, length) for first, second in pairs]
    return [builder.extract_element(vectors[0], _I32(lane)) for lane in range(vectors[0].type.count)]


def _halve(builder: Any, first: Any, second: Any, length: int) -> Any:
    """Sums of 2 · length lanes each become sums of `length`."""
    lanes = first.type.count * (1 if second is None else 2)
    starts = range(0, lanes, 2 * length)
    low, high = (
        builder.shuffle_vector(
            first, first if second is None else second,
            ir.Constant(_vector(_I32, lanes // 2), [at + half + i for at in starts for i in range(length)]),
        )
        for half in (0, length)
    )  # fmt: skip
    return builder.fadd(low, high)


class _Tile:
    """Running sums of outputs × rows results: variables that the compiler keeps in registers."""

    def __init__(self, builder: Any, outputs: int, rows: int):
        self._builder, self.pairs = builder, [(o, r) for o in range(outputs) for r in range(rows)]
        zero = _all(0, _FLOAT)
        self._places = {pair: [cgutils.alloca_once(builder, zero.type) for _ in range(SETS)] for pair in self.pairs}
        for places in self._places.values():
            for place in places:
                builder.store(zero, place)

    def add(self, pair: tuple[int, int], each: int, a: Any, b: Any) -> None:
        place = self._places[pair][each]
        self._builder.store(_multiply_add(self._builder, a, b, self._builder.load(place)), place)

    def totals(self) -> dict[tuple[int, int], Any]:
        b = self._builder
        vectors = []
        for pair in self.pairs:
            first, second, third, fourth = (b.load(place) for place in self._places[pair])
            vectors.append(b.fadd(b.fadd(first, second), b.fadd(third, fourth)))
        return dict(zip(self.pairs, _add_up(b, vectors), strict=True))


# -- the function ------------------------------------------------------------------------------------------------

Totals = dict[tuple[int, int], Any]  # (output, row) of a tile -> its result


class _Call:
    """Inside the function: its arguments, and pointers into them."""

    def __init__(self, builder: Any, arguments: Any, kind: Any):
        self.builder, self.kind = builder, kind
        (self.codes, self.scales, self.block, self.first, self.last, self.columns, self.x, self.across, self.indices,
         self.count, self.results, self.stride) = arguments  # fmt: skip

    def fill(self) -> None:
        """Four outputs at a time, and for these all rows; then the outputs that are left, one by one."""
        b, of_a_tile = self.builder, {types.uint8: self.fp8, types.int8: self.fp4}.get(self.kind, self.wide)
        whole = b.add(self.first, _floor(b, b.sub(self.last, self.first), 4))
        for start, stop, together in ((self.first, whole, 4), (whole, self.last, 1)):
            with _loop(b, start, stop, together) as out:
                done = _WORD(0)
                for rows in (4, 2, 1):
                    ready = b.add(done, _floor(b, b.sub(self.count, done), rows))
                    with _loop(b, done, ready, rows) as m:
                        outputs = min(4 // rows, together)
                        for o in range(0, together, outputs):
                            at = b.add(out, _WORD(o))
                            self.keep(at, m, of_a_tile(at, outputs, self.chosen(m, rows)))
                    done = ready

    def chosen(self, m: Any, rows: int) -> list[Any]:
        """Where the rows of x begin that entries m, m + 1 … of `indices` name."""
        b = self.builder
        places = [b.gep(self.indices, [b.add(m, _WORD(r))]) for r in range(rows)]
        return [b.gep(self.x, [b.mul(b.load(place), self.across)]) for place in places]

    def keep(self, out: Any, m: Any, found: Totals) -> None:
        b = self.builder
        for (o, r), value in found.items():
            row = b.mul(b.add(m, _WORD(r)), self.stride)
            b.store(value, b.gep(self.results, [b.add(row, b.add(b.sub(out, self.first), _WORD(o)))]))

    def part(self, begins: list[Any], starts: list[Any], length: Any) -> Totals:
        """Sums of `length` products of weights from each begin on and numbers from each start on."""
        b, tile = self.builder, _Tile(self.builder, len(begins), len(starts))

        def add(position: Any, each: int, together: int = 1) -> None:
            pieces = [
                _pieces(b, _widened(b, self.kind, b.gep(begin, [position]), together * LANES)) for begin in begins
            ]
            for i in range(together):
                here = b.add(position, _WORD(i * LANES))
                numbers = [_load(b, b.gep(start, [here]), _FLOAT, 4) for start in starts]
                for o, r in tile.pairs:
                    tile.add((o, r), each + i, pieces[o][i], numbers[r])

        whole = _floor(b, length, LANES * SETS)
        with _loop(b, _WORD(0), whole, LANES * SETS) as position:
            self.ask_for_next(begins, position)
            for each in range(0, SETS, 2):  # 32 codes of 8 bits share the instructions that make them float16
                add(b.add(position, _WORD(each * LANES)), each, 2)
        vectors = _floor(b, length, LANES)
        with _loop(b, whole, vectors, LANES) as position:
            add(position, 0)
        totals = {pair: cgutils.alloca_once(b, _FLOAT) for pair in tile.pairs}
        for pair, value in tile.totals().items():
            b.store(value, totals[pair])
        with _loop(b, vectors, length, 1) as position:
            for (o, r), total in totals.items():
                weight = b.extract_element(_widened(b, self.kind, b.gep(begins[o], [position]), 1), _I32(0))
                number = b.load(b.gep(starts[r], [position]))
                b.store(_multiply_add(b, weight, number, b.load(total)), total)
        return {pair: b.load(total) for pair, total in totals.items()}

    def ask_for_next(self, begins: list[Any], position: Any) -> None:
        """Have the lines of the outputs after these fetched meanwhile: what the processor does by itself ends at the
        borders of pages."""
        b = self.builder
        ahead = b.add(position, b.mul(self.columns, _WORD(AHEAD)))
        bytes_of = {types.float32: 4, types.uint16: 2}.get(self.kind, 1)
        for begin in begins:
            for line in range(0, LANES * SETS * bytes_of, 64):
                place = b.gep(begin, [b.add(ahead, _WORD(line // bytes_of))])
                _prefetch(b, place)

    def row(self, out: Any, o: int) -> Any:
        return self.builder.mul(self.builder.add(out, _WORD(o)), self.columns)

    def wide(self, out: Any, outputs: int, starts: list[Any]) -> Totals:
        begins = [self.builder.gep(self.codes, [self.row(out, o)]) for o in range(outputs)]
        return self.part(begins, starts, self.columns)

    def fp8(self, out: Any, outputs: int, starts: list[Any]) -> Totals:
        """Block by block, each sum times its scale."""
        b = self.builder
        by_row = b.icmp_signed("==", self.block, _WORD(0))
        size = b.select(by_row, self.columns, self.block)
        size = b.select(b.icmp_signed("==", size, _WORD(0)), _WORD(1), size)  # a shared expert that is not there
        blocks = b.udiv(b.sub(b.add(self.columns, size), _WORD(1)), size)
        begins = [b.gep(self.codes, [self.row(out, o)]) for o in range(outputs)]
        scales = []
        for o in range(outputs):
            number = b.add(out, _WORD(o))
            scales.append(b.mul(b.select(by_row, number, b.udiv(number, size)), blocks))
        totals = {(o, r): cgutils.alloca_once(b, _FLOAT) for o in range(outputs) for r in range(len(starts))}
        for total in totals.values():
            b.store(_FLOAT(0), total)
        with _loop(b, _WORD(0), blocks, 1) as block:
            first = b.mul(block, size)
            left = b.sub(self.columns, first)
            length = b.select(b.icmp_signed("<", left, size), left, size)
            here, there = ([b.gep(each, [first]) for each in pointers] for pointers in (begins, starts))
            for (o, r), value in self.part(here, there, length).items():
                scale = b.fmul(b.load(b.gep(self.scales, [b.add(scales[o], block)])), _FLOAT(256))
                b.store(_multiply_add(b, value, scale, b.load(totals[o, r])), totals[o, r])
        return {pair: b.load(total) for pair, total in totals.items()}

    def fp4(self, out: Any, outputs: int, starts: list[Any]) -> Totals:
        """Group by group: sixteen bytes with an even and an odd number each."""
        b, tile = self.builder, _Tile(self.builder, outputs, len(starts))
        groups = b.udiv(self.columns, _WORD(GROUP))
        begins = [b.gep(self.codes, [b.udiv(self.row(out, o), _WORD(2))]) for o in range(outputs)]
        scales = [b.gep(self.scales, [b.mul(b.add(out, _WORD(o)), groups)]) for o in range(outputs)]
        even, odd = (ir.Constant(_vector(_I32), list(range(start, GROUP, 2))) for start in (0, 1))
        table = ir.Constant(_vector(_FLOAT), [sign * n for sign in (1.0, -1.0) for n in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])

        def weights(o: int, group: Any) -> tuple[Any, Any]:
            pairs = _load(b, b.gep(begins[o], [b.mul(group, _WORD(GROUP // 2))]), _I8, 1)
            pairs = b.zext(pairs, _vector(_I32))
            scaled = b.fmul(table, _power(b, b.load(b.gep(scales[o], [group]))))
            low = _look_up(b, scaled, b.and_(pairs, _all(15, _I32)))
            return low, _look_up(b, scaled, b.lshr(pairs, _all(4, _I32)))

        def add(group: Any, each: int) -> None:
            found = [weights(o, group) for o in range(outputs)]
            for r, start in enumerate(starts):
                here = b.gep(start, [b.mul(group, _WORD(GROUP))])
                halves = _load(b, here, _FLOAT, 4), _load(b, b.gep(here, [_WORD(LANES)]), _FLOAT, 4)
                evens, odds = (b.shuffle_vector(*halves, mask) for mask in (even, odd))
                for o, (low, high) in enumerate(found):
                    tile.add((o, r), 2 * each, low, evens)
                    tile.add((o, r), 2 * each + 1, high, odds)

        whole = _floor(b, groups, 2)
        with _loop(b, _WORD(0), whole, 2) as group:
            for begin in begins:
                ahead = b.add(b.mul(group, _WORD(GROUP // 2)), b.mul(self.columns, _WORD(AHEAD // 2)))
                _prefetch(b, b.gep(begin, [ahead]))
            add(group, 0)
            add(b.add(group, _WORD(1)), 1)
        with _loop(b, whole, groups, 1) as group:
            add(group, 0)
        return tile.totals()


def _floor(builder: Any, n: Any, step: int) -> Any:
    return builder.mul(builder.udiv(n, _WORD(step)), _WORD(step))


@contextmanager
def _loop(builder: Any, start: Any, stop: Any, step: int) -> Iterator[Any]:
    with cgutils.for_range_slice(builder, start, stop, _WORD(step), _WORD) as (position, _):
        yield position


def _power(builder: Any, byte: Any) -> Any:
    """2 to the power of byte − 127, in every lane; byte 0 stands for a number below the normal ones."""
    bits = builder.shl(builder.zext(byte, _I32), _I32(23))
    bits = builder.select(builder.icmp_unsigned("==", byte, _I8(0)), _I32(0x00400000), bits)
    scalar = builder.bitcast(bits, _FLOAT)
    one = builder.insert_element(ir.Constant(_vector(_FLOAT), ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(one, one, _all(0, _I32))


def _function(module: Any, kind: Any, codes: Any, scales: Any) -> Any:
    """The function in this module, written when it is first asked for."""
    name = f"minglm_products_{kind}"
    if name in module.globals:
        return module.globals[name]
    floats, words = _FLOAT.as_pointer(), _WORD.as_pointer()
    inputs = [codes, scales, *[_WORD] * 4, floats, _WORD, words, _WORD, floats, _WORD]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), inputs), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    _Call(builder, function.args, kind).fill()
    builder.ret_void()
    return function


@intrinsic
def _products(typing, weight, scales, block, first, last, x, indices, count, results):
    def code(context, builder, signature, arguments):
        w, s, numbers, chosen, found = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1, 5, 6, 8)
        )
        width, across, stride = (cgutils.unpack_tuple(builder, a.shape)[1] for a in (w, numbers, found))
        columns = builder.mul(width, _WORD(2)) if weight.dtype == types.int8 else width
        block, first, last, count = (arguments[i] for i in (2, 3, 4, 7))
        function = _function(builder.module, weight.dtype, w.data.type, s.data.type)
        given = (
            w.data,
            s.data,
            block,
            first,
            last,
            columns,
            numbers.data,
            across,
            chosen.data,
            count,
            found.data,
            stride,
        )
        builder.call(function, given)
        return context.get_dummy_value()

    whole = types.intp
    return types.void(weight, scales, whole, whole, whole, x, indices, whole, results), code


# -- what they say -----------------------------------------------------------------------------------------------


@compiled_as(_products)
def products(
    weight: np.ndarray, scales: np.ndarray, block: int, first: int, last: int, x: np.ndarray, indices: np.ndarray,
    count: int, results: np.ndarray,
) -> None:  # fmt: skip
    """results[m, i] = row `first` + i of the weight times row indices[m] of x, for rows below `last` and the first
    `count` indices: a part of `linear`. `weight` and `scales` as `codes_at` and `scales_at` give them; `block`: see
    there. Rows of x may be longer than the weight's, rows of `results` longer than last − first."""
    for out in range(first, last):
        row = _numbers(weight, scales, block, out)
        for m in range(count):
            results[m, out - first] = np.dot(row, x[indices[m], : len(row)])


def _numbers(weight: np.ndarray, scales: np.ndarray, block: int, out: int) -> np.ndarray:
    codes = weight[out]
    if codes.dtype == np.uint8:
        row = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return row * (scales[out, 0] if block == 0 else scales[out // block][np.arange(len(row)) // block])
    if codes.dtype == np.int8:
        halves = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], axis=-1)
        powers = np.ldexp(np.float32(1), scales[out].astype(np.int32) - 127)
        return halves.view(ml_dtypes.float4_e2m1fn).astype(np.float32).reshape(-1) * np.repeat(powers, GROUP)
    return codes.view(ml_dtypes.bfloat16).astype(np.float32) if codes.dtype == np.uint16 else codes


# -- weights at an address ---------------------------------------------------------------------------------------


@intrinsic
def _codes_at(typing, address, rows, columns, like):
    kind = types.Array(like.dtype, 2, "C")

    def code(context, builder, signature, arguments):
        at, m, n, _ = arguments
        n = builder.udiv(n, n.type(2)) if like.dtype == types.int8 else n
        return array_at(kind, context, builder, at, [m, n])

    return kind(types.int64, types.intp, types.intp, like), code


@intrinsic
def _scales_at(typing, address, rows, columns, block, like):
    kind = types.Array(types.uint8 if like.dtype == types.int8 else types.float32, 2, "C")

    def code(context, builder, signature, arguments):
        at, m, n, size, _ = arguments
        one, none = n.type(1), n.type(0)

        def blocks(of: Any) -> Any:
            return builder.udiv(builder.sub(builder.add(of, size), one), size)

        if like.dtype == types.int8:
            shape = [m, builder.udiv(n, n.type(GROUP))]
        elif like.dtype == types.uint8:
            by_row = builder.icmp_signed("==", size, none)
            size = builder.select(by_row, one, size)
            shape = [blocks(m), builder.select(by_row, one, blocks(n))]
        else:
            shape = [none, none]
        return array_at(kind, context, builder, at, shape)

    return kind(types.int64, types.intp, types.intp, types.intp, like), code


@compiled_as(_codes_at)
def codes_at(address: int, rows: int, columns: int, like: np.ndarray) -> np.ndarray:
    """The codes of a weight [rows, columns] at an address, of the dtype of `like`."""
    return matrix(address, rows, columns // 2 if like.dtype == np.int8 else columns, like)


@compiled_as(_scales_at)
def scales_at(address: int, rows: int, columns: int, block: int, like: np.ndarray) -> np.ndarray:
    """Its scales: float32 [rows, 1], or one for each `block` of rows and columns; bytes [rows, columns / 32]; or
    nothing."""
    if like.dtype == np.int8:
        return matrix(address, rows, columns // GROUP, np.zeros(0, np.uint8))
    if like.dtype != np.uint8:
        return np.zeros((0, 0), np.float32)
    shape = (rows, 1) if block == 0 else (-(-rows // block), -(-columns // block))
    return matrix(address, *shape, np.zeros(0, np.float32))
