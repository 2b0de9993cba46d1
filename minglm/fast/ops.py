"""The fast namespace: twins of `minglm.model.ops`, for `ops=` of the model's own forward and backward.

Same names, same arguments, same results up to rounding; float32 only. `routed_experts` is the twin of the function in
`minglm.model.experts`: all experts of a layer at once instead of one after the other. What is not worth a kernel is the
book's own (`embed`, `sigmoid`, `softmax`).

The number of threads is a property of the process: see `use_threads`.
"""

import sys
from typing import Any, NamedTuple

import numpy as np

from minglm.fast import attention, products, rows
from minglm.fast.blas import one_thread_each, sgemm
from minglm.fast.team import Team, cores, team
from minglm.model.ops import IGNORE, Array, Sight, Tap, embed, no_tap, sigmoid, softmax, softmax_bwd
from minglm.model.params import Experts, expert
from minglm.model.router import Routing

__all__ = ["embed", "sigmoid", "softmax", "softmax_bwd"]  # and everything below

NONE = np.zeros(0, np.float32)


def _team() -> Team:
    return team(_threads or cores())


_threads: int | None = None


def _run(kernel: Any, *arguments: Any) -> None:
    _team().run(kernel, *arguments)


def _run_products(kernel: Any, *arguments: Any) -> None:
    with one_thread_each():
        _team().run(kernel, sgemm(), *arguments)


# -- arrays ------------------------------------------------------------------------------------------------------


def flat(x: Array, axes: int = 1) -> Array:
    """A contiguous float32 view, or copy, with all but the last `axes` axes made one."""
    if x.dtype != np.float32:
        raise ValueError(f"the fast operations compute in float32, got {x.dtype.name}; use minglm.model.ops for it")
    return np.ascontiguousarray(x).reshape(-1, *x.shape[x.ndim - axes :])


_pool: dict[int, list[Array]] = {}
POOLED = 1 << 18  # bytes; smaller arrays come from NumPy, which is quick there


def empty(*shape: int) -> Array:
    """A float32 array that nobody else uses. Large ones are used again when nobody looks at them any more: fresh
    memory costs as much time as two passes over it."""
    count = int(np.prod(shape))
    if 4 * count < POOLED:
        return np.empty(shape, np.float32)
    known = _pool.setdefault(count, [])
    for base in known:
        if sys.getrefcount(base) == 3:  # the pool's, the loop's and the call's own: no view is left
            return base.reshape(shape)
    known.append(np.empty(count, np.float32))
    return known[-1].reshape(shape)


def like(x: Array) -> Array:
    return empty(*x.shape)


def forget_buffers() -> None:
    """Give the memory of buffers that are not in use back."""
    _pool.clear()


# -- linear ------------------------------------------------------------------------------------------------------


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:  # [.., in] -> [.., out]
    x_rows = flat(x)
    y = empty(len(x_rows), len(weight))
    _run_products(products.linear_forward, x_rows, weight, NONE if bias is None else bias, y)
    return y.reshape(*x.shape[:-1], len(weight))


def linear_bwd(dy: Array, x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, Array, Array | None]:
    dy_rows, x_rows = flat(dy), flat(x)
    dx, dweight = like(x_rows), like(weight)
    dbias = NONE if bias is None else like(bias)
    _run_products(products.linear_backward, dy_rows, x_rows, weight, dx, dweight, dbias)
    return dx.reshape(x.shape), dweight, None if bias is None else dbias


# -- rows --------------------------------------------------------------------------------------------------------


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    x_rows = flat(x)
    y = like(x_rows)
    _run(rows.norm_forward, x_rows, weight, np.float32(eps), y)
    return y.reshape(x.shape)


