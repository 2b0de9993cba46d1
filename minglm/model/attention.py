"""Grouped-query attention: projections, optional q/k norm, rotation, cache, and who may see whom.

The sums over keys are `ops.attend`; here is everything around them.
"""

from typing import Any, NamedTuple

import numpy as np

from minglm.config import Config
from minglm.model import ops as numpy_ops
from minglm.model.kvcache import KVCache
from minglm.model.ops import Array, Ops, Sight, Tap, no_tap
from minglm.model.params import Attention, Linear, Weight
from minglm.model.rope import rotation

# -- where each token stands -------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """What one call's tokens need to know of their places; the same for every layer."""

    sight: Sight  # where each token stands in its row, cache included, and whom it sees there
    positions: Array  # [B, T]
    cos: Array  # [B, T, r/2]
    sin: Array  # [B, T, r/2]


def make_layout(
    shape: tuple[int, ...],
    config: Config,
    dtype: Any,
    cache: KVCache | None = None,
    positions: Array | None = None,
    segments: Array | None = None,
) -> Layout:
    """Places for new tokens, `shape` = (B, T).

    A token sees itself and the earlier tokens of its own segment, whatever their positions; padding (a negative
    segment) sees only itself and is seen by nobody. By default a row is one segment, the one that its cache ends
    with, and a token's position is the number of earlier tokens that it sees, so positions begin at 0 in each
    document and after any left padding.
    """
    batch, count = shape
    if cache is None:
        slots = np.broadcast_to(np.arange(count), (batch, count))
        known = np.zeros((batch, 0), np.int64)
    else:
        slots = cache.slots(count)
        known = cache.segments[:, : int(cache.length.max())]
    if segments is None:
        segments = np.broadcast_to(last_segment(cache, batch)[:, None], (batch, count))

    key_segments = np.full((batch, int(slots.max()) + 1), -1, np.int64)
    key_segments[:, : known.shape[1]] = known
    key_segments[np.arange(batch)[:, None], slots] = segments

    if positions is None:
        positions = np.where(segments < 0, 0, np.take_along_axis(_place_in_segment(key_segments), slots, axis=1))
    cos, sin = rotation(positions, config, dtype)
    return Layout(Sight(slots, segments, key_segments), positions, cos, sin)


def _place_in_segment(segments: Array) -> Array:  # [B, S] -> [B, S]
    """How many earlier entries of the row have the same segment."""
    order = np.argsort(segments, axis=1, kind="stable")  # each segment's entries together, in their order
    ordered = np.take_along_axis(segments, order, axis=1)
    index = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.diff(ordered, axis=1, prepend=ordered[:, :1] - 1) != 0
    start = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    places = np.empty_like(order)
    np.put_along_axis(places, order, index - start, axis=1)
    return places


def last_segment(cache: KVCache | None, batch: int) -> Array:  # -> [B]
    """The segment of each row's last token that is not padding; 0 where there is none."""
    if cache is None:
        return np.zeros(batch, np.int64)
    held = np.where(np.arange(cache.capacity) < cache.length[:, None], cache.segments, -1)
    last = cache.capacity - 1 - np.argmax(held[:, ::-1] >= 0, axis=1)
    return held[np.arange(batch), last].clip(min=0)


# -- the sub-layer -----------------------------------------------------------------------------------------------


class AttentionSaved(NamedTuple):
    """References to what the backward reads; norms and rotations are recomputed."""

    x: Array  # [B, T, D]
    q: Array  # [B, T, H, d] before its norm
    k: Array  # [B, T, G, d] before its norm
    heads: Array  # [B, T, H, d] what `attend` returned
    attend: Any
    layout: Layout


