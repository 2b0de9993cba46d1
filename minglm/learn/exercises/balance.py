"""Loss-free balancing: after a step each expert's selection bias moves by a fixed rate against its load's error."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Inputs, Mistake, Outputs
from minglm.model.ops import Array


def reference(
    bias: Array,  # [E]
    indices: Array,  # int [N, K]
    valid: Array,  # bool [N], False for padding
    rate: float,
    *,
    step: str = "sign",  # or "proportional", "relative"
    towards: str = "even",  # or "uneven"
    target: str = "mean",  # of the loads, or "N / E", "share", "median"
    counts: str = "valid",  # or "padding", "first picks"
    update: str = "add",  # or "replace", "absent only", "times", "recentred"
    tie: str = "stays",  # or "rises"
) -> Array:
    """All flags at their defaults: `minglm.model.update_bias` of `minglm.model.expert_load`."""
    E = len(bias)
    seen = indices if counts == "padding" else indices[valid]
    load = np.bincount((seen[:, :1] if counts == "first picks" else seen).reshape(-1), minlength=E).astype(bias.dtype)
    aim = {"mean": load.mean(), "N / E": len(seen) / E, "share": 1 / E, "median": np.median(load)}[target]
    error = aim - load
    direction = np.where(error >= 0, 1.0, -1.0) if tie == "rises" else np.sign(error)
    moves = {"sign": direction, "proportional": error, "relative": error / max(load.mean(), 1)}[step] * rate
    moves = -moves if towards == "uneven" else moves
    if update == "absent only":
        moves = np.where(load == 0, moves, 0)
    new = {"replace": moves, "times": bias * (1 + moves)}.get(update, bias + moves)
    return new - new.mean() if update == "recentred" else new


def moved(inputs: Inputs, returned: Any) -> Outputs:
    """The update in units of the rate: against the bias itself it would drown."""
    new = np.asarray(returned)
    return {"update": (new - inputs[0]) / inputs[3] if new.shape == inputs[0].shape else new}


def cases(draw: int = 0) -> Sequence[Case]:
    """Padding, three picks, one expert exactly at the mean, biases that are not zero."""
    made = []
    for seed in (31, 0, 1):
        loads = default_rng([seed, draw]).permutation([8, 6, 6, 14, 5, 4, 2, 3])  # 48 = 16 · 3 picks, mean 6
        indices = _picks(loads)
        padding = np.tile([[0, 1, 2]], (4, 1))
        valid = np.repeat([True, False], [16, 4])
        made.append(
            Case(
                "values",
                (0.1 * default_rng([seed, draw]).standard_normal(8), np.concatenate([indices, padding]), valid, 1e-3),
            )
        )
    dead = np.array([[0, 1], [0, 2], [0, 1]])
    made.append(Case("idle experts", (np.array([0.1, -0.2, 0.05, 0.0]), dead, np.ones(3, bool), 0.01)))
    return made


def _picks(loads: Array) -> Array:
    """Rows of three different experts with these loads."""
    left, rows = loads.copy(), []
    for _ in range(loads.sum() // 3):
        best = np.argsort(-left, kind="stable")[:3]
        left[best] -= 1
        rows.append(best)
    return np.array(rows)


EXERCISE = Exercise(
    name="bias_update",
    minutes=15,
    brief="bias_update(bias [E], indices int [N, K], valid bool [N], rate) -> the new bias [E]: + rate where an "
    "expert's load is below the mean, − rate where it is above, unchanged at the mean. Notebook 11; arXiv 2408.15664.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("sign", {"towards": "uneven"}, "busy experts are pushed up"),
        Mistake("proportional", {"step": "proportional"}, "the step grows with the error; the rule takes its sign"),
        Mistake("relative", {"step": "relative"}, "the step grows with the relative error; the rule takes its sign"),
        Mistake("N_over_E", {"target": "N / E"}, "the fair share is N/E, but N · K picks are shared out"),
        Mistake("share_vs_count", {"target": "share"}, "a share, 1/E, is compared with counts"),
        Mistake("median", {"target": "median"}, "the median of the loads stands where their mean belongs"),
        Mistake("top1", {"counts": "first picks"}, "only first picks are counted"),
        Mistake("padding", {"counts": "padding"}, "padding is counted"),
        Mistake("replace", {"update": "replace"}, "the old bias is lost"),
        Mistake("absent_only", {"update": "absent only"}, "only experts without tokens are moved"),
        Mistake("times_bias", {"update": "times"}, "the bias is multiplied, not added to"),
        Mistake(
            "recentred",
            {"update": "recentred"},
            "the mean is taken off afterwards: harmless for the choice, but not the rule",
        ),
        Mistake("geq", {"tie": "rises"}, "an expert exactly at the mean is pushed"),
    ),
    designs=(
        Design(
            "proportional",
            {"step": "proportional"},
            "The step is rate times the error itself, the mean load minus the expert's, not its sign.",
        ),
        Design("median", {"target": "median"}, "Loads are compared with their median instead of their mean."),
        Design("recentred", {"update": "recentred"}, "After the step the mean of all biases is subtracted."),
        Design("first_picks", {"counts": "first picks"}, "Only a token's first pick counts as load."),
    ),
    axes={"update": "E"},
    outputs=moved,
    tolerance=1e-6,  # the update is a small difference of larger numbers
)