def rms_norm_bwd(dy: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    x_rows = flat(x)
    dx, dweight, scales = like(x_rows), like(weight), empty(len(x_rows))
    _run(rows.norm_backward, flat(dy), x_rows, weight, np.float32(eps), dx, dweight, scales)
    return dx.reshape(x.shape), dweight


def rope(x: Array, cos: Array, sin: Array) -> Array:  # [B, T, heads, d], [B, T, r/2] -> [B, T, heads, d]
    return _turn(x, cos, sin, 1)


def rope_bwd(dy: Array, cos: Array, sin: Array) -> Array:
    return _turn(dy, cos, sin, -1)


def _turn(x: Array, cos: Array, sin: Array, direction: int) -> Array:
    heads = flat(x, 2)
    y = like(heads)
    _run(rows.turn_heads, heads, flat(cos), flat(sin), np.float32(direction), y)
    return y.reshape(x.shape)


def add(x: Array, *others: Array) -> Array:
    total = x
    for other in others:
        y = like(x)
        _run(rows.add_rows, flat(total, 0).reshape(-1), flat(other, 0).reshape(-1), y.reshape(-1))
        total = y
    return total


def embed_bwd(dy: Array, ids: Array, weight: Array) -> Array:  # [B, T, D] -> [V, D]
    dweight = like(weight)
    _run(rows.embed_backward, flat(dy), ids.reshape(-1), dweight)
    return dweight


# -- gated MLP ---------------------------------------------------------------------------------------------------


class MlpSaved(NamedTuple):
    x: Array
    gate: Array
    up: Array
    hidden: Array


def expert_mlp(
    x: Array, gate_proj: Array, up_proj: Array, down_proj: Array, tap: Tap = no_tap
) -> tuple[Array, MlpSaved]:  # [.., D] -> [.., D]
    _refuse(tap)
    x_rows = flat(x)
    gate, up, hidden = (empty(len(x_rows), len(gate_proj)) for _ in range(3))
    y = like(x_rows)
    _run_products(products.mlp_forward, x_rows, gate_proj, up_proj, down_proj, gate, up, hidden, y)
    return y.reshape(x.shape), MlpSaved(x_rows, gate, up, hidden)


def expert_mlp_bwd(
    dy: Array, saved: MlpSaved, gate_proj: Array, up_proj: Array, down_proj: Array
) -> tuple[Array, Array, Array, Array]:
    x, gate, up, hidden = saved
    grads = like(x), like(gate_proj), like(up_proj), like(down_proj)
    dup, dgate = like(up), like(gate)
    weights = gate_proj, up_proj, down_proj
    _run_products(products.mlp_backward, flat(dy), x, *weights, gate, up, hidden, dup, dgate, *grads)
    return grads[0].reshape(dy.shape), *grads[1:]


# -- routed experts ----------------------------------------------------------------------------------------------


class Visits(NamedTuple):
    """The picks sorted by expert, and what the experts' forward keeps."""

    slots: Array  # int [picks] token · K + rank
    tokens: Array  # int [picks]
    starts: Array  # int [E + 1]
    places: Array  # int [N, K] where each token's picks are, experts in ascending order
    weights: Array  # [picks]
    x: Array  # [picks, D]
    gate: Array  # [picks, F]
    up: Array
    hidden: Array


def routed_experts(
    x: Array, routing: Routing, params: Experts, tap: Tap = no_tap, ops: Any = None
) -> tuple[Array, Visits]:  # [N, D] -> [N, D]
    _refuse(tap)
    (N, K), F = routing.indices.shape, params.gate_proj[0].shape[0]
    chosen = routing.indices.reshape(-1)
    slots = np.argsort(chosen, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(chosen, minlength=len(params.gate_proj)))])
    places = np.empty(N * K, np.int64)
    places[slots] = np.arange(N * K)
    places = np.sort(places.reshape(N, K), axis=1)
    weights = flat(routing.weights).reshape(-1)[slots]
    picked_x, out = empty(N * K, x.shape[1]), empty(N * K, x.shape[1])
    gate, up, hidden = (empty(N * K, F) for _ in range(3))
    y, visits = like(x), Visits(slots, slots // K, starts, places, weights, picked_x, gate, up, hidden)
    book = _addresses(params)
    _run_products(products.experts_forward, flat(x), *visits[1:5], book, picked_x, gate, up, hidden, out, y)
    return y, visits


def routed_experts_bwd(
    dy: Array, visits: Visits, routing: Routing, params: Experts, ops: Any = None
) -> tuple[Array, Array, Experts]:
    picked_dy, dpicked = like(visits.x), like(visits.x)
    dgate, dup, weighted = (like(visits.gate) for _ in range(3))
    dx, dweights = like(dy), np.empty(len(visits.slots), np.float32)
    grads = Experts(*(like(part) for part in params))
    for e in np.flatnonzero(np.diff(visits.starts) == 0):
        for part in grads:
            part[e] = 0
    room = picked_dy, dgate, dup, weighted, dpicked
    books = _addresses(params), _addresses(grads)
    _run_products(
        products.experts_backward, flat(dy), *visits[1:5], books[0], *visits[5:], *room, dx, dweights, books[1]
    )
    by_slot = np.empty_like(dweights)
    by_slot[visits.slots] = dweights
    return dx, by_slot.reshape(routing.weights.shape), grads


def _addresses(params: Experts) -> Array:  # -> int64 [E, 3]
    return np.array([[part.ctypes.data for part in expert(params, e)] for e in range(len(params.gate_proj))])


# -- attention ---------------------------------------------------------------------------------------------------


class AttendSaved(NamedTuple):
    q: Array
    k: Array
    v: Array
    y: Array
    totals: Array
    sight: Sight


def attend(
    q: Array, k: Array, v: Array, sight: Sight, tap: Tap = no_tap
) -> tuple[Array, AttendSaved]:  # [B, T, H, d], [B, S, G, d] ×2 -> [B, T, H, d]
    _refuse(tap)
    q = np.ascontiguousarray(q)
    B, T, H, _ = q.shape
    y, totals = like(q), empty(B, H, T)
    room = empty(_team().threads, attention.BLOCK, k.shape[1])
    slots, segments, key_segments = (np.ascontiguousarray(a) for a in sight)
    _run_products(attention.attend_forward, q, k, v, slots, segments, key_segments, room, y, totals)
    return y, AttendSaved(q, k, v, y, totals, sight)


def attend_bwd(dy: Array, saved: AttendSaved) -> tuple[Array, Array, Array]:
    q, k, v, y, totals, sight = saved
    dq, dk, dv, dk_heads, dv_heads = like(q), like(k), like(v), like(q), like(q)
    room = [empty(_team().threads, attention.BLOCK, k.shape[1]) for _ in range(2)]
    k, v, segments = np.ascontiguousarray(k), np.ascontiguousarray(v), np.ascontiguousarray(sight.segments)
    parts = dk_heads, dv_heads, dq, dk, dv
    _run_products(attention.attend_backward, np.ascontiguousarray(dy), q, k, v, y, totals, segments, *room, *parts)
    return dq, dk, dv


def _refuse(tap: Tap) -> None:
    if tap is not no_tap:
        raise ValueError("the fast operations cannot be tapped inside; use minglm.model.ops to watch every step")


# -- cross-entropy -----------------------------------------------------------------------------------------------


class CrossEntropySaved(NamedTuple):
    logits: Array  # [N, V]
    targets: Array
    totals: Array
    shape: tuple[int, ...]


def cross_entropy(logits: Array, targets: Array) -> tuple[Any, CrossEntropySaved]:  # [.., V], [..] -> scalar
    logit_rows, flat_targets = flat(logits), np.ascontiguousarray(targets).reshape(-1)
    losses, totals = np.empty((2, len(logit_rows)), np.float32)
    _run(rows.entropy_forward, logit_rows, flat_targets, IGNORE, losses, totals)
    loss = losses.sum() / np.float32(max(int((flat_targets != IGNORE).sum()), 1))
    return loss, CrossEntropySaved(logit_rows, flat_targets, totals, logits.shape)


def cross_entropy_bwd(dloss: Any, saved: CrossEntropySaved) -> Array:  # scalar -> [.., V]
    logits, targets, totals, shape = saved
    factor = np.float32(dloss / max(int((targets != IGNORE).sum()), 1))
    dlogits = like(logits)
    _run(rows.entropy_backward, logits, targets, IGNORE, totals, factor, dlogits)
    return dlogits.reshape(shape)
