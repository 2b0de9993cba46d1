"""Rows of weights times rows of numbers: every way to store weights, and bits that depend on nothing but the row."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from minglm.fast.jit import kernel
from minglm.fast.vectors import codes_at, products, scales_at
from minglm.formats.smallfloats import SmallFloats
from minglm.model import ops
from tests.helpers import random_state

F32 = np.float32
CODES = {"float32": F32, "bfloat16": np.uint16, "fp8": np.uint8, "fp8-block": np.uint8, "mxfp4": np.int8}
SIZES = [(1, 1), (3, 7), (2, 16), (5, 31), (4, 64), (3, 75), (2, 130), (130, 96), (3, 257), (2, 1000), (300, 160)]


@kernel
def all_products(weight_at, scales_there, rows, columns, block, like, x, indices, room, into):
    weight = codes_at(weight_at, rows, columns, like)
    scales = scales_at(scales_there, rows, columns, block, like)
    for first in range(0, rows, room.shape[1]):
        last = min(first + room.shape[1], rows)
        products(weight, scales, block, first, last, x, indices, len(indices), room)
        for m in range(len(indices)):
            for i in range(first, last):
                into[m, i] = room[m, i - first]


def numbers(seed, *shape):
    return random_state(seed).standard_normal(shape).astype(F32)


def stored(kind, weight):
    """What stands for a weight, codes and scales, and the numbers that these mean."""
    if kind == "float32":
        return weight, np.zeros(1, F32), weight
    if kind == "bfloat16":
        narrow = weight.astype(ml_dtypes.bfloat16)
        return narrow.view(np.uint16), np.zeros(1, F32), narrow.astype(F32)
    small = SmallFloats.of(kind, weight)
    return small.codes, small.scales, small.astype(F32)


def product(kind, codes, scales, shape, x, indices, together=64):
    """[indices, out], so many outputs in one go."""
    into, room = np.full((len(indices), shape[0]), 99, F32), np.full((len(indices), together), 99, F32)
    block = 128 if kind == "fp8-block" else 0
    like = np.zeros(0, CODES[kind])
    all_products(codes.ctypes.data, scales.ctypes.data, *shape, block, like, x, np.array(indices), room, into)
    return into


CASES = [
    pytest.param(kind, shape, id=f"{kind}-{shape[0]}x{shape[1]}")
    for kind, shape in itertools.product(CODES, SIZES)
    if kind != "mxfp4" or shape[1] % 32 == 0
]


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_products_are_linear(kind, shape):
    weight, x = numbers(0, *shape) * np.exp(numbers(1, shape[0], 1)), numbers(2, 6, shape[1] + 3)
    codes, scales, meant = stored(kind, weight)
    for indices in ([4], [5, 0], [1, 2, 3], [0, 5, 4, 2, 1, 3, 3]):
        part = x[indices, : shape[1]]
        scale = np.abs(part) @ np.abs(meant).T
        found = product(kind, codes, scales, shape, x, indices)
        assert (np.abs(found - ops.linear(part.astype(np.float64), meant.astype(np.float64))) <= 1e-6 * scale).all()


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_a_row_s_bits_do_not_depend_on_its_company(kind, shape):
    codes, scales, _ = stored(kind, numbers(0, *shape))
    x = numbers(2, 9, shape[1])
    alone = np.concatenate([product(kind, codes, scales, shape, x, [n]) for n in range(9)])
    for indices in ([0, 1], [8, 7, 6], [1, 3, 5, 7], list(range(9)), [2] * 5):
        for together in (1, 3, 64):
            assert np.array_equal(product(kind, codes, scales, shape, x, indices, together), alone[indices])


@pytest.mark.parametrize("size", [1, 7, 31, 64, 130, 1000])
def test_whole_numbers_come_out_exactly(size):
    """No sum rounds, in whatever order: equal to the bit."""
    random = random_state(size)
    x = random.randint(-8, 9, (3, size)).astype(F32)
    weight = random.randint(-128, 129, (4, size)).astype(F32)
    for kind in ("float32", "bfloat16"):
        codes, scales, _ = stored(kind, weight)
        assert np.array_equal(product(kind, codes, scales, (4, size), x, [0, 1, 2]), x @ weight.T)


def test_every_code_of_fp8_is_read_right():
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8).reshape(1, -1)  # all but the two NaNs
    meant = codes.view(ml_dtypes.float8_e4m3fn).astype(F32)
    scales = np.array([[0.37]], F32)
    for i in range(codes.shape[1]):
        x = np.zeros((1, codes.shape[1]), F32)
        x[0, i] = 1
        assert product("fp8", codes, scales, codes.shape, x, [0])[0, 0] == meant[0, i] * scales[0, 0]


@pytest.mark.parametrize("power", [0, 1, 100, 127, 154, 252])
def test_every_code_of_mxfp4_is_read_right_under_every_scale(power):
    codes = np.arange(16, dtype=np.uint8).reshape(1, 16) * 17  # both halves of a byte alike
    scales = np.array([[power]], np.uint8)
    meant = SmallFloats("mxfp4", codes, scales).astype(np.float64)[0]
    assert set(np.abs(meant) / 2.0 ** (power - 127)) == {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    for i in range(32):
        x = np.zeros((1, 32), F32)
        x[0, i] = 1
        assert product("mxfp4", codes, scales, (1, 32), x, [0])[0, 0] == F32(meant[i])


def test_nan_and_infinity_pass_through():
    weight, x = numbers(0, 2, 40), numbers(1, 2, 40)
    x[0, 17], x[1, 39] = np.nan, np.inf
    codes, scales, _ = stored("float32", weight)
    found = product("float32", codes, scales, (2, 40), x, [0, 1])
    assert np.isnan(found[0]).all()
    assert np.isinf(found[1]).all()
