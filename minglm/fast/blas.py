"""Matrix products inside kernels: SciPy's BLAS, called at its address.

Kernels cut the work into pieces and each piece is one product on one thread, because then products of all sizes run at
the same time, and their bits do not depend on the number of threads. So the library's own threads are switched off
while kernels use it.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minglm.fast.machine import compiled_as

_INT, _WORD, _BYTE, _FLOAT = ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.FloatType()


@functools.cache
def sgemm() -> int:
    """The address of BLAS's single-precision matrix product, as Fortran calls it."""
    from scipy.linalg import cython_blas

    capsule = cython_blas.__pyx_capi__["sgemm"]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    name = api.PyCapsule_GetName(capsule)
    if name.count(b"int *") != 6:
        raise ValueError(f"this SciPy's matrix product has another signature, {name.decode()}; use engine='numpy'")
    return int(api.PyCapsule_GetPointer(capsule, name))


@functools.cache
def _libraries() -> list[Any]:
    from threadpoolctl import ThreadpoolController

    sgemm()  # loads SciPy's library
    return [lib for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]


_guard = threading.Lock()
_inside = 0  # how many are within `one_thread_each`, on whatever thread
_changed: list[tuple[Any, int]] = []


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within: a matrix product runs on the thread that asks for it. The first in changes the libraries' settings, the
    last out restores them."""
    global _inside, _changed
    with _guard:
        if _inside == 0:
            _changed = [(lib, count) for lib in _libraries() if (count := lib.num_threads) != 1]
            for lib, _ in _changed:
                _set_threads(lib, 1)
        _inside += 1
    try:
        yield
    finally:
        with _guard:
            _inside -= 1
            if _inside == 0:
                for lib, count in _changed:
                    _set_threads(lib, count)


def _set_threads(library: Any, count: int) -> None:
    """On whatever thread: threadpoolctl 3.8 heeds the first one that sets a count, and silently no other."""
    let_go = getattr(library, "clear_controlling_thread", lambda force: None)
    let_go(force=True)
    library.set_num_threads(count)
    let_go(force=True)


def _after_fork() -> None:
    """The child's only thread is within nothing, whatever the parent's others were doing."""
    global _guard, _inside
    _guard, _inside = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@intrinsic
def _address(typing, array):
    def code(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, _WORD)

    return types.int64(array), code


@compiled_as(_address)
def address(array: np.ndarray) -> int:
    """Where an array's numbers begin."""
    return array.ctypes.data


@intrinsic
def _product(typing, blas, turn_a, turn_b, m, n, k, scale, a, a_row, b, b_row, keep, c, c_row):
    def code(context, builder, signature, arguments):
        blas, turn_a, turn_b, m, n, k, scale, a, a_row, b, b_row, keep, c, c_row = arguments

        def place(value, kind):
            return cgutils.alloca_once_value(builder, builder.trunc(value, kind) if kind is _INT else value)

        def letter(turned):  # "N" or "T"
            chosen = builder.select(turned, ir.Constant(_BYTE, ord("T")), ir.Constant(_BYTE, ord("N")))
            return cgutils.alloca_once_value(builder, chosen)

        pointers = [
            letter(turn_b), letter(turn_a), place(n, _INT), place(m, _INT), place(k, _INT), place(scale, _FLOAT),
            builder.inttoptr(b, _FLOAT.as_pointer()), place(b_row, _INT),
            builder.inttoptr(a, _FLOAT.as_pointer()), place(a_row, _INT),
            place(keep, _FLOAT), builder.inttoptr(c, _FLOAT.as_pointer()), place(c_row, _INT),
        ]  # fmt: skip
        kind = ir.FunctionType(ir.VoidType(), [p.type for p in pointers])
        builder.call(builder.inttoptr(blas, kind.as_pointer()), pointers)
        return context.get_dummy_value()

    whole, truth, number = types.int64, types.boolean, types.float32
    kinds = [whole, truth, truth, whole, whole, whole, number, whole, whole, whole, whole, number, whole, whole]
    return types.void(*kinds), code


@compiled_as(_product)
def product(
    blas: int,
    turn_a: bool,
    turn_b: bool,
    m: int,
    n: int,
    k: int,
    scale: Any,
    a: int,
    a_row: int,
    b: int,
    b_row: int,
    keep: Any,
    c: int,
    c_row: int,
) -> None:
    """C [m, n] = scale · A B + keep · C, with A [m, k] and B [k, n], or turned: stored as [k, m] and [n, k].

    a, b, c are addresses of float32 numbers, a_row … the steps from row to row. (BLAS stores columns one after the
    other: it is given the turned problem, Cᵀ = Bᵀ Aᵀ.)
    """

    def view(at: int, rows: int, columns: int, step: int) -> np.ndarray:
        flat = np.ctypeslib.as_array((ctypes.c_float * int((rows - 1) * step + columns)).from_address(int(at)))
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), (4 * step, 4))

    left = view(a, k, m, a_row).T if turn_a else view(a, m, k, a_row)
    right = view(b, n, k, b_row).T if turn_b else view(b, k, n, b_row)
    out = view(c, m, n, c_row)
    result = np.float32(scale) * (left @ right)
    out[...] = result + np.float32(keep) * out if keep else result
