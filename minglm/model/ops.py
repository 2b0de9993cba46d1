"""Leaf operations: arrays in, arrays out, each with its backward under it.

An operation `y = op(x, …)` has a backward `op_bwd(dy, x, …)` that takes the same inputs, recomputes what is cheap and
returns one gradient per input array. Three operations are too dear to recompute: they return `(y, saved)` and their
backward is `op_bwd(dy, saved)`; what `saved` holds is their own business.

The layers reach the larger of these functions through an argument `ops`, by default this module. Another module with
the same names, of faster twins, can stand in for it.

Axis letters: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, d head size, D hidden size,
F expert hidden size, V vocabulary, N rows of any kind. Weights are [out, in], as stored.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Tap = Callable[[str, Array], Array]  # shown every named array; the model goes on with what it returns

Ops = Any  # this module, or whatever has functions of the same names

IGNORE = -100  # a target that counts for nothing, as in transformers and torch


def no_tap(name: str, array: Array) -> Array:
    """The default tap: look at nothing, change nothing."""
    return array


def scoped(tap: Tap, prefix: str) -> Tap:
    """The same tap, with a prefix before every name."""
    if tap is no_tap:
        return tap
    return lambda name, array: tap(prefix + name, array)


# -- sums --------------------------------------------------------------------------------------------------------


def add(x: Array, *others: Array) -> Array:
    """x + others, all of one shape: where a value was used several times, its gradients add up."""
    for other in others:
        x = x + other
    return x


# -- linear ------------------------------------------------------------------------------------------------------


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:  # [.., in] -> [.., out]
    """y = x Wᵀ + b. The leading axes are flattened so that one matrix product does it."""
    y = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0])


def linear_bwd(dy: Array, x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, Array, Array | None]:
    """dx = dy W, dW = dyᵀ x, db = the sum of dy over rows (None without a bias)."""
    dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = (dy_rows @ weight).reshape(x.shape)
    dweight = dy_rows.T @ x_rows
    return dx, dweight, None if bias is None else dy_rows.sum(axis=0)


# -- RMSNorm -----------------------------------------------------------------------------------------------------


def rms_norm(x: Array, weight: Array, eps: float) -> Array:  # [.., D] -> [.., D]
    """y = x / √(mean(x²) + eps) · w, over the last axis (arXiv 1910.07467)."""
    inverse_rms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * inverse_rms * weight


def rms_norm_bwd(dy: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """With n = x/r and g = dy · w:  dx = (g − n · mean(g · n)) / r,  dw = Σ dy · n.

    The second term is there because r depends on x: doubling a row leaves y unchanged (up to eps), so dx is
    orthogonal to x.
    """
    inverse_rms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    normalised = x * inverse_rms
    dnormalised = dy * weight
    along_x = np.mean(dnormalised * normalised, axis=-1, keepdims=True)
    dx = (dnormalised - normalised * along_x) * inverse_rms
    dweight = (dy * normalised).reshape(-1, x.shape[-1]).sum(axis=0)
    return dx, dweight


# -- sigmoid and SwiGLU ------------------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    """1 / (1 + e⁻ˣ), from e^−|x| so that nothing overflows."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def swiglu(gate: Array, up: Array) -> Array:  # [.., F], [.., F] -> [.., F]
    """silu(gate) · up, with silu(z) = z · sigmoid(z) (arXiv 2002.05202)."""
    return gate * sigmoid(gate) * up


