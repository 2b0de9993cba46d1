"""The training loss and its gradient for every parameter: next token, next-next tokens, balance.

total = main + mtp_weight · mtp + balance_weight · balance
"""

from typing import Any, NamedTuple

import numpy as np

from minglm.config import Config
from minglm.model import ops as numpy_ops
from minglm.model.experts import MoeSaved
from minglm.model.mtp import Depth, mtp_chain, mtp_chain_bwd, mtp_chain_loss
from minglm.model.ops import IGNORE, Array, Ops
from minglm.model.params import Params, Weight
from minglm.model.router import RouterSaved, balance_loss, expert_load
from minglm.model.transformer import TransformerSaved, head, head_bwd, transformer, transformer_bwd


class Loss(NamedTuple):
    """Losses in nats per token, and each router's load over the valid tokens."""

    total: Any
    main: Any  # next token
    mtp: Any  # mean over the MTP layers; 0 without any
    balance: Any  # sum over the routers of a sequence-level loss that is 1 when balanced; 0 if its weight is 0
    load: dict[int, Array]  # layer number -> picks per expert [E]; MTP layers follow the last decoder layer


def loss_and_grads(
    ids: Array,
    targets: Array,
    params: Params,
    config: Config,
    mtp_weight: float = 0.3,
    balance_weight: float = 0.0,
    positions: Array | None = None,
    segments: Array | None = None,
    ops: Ops = numpy_ops,
) -> tuple[Loss, Params]:  # int [B, T] ×2 -> scalars, the parameters' record
    """`targets[b, t]` is the token after `ids[b, t]`, or IGNORE (see `shift_targets`); the MTP losses use the same
    targets, moved on by their depth. Gradients come as a record of the parameters' type. The selection biases'
    gradients are zero: they move by `router.update_bias`. Weights must be float32 or float64: nothing is widened here.
    """
    mtp_weight, balance_weight = float(mtp_weight), float(balance_weight)  # a NumPy float64 would promote the total
    # 1. trunk, head, next-token loss
    hidden, saved = transformer(ids, params, config, None, positions, segments, ops=ops, save=True)
    logits = head(hidden, params, ops=ops)
    main, saved_main = ops.cross_entropy(logits, targets)
    # 2. MTP layers, each on the output of the one before
    depths = min(len(params.mtp), ids.shape[1] - 1) if mtp_weight else 0
    chain = mtp_chain(hidden, ids, saved.layout, params, config, depths, ops=ops)
    mtp, saved_mtp = mtp_chain_loss(chain, targets, params, main.dtype, ops)
    # 3. routers
    routers = _routers(saved, chain, config)
    balance, dscores = _balance(routers, balance_weight, main.dtype)
    load = {i: expert_load(s.routing.indices, config.n_routed_experts, valid) for i, s, valid in routers}
    total = main + mtp_weight * mtp + balance_weight * balance

    # 3. routers: `dscores` goes in where each layer is undone
    # 2. the MTP layers
    dstate, dtable_mtp, dhead_mtp, dmtp = mtp_chain_bwd(
        mtp_weight, chain, saved_mtp, hidden, params, config, dscores, ops
    )
    # 1. head and trunk
    dhidden, dhead_main = head_bwd(ops.cross_entropy_bwd(1.0, saved_main), hidden, params, ops)
    dembedding, dlayers, dnorm = transformer_bwd(dhidden + dstate, saved, params, config, dscores, ops)
    dtable, dhead = dembedding.weight + dtable_mtp, dhead_main + dhead_mtp
    if params.lm_head is None:  # tied: one matrix, two uses
        grads = Params(Weight(dtable + dhead), dlayers, dnorm, None, dmtp)
    else:
        grads = Params(Weight(dtable), dlayers, dnorm, Weight(dhead), dmtp)
    return Loss(total, main, mtp, balance, load), grads


def shift_targets(ids: Array, segments: Array | None = None) -> Array:  # [B, T] -> [B, T]
    """The token after each token; IGNORE where the row ends or another document begins."""
    targets = np.full(ids.shape, IGNORE, np.int64)
    targets[:, :-1] = ids[:, 1:]
    if segments is not None:
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
        targets[:, :-1][~same] = IGNORE
    return targets


# -- balance -----------------------------------------------------------------------------------------------------


class _Router(NamedTuple):
    """One router's step, and which of its tokens count."""

    layer: int
    saved: RouterSaved
    valid: Array  # bool [B, T]: not padding


def _routers(saved: TransformerSaved, chain: list[Depth], config: Config) -> list[_Router]:
    """Every router that ran, in layer order."""
    steps = [(i, s.mlp, saved.layout.sight.segments >= 0) for i, s in enumerate(saved.layers)]
    steps += [(config.num_hidden_layers + depth.number, depth.saved.layer.mlp, depth.valid) for depth in chain]
    return [_Router(i, mlp.router, valid) for i, mlp, valid in steps if isinstance(mlp, MoeSaved)]


def _balance(routers: list[_Router], weight: float, dtype: Any) -> tuple[Any, dict[int, Array]]:
    """The sum of the routers' balance losses, and per layer the weighted gradient at the scores [N, E]."""
    total, dscores = dtype.type(0), {}
    if weight:
        for layer, saved, valid in routers:
            by_row = (*valid.shape, -1)
            scores, indices = saved.scores.reshape(by_row), saved.routing.indices.reshape(by_row)
            loss, gradient = balance_loss(scores, indices, valid)
            total = total + loss
            dscores[layer] = gradient.reshape(saved.scores.shape) * weight
    return total, dscores
