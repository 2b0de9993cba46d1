"""The router: which K of the E experts see a token, and how loud each speaks.

A token's experts are chosen by *biased* scores and weighted by the *unbiased* ones. The bias is how GLM-4.5 balances
the experts' load without a loss term (arXiv 2408.15664): it moves by the sign of the load error, never by a gradient.
"""

from typing import Any, NamedTuple

import numpy as np

from minglm.config import Config
from minglm.model import ops as numpy_ops
from minglm.model.ops import Array, Ops, Tap, no_tap, sigmoid
from minglm.model.params import Router


class Routing(NamedTuple):
    """N tokens' choices, in the order of their biased scores."""

    indices: Array  # int [N, K]
    weights: Array  # [N, K]


class RouterSaved(NamedTuple):
    x: Array  # [N, D]
    scores: Array  # [N, E] sigmoid of the logits, without the bias
    routing: Routing


def router(
    x: Array, params: Router, config: Config, tap: Tap = no_tap, ops: Ops = numpy_ops
) -> tuple[Routing, RouterSaved]:  # [N, D] -> [N, K] ×2
    """Sigmoid scores, selection bias, groups, top-K, normalise, scale (`Glm4MoeTopkRouter` of transformers)."""
    logits = tap("router_logits", ops.linear(x, params.weight))  # [N, D] -> [N, E]
    # 1. every expert scores the token, each for itself: unlike a softmax, all may score high
    scores = tap("router_scores", sigmoid(logits))
    # 2. the bias decides who is picked …
    biased = tap("biased_scores", _keep_best_groups(scores + params.e_score_correction_bias, config))
    order = np.argsort(-biased, axis=-1, kind="stable")
    indices = tap("expert_indices", order[:, : config.num_experts_per_tok])  # -> [N, K]
    # 3. … and has no say in how loud they speak
    picked = np.take_along_axis(scores, indices, axis=-1)  # -> [N, K]
    weights = tap("expert_weights", _normalise(picked, config))
    routing = Routing(indices, weights)
    return routing, RouterSaved(x, scores, routing)


def router_bwd(
    dweights: Array,
    saved: RouterSaved,
    params: Router,
    config: Config,
    dscores: Array | None = None,
    ops: Ops = numpy_ops,
) -> tuple[Array, Router]:  # [N, K] -> [N, D], the record
    """The choice is piecewise constant, so gradients flow only through the weights of the experts that were picked.

    With w = c · p / Σp:  dp = c / Σp · (dw − Σ dw·p / Σp): scaling all K scores together changes nothing.
    `dscores` [N, E] is added at the scores: the gradient of the balance loss.
    """
    x, scores, routing = saved
    # 3. weights = normalise(scores at the picked experts)
    picked = np.take_along_axis(scores, routing.indices, axis=-1)
    dpicked = _normalise_bwd(dweights, picked, config)
    dscores_all = np.zeros_like(scores) if dscores is None else dscores.copy()
    rows = np.arange(len(x))[:, None]
    dscores_all[rows, routing.indices] += dpicked  # a token's K experts are all different: nothing is lost by +=
    # 2. the choice has no gradient
    # 1. scores = sigmoid(logits)
    dlogits = dscores_all * scores * (1 - scores)
    dx, dweight, _ = ops.linear_bwd(dlogits, x, params.weight)
    return dx, Router(dweight, np.zeros_like(params.e_score_correction_bias))


def _keep_best_groups(biased: Array, config: Config) -> Array:  # [N, E] -> [N, E]
    """Experts outside the `topk_group` best groups fall to −∞. A group is judged by the sum of its two best."""
    if config.n_group == 1:
        return biased
    groups = biased.reshape(len(biased), config.n_group, -1)  # -> [N, groups, E / groups]
    two_best = np.sort(groups, axis=-1)[:, :, -2:].sum(axis=-1)
    best = np.argsort(-two_best, axis=-1, kind="stable")[:, : config.topk_group]
    is_open = np.zeros(two_best.shape, bool)
    np.put_along_axis(is_open, best, True, axis=-1)
    return np.where(is_open[:, :, None], groups, -np.inf).reshape(biased.shape)


def _normalise(picked: Array, config: Config) -> Array:  # [N, K] -> [N, K]
    total = picked.sum(axis=-1, keepdims=True) + 1e-20 if config.norm_topk_prob else 1
    return picked / total * config.routed_scaling_factor


def _normalise_bwd(dweights: Array, picked: Array, config: Config) -> Array:  # [N, K] ×2 -> [N, K]
    dpicked = dweights * config.routed_scaling_factor
    if not config.norm_topk_prob:
        return dpicked
    total = picked.sum(axis=-1, keepdims=True) + 1e-20
    return (dpicked - (dpicked * picked).sum(axis=-1, keepdims=True) / total) / total


# -- balance -----------------------------------------------------------------------------------------------------


def expert_load(indices: Array, experts: int, valid: Array | None = None) -> Array:  # [N, K] -> [E]
    """How many of the picks each expert got; only tokens with `valid` [N] (not padding) count."""
    counted = indices if valid is None else indices[valid.reshape(-1)]
    return np.bincount(counted.reshape(-1), minlength=experts)


def update_bias(bias: Array, load: Array, rate: float) -> Array:  # [E] ×2 -> [E]
    """Loss-free balancing: busy experts a step down, idle ones a step up, all steps equal (arXiv 2408.15664)."""
    return bias + bias.dtype.type(rate) * np.sign(load.mean() - load).astype(bias.dtype)


def balance_loss(scores: Array, indices: Array, valid: Array) -> tuple[Any, Array]:
    """Sequence-level balance loss and its gradient: [B, T, E], [B, T, K], bool [B, T] -> scalar, [B, T, E].

    For each sequence Σ_e f_e · P_e, with f_e = E/(K·n) · picks of e among its n valid tokens (a constant for the
    gradient) and P_e the mean of s_e / Σs; averaged over the sequences that have a valid token. 1 when balanced. A
    sequence is a row, whatever documents are packed in it.
    Source: DeepSeek-V3 report, arXiv 2412.19437, equations 17 to 20 (there f counts the K best scores *without* bias
    and groups, here the picks as they were made); GLM-4.5 uses it with weight 1e-4.
    """
    B, _, E = scores.shape
    K = indices.shape[-1]
    count = np.maximum(valid.sum(axis=1), 1)  # [B]
    load = np.stack([expert_load(indices[b], E, valid[b]) for b in range(B)])  # [B, E]
    f = (load * E / (K * count[:, None])).astype(scores.dtype)[:, None]  # [B, 1, E]
    weight = (valid / count[:, None] / max(int(valid.any(axis=1).sum()), 1)).astype(scores.dtype)[:, :, None]

    total = scores.sum(axis=-1, keepdims=True)
    share = scores / total
    loss = (weight * share * f).sum()
    dshare = weight * f
    dscores = (dshare - (dshare * share).sum(axis=-1, keepdims=True)) / total
    return loss, dscores
