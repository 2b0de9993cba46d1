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
    *,
    score: str = "sigmoid",  # or "softmax", "bias in logit"
    select: str = "biased",  # or "scores", "minus bias", "lowest"
    weigh: str = "scores",  # or "biased", "softmax of the picked"
    norm: str = "picked",  # divide by the sum of the picked, or "all", "K", "never"
    scaled: bool = True,
) -> tuple[Array, Array]:  # int [N, K], [N, K]
    """All flags at their defaults: `minglm.model.router` with one group."""
    logits = h @ gate.T
    if score == "softmax":
        scores = softmax(logits)
    else:
        scores = sigmoid(logits + bias if score == "bias in logit" else logits)
    biased = scores - bias if select == "minus bias" else scores + bias
    by = scores if select == "scores" or score == "bias in logit" else -biased if select == "lowest" else biased
    indices = np.argsort(-by, axis=-1, kind="stable")[:, :K]
    picked = np.take_along_axis(biased if weigh == "biased" else scores, indices, axis=-1)
    if weigh == "softmax of the picked":
        picked = softmax(picked)
    total: Any = 1
    if normalise and norm != "never":
        total = {"picked": picked.sum(-1, keepdims=True), "all": scores.sum(-1, keepdims=True), "K": K}[norm]
    return indices, picked / total * (scale if scaled else 1)


def dense(inputs: Inputs, returned: Any) -> Outputs:
    """Weights [N, E], zero where an expert was not picked: the order of the K picks is free."""
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise ValueError("wanted two things, indices [N, K] and weights [N, K]")
    indices, weights = np.asarray(returned[0]), np.asarray(returned[1])
    N, E, K = len(inputs[0]), len(inputs[1]), inputs[3]
    if indices.shape != (N, K) or weights.shape != (N, K):
        return {"weights": weights if weights.shape != (N, K) else indices}
    if indices.dtype.kind not in "iu" or not ((indices >= 0) & (indices < E)).all():
        raise ValueError(f"indices must be whole numbers 0 … {E - 1}, the experts' numbers")
    full = np.zeros((N, E), weights.dtype)
    np.put_along_axis(full, indices, weights, axis=-1)
    return {"weights": full}


def cases(draw: int = 0) -> Sequence[Case]:
    """Three of eight experts, biases that change many choices, a scale that is not 1, no near ties."""
    rng = default_rng([2, draw])
    made = []
    for normalise in (True, True, True, False, False, False):
        point = "normalised" if normalise else "not normalised"
        h, gate = rng.standard_normal((40, 6)), rng.standard_normal((8, 6)) * 0.7
        bias = 0.25 * rng.choice([-1, 1], 8) * rng.uniform(0.6, 1.4, 8)
        ranked = -np.sort(-(sigmoid(h @ gate.T) + bias), axis=-1)
        h = h[ranked[:, 2] - ranked[:, 3] > 1e-4]
        made.append(Case(point, (h, gate, bias, 3, normalise, 2.5)))
    made.append(Case("one token, all experts", (rng.standard_normal((1, 6)), gate, bias, 8, True, 2.5)))
    return made


EXERCISE = Exercise(
    name="router",
    minutes=20,
    brief="router(h [N, D], gate [E, D], bias [E], K, normalise, scale) -> indices [N, K], weights [N, K]. Sigmoid of "
    "h · gate; the K best of score + bias; their scores without the bias, divided by their sum if `normalise`, times "
    "scale. Notebook 05; arXiv 2412.19437.",
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
        Mistake("no_scale", {"scaled": False}, "the scale is missing, or divided away again"),
        Mistake("lowest", {"select": "lowest"}, "the lowest are picked"),
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
    axes={"weights": "N K"},
    outputs=dense,
)
