"""What kernels need of the machine and Numba does not offer: atomic integers, arrays at an address, bfloat16.

Each function is there twice: as plain Python, which says what it does and runs when the JIT is off (then there is one
thread, and atomic means nothing), and above it as the instructions that the compiler puts in its place. To understand
the kernels the plain ones, and the docstrings of `publish` and `call_published`, are enough.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

_WORD = ir.IntType(64)
ARGUMENTS = 8192  # bytes that a kernel's arguments take at most


def compiled_as(instructions: Any) -> Callable[[Callable[..., Any]], Any]:
    """The decorated function, or with the JIT on the instructions that stand for it."""
    return lambda plain: plain if config.DISABLE_JIT else instructions


# -- integers that several threads change ------------------------------------------------------------------------


def _pointer(context, builder, signature, arguments):
    """The address of words[i], the first two arguments."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@intrinsic
def _load(typing, words, i):
    def code(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(context, builder, signature, arguments), "seq_cst", 8)

    return types.int64(words, types.intp), code


@intrinsic
def _fetch_add(typing, words, i, value):
    def code(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _pointer(context, builder, signature, arguments), arguments[2], "seq_cst")

    return types.int64(words, types.intp, types.int64), code


@intrinsic
def _swap_if(typing, words, i, expected, value):
    def code(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature, arguments)
        return builder.extract_value(builder.cmpxchg(pointer, arguments[2], arguments[3], "seq_cst"), 1)

    return types.boolean(words, types.intp, types.int64, types.int64), code


@intrinsic
def _give_way(typing):
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"

    def code(context, builder, signature, arguments):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), name)
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), code


@compiled_as(_load)
def load(words: np.ndarray, i: int) -> int:
    """words[i] as other threads have just left it. `words` is an int64 array, in all of these."""
    return int(words[i])


@compiled_as(_fetch_add)
def fetch_add(words: np.ndarray, i: int, value: int) -> int:
    """Add to words[i] in one indivisible step; returns what was there before."""
    before = int(words[i])
    words[i] += value
    return before


@compiled_as(_swap_if)
def swap_if(words: np.ndarray, i: int, expected: int, value: int) -> bool:
    """Set words[i] to `value` if it is `expected`, in one indivisible step; returns whether it was."""
    if words[i] != expected:
        return False
    words[i] = value
    return True


@compiled_as(_give_way)
def give_way() -> None:
    """Let another thread that waits for this processor run."""


# -- calling a kernel in other threads ---------------------------------------------------------------------------


@intrinsic
def publish(typing, words, at, kernel, arguments, place):
    """Make kernel(rank, threads, *arguments) callable for other threads: words[at] gets the address of a function
    that does it, words[at + 1] that of the arguments, which are written to `place`, an array of bytes. Who calls keeps
    that, and the arrays among the arguments. The first argument is `words` too: should the kernel raise an error,
    words[1] gets 1."""
    typing.resolve_function_type(kernel, (types.int64, types.int64, *arguments.types), {})
    compiled = kernel.dispatcher.overloads[(types.int64, types.int64, *arguments.types)]

    def code(context, builder, signature, values):
        packed = context.get_value_type(arguments)
        kind = ir.FunctionType(ir.VoidType(), [_WORD, _WORD, _WORD])
        name = f"part_of_{compiled.fndesc.llvm_func_name}"
        function = ir.Function(builder.module, kind, name)
        function.linkage = "internal"
        function.attributes.add("noinline")  # a copy for one thread might sum in another order
        rank, threads, address = function.args
        inside = ir.IRBuilder(function.append_basic_block())
        each = cgutils.unpack_tuple(inside, inside.load(inside.inttoptr(address, packed.as_pointer()), typ=packed))
        callee = context.declare_function(builder.module, compiled.fndesc)
        context.active_code_library.add_linking_library(compiled.library)
        status, _ = context.call_conv.call_function(
            inside, callee, compiled.fndesc.restype, compiled.fndesc.argtypes, [rank, threads, *each]
        )
        with inside.if_then(status.is_error):
            shared = context.make_array(arguments.types[0])(context, inside, each[0])
            inside.store(ir.Constant(_WORD, 1), inside.gep(shared.data, [ir.Constant(_WORD, 1)]))
        inside.ret_void()
        if context.get_abi_sizeof(packed) > ARGUMENTS:
            raise TypeError(f"the arguments of {name} take more than {ARGUMENTS} bytes")
        room = context.make_array(signature.args[4])(context, builder, values[4])
        target = builder.bitcast(room.data, packed.as_pointer())
        builder.store(values[3], target)
        array = context.make_array(signature.args[0])(context, builder, values[0])
        for offset, pointer in enumerate((function, target)):
            index = builder.add(values[1], ir.Constant(_WORD, offset))
            builder.store(builder.ptrtoint(pointer, _WORD), builder.gep(array.data, [index]))
        return context.get_dummy_value()

    return types.void(words, types.intp, kernel, arguments, place), code


@intrinsic
def call_published(typing, function, rank, threads, arguments):
    """Call what `publish` wrote."""
    kind = ir.FunctionType(ir.VoidType(), [_WORD, _WORD, _WORD])

    def code(context, builder, signature, values):
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), code


# -- arrays that are somewhere in memory -------------------------------------------------------------------------


def array_at(kind, context, builder, address, lengths):
    array = context.make_array(kind)(context, builder)
    size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    strides = [size]
    for length in reversed(lengths[1:]):
        strides.insert(0, builder.mul(strides[0], length))
    data = builder.inttoptr(address, array.data.type)
    populate_array(array, data, lengths, strides, size, meminfo=None)
    return array._getvalue()


@intrinsic
def _vector(typing, address, n):
    kind = types.Array(types.float32, 1, "C")

    def code(context, builder, signature, arguments):
        return array_at(kind, context, builder, arguments[0], arguments[1:])

    return kind(types.int64, types.intp), code


@intrinsic
def _matrix(typing, address, rows, columns, like):
    kind = types.Array(like.dtype, 2, "C")

    def code(context, builder, signature, arguments):
        return array_at(kind, context, builder, arguments[0], arguments[1:3])

    return kind(types.int64, types.intp, types.intp, like), code


@compiled_as(_vector)
def vector(address: int, n: int) -> np.ndarray:
    """The float32 [n] at an address. Whoever gives addresses to a kernel keeps their arrays alive."""
    return np.ctypeslib.as_array((ctypes.c_float * int(n)).from_address(int(address)))


@compiled_as(_matrix)
def matrix(address: int, rows: int, columns: int, like: np.ndarray) -> np.ndarray:
    """The contiguous [rows, columns] at an address, of the dtype of `like`."""
    kind: Any = np.ctypeslib.as_ctypes_type(like.dtype)
    return np.ctypeslib.as_array((kind * int(rows * columns)).from_address(int(address))).reshape(rows, columns)


# -- bfloat16 ----------------------------------------------------------------------------------------------------


@intrinsic
def _widen(typing, value):
    def code(context, builder, signature, arguments):
        if value == types.float32:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), code


@compiled_as(_widen)
def widen(value: Any) -> np.float32:
    """A weight as float32: itself, or the bfloat16 whose bits a uint16 holds (the upper half of a float32's)."""
    return (np.uint32(value) << np.uint32(16)).view(np.float32) if isinstance(value, np.uint16) else value
