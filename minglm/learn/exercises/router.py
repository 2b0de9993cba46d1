"""The router: sigmoid scores, a bias to choose by, the K best, weights from the scores without it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Inputs, Mistake, Outputs
from minglm.model.ops import Array, sigmoid, softmax


def reference(
    h: Array,  # [N, D]
    gate: Array,  # [E, D]
    bias: Array,  # [E]
    K: int,
    normalise: bool,
    scale: float,
    n_group: int,
    topk_group: int,
    *,
    score: str = "sigmoid",  # or "softmax", "bias in logit"
    select: str = "biased",  # or "scores", "minus bias", "lowest"
    weigh: str = "scores",  # or "biased", "softmax of the picked", "sorted scores"
    norm: str = "picked",  # divide by the sum of the picked, or "all", "K", "tokens", "never"
    scaled: bool = True,
    group: str = "two best",  # that judge it, or "best"; "none": all are open
    closed: float = -np.inf,  # biased score of experts in groups that are closed, or 0
) -> tuple[Array, Array]:  # int [N, K], [N, K]
    """All flags at their defaults: `minglm.model.router`."""
    logits = h @ gate.T
    if score == "softmax":
        scores = softmax(logits)
    else:
        scores = sigmoid(logits + bias if score == "bias in logit" else logits)
    biased = scores - bias if select == "minus bias" else scores + bias
    by = scores if select == "scores" or score == "bias in logit" else biased
    by = by if group == "none" else _in_best_groups(by, n_group, topk_group, 1 if group == "best" else 2, closed)
    indices = np.argsort(by if select == "lowest" else -by, axis=-1, kind="stable")[:, :K]
    picked = np.take_along_axis(biased if weigh == "biased" else scores, indices, axis=-1)
    if weigh == "softmax of the picked":
        picked = softmax(picked)
    if weigh == "sorted scores":
        picked = -np.sort(-picked, axis=-1)
    total: Any = 1
    if normalise and norm != "never":
        sums = {"picked": picked.sum(-1, keepdims=True), "all": scores.sum(-1, keepdims=True), "K": K}
        total = picked.sum(0, keepdims=True) if norm == "tokens" else sums[norm]
    return indices, picked / total * (scale if scaled else 1)


def _in_best_groups(by: Array, n_group: int, topk_group: int, judges: int, closed: float) -> Array:  # [N, E] -> [N, E]
    groups = by.reshape(len(by), n_group, -1)
    worth = -np.sort(-groups, axis=-1)[:, :, :judges].sum(axis=-1)  # [N, groups]
    last = -np.sort(-worth, axis=-1)[:, topk_group - 1, None]
    return np.where((worth >= last)[:, :, None], groups, closed).reshape(by.shape)


def _clear(scores: Array, k: int) -> Array:  # [N, ..] -> bool [N]
    """Whether the k best of each row are so by more than rounding."""
    ranked = -np.sort(-scores, axis=-1)
    return np.ones(len(scores), bool) if k == scores.shape[1] else ranked[:, k - 1] - ranked[:, k] > 1e-4


def dense(inputs: Inputs, returned: Any) -> Outputs:
    """Weights [N, E], zero where an expert was not picked: the order of the K picks is free."""
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise ValueError("wanted two things, indices [N, K] and weights [N, K]")
    indices, weights = np.asarray(returned[0]), np.asarray(returned[1])
    N, E, K = len(inputs[0]), len(inputs[1]), inputs[3]
    for name, found in (("indices", indices), ("weights", weights)):
        if found.shape != (N, K):
            raise ValueError(f"{name} has the shape {list(found.shape)}, wanted [N, K] = {[N, K]}")
    if indices.dtype.kind == "f" and weights.dtype.kind in "iu":
        raise ValueError("indices come first, then weights")
    if indices.dtype.kind not in "iu" or not ((indices >= 0) & (indices < E)).all():
        raise ValueError(f"indices must be whole numbers 0 … {E - 1}, the experts' numbers")
    full = np.zeros((N, E), weights.dtype)
    np.put_along_axis(full, indices, weights, axis=-1)
    return {"weights": full}


def cases(draw: int = 0) -> Sequence[Case]:
    """Three of eight experts, biases that change many choices, a scale that is not 1, no near ties; with groups all
    biased scores are below 0, and one group of three is closed."""
    rng = default_rng([2, draw])

    def inputs(N: int, E: int, K: int, normalise: bool, n_group: int = 1, topk_group: int = 1) -> Inputs:
        h, gate = rng.standard_normal((N, 6)), rng.standard_normal((E, 6)) * 0.7
        bias = 0.25 * rng.choice([-1, 1], E) * rng.uniform(0.6, 1.4, E) - (1.5 if n_group > 1 else 0)
        biased = sigmoid(h @ gate.T) + bias
        worth = np.sort(biased.reshape(N, n_group, -1), axis=-1)[:, :, -2:].sum(axis=-1)
        open_ones = _in_best_groups(biased, n_group, topk_group, 2, -np.inf)
        h = h[_clear(worth, topk_group) & _clear(open_ones, K)]
        return h, gate, bias, K, normalise, 2.5, n_group, topk_group

    return [
        *(Case("normalised", inputs(40, 8, 3, True)) for _ in range(3)),
        *(Case("not normalised", inputs(40, 8, 3, False)) for _ in range(3)),
        *(Case("groups", inputs(40, 9, 4, normalise, 3, 2)) for normalise in (True, True, False)),
        Case("one token, all experts", inputs(1, 8, 8, True)),
    ]


EXERCISE = Exercise(
    name="router",
    minutes=20,
    brief="router(h [N, D], gate [E, D], bias [E], K, normalise, scale, n_group, topk_group) -> indices [N, K], "
    "weights [N, K]. Sigmoid of h · gate; the K best of score + bias; their scores without the bias, divided by their "
    "sum if `normalise`, times scale. The experts stand in n_group groups of equal size (GLM-4.5: one): only those in "
    "the topk_group groups whose two best add up to most are open. Notebook 05; arXiv 2412.19437.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("biased_weights", {"weigh": "biased"}, "the weights come from the biased scores"),
        Mistake("no_bias", {"select": "scores"}, "the experts are chosen without the bias"),
        Mistake("bias_in_logit", {"score": "bias in logit"}, "the bias is added before the sigmoid"),
        Mistake("minus_bias", {"select": "minus bias"}, "the bias is subtracted"),
        Mistake("softmax", {"score": "softmax"}, "the scores are a softmax over all experts (OLMoE and Qwen do so)"),
        Mistake("softmax_topk", {"weigh": "softmax of the picked"}, "the weights are a softmax of the picked scores"),
        Mistake("norm_before", {"norm": "all"}, "the scores are divided by the sum over all experts"),
        Mistake("no_norm", {"norm": "never"}, "the weights are never divided by their sum"),
        Mistake("norm_over_K", {"norm": "K"}, "the weights are divided by K instead of by their sum"),
        Mistake(
            "norm_over_tokens", {"norm": "tokens"}, "the scores are divided by a sum over the tokens, not over the K"
        ),
        Mistake("no_scale", {"scaled": False}, "the scale is missing, or divided away again"),
        Mistake("lowest", {"select": "lowest"}, "the lowest are picked"),
        Mistake("unpaired", {"weigh": "sorted scores"}, "the weights are sorted, and the indices are not"),
        Mistake("no_groups", {"group": "none"}, "all groups are open"),
        Mistake("group_max", {"group": "best"}, "a group is judged by its best expert, not by its two best"),
        Mistake("group_fill_zero", {"closed": 0.0}, "experts of closed groups get 0, and the others are below"),
    ),
    designs=(
        Design("softmax", {"score": "softmax"}, "The scores are a softmax over all experts, as in OLMoE and Qwen."),
        Design(
            "minus_bias",
            {"select": "minus bias"},
            "The bias is a penalty: it is subtracted before the experts are chosen.",
        ),
        Design(
            "softmax_topk",
            {"weigh": "softmax of the picked"},
            "The weights are made from the softmax of the K picked scores.",
        ),
        Design("norm_over_K", {"norm": "K"}, "With `normalise` the weights are divided by K, not by their sum."),
    ),
    axes={"weights": "N E"},  # as `dense` lays them out
    outputs=dense,
)