def attention(
    x: Array,
    params: Attention,
    config: Config,
    layout: Layout,
    cache: KVCache | None = None,
    layer: int = 0,
    tap: Tap = no_tap,
    ops: Ops = numpy_ops,
) -> tuple[Array, AttentionSaved]:  # [B, T, D] -> [B, T, D]
    """Project, norm each head, rotate, remember, attend, project back.

    The order is GLM-4.5's: bias, then norm over a head's d entries, then rotation, then cache (`Glm4MoeAttention` of
    transformers). `layer` is the layer's number in the cache.
    """
    B, T, _ = x.shape
    # 1. project
    q = tap("q", ops.linear(x, *params.q_proj).reshape(B, T, -1, config.head_dim))  # -> [B, T, H, d]
    k = tap("k", ops.linear(x, *params.k_proj).reshape(B, T, -1, config.head_dim))  # -> [B, T, G, d]
    v = tap("v", ops.linear(x, *params.v_proj).reshape(B, T, -1, config.head_dim))  # -> [B, T, G, d]
    # 2. norm
    q_normed = tap("q_norm", _head_norm(q, params.q_norm, config, ops))
    k_normed = tap("k_norm", _head_norm(k, params.k_norm, config, ops))
    # 3. rotate: a key is turned once in its life, before it is stored
    q_turned = tap("q_rope", ops.rope(q_normed, layout.cos, layout.sin))
    k_turned = tap("k_rope", ops.rope(k_normed, layout.cos, layout.sin))
    # 4. remember
    k_seen, v_seen = (
        (k_turned, v) if cache is None else cache.append(layer, k_turned, v, layout.sight.slots)
    )  # -> [B, S, G, d]
    # 5. attend
    mixed, saved_attend = ops.attend(q_turned, k_seen, v_seen, layout.sight, tap)  # -> [B, T, H, d]
    heads = tap("heads", mixed)
    # 6. project back
    out = tap("o", ops.linear(heads.reshape(B, T, -1), *params.o_proj))  # -> [B, T, D]
    return out, AttentionSaved(x, q, k, heads, saved_attend, layout)


def attention_bwd(
    dout: Array, saved: AttentionSaved, params: Attention, config: Config, ops: Ops = numpy_ops
) -> tuple[Array, Attention]:  # [B, T, D] -> [B, T, D], the record
    """The numbered steps of the forward, undone in reverse. Without a cache: training sees whole sequences."""
    x, q, k, heads, saved_attend, layout = saved
    B, T, _ = x.shape
    # 6. out = o_proj(heads)
    dheads, do_weight, _ = ops.linear_bwd(dout, heads.reshape(B, T, -1), *params.o_proj)
    # 5. heads = attend(q, k, v)
    dq_turned, dk_turned, dv = ops.attend_bwd(dheads.reshape(heads.shape), saved_attend)
    # 4. without a cache there is nothing to undo
    # 3. q, k = rope(q, k)
    dq_normed = ops.rope_bwd(dq_turned, layout.cos, layout.sin)
    dk_normed = ops.rope_bwd(dk_turned, layout.cos, layout.sin)
    # 2. q, k = head_norm(q, k)
    dq, dq_norm = _head_norm_bwd(dq_normed, q, params.q_norm, config, ops)
    dk, dk_norm = _head_norm_bwd(dk_normed, k, params.k_norm, config, ops)
    # 1. q, k, v = q_proj(x), k_proj(x), v_proj(x): x was used three times, so its gradients add up
    dx_q, dq_weight, dq_bias = ops.linear_bwd(dq.reshape(B, T, -1), x, *params.q_proj)
    dx_k, dk_weight, dk_bias = ops.linear_bwd(dk.reshape(B, T, -1), x, *params.k_proj)
    dx_v, dv_weight, dv_bias = ops.linear_bwd(dv.reshape(B, T, -1), x, *params.v_proj)
    dparams = Attention(
        q_proj=Linear(dq_weight, dq_bias),
        k_proj=Linear(dk_weight, dk_bias),
        v_proj=Linear(dv_weight, dv_bias),
        o_proj=Linear(do_weight, None),
        q_norm=dq_norm,
        k_norm=dk_norm,
    )
    return ops.add(dx_q, dx_k, dx_v), dparams


def _head_norm(x: Array, norm: Weight | None, config: Config, ops: Ops) -> Array:
    """RMSNorm over each head's d entries, one weight for all heads; GLM-4.5-Air has none."""
    return x if norm is None else ops.rms_norm(x, norm.weight, config.rms_norm_eps)


def _head_norm_bwd(dy: Array, x: Array, norm: Weight | None, config: Config, ops: Ops) -> tuple[Array, Weight | None]:
    if norm is None:
        return dy, None
    dx, dweight = ops.rms_norm_bwd(dy, x, norm.weight, config.rms_norm_eps)
    return dx, Weight(dweight)
