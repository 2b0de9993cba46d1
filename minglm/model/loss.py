"""The training loss and its gradient for every parameter: next token, next-next tokens, balance.

total = main + mtp_weight · mtp + balance_weight · balance
"""

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minglm.config import Config
from minglm.model import ops as numpy_ops
from minglm.model.experts import MoeSaved
from minglm.model.mtp import Depth, mtp_chain, mtp_embedding_weight, mtp_head_weight, mtp_layer_bwd
from minglm.model.ops import IGNORE, Array
from minglm.model.params import Mtp, Params, Weight, zeros_like
from minglm.model.router import balance_loss, expert_load
from minglm.model.transformer import TransformerSaved, head, head_weight, transformer, transformer_bwd


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
    ops: ModuleType = numpy_ops,
) -> tuple[Loss, Params]:  # int [B, T] ×2
    """`targets[b, t]` is the token after `ids[b, t]`, or IGNORE (see `shift_targets`); the MTP losses use the same
    targets, moved on by their depth. Gradients come as a record of the parameters' type. The selection biases'
    gradients are zero: they move by `router.update_bias`.
    """
    mtp_weight, balance_weight = float(mtp_weight), float(balance_weight)  # a NumPy float64 would promote the total
    # 1. trunk, head, next-token loss
    hidden, saved = transformer(ids, params, config, None, positions, segments, ops=ops, save=True)
    logits = head(hidden, params, ops=ops)
    main, saved_main = ops.cross_entropy(logits, targets)
    # 2. MTP layers, each on the output of the one before
    depths = min(len(params.mtp), ids.shape[1] - 1) if mtp_weight else 0
    chain = mtp_chain(hidden, ids, saved.layout, params, config, depths, ops=ops)
    mtp_losses = [_mtp_loss(depth, k, targets, params, ops) for k, depth in enumerate(chain, start=1)]
    mtp = sum((loss for loss, _ in mtp_losses), main.dtype.type(0)) / max(depths, 1)
    # 3. routers
    routers = _routers(saved, chain, config)
    balance, dscores = _balance(routers, balance_weight, main.dtype)
    load = {r.layer: expert_load(r.indices, config.n_routed_experts, r.valid) for r in routers}
    total = main + mtp_weight * mtp + balance_weight * balance

    # 2. the MTP layers again, backwards
    each = mtp_weight / max(depths, 1)
    dstate, dtable_mtp, dhead_mtp, dmtp = _mtp_bwd(chain, mtp_losses, each, dscores, hidden, params, config, ops)
    # 1. head and trunk
    dlogits = ops.cross_entropy_bwd(1.0, saved_main)
    dhidden, dhead, _ = ops.linear_bwd(dlogits.reshape(logits.shape), hidden, head_weight(params))
    dembedding, dlayers, dnorm = transformer_bwd(dhidden + dstate, saved, params, config, dscores, ops)
    dtable, dhead = dembedding.weight + dtable_mtp, dhead + dhead_mtp
    if params.lm_head is None:  # tied: one matrix, two uses
        grads = Params(Weight(dtable + dhead), dlayers, dnorm, None, dmtp)
    else:
        grads = Params(Weight(dtable), dlayers, dnorm, Weight(dhead), dmtp)
    return Loss(total, main, mtp, balance, load), grads


# -- next-next tokens --------------------------------------------------------------------------------------------


def _mtp_loss(depth: Depth, k: int, targets: Array, params: Params, ops: ModuleType) -> tuple[Any, Any]:
    """Row i of depth k predicts the token after t_{i+k}: the target of row i + k. Returns the loss and its saved."""
    logits = ops.linear(depth.normed, mtp_head_weight(params, params.mtp[depth.layer]))
    return ops.cross_entropy(logits, np.where(depth.valid, targets[:, k:], IGNORE))


def _mtp_bwd(
    chain: list[Depth],
    losses: list[tuple[Any, Any]],
    dloss: float,
    dscores: dict[int, Array],
    hidden: Array,
    params: Params,
    config: Config,
    ops: ModuleType,
) -> tuple[Array, Array, Array, tuple[Mtp, ...]]:
    """Last depth first, because each depth hands a gradient to the state that it read.

    Returns the gradients of the trunk's hidden states, of the main embedding and head (for MTP layers that borrow
    them), and of each MTP layer.
    """
    dtable, dhead = np.zeros_like(params.embed_tokens.weight), np.zeros_like(head_weight(params))
    dmtp = [zeros_like(mtp) for mtp in params.mtp]
    dstate = np.zeros_like(hidden[:, :0])  # gradient at this depth's output from the next depth: none yet
    for depth, (_, saved_loss) in zip(reversed(chain), reversed(losses), strict=True):
        mtp = params.mtp[depth.layer]
        dlogits = ops.cross_entropy_bwd(dloss, saved_loss).reshape(*depth.normed.shape[:2], -1)
        dnormed, dhead_here, _ = ops.linear_bwd(dlogits, depth.normed, mtp_head_weight(params, mtp))
        dnormed[:, : dstate.shape[1]] += dstate
        dstate, dtable_here, dlayer = mtp_layer_bwd(
            dnormed,
            depth.saved,
            mtp,
            mtp_embedding_weight(params, mtp),
            config,
            dscores.get(config.num_hidden_layers + depth.layer),
            ops,
        )
        if mtp.shared_head.head is None:
            dhead += dhead_here
        else:
            dlayer = dlayer._replace(shared_head=dlayer.shared_head._replace(head=Weight(dhead_here)))
        if mtp.embed_tokens is None:
            dtable += dtable_here
        else:
            dlayer = dlayer._replace(embed_tokens=Weight(dtable_here))
        dmtp[depth.layer] = dlayer
    dhidden = np.zeros_like(hidden)
    dhidden[:, : dstate.shape[1]] = dstate
    return dhidden, dtable, dhead, tuple(dmtp)


# -- balance -----------------------------------------------------------------------------------------------------


class _Router(NamedTuple):
    """What the balance needs of one router's step."""

    layer: int
    scores: Array  # [N, E]
    indices: Array  # [N, K]
    valid: Array  # bool [B, T]: not padding


def _routers(saved: TransformerSaved, chain: list[Depth], config: Config) -> list[_Router]:
    """Every router that ran, in layer order."""
    steps = [(i, s.mlp, saved.layout.segments >= 0) for i, s in enumerate(saved.layers)]
    steps += [(config.num_hidden_layers + depth.layer, depth.saved.layer.mlp, depth.valid) for depth in chain]
    return [
        _Router(i, moe.router.scores, moe.router.routing.indices, valid)
        for i, moe, valid in steps
        if isinstance(moe, MoeSaved)
    ]


def _balance(routers: list[_Router], weight: float, dtype: Any) -> tuple[Any, dict[int, Array]]:
    """The sum of the routers' balance losses, and per layer the weighted gradient at the scores [N, E]."""
    total, dscores = dtype.type(0), {}
    if weight:
        for r in routers:
            by_row = (*r.valid.shape, -1)
            loss, gradient = balance_loss(r.scores.reshape(by_row), r.indices.reshape(by_row), r.valid)
            total = total + loss
            dscores[r.layer] = gradient.reshape(r.scores.shape) * weight
    return total, dscores
