"""Muon's step: five rounds of a polynomial bring a gradient's singular values near 1, then a length."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Mistake, one
from minglm.model.ops import Array

_QUINTIC, _CUBIC = (3.4445, -4.7750, 2.0315), (1.5, -0.5, 0.0)


def reference(
    x: Array,  # [.., rows, cols]
    *,
    divide: str = "frobenius",  # by which size first, or "nothing", "max", "rows", "spectral"
    square: str = "product",  # A², or "elementwise"
    polynomial: tuple[float, float, float] = _QUINTIC,
    steps: int = 5,
    instead: str = "",  # of the rounds: "svd", "sign", "frobenius"
    matrices: str = "each",  # or "stacked": one matrix of all rows
    length: str = "max",  # 0.2 · √max(rows, cols), or "min", "keller", "none"
    back: bool = True,  # turned back if it was turned
) -> Array:
    """All flags at their defaults: `minglm.train.muon.newton_schulz` · `step_length`."""
    rows, cols = x.shape[-2:]
    stack = x.reshape(-1, cols) if matrices == "stacked" else x
    tall = stack.shape[-2] > stack.shape[-1]
    y = stack.mT if tall else stack
    y = y / np.maximum(_size(y, divide), 1e-7).astype(x.dtype)
    if instead == "svd":
        u, _, vt = np.linalg.svd(y, full_matrices=False)
        y = u @ vt
    elif instead == "sign":
        y = np.sign(y)
    elif not instead:
        a, b, c = polynomial
        for _ in range(steps):
            gram = y @ y.mT
            y = a * y + (b * gram + c * (gram * gram if square == "elementwise" else gram @ gram)) @ y
    y = y.mT if tall and back else y
    y = y.reshape(x.shape) if matrices == "stacked" and back else y
    longs: dict[str, float] = {
        "max": 0.2 * max(rows, cols) ** 0.5, "min": 0.2 * min(rows, cols) ** 0.5,
        "keller": max(1, rows / cols) ** 0.5, "none": 1.0,
    }  # fmt: skip
    return y * longs[length]


def _size(y: Array, divide: str) -> Any:
    if divide == "nothing":
        return np.ones(())
    if divide == "max":
        return np.abs(y).max(axis=(-2, -1), keepdims=True)
    if divide == "rows":
        return np.linalg.norm(y, axis=-1, keepdims=True)
    return np.linalg.norm(y, ord="fro" if divide == "frobenius" else 2, axis=(-2, -1), keepdims=True)


def cases(draw: int = 0) -> Sequence[Case]:
    """Stacks of two matrices, one ten times smaller, with very different singular values (all below 1, so that nothing
    overflows where the division is forgotten)."""
    rng = default_rng([11, draw])

    def inputs(rows: int, cols: int) -> tuple[Array]:
        x = 0.02 * rng.standard_normal((2, rows, cols))
        diagonal = np.arange(min(rows, cols))
        x[:, diagonal, diagonal] += 0.8 * np.logspace(0, -2, len(diagonal))
        return (x * np.array([1, 0.1])[:, None, None],)

    made = [Case("tall", inputs(12, 5)) for _ in range(3)]
    spread = np.diag([1.0, 0.1, 0.01, 0.001])
    return [
        *made,
        Case("wide", inputs(4, 9)),
        Case("one square matrix", (spread,)),
        Case("a gradient of zero", (np.zeros((3, 2)),)),
    ]


EXERCISE = Exercise(
    name="orthogonalise",
    minutes=30,
    brief="orthogonalise(x [.., rows, cols]) -> the same shape. Divide each matrix by its Frobenius norm (at least "
    "1e-7), five times x ← a·x + (b·A + c·A²)·x with A = x·xᵀ and (a, b, c) = (3.4445, −4.7750, 2.0315) on the side "
    "where A is small, times 0.2 · √max(rows, cols). Notebook 11; arXiv 2502.16982.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("no_norm", {"divide": "nothing"}, "the matrix is not divided by its norm first"),
        Mistake("max_norm", {"divide": "max"}, "the matrix is divided by its largest entry"),
        Mistake("row_norm", {"divide": "rows"}, "every row of the turned matrix is divided by a norm of its own"),
        Mistake("spectral_norm", {"divide": "spectral"}, "the matrix is divided by its largest singular value"),
        Mistake("elementwise_square", {"square": "elementwise"}, "A² is taken entry by entry, not as a product"),
        Mistake("cubic", {"polynomial": _CUBIC}, "the coefficients are those of the cubic, 1.5 and −0.5"),
        Mistake("exact_svd", {"instead": "svd"}, "all singular values are exactly 1: cleaner than the recipe"),
        Mistake("one_step", {"steps": 1}, "there is one round instead of five"),
        Mistake("ten_steps", {"steps": 10}, "there are ten rounds instead of five"),
        Mistake("flat_experts", {"matrices": "stacked"}, "all matrices of the stack are treated as one"),
        Mistake("scale_min", {"length": "min"}, "the length is taken from the shorter side"),
        Mistake("keller", {"length": "keller"}, "the length is √max(1, rows/cols), Keller Jordan's, without the 0.2"),
        Mistake("no_scale", {"length": "none"}, "the length, 0.2 · √max(rows, cols), is missing"),
        Mistake("no_transpose_back", {"back": False}, "a tall matrix was turned and not turned back"),
        Mistake("sign", {"instead": "sign"}, "only the signs of the entries are left"),
        Mistake("frobenius_only", {"instead": "frobenius"}, "the matrix is divided by its norm, and that is all"),
    ),
    designs=(
        Design("cubic", {"polynomial": _CUBIC}, "The coefficients are (a, b, c) = (1.5, −0.5, 0)."),
        Design("ten_steps", {"steps": 10}, "There are ten rounds."),
        Design("keller", {"length": "keller"}, "The length is √max(1, rows / cols)."),
        Design(
            "spectral_norm",
            {"divide": "spectral"},
            "Divide by the largest singular value instead of the Frobenius norm.",
        ),
    ),
    axes={"update": ".. rows cols"},
    outputs=one("update"),
    tolerance=1e-5,  # where the 1e-7 stands is free
)
