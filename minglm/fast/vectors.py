"""A row of a weight times several rows of numbers at once, written for vector registers.

Reading weights is what a decoding step spends its time on, so a weight that is read serves every row that is there,
and weights of 16, 8 and 4 bits become float32 only in a register. Sixteen products at a time go into sixteen running
sums (four sets of them in turn, so that a sum need not wait for the one before), and these are added up in one fixed
order, which depends on nothing but the length: a row's bits are the same whether it comes alone or with others. A
compiler left to itself chooses another order in each place, so the instructions are written out here.

What they say is in the plain Python functions (`dots`, and `codes_at` and `scales_at` at the end), which run when the
JIT is off.
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


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FUSE), c, flags=_FUSE)


def _add_up(builder: Any, vector: Any) -> Any:
    """The sum of all lanes: halves onto halves."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low, high = (
            builder.shuffle_vector(vector, vector, ir.Constant(_vector(_I32, lanes), list(range(start, start + lanes))))
            for start in (0, lanes)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, _I32(0))


class _Sums:
    """Running sums for each row of x: variables that the compiler keeps in registers."""

    def __init__(self, builder: Any, rows: int, sets: int):
        self._builder = builder
        zero = _all(0, _FLOAT)
        self.places = [[cgutils.alloca_once_value(builder, zero) for _ in range(sets)] for _ in range(rows)]
        for row in self.places:
            for place in row:
                builder.store(zero, place)

    def add(self, row: int, each: int, a: Any, b: Any) -> None:
        place = self.places[row][each]
        self._builder.store(_multiply_add(self._builder, a, b, self._builder.load(place)), place)

    def total(self, row: int) -> Any:
        vectors = [self._builder.load(place) for place in self.places[row]]
        while len(vectors) > 1:
            vectors = [self._builder.fadd(*pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
        return _add_up(self._builder, vectors[0])


class _Call:
    """Inside the function: its arguments, and pointers into them."""

    def __init__(self, builder: Any, arguments: Any, kind: Any):
        self.builder, self.kind = builder, kind
        (self.codes, self.scales, self.block, self.out, self.columns, self.x, self.across, self.indices, self.count,
         self.results) = arguments  # fmt: skip

    def chosen(self, m: Any, rows: int) -> list[Any]:
        """Where the rows of x begin that entries m, m + 1 … of `indices` name."""
        b = self.builder
        places = [b.gep(self.indices, [b.add(m, _WORD(r))]) for r in range(rows)]
        return [b.gep(self.x, [b.mul(b.load(place), self.across)]) for place in places]

    def part(self, begin: Any, starts: list[Any], length: Any) -> list[Any]:
        """For each row the sum of `length` products of weights from `begin` on and numbers from its start on."""
        b, sums = self.builder, _Sums(self.builder, len(starts), SETS)

        def add(position: Any, each: int) -> None:
            weights = _widened(b, self.kind, b.gep(begin, [position]))
            for r, start in enumerate(starts):
                sums.add(r, each, weights, _load(b, b.gep(start, [position]), _FLOAT, 4))

        whole = _floor(b, length, LANES * SETS)
        with _loop(b, _WORD(0), whole, LANES * SETS) as position:
            for each in range(SETS):
                add(b.add(position, _WORD(each * LANES)), each)
        vectors = _floor(b, length, LANES)
        with _loop(b, whole, vectors, LANES) as position:
            add(position, 0)
        totals = [cgutils.alloca_once(b, _FLOAT) for _ in starts]
        for r, total in enumerate(totals):
            b.store(sums.total(r), total)
        with _loop(b, vectors, length, 1) as position:
            one = b.extract_element(_widened(b, self.kind, b.gep(begin, [position]), 1), _I32(0))
            for start, total in zip(starts, totals, strict=True):
                number = b.load(b.gep(start, [position]))
                b.store(_multiply_add(b, one, number, b.load(total)), total)
        return [b.load(total) for total in totals]

    def wide(self, starts: list[Any]) -> list[Any]:
        begin = self.builder.gep(self.codes, [self.builder.mul(self.out, self.columns)])
        return self.part(begin, starts, self.columns)

    def fp8(self, starts: list[Any]) -> list[Any]:
        """Block by block, each sum times its scale."""
        b = self.builder
        by_row = b.icmp_signed("==", self.block, _WORD(0))
        size = b.select(by_row, self.columns, self.block)
        blocks = b.udiv(b.sub(b.add(self.columns, size), _WORD(1)), size)
        row = b.mul(b.select(by_row, self.out, b.udiv(self.out, size)), blocks)
        begin = b.gep(self.codes, [b.mul(self.out, self.columns)])
        totals = [cgutils.alloca_once(b, _FLOAT) for _ in starts]
        for total in totals:
            b.store(_FLOAT(0), total)
        with _loop(b, _WORD(0), blocks, 1) as block:
            first = b.mul(block, size)
            left = b.sub(self.columns, first)
            length = b.select(b.icmp_signed("<", left, size), left, size)
            found = self.part(b.gep(begin, [first]), [b.gep(start, [first]) for start in starts], length)
            scale = b.fmul(b.load(b.gep(self.scales, [b.add(row, block)])), _FLOAT(256))
            for total, value in zip(totals, found, strict=True):
                b.store(_multiply_add(b, value, scale, b.load(total)), total)
        return [b.load(total) for total in totals]

    def fp4(self, starts: list[Any]) -> list[Any]:
        """Group by group: sixteen bytes with an even and an odd number each."""
        b, sums = self.builder, _Sums(self.builder, len(starts), SETS)
        groups = b.udiv(self.columns, _WORD(GROUP))
        begin = b.gep(self.codes, [b.udiv(b.mul(self.out, self.columns), _WORD(2))])
        scales = b.gep(self.scales, [b.mul(self.out, groups)])
        even, odd = (ir.Constant(_vector(_I32), list(range(start, GROUP, 2))) for start in (0, 1))

        table = ir.Constant(_vector(_FLOAT), [sign * n for sign in (1.0, -1.0) for n in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])

        def add(group: Any, each: int) -> None:
            pairs = _load(b, b.gep(begin, [b.mul(group, _WORD(GROUP // 2))]), _I8, 1)
            pairs = b.zext(pairs, _vector(_I32))
            scaled = b.fmul(table, _power(b, b.load(b.gep(scales, [group]))))
            low = _look_up(b, scaled, b.and_(pairs, _all(15, _I32)))
            high = _look_up(b, scaled, b.lshr(pairs, _all(4, _I32)))
            for r, start in enumerate(starts):
                here = b.gep(start, [b.mul(group, _WORD(GROUP))])
                halves = _load(b, here, _FLOAT, 4), _load(b, b.gep(here, [_WORD(LANES)]), _FLOAT, 4)
                evens, odds = (b.shuffle_vector(*halves, mask) for mask in (even, odd))
                sums.add(r, 2 * each, low, evens)
                sums.add(r, 2 * each + 1, high, odds)

        whole = _floor(b, groups, 2)
        with _loop(b, _WORD(0), whole, 2) as group:
            add(group, 0)
            add(b.add(group, _WORD(1)), 1)
        with _loop(b, whole, groups, 1) as group:
            add(group, 0)
        return [sums.total(r) for r in range(len(starts))]


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
    name = f"minglm_dots_{kind}"
    if name in module.globals:
        return module.globals[name]
    pointer = _FLOAT.as_pointer()
    inputs = [codes, scales, _WORD, _WORD, _WORD, pointer, _WORD, _WORD.as_pointer(), _WORD, pointer]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), inputs), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    call = _Call(builder, function.args, kind)
    row = {types.uint8: call.fp8, types.int8: call.fp4}.get(kind, call.wide)
    done = _WORD(0)
    for rows in (4, 2, 1):
        ready = builder.add(done, _floor(builder, builder.sub(call.count, done), rows))
        with _loop(builder, done, ready, rows) as m:
            for r, found in enumerate(row(call.chosen(m, rows))):
                builder.store(found, builder.gep(call.results, [builder.add(m, _WORD(r))]))
        done = ready
    builder.ret_void()
    return function


@intrinsic
def _dots(typing, weight, scales, block, out, x, indices, count, results):
    def code(context, builder, signature, arguments):
        w, s, numbers, chosen, found = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1, 4, 5, 7)
        )
        width, across = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (w, numbers))
        columns = builder.mul(width, _WORD(2)) if weight.dtype == types.int8 else width
        function = _function(builder.module, weight.dtype, w.data.type, s.data.type)
        builder.call(
            function,
            [w.data, s.data, arguments[2], arguments[3], columns, numbers.data, across, chosen.data, arguments[6],
             found.data],
        )  # fmt: skip
        return context.get_dummy_value()

    whole = types.intp
    return types.void(weight, scales, whole, whole, x, indices, whole, results), code


# -- what they say -----------------------------------------------------------------------------------------------


@compiled_as(_dots)
def dots(
    weight: np.ndarray, scales: np.ndarray, block: int, out: int, x: np.ndarray, indices: np.ndarray, count: int,
    results: np.ndarray,
) -> None:  # fmt: skip
    """results[m] = row `out` of the weight times row indices[m] of x, for the first `count` of these: `linear` for one
    output. `weight` and `scales` as `codes_at` and `scales_at` give them; `block`: see there. Rows of x may be longer
    than the weight's."""
    row = _numbers(weight, scales, block, out)
    for m in range(count):
        results[m] = np.dot(row, x[indices[m], : len(row)])


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
