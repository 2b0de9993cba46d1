"""The transformer: embedding, decoder layers, final norm, head."""

from typing import NamedTuple

from minglm.config import Config
from minglm.model import ops as numpy_ops
from minglm.model.attention import Layout, make_layout
from minglm.model.kvcache import KVCache
from minglm.model.layer import LayerSaved, layer, layer_bwd
from minglm.model.ops import Array, Ops, Tap, no_tap, scoped
from minglm.model.params import Layer, Params, Weight, compute_dtype, in_compute_dtype


class TransformerSaved(NamedTuple):
    ids: Array  # [B, T]
    layout: Layout
    layers: list[LayerSaved]  # empty unless asked for
    last: Array  # [B, T, D] the residual stream after the last layer


def transformer(
    ids: Array,
    params: Params,
    config: Config,
    cache: KVCache | None = None,
    positions: Array | None = None,
    segments: Array | None = None,
    tap: Tap = no_tap,
    ops: Ops = numpy_ops,
    save: bool = False,
    stop_at: int | None = None,
) -> tuple[Array, TransformerSaved]:  # int [B, T] -> [B, T, D]
    """Hidden states after the final norm, the ones that the head and the MTP layers read.

    `segments` [B, T] numbers the documents of a row (negative: padding) and `positions` [B, T] overrides the default
    of counting within each; see `make_layout`. With a cache the new tokens continue its rows. `save=True` keeps what
    the backward needs. `stop_at=n` stops after n layers and returns the residual stream there, not normed.
    """
    dtype = compute_dtype(params)
    layout = make_layout(ids.shape, config, dtype, cache, positions, segments)
    x = tap("embed_tokens", ops.embed(ids, params.embed_tokens.weight).astype(dtype, copy=False))  # -> [B, T, D]
    saved_layers = []
    for i, stored in enumerate(params.layers[:stop_at]):
        weights = getattr(ops, "in_compute_dtype", in_compute_dtype)(stored, params.norm.weight.dtype, dtype)
        x, saved = layer(x, weights, config, layout, cache, i, scoped(tap, f"layers.{i}."), ops)
        if save:
            saved_layers.append(saved)
    if cache is not None:
        cache.advance(layout.sight.segments)
    saved_all = TransformerSaved(ids, layout, saved_layers, x)
    if stop_at is not None:
        return x, saved_all
    norm = params.norm.weight.astype(dtype, copy=False)
    return tap("norm", ops.rms_norm(x, norm, config.rms_norm_eps)), saved_all


def head(hidden: Array, params: Params, tap: Tap = no_tap, ops: Ops = numpy_ops) -> Array:  # [B, T, D] -> [B, T, V]
    """Logits: one score for every token of the vocabulary."""
    return tap("logits", ops.linear(hidden, head_weight(params).astype(hidden.dtype, copy=False)))


def head_bwd(
    dlogits: Array, hidden: Array, params: Params, ops: Ops = numpy_ops
) -> tuple[Array, Array]:  # [B, T, V] -> [B, T, D], [V, D]
    """Returns dhidden and the gradient of the head's weight, which is the embedding's when they are tied."""
    dhidden, dweight, _ = ops.linear_bwd(dlogits, hidden, head_weight(params))
    return dhidden, dweight


def head_weight(params: Params) -> Array:
    """The matrix [V, D] that makes logits: the head's own, or the embedding when they are tied."""
    return params.embed_tokens.weight if params.lm_head is None else params.lm_head.weight


def transformer_bwd(
    dhidden: Array,
    saved: TransformerSaved,
    params: Params,
    config: Config,
    dscores: dict[int, Array] | None = None,
    ops: Ops = numpy_ops,
) -> tuple[Weight, tuple[Layer, ...], Weight]:
    """Gradients of the embedding, the layers and the final norm, from the gradient at the hidden states [B, T, D].

    `dscores[i]` [N, E]: the balance loss's gradient at the router of layer i. Needs `save=True` in the forward.
    """
    assert len(saved.layers) == len(params.layers), "run transformer(…, save=True) first"
    dx, dnorm = ops.rms_norm_bwd(dhidden, saved.last, params.norm.weight, config.rms_norm_eps)
    dlayers: list[Layer] = []
    for i in reversed(range(len(params.layers))):
        of_balance = None if dscores is None else dscores.get(i)
        dx, dlayer = layer_bwd(dx, saved.layers[i], params.layers[i], config, of_balance, ops)
        dlayers.append(dlayer)
    dembedding = ops.embed_bwd(dx, saved.ids, params.embed_tokens.weight)
    return Weight(dembedding), tuple(reversed(dlayers)), Weight(dnorm)
