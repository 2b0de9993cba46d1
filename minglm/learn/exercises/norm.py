"""RMSNorm: y = x / √(mean(x²) + eps) · weight, over the last axis."""

from collections.abc import Sequence

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Mistake, one
from minglm.model.ops import Array


def reference(
    x: Array,  # [.., D]
    weight: Array,  # [D]
    eps: float,
    *,
    minus_mean: str = "",  # where the mean is subtracted: "", "above", "below" the fraction line, "both"
    total: str = "mean",  # or "sum"
    eps_at: str = "inside",  # the root, or "outside"
    root: bool = True,
    axis: int | None = -1,
    weigh: str = "after",  # or "before", "one plus"
) -> Array:
    """All flags at their defaults: `minglm.model.rms_norm`."""
    x = x * weight if weigh == "before" else x
    centred = x - x.mean(axis=-1, keepdims=True)
    below = centred if minus_mean in ("below", "both") else x
    size = (below * below).mean(axis=axis, keepdims=True)
    size = size * x.shape[-1] if total == "sum" else size
    size = size + eps if eps_at == "inside" else size
    size = np.sqrt(size) if root else size
    size = size + eps if eps_at == "outside" else size
    normed = (centred if minus_mean in ("above", "both") else x) / size
    return normed if weigh == "before" else normed * (1 + weight if weigh == "one plus" else weight)


def cases(draw: int = 0) -> Sequence[Case]:
    """Rows of very different size, each with a mean of its own; weights that are not 1; a large eps."""
    rng = default_rng([1, draw])
    made = []
    for D in (8, 12, 20):
        sizes = np.array([0.01, 0.3, 1, 5, 0.1])[:, None]
        x = sizes * (0.7 + rng.standard_normal((5, D)))
        made.append(Case("values", (x, 1.5 + rng.standard_normal(D), 1e-3)))
    batch = rng.standard_normal((2, 3, 8)) + 0.5
    made.append(Case("more axes", (batch, 1.5 + rng.standard_normal(8), 1e-3)))
    made.append(Case("a row of zeros", (np.zeros((2, 8)), np.ones(8), 1e-5)))
    return made


EXERCISE = Exercise(
    name="rms_norm",
    minutes=10,
    brief="rms_norm(x [.., D], weight [D], eps) -> [.., D]: each row over the root of the mean of its squares plus "
    "eps, times the weight. Notebook 02; arXiv 1910.07467.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("layer_norm", {"minus_mean": "both"}, "the mean is subtracted first, as LayerNorm does"),
        Mistake("std_only", {"minus_mean": "below"}, "you divide by the spread around the mean"),
        Mistake("centred_above", {"minus_mean": "above"}, "the mean is taken off above the fraction line"),
        Mistake("sum_not_mean", {"total": "sum"}, "the squares are summed, not averaged"),
        Mistake("eps_outside", {"eps_at": "outside"}, "eps is added after the root"),
        Mistake("no_sqrt", {"root": False}, "the root is missing"),
        Mistake("axis_all", {"axis": None}, "one mean is taken over all rows together"),
        Mistake("axis_tokens", {"axis": 0}, "the mean is taken down the columns, over tokens"),
        Mistake("weight_first", {"weigh": "before"}, "the weight is multiplied in before the norm"),
        Mistake(
            "one_plus_w", {"weigh": "one plus"}, "the weight is used as 1 + weight (Gemma does so; GLM-4.5 does not)"
        ),
    ),
    designs=(
        Design(
            "layer_norm",
            {"minus_mean": "both"},
            "The mean of the row is subtracted first, as in LayerNorm: it is x − mean(x) that is divided and squared.",
        ),
        Design(
            "one_plus_w",
            {"weigh": "one plus"},
            "What is stored is the weight minus one, as in Gemma: multiply by 1 + weight.",
        ),
        Design("eps_outside", {"eps_at": "outside"}, "eps is added to the root, not under it."),
    ),
    axes={"y": ".. D"},
    outputs=one("y"),
)