def swiglu_bwd(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """With s = sigmoid(gate):  dgate = dy · up · s · (1 + gate · (1 − s)),  dup = dy · gate · s."""
    s = sigmoid(gate)
    dgate = dy * up * s * (1 + gate * (1 - s))
    dup = dy * gate * s
    return dgate, dup


# -- one expert, or any gated MLP --------------------------------------------------------------------------------


class MlpSaved(NamedTuple):
    """x [n, D] and the two hidden projections [n, F]; their SwiGLU is recomputed."""

    x: Array
    gate: Array
    up: Array


def expert_mlp(
    x: Array, gate_proj: Array, up_proj: Array, down_proj: Array, tap: Tap = no_tap
) -> tuple[Array, MlpSaved]:  # [.., D] -> [.., D]
    """down(silu(gate(x)) · up(x)), without biases: an expert, the shared expert and the dense MLP alike."""
    gate = tap("gate", linear(x, gate_proj))  # [.., D] -> [.., F]
    up = tap("up", linear(x, up_proj))  # [.., D] -> [.., F]
    hidden = tap("hidden", swiglu(gate, up))
    y = linear(hidden, down_proj)  # [.., F] -> [.., D]
    return y, MlpSaved(x, gate, up)


def expert_mlp_bwd(
    dy: Array, saved: MlpSaved, gate_proj: Array, up_proj: Array, down_proj: Array
) -> tuple[Array, Array, Array, Array]:
    """Returns dx, dgate_proj, dup_proj, ddown_proj."""
    x, gate, up = saved
    hidden = swiglu(gate, up)
    dhidden, ddown_proj, _ = linear_bwd(dy, hidden, down_proj)
    dgate, dup = swiglu_bwd(dhidden, gate, up)
    dx_up, dup_proj, _ = linear_bwd(dup, x, up_proj)
    dx_gate, dgate_proj, _ = linear_bwd(dgate, x, gate_proj)
    return dx_gate + dx_up, dgate_proj, dup_proj, ddown_proj


# -- rotary positions --------------------------------------------------------------------------------------------


def rope(x: Array, cos: Array, sin: Array) -> Array:  # [B, T, heads, d], [B, T, r/2] -> [B, T, heads, d]
    """Turn entry pairs (i, i + r/2) of each head's first r entries by their angle; the rest passes through.

    Rotary positions: arXiv 2104.09864. The pairs are half-split, as in GPT-NeoX (arXiv 2204.06745), not neighbours
    (2i, 2i + 1) as in that paper, GLM-4 and GLM-5.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]  # the same angle for every head
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def rope_bwd(dy: Array, cos: Array, sin: Array) -> Array:
    """A rotation's transpose is the rotation by minus the angle (a scale in cos and sin stays a scale)."""
    return rope(dy, cos, -sin)


# -- softmax and attention ---------------------------------------------------------------------------------------


def softmax(x: Array) -> Array:
    """Along the last axis. At least one entry of each row must be above −∞."""
    exps = np.exp(x - x.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def softmax_bwd(dy: Array, y: Array) -> Array:
    """dx = y · (dy − Σ dy · y), from the output y. Each row of dx sums to zero."""
    return y * (dy - np.vecdot(dy, y)[..., None])


class Sight(NamedTuple):
    """Which keys each query may see: itself and the earlier ones of its own segment."""

    slots: Array  # int [B, T] the key that is the query's own
    segments: Array  # int [B, T] of the queries; negative: padding, which sees only itself
    key_segments: Array  # int [B, S]

    @property
    def visible(self) -> Array:  # bool [B, T, S]
        keys, slots, segments = np.arange(self.key_segments.shape[1]), self.slots[:, :, None], self.segments[:, :, None]
        same_segment = (self.key_segments[:, None] == segments) & (segments >= 0)
        return (keys < slots) & same_segment | (keys == slots)


class AttendSaved(NamedTuple):
    """The inputs and the attention probabilities [B, H, T, S] (dear to recompute: a product over S and a softmax)."""

    q: Array
    k: Array
    v: Array
    probs: Array


def attend(
    q: Array, k: Array, v: Array, sight: Sight, tap: Tap = no_tap
) -> tuple[Array, AttendSaved]:  # [B, T, H, d], [B, S, G, d] ×2 -> [B, T, H, d]
    """softmax(q kᵀ / √d) v over the visible keys. Query head h reads key/value head h // R."""
    B, T, H, d = q.shape
    S = k.shape[1]
    q_heads, k_heads, v_heads = _by_group(q * d**-0.5, k, v)  # scaled here, where the array is small
    products = q_heads @ k_heads.swapaxes(-1, -2)  # [B, G, R, T, d] · [B, G, 1, d, S] -> [B, G, R, T, S]
    np.copyto(products, -np.inf, where=~sight.visible[:, None, None])
    scores = tap("scores", products.reshape(B, H, T, S))
    probs = tap("probs", softmax(scores))
    mixed = probs.reshape(products.shape) @ v_heads  # -> [B, G, R, T, d]
    return _merge_heads(mixed), AttendSaved(q, k, v, probs)


def attend_bwd(dy: Array, saved: AttendSaved) -> tuple[Array, Array, Array]:
    """dv = Pᵀ dy;  dS = softmax_bwd(dy vᵀ);  dq = dS k / √d;  dk = dSᵀ q / √d;  dk and dv summed over each group.

    The mask needs no second look: where a key is hidden its probability is 0, and so is dS.
    """
    q, k, v, probs = saved
    scale = q.shape[-1] ** -0.5
    q_heads, k_heads, v_heads = _by_group(q * scale, k, v)
    dmixed, _, _ = _by_group(dy, k, v)
    grouped = probs.reshape(*q_heads.shape[:-1], k.shape[1])  # -> [B, G, R, T, S]

    dprobs = dmixed @ v_heads.swapaxes(-1, -2)  # -> [B, G, R, T, S]
    dscores = softmax_bwd(dprobs, grouped)
    dq = dscores @ k_heads * scale  # -> [B, G, R, T, d]
    dk = (dscores.swapaxes(-1, -2) @ q_heads).sum(axis=2)  # R query heads share a key: -> [B, G, S, d]
    dv = (grouped.swapaxes(-1, -2) @ dmixed).sum(axis=2)
    return _merge_heads(dq), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def _by_group(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Views with heads first: q [B, G, R, T, d], k and v [B, G, 1, S, d] (broadcast, not repeated)."""
    B, T, H, d = q.shape
    G = k.shape[2]
    q_heads = q.reshape(B, T, G, H // G, d).transpose(0, 2, 3, 1, 4)
    return q_heads, k.swapaxes(1, 2)[:, :, None], v.swapaxes(1, 2)[:, :, None]


def _merge_heads(x: Array) -> Array:  # [B, G, R, T, d] -> [B, T, H, d]
    B, G, R, T, d = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, d)


# -- embedding ---------------------------------------------------------------------------------------------------


def embed(ids: Array, weight: Array) -> Array:  # [B, T], [V, D] -> [B, T, D]
    """Row `id` of the table for each id."""
    return weight[ids]


def embed_bwd(dy: Array, ids: Array, weight: Array) -> Array:  # [B, T, D] -> [V, D]
    """Each row collects the gradients of all its uses: `+=` with repeated indices would keep only the last."""
    dweight = np.zeros(weight.shape, dy.dtype)
    np.add.at(dweight, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
    return dweight


# -- cross-entropy -----------------------------------------------------------------------------------------------


class CrossEntropySaved(NamedTuple):
    """Probabilities [N, V], targets [N], which of them count, and the shape of the logits."""

    probs: Array
    targets: Array
    valid: Array
    shape: tuple[int, ...]


def cross_entropy(logits: Array, targets: Array) -> tuple[Any, CrossEntropySaved]:  # [.., V], [..] -> scalar
    """Mean of −log softmax(logits)[target] over the targets that are not IGNORE; 0 if none is. In nats."""
    rows = logits.reshape(-1, logits.shape[-1])
    flat = targets.reshape(-1)
    valid = flat != IGNORE
    shifted = rows - rows.max(axis=-1, keepdims=True)
    exps = np.exp(shifted)
    total = exps.sum(axis=-1, keepdims=True)
    picked = shifted[np.arange(len(flat)), np.where(valid, flat, 0)]
    losses = np.where(valid, np.log(total[:, 0]) - picked, 0)
    loss = losses.sum() / max(int(valid.sum()), 1)
    return loss, CrossEntropySaved(exps / total, flat, valid, logits.shape)


def cross_entropy_bwd(dloss: Any, saved: CrossEntropySaved) -> Array:  # scalar -> [.., V]
    """dlogits = dloss · (softmax − one-hot) / (number of valid targets), zero on ignored rows."""
    probs, targets, valid, shape = saved
    dlogits = probs.copy()
    dlogits[np.arange(len(targets)), np.where(valid, targets, 0)] -= 1
    dlogits[~valid] = 0
    return dlogits.reshape(shape) * probs.dtype.type(dloss / max(int(valid.sum()), 1))
