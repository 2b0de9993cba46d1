"""FP8 (e4m3fn): a sign, four bits of exponent, three of mantissa; no infinity, 448 is the largest, one NaN a sign."""

from collections.abc import Sequence

import ml_dtypes
import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Mistake, one
from minglm.model.ops import Array

_TELLING = [
    0.0, -0.0, 1, 1.0625, 1.1875, 1.0629883, 1.9375, 1.96875, 240, 248, 250, 300, 447, 448, 460, 500, -1000,
    2**-6, 2**-7, 2**-9, 1.5 * 2**-9, 2**-10, 0.7 * 2**-9,
]  # fmt: skip


def reference(
    x: Array,  # float32 [n], finite
    *,
    top: float = 448,  # the largest number, or 240
    rounding: str = "nearest even",  # or "down", "half away"
    carry: str = "up",  # a mantissa that rounds up to 2, or "lost", "clamped"
    low: str = "subnormal",  # below 2⁻⁶, or "zero"
    step: int = -9,  # power of two between neighbours there
    over: str = "top",  # beyond the largest, or "NaN", "wraps"
    bias: int = 7,  # of the exponent
    first: str = "",  # rounded to "bfloat16" before
    minus: str = "bit",  # taken from the sign bit, or "below zero"
) -> Array:  # uint8 [n]
    """All flags at their defaults: `ml_dtypes.float8_e4m3fn` of x clipped to ±448."""
    x = x.astype(ml_dtypes.bfloat16) if first else x
    size = np.abs(x.astype(np.float64))
    clipped = np.minimum(size, top) if over == "top" else size
    lowest = 1 - bias
    exponent = np.maximum(np.frexp(np.maximum(clipped, 1e-9))[1] - 1, lowest)  # clipped = 1.… · 2^exponent
    small = clipped < 2.0**lowest
    quanta = clipped / np.where(small & (step != -9), 2.0**step, 2.0 ** (exponent - 3))
    whole = (
        np.rint(quanta) if rounding == "nearest even" else np.floor(quanta + (0.5 if rounding == "half away" else 0))
    )
    if carry != "up":
        whole = np.where((whole == 16) & ~small, 8 if carry == "lost" else 15, whole)
    code = (exponent - lowest) * 8 + whole.astype(np.int64)  # the carry and the step to subnormals come by themselves
    code = np.where(small & (low == "zero"), 0, code)
    code = np.where((size > 464) & (over == "NaN"), 127, code) & 127
    return np.where(np.signbit(x) if minus == "bit" else x < 0, code | 128, code).astype(np.uint8)


def cases(draw: int = 0) -> Sequence[Case]:
    """Ties, carries, both ends, both zeros, in every case; every finite code; every middle between two neighbours."""
    rng = default_rng([12, draw])
    finite = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    made = []
    for _ in range(3):
        more = rng.standard_normal(40) * np.exp2(rng.integers(-9, 9, 40))
        made.append(Case("values", (rng.permutation(np.concatenate([_TELLING, more])).astype(np.float32),)))
    return [
        *made,
        Case("every number of the format comes back", (np.concatenate([finite, -finite]),)),
        Case("every middle between neighbours", ((finite[1:] + finite[:-1]) / 2,)),
    ]


EXERCISE = Exercise(
    name="fp8_encode",
    minutes=30,
    brief="fp8_encode(x float32 [n], finite) -> uint8 [n]. Bits: sign, four of exponent (bias 7), three of "
    "mantissa; below 2⁻⁶ steps of 2⁻⁹; to the nearest, ties to the even code; beyond ±448 to ±448. "
    "Notebook 12; arXiv 2209.05433.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("max240", {"top": 240}, "the largest is taken to be 240, as if the last exponent meant infinity"),
        Mistake("truncate", {"rounding": "down"}, "bits are cut off, not rounded"),
        Mistake("half_away", {"rounding": "half away"}, "ties go away from zero, not to the even code"),
        Mistake("carry_lost", {"carry": "lost"}, "a mantissa that rounds up to 2 does not raise the exponent"),
        Mistake("carry_clamped", {"carry": "clamped"}, "a mantissa that rounds up to 2 stays at 1.875"),
        Mistake("flush_subnormal", {"low": "zero"}, "everything below 2⁻⁶ becomes zero"),
        Mistake("sub_step_6", {"step": -6}, "below 2⁻⁶ the steps are 2⁻⁶"),
        Mistake("sub_step_10", {"step": -10}, "below 2⁻⁶ the steps are 2⁻¹⁰"),
        Mistake("overflow_nan", {"over": "NaN"}, "what is too large becomes NaN"),
        Mistake("no_clip", {"over": "wraps"}, "what is too large runs over and begins anew"),
        Mistake("bias8", {"bias": 8}, "the exponent's bias is 8"),
        Mistake("double_rounding", {"first": "bfloat16"}, "it was rounded to bfloat16 before"),
        Mistake("neg_zero_lost", {"minus": "below zero"}, "minus zero loses its sign"),
    ),
    designs=(
        Design("max240", {"top": 240}, "The largest number is 240: the last exponent is kept free."),
        Design("truncate", {"rounding": "down"}, "Do not round: cut off, towards zero."),
        Design(
            "flush", {"low": "zero"}, "There are no subnormal numbers: what is below 2⁻⁶ becomes a zero of its sign."
        ),
        Design("half_away", {"rounding": "half away"}, "Ties are rounded away from zero."),
    ),
    axes={"codes": "n"},
    outputs=one("codes"),
)
