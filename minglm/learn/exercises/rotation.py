"""Partial rotary positions: entry i of a head turns with entry i + r/2, by position · theta^(−2i/r)."""

from collections.abc import Sequence

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Inputs, Mistake, Outputs, Property, one
from minglm.model.ops import Array


def reference(
    x: Array,  # [T, H, d]
    positions: Array,  # int [T]
    theta: float,
    r: int,
    *,
    turned: str = "first",  # r entries, or "last", "all"
    partner: str = "half of r",  # so far away, or "neighbour", "half of d"
    power: str = "2i / r",  # or "2i / d", "i / r"
    direction: int = 1,
    table: str = "halves",  # cos and sin of all r entries, or "repeated": as if neighbours were partners
    minus: bool = True,  # in the first of the two lines of a rotation
    time: str = "positions",  # or "heads", "along heads", "from 1", "from 0"
    rest: str = "kept",  # or "zero", "dropped"
) -> Array:  # -> [T, H, d]
    """All flags at their defaults: `minglm.model.ops.rope` with the angles of `minglm.model.rope`."""
    T, H, d = x.shape
    r = d if turned == "all" else r
    y = np.roll(x, r, axis=-1) if turned == "last" else x.copy()
    pairs = np.arange(r // 2)
    powers = pairs * {"2i / r": 2 / r, "2i / d": 2 / d, "i / r": 1 / r}[power]
    numbers = {"heads": np.arange(H), "from 1": 1 + np.arange(T), "from 0": np.arange(T)}.get(time, positions)
    angles = direction * numbers[:, None] * theta**-powers  # [T, r/2]
    angles = angles[None] if "heads" in time else angles[:, None]
    angle_of = np.repeat(pairs, 2) if table == "repeated" else np.tile(pairs, 2)  # of each of the r entries
    a, b = angles[..., angle_of[: r // 2]], angles[..., angle_of[r // 2 :]]
    first = 2 * pairs if partner == "neighbour" else pairs
    second = first + {"half of r": r // 2, "neighbour": 1, "half of d": d // 2}[partner]
    one_, two = y[..., first], y[..., second]
    y[..., first] = one_ * np.cos(a) - (two if minus else -two) * np.sin(a)
    y[..., second] = two * np.cos(b) + one_ * np.sin(b)
    y = np.roll(y, -r, axis=-1) if turned == "last" else y
    if rest == "dropped":
        return y[..., :r]
    return np.where(np.arange(d) < r, y, 0).astype(x.dtype) if rest == "zero" else y


def cases(draw: int = 0) -> Sequence[Case]:
    """As many heads as tokens, so that a wrong axis is no error; positions that begin at 5; r neither d nor d / 2."""
    rng = default_rng([4, draw])

    def inputs(T: int, d: int, r: int) -> tuple[object, ...]:
        positions = 5 + np.cumsum(rng.permutation(np.arange(T))) + np.arange(T)
        return rng.standard_normal((T, T, d)), positions, 100.0, r

    return [
        *(Case("a third of a head", inputs(3, 12, 4)) for _ in range(3)),
        *(Case("half of a head", inputs(3, 16, 8)) for _ in range(2)),
        Case("the whole head", inputs(4, 8, 8)),
        Case("one token", inputs(1, 12, 4)),
    ]


def keeps_lengths(inputs: Inputs, outputs: Outputs) -> bool:
    return bool(np.allclose((inputs[0] ** 2).sum(-1), (outputs["y"] ** 2).sum(-1), rtol=1e-4))


def keeps_rest(inputs: Inputs, outputs: Outputs) -> bool:
    return bool((inputs[0][..., inputs[3] :] == outputs["y"][..., inputs[3] :]).all())


EXERCISE = Exercise(
    name="rope",
    minutes=20,
    brief="rope(x [T, H, d], positions int [T], theta, r) -> [T, H, d]. Of the first r entries of each head entry i "
    "turns with entry i + r/2, by the angle position · theta^(−2i/r); the other d − r pass through. Notebook 03; arXiv "
    "2104.09864, with the pairs of 2204.06745.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("all_dims", {"turned": "all"}, "all d entries of a head are turned, not the first r"),
        Mistake("interleaved", {"partner": "neighbour"}, "neighbours turn together, (2i, 2i + 1), as in the paper"),
        Mistake("half_of_d", {"partner": "half of d"}, "entry i turns with entry i + d/2, not i + r/2"),
        Mistake("last_dims", {"turned": "last"}, "the last r entries are turned, not the first"),
        Mistake("freq_over_d", {"power": "2i / d"}, "the exponent is 2i/d, not 2i/r"),
        Mistake("exp1", {"power": "i / r"}, "the exponent is i/r, not 2i/r"),
        Mistake("sign", {"direction": -1}, "the rotation goes the other way round"),
        Mistake("mixed", {"table": "repeated"}, "the table of angles is that of neighbours, the pairs are half-split"),
        Mistake("noneg", {"minus": False}, "the minus of a rotation is missing"),
        Mistake("head_axis", {"time": "heads"}, "the angle follows the head, not the token"),
        Mistake("head_axis", {"time": "along heads"}, "the positions run along the heads, not the tokens"),
        Mistake("start1", {"time": "from 1"}, "positions are counted from 1, whatever was given"),
        Mistake("restart0", {"time": "from 0"}, "positions are counted from 0, whatever was given"),
        Mistake("zero_rest", {"rest": "zero"}, "the other d − r entries are zero; they pass through"),
        Mistake("drop_rest", {"rest": "dropped"}, "the other d − r entries are not returned"),
    ),
    designs=(
        Design("interleaved", {"partner": "neighbour"}, "Neighbours turn together: (2i, 2i + 1), as in GLM-4."),
        Design("freq_over_d", {"power": "2i / d"}, "The exponent is −2i/d."),
        Design("clockwise", {"direction": -1}, "The rotation goes the other way round."),
        Design("last_dims", {"turned": "last"}, "The last r entries are turned instead of the first."),
    ),
    axes={"y": "T H d"},
    outputs=one("y"),
    properties=(
        Property("The lengths of the heads have changed: a rotation cannot do that.", keeps_lengths),
        Property("Entries from r on have changed: they carry no position.", keeps_rest),
    ),
    tolerance=1e-5,  # tables in float32 will do
)
