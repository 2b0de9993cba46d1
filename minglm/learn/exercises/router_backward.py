"""Router backward: through the weights of the experts that were picked, normalised or not; the choice has no slope."""

from collections.abc import Sequence

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Mistake, several
from minglm.model.ops import Array, sigmoid


def reference(
    dweights: Array,  # [N, K]
    h: Array,  # [N, D]
    gate: Array,  # [E, D]
    indices: Array,  # int [N, K]
    normalise: bool,
    scale: float,
    *,
    total: str = "depends",  # on each score, or "constant"
    mean: str = "weighted",  # what normalising takes off, or "plain"
    scaled: bool = True,
    slope: str = "sigmoid",  # of the scores, or "none", "softmax"
    reach: str = "picked",  # or "all experts"
    bias: str = "nothing",  # its gradient, or "scores", "logits"
) -> tuple[Array, Array, Array]:  # dh [N, D], dgate [E, D], dbias [E]
    """All flags at their defaults: `minglm.model.router_bwd`. With w = c · p / Σp of the picked scores p:
    dp = c / Σp · (dw − Σ dw·p / Σp), and dlogits = dp · s · (1 − s)."""
    scores = sigmoid(h @ gate.T)
    picked = np.take_along_axis(scores, indices, axis=-1)
    c, size = (scale if scaled else 1), (picked.sum(-1, keepdims=True) if normalise else 1)
    share = picked / size
    off = np.zeros((len(h), 1))
    if normalise and total == "depends":
        off = dweights.mean(-1, keepdims=True) if mean == "plain" else (dweights * share).sum(-1, keepdims=True)
    dscores = np.tile(-c / size * off if reach == "all experts" else np.zeros((len(h), 1)), (1, len(gate)))
    np.put_along_axis(dscores, indices, c / size * (dweights - off), axis=-1)
    slopes = {"sigmoid": scores * (1 - scores), "none": np.ones_like(scores)}.get(slope)
    if slopes is None:  # as if the weights were a softmax of the picked logits
        slopes = np.zeros_like(scores)
        np.put_along_axis(slopes, indices, share * size, axis=-1)
    dlogits = dscores * slopes
    dbias = {"nothing": np.zeros(len(gate), h.dtype), "scores": dscores.sum(0), "logits": dlogits.sum(0)}[bias]
    return (dlogits @ gate).astype(h.dtype), (dlogits.T @ h).astype(h.dtype), dbias.astype(h.dtype)


def cases(draw: int = 0) -> Sequence[Case]:
    """Three of eight experts, a scale that is not 1, gradients that differ among the picks: equal ones cancel."""
    rng = default_rng([10, draw])

    def inputs(N: int, K: int, normalise: bool) -> tuple[object, ...]:
        h, gate = rng.standard_normal((N, 5)), rng.standard_normal((8, 5)) * 0.7
        indices = np.argsort(-(h @ gate.T + 0.5 * rng.standard_normal(8)), axis=-1)[:, :K]
        return rng.standard_normal((N, K)) + 0.5, h, gate, indices, normalise, 2.5

    points = {"normalised": True, "not normalised": False}
    made = [Case(point, inputs(9, 3, normalise)) for point, normalise in points.items() for _ in range(3)]
    alone = inputs(4, 1, True)
    return [*made, Case("one pick: its weight is always the scale", alone)]


EXERCISE = Exercise(
    name="router_bwd",
    minutes=40,
    brief="router_bwd(dweights [N, K], h [N, D], gate [E, D], indices int [N, K], normalise, scale) -> dh [N, D], "
    "dgate [E, D], dbias [E], for the weights that the exercise `router` returns. "
    "Notebook 10c; docs/derivations/router.md.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("constant_sum", {"total": "constant"}, "the sum below the fraction line is treated as a constant"),
        Mistake("plain_mean", {"mean": "plain"}, "the plain mean of dweights is taken off, not the weighted one"),
        Mistake("no_scale", {"scaled": False}, "the scale is missing"),
        Mistake("no_slope", {"slope": "none"}, "the sigmoid's slope, s · (1 − s), is missing"),
        Mistake("softmax_slope", {"slope": "softmax"}, "this is the slope of a softmax over the picked experts"),
        Mistake("all_experts", {"reach": "all experts"}, "experts that were not picked get a gradient"),
        Mistake("bias_gradient", {"bias": "scores"}, "the selection bias gets a gradient: the scores' own"),
        Mistake("bias_as_logit", {"bias": "logits"}, "the selection bias gets a gradient: the logits' own"),
    ),
    designs=(
        Design(
            "constant_sum",
            {"total": "constant"},
            "The sum below the fraction line lets no gradient through: treat it as a constant.",
        ),
        Design(
            "straight_through",
            {"slope": "none"},
            "The sigmoid lets gradients through unchanged: its slope counts as 1.",
        ),
    ),
    axes={"dh": "N D", "dgate": "E D", "dbias": "E"},
    outputs=several("dh", "dgate", "dbias"),
)
