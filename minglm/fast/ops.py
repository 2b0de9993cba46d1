"""The fast namespace: twins of `minglm.model.ops`, for `ops=` of the model's own forward and backward.

Same names, same arguments, same results up to rounding; float32 only. `router` and `routed_experts` are the twins of
the functions in `minglm.model`: all experts of a layer at once instead of one after the other.
"""

import functools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from minglm.config import Config
from minglm.fast import attention, muon, products, rows
from minglm.fast.blas import one_thread_each, sgemm
from minglm.fast.team import team
from minglm.formats.mapped import ExpertStack
from minglm.formats.smallfloats import SmallFloats
from minglm.model.experts import routed_experts
from minglm.model.ops import IGNORE, Array, Sight, Tap, embed, no_tap
from minglm.model.params import Experts, Router, expert, map_record
from minglm.model.router import RouterSaved, Routing

NO_BIAS = np.zeros(0, np.float32)
KEPT = 1 << 28  # bytes of buffers that stay after a session
POOLED = 1 << 18  # bytes; smaller arrays come from NumPy, which is quick there


# -- what the forwards keep for the backwards --------------------------------------------------------------------


class MlpSaved(NamedTuple):
    x: Array
    gate: Array
    up: Array
    hidden: Array


class Visits(NamedTuple):
    """The picks sorted by expert, and what the experts' forward keeps."""

    slots: Array  # int [picks] token · K + rank
    starts: Array  # int [E + 1]
    places: Array  # int [N, K] where each token's picks are, experts in ascending order
    weights: Array  # [picks]
    x: Array  # [picks, D]
    gate: Array  # [picks, F]
    up: Array
    hidden: Array


class AttendSaved(NamedTuple):
    q: Array
    k: Array
    v: Array
    y: Array
    totals: Array
    begins: Array


class CrossEntropySaved(NamedTuple):
    logits: Array  # [N, V]
    targets: Array
    totals: Array
    shape: tuple[int, ...]


# -- the operations ----------------------------------------------------------------------------------------------


class FastOps:
    """The operations on a team of `threads`, with buffers that are used again from step to step and, outside a
    session, stay as long as the object.

    Nothing in a result depends on the number of threads. One caller at a time. Weights that do not fit raise
    ValueError.
    """

    embed = staticmethod(embed)
    one_thread_each = staticmethod(one_thread_each)

    def __init__(self, threads: int):
        self._team = team(threads)
        self._pool: dict[int, list[Array]] = {}
        self._looked: tuple[Any, Any] = (None, None)
        self._in_session = False

    @contextmanager
    def session(self) -> Iterator[None]:
        """Around many operations: other callers wait, and NumPy's own products stay on one thread too, because its
        waiting threads would take the processors from ours. Buffers beyond `KEPT` bytes are given back at the end."""
        with self._team.lock, one_thread_each():
            self._in_session = True
            try:
                yield
            finally:
                self._in_session = False
                if sum(4 * count * len(known) for count, known in self._pool.items()) > KEPT:
                    self._pool.clear()

    def _run(self, kernel: Any, *arguments: Any) -> None:
        self._team.run(kernel, *arguments)

    def _run_products(self, kernel: Any, *arguments: Any) -> None:
        with nullcontext() if self._in_session else one_thread_each():
            self._team.run(kernel, sgemm(), *arguments)

    # -- arrays ----------------------------------------------------------------------------------------------

    def empty(self, *shape: int) -> Array:
        """A float32 array that nobody else uses. Large ones are used again when nobody looks at them any more: fresh
        memory costs as much time as two passes over it."""
        count = math.prod(shape)
        if 4 * count < POOLED:
            return np.empty(shape, np.float32)
        known = self._pool.setdefault(count, [])
        for base in known:
            if sys.getrefcount(base) == 3:  # the pool's, the loop's and the call's own: no view is left
                return base.reshape(shape)
        known.append(np.empty(count, np.float32))
        return known[-1].reshape(shape)

    def like(self, x: Array) -> Array:
        return self.empty(*x.shape)

    def in_compute_dtype(self, record: Any, stored: Any, dtype: Any) -> Any:
        """The twin of `minglm.model.params.in_compute_dtype`: matrices stay as they are stored, and are widened where
        they are used."""
        if stored == dtype:
            return record
        return map_record(lambda name, array: array if array.ndim > 1 else array.astype(dtype, copy=False), record)

    def _wide(self, weight: Array, *shape: int) -> Array:
        """A weight of this shape as float32."""
        if isinstance(weight, SmallFloats):
            if weight.shape != shape:
                raise ValueError(f"a weight has shape {list(weight.shape)}, wanted {list(shape)}")
            return weight.astype(np.float32)
        check(weight, *shape, bfloat16=True)
        if weight.dtype == np.float32:
            return weight
        wide = self.like(weight)
        self._run(rows.widen_all, weight.view(np.uint16).reshape(-1), wide.reshape(-1))
        return wide

    # -- linear -----------------------------------------------------------------------------------------------

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:  # [.., in] -> [.., out]
        x_rows = flat(x)
        y = self.empty(len(x_rows), len(weight))
        wide = self._wide(weight, len(weight), x.shape[-1])
        bias = NO_BIAS if bias is None else check(bias, len(weight))
        self._run_products(products.linear_forward, x_rows, wide, bias, y)
        return y.reshape(*x.shape[:-1], len(weight))

    def linear_bwd(
        self, dy: Array, x: Array, weight: Array, bias: Array | None = None
    ) -> tuple[Array, Array, Array | None]:
        check(weight, dy.shape[-1], x.shape[-1])
        dy_rows, x_rows = flat(dy), flat(x)
        dx, dweight = self.like(x_rows), self.like(weight)
        dbias = NO_BIAS if bias is None else self.like(bias)
        pieces = -(-len(x_rows) // products.LONG)
        partial = (self.empty(pieces, weight.size) if pieces > 1 else dweight).reshape(pieces, -1)
        self._run_products(products.linear_backward, dy_rows, x_rows, weight, dx, partial, dweight.reshape(-1), dbias)
        return dx.reshape(x.shape), dweight, None if bias is None else dbias

    # -- rows -------------------------------------------------------------------------------------------------

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        x_rows = flat(x)
        y = self.like(x_rows)
        self._run(rows.norm_forward, x_rows, check(weight, x.shape[-1]), np.float32(eps), y)
        return y.reshape(x.shape)

    def rms_norm_bwd(self, dy: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        check(weight, x.shape[-1])
        x_rows = flat(x)
        dx, dweight, partial = (
            self.like(x_rows),
            self.like(weight),
            self.empty(-(-len(x_rows) // rows.ROWS), len(weight)),
        )
        self._run(rows.norm_backward, flat(dy), x_rows, weight, np.float32(eps), dx, dweight, partial)
        return dx.reshape(x.shape), dweight

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:  # [B, T, heads, d], [B, T, r/2] -> [B, T, heads, d]
        return self._turn(x, cos, sin, 1)

    def rope_bwd(self, dy: Array, cos: Array, sin: Array) -> Array:
        return self._turn(dy, cos, sin, -1)

    def _turn(self, x: Array, cos: Array, sin: Array, direction: int) -> Array:
        heads = flat(x, 2)
        y = self.like(heads)
        self._run(rows.turn_heads, heads, flat(cos), flat(sin), np.float32(direction), y)
        return y.reshape(x.shape)

    def add(self, x: Array, *others: Array) -> Array:
        total = x
        for other in others:
            y = self.like(x)
            self._run(rows.add_rows, flat(total, 0).reshape(-1), flat(other, 0).reshape(-1), y.reshape(-1))
            total = y
        return total

    def squares(self, x: Array) -> float:
        """Σ x², in float64 over blocks that are summed in float32."""
        x = flat(x, 0).reshape(-1)
        partial = np.empty(-(-len(x) // rows.BLOCK), np.float32)
        self._run(rows.squares_of, x, partial)
        return float(partial.sum(dtype=np.float64))

    def adamw(self, p: Array, g: Array, m: Array, v: Array, *how: float) -> None:
        """`minglm.train.optim.AdamW` for one array, in place. `how`: the factors, in the kernel's order."""
        self._run(rows.adamw, *(flat(a, 0).reshape(-1) for a in (p, g, m, v)), *(np.float32(x) for x in how))

    def muon(
        self,
        matrices: list[tuple[Array, Array, Array, float]],
        clip: float,
        momentum: float,
        kept: float,
        coefficients: tuple[float, float, float],
        tiny: float,
        steps: int,
    ) -> None:
        """`minglm.train.muon.Muon`, in place, for all matrices: (weight, gradient, running mean, length of the step).
        They may be stacked, [.., rows, cols]."""
        book, lengths, room = _matrices(matrices)
        how = (np.float32(x) for x in (clip, momentum, kept, *coefficients, tiny))
        self._run_products(muon.muon, book, lengths, *how, steps, self.empty(self._team.threads, room))

    def embed_bwd(self, dy: Array, ids: Array, weight: Array) -> Array:  # [B, T, D] -> [V, D]
        dweight = self.like(weight)
        self._run(rows.embed_backward, flat(dy), ids.reshape(-1), dweight)
        return dweight

    # -- gated MLP --------------------------------------------------------------------------------------------

    def expert_mlp(
        self, x: Array, gate_proj: Array, up_proj: Array, down_proj: Array, tap: Tap = no_tap
    ) -> tuple[Array, MlpSaved]:  # [.., D] -> [.., D]
        _refuse(tap)
        x_rows, F, D = flat(x), len(gate_proj), x.shape[-1]
        gate, up, hidden = (self.empty(len(x_rows), F) for _ in range(3))
        weights = self._wide(gate_proj, F, D), self._wide(up_proj, F, D), self._wide(down_proj, D, F)
        y = self.like(x_rows)
        self._run_products(products.mlp_forward, x_rows, *weights, gate, up, hidden, y)
        return y.reshape(x.shape), MlpSaved(x_rows, gate, up, hidden)

    def expert_mlp_bwd(
        self, dy: Array, saved: MlpSaved, gate_proj: Array, up_proj: Array, down_proj: Array
    ) -> tuple[Array, Array, Array, Array]:
        x, gate, up, hidden = saved
        check(down_proj, x.shape[-1], gate.shape[-1])
        grads = self.like(x), self.like(gate_proj), self.like(up_proj), self.like(down_proj)
        partials = self.empty(3, -(-len(x) // products.LONG), gate_proj.size)
        weights, room = (gate_proj, up_proj, down_proj), (self.like(up), self.like(gate), partials)
        flat_grads = [grad.reshape(-1) for grad in grads[1:]]
        self._run_products(products.mlp_backward, flat(dy), x, *weights, gate, up, hidden, *room, grads[0], *flat_grads)
        return grads[0].reshape(dy.shape), *grads[1:]

    # -- router and routed experts ----------------------------------------------------------------------------

    def router(
        self, x: Array, params: Router, config: Config, tap: Tap = no_tap, ops: Any = None
    ) -> tuple[Routing, RouterSaved]:  # [N, D] -> [N, K] ×2
        _refuse(tap)
        scores = self.linear(x, params.weight)
        N, E = scores.shape
        K, c = config.num_experts_per_tok, config
        routing = Routing(np.empty((N, K), np.int64), self.empty(N, K))
        how = c.n_group, c.topk_group, c.norm_topk_prob, np.float32(c.routed_scaling_factor)
        room = (self.empty(self._team.threads, E) for _ in range(2))
        self._run(rows.route, scores, check(params.e_score_correction_bias, E), *how, *room, *routing)
        return routing, RouterSaved(x, scores, routing)

    def routed_experts(
        self, x: Array, routing: Routing, params: Experts, tap: Tap = no_tap, ops: Any = None
    ) -> tuple[Array, Any]:  # [N, D] -> [N, D]
        _refuse(tap)
        if isinstance(params.gate_proj, ExpertStack):  # widened one at a time, and given back before the next
            params = Experts(*(part.astype(np.float32) for part in params))
            return routed_experts(x, routing, params, ops=self)
        if isinstance(params.gate_proj[0], SmallFloats):
            return routed_experts(x, routing, params, ops=self)
        (N, K), F = routing.indices.shape, params.gate_proj[0].shape[0]
        slots, starts, places = (np.empty(n, np.int64) for n in (N * K, len(params.gate_proj) + 1, (N, K)))
        picked_x, out = self.empty(N * K, x.shape[1]), self.empty(N * K, x.shape[1])
        gate, up, hidden = (self.empty(N * K, F) for _ in range(3))
        y, visits = self.like(x), Visits(slots, starts, places, self.empty(N * K), picked_x, gate, up, hidden)
        stored = params.gate_proj[0].dtype
        kind = np.zeros(0, np.float32 if stored == np.float32 else np.uint16)
        own_wide = self.empty(self._team.threads, 3, 0 if stored == np.float32 else F * x.shape[1])
        room = kind, own_wide, picked_x, gate, up, hidden, out
        picks = np.ascontiguousarray(routing.indices), flat(routing.weights)
        self._run_products(
            products.experts_forward, flat(x), *picks, *visits[:4], _addresses(params, F, x.shape[1]), *room, y
        )
        return y, visits

    def routed_experts_bwd(
        self, dy: Array, visits: Visits, routing: Routing, params: Experts, ops: Any = None
    ) -> tuple[Array, Array, Experts]:
        picked_dy, dpicked = self.like(visits.x), self.like(visits.x)
        dgate, dup, weighted = (self.like(visits.gate) for _ in range(3))
        dx, dweights = self.like(dy), self.like(routing.weights)
        grads = Experts(*(self.like(part) for part in params))
        for e in np.flatnonzero(np.diff(visits.starts) == 0):
            for part in grads:
                part[e] = 0
        room = picked_dy, dgate, dup, weighted, dpicked
        shape = visits.gate.shape[1], dy.shape[1]
        books = _addresses(params, *shape, bfloat16=False), _addresses(grads, *shape)
        self._run_products(
            products.experts_backward, flat(dy), *visits[:4], books[0], *visits[4:], *room, dx, dweights, books[1]
        )
        return dx, dweights, grads

    # -- attention --------------------------------------------------------------------------------------------

    def attend(
        self, q: Array, k: Array, v: Array, sight: Sight, tap: Tap = no_tap
    ) -> tuple[Array, AttendSaved]:  # [B, T, H, d], [B, S, G, d] ×2 -> [B, T, H, d]
        """Raises ValueError for a segment whose tokens do not stand together."""
        _refuse(tap)
        q = np.ascontiguousarray(q)
        B, T, H, _ = q.shape
        y, totals, begins = self.like(q), self.empty(B, H, T), self._first_keys(sight)
        room = self.empty(self._team.threads, attention.BLOCK, k.shape[1])
        self._run_products(
            attention.attend_forward, q, k, v, begins, np.ascontiguousarray(sight.slots), room, y, totals
        )
        return y, AttendSaved(q, k, v, y, totals, begins)

    def attend_bwd(self, dy: Array, saved: AttendSaved) -> tuple[Array, Array, Array]:
        q, k, v, y, totals, begins = saved
        dq, dk, dv, dk_heads, dv_heads = self.like(q), self.like(k), self.like(v), self.like(q), self.like(q)
        room = [self.empty(self._team.threads, attention.BLOCK, k.shape[1]) for _ in range(2)]
        k, v, parts = np.ascontiguousarray(k), np.ascontiguousarray(v), (dk_heads, dv_heads, dq, dk, dv)
        self._run_products(
            attention.attend_backward, np.ascontiguousarray(dy), q, k, v, y, totals, begins, *room, *parts
        )
        return dq, dk, dv

    def _first_keys(self, sight: Sight) -> Array:
        """`first_keys`, which every layer of a pass asks for again."""
        if self._looked[0] is not sight:
            self._looked = sight, first_keys(sight)
        return self._looked[1]

    # -- cross-entropy ----------------------------------------------------------------------------------------

    def cross_entropy(self, logits: Array, targets: Array) -> tuple[Any, CrossEntropySaved]:  # [.., V], [..] -> scalar
        logit_rows, flat_targets = flat(logits), np.ascontiguousarray(targets).reshape(-1)
        wrong = (flat_targets != IGNORE) & ((flat_targets < 0) | (flat_targets >= logits.shape[-1]))
        if wrong.any():
            raise IndexError(f"target {flat_targets[wrong][0]} is not in a vocabulary of {logits.shape[-1]}")
        losses, totals = np.empty(len(logit_rows), np.float32), np.empty((len(logit_rows), 2), np.float32)
        self._run(rows.entropy_forward, logit_rows, flat_targets, IGNORE, losses, totals)
        loss = losses.sum() / np.float32(max(int((flat_targets != IGNORE).sum()), 1))
        return loss, CrossEntropySaved(logit_rows, flat_targets, totals, logits.shape)

    def cross_entropy_bwd(self, dloss: Any, saved: CrossEntropySaved) -> Array:  # scalar -> [.., V]
        logits, targets, totals, shape = saved
        factor = np.float32(dloss / max(int((targets != IGNORE).sum()), 1))
        dlogits = self.like(logits)
        self._run(rows.entropy_backward, logits, targets, IGNORE, totals, factor, dlogits)
        return dlogits.reshape(shape)


@functools.cache
def shared_ops(threads: int) -> FastOps:
    """The process's operations for prompts: the buffers of one serve the next."""
    return FastOps(threads)


# -- helpers ---------------------------------------------------------------------------------------------------


def flat(x: Array, axes: int = 1) -> Array:
    """A contiguous float32 view, or copy, with all but the last `axes` axes made one."""
    if x.dtype != np.float32:
        raise ValueError(f"the fast operations compute in float32, got {x.dtype.name}; use minglm.model.ops for it")
    return np.ascontiguousarray(x).reshape(-1, *x.shape[x.ndim - axes :])


def check(weight: Array, *shape: int, bfloat16: bool = False) -> Array:
    """The weight, if kernels can read it. Raises ValueError for another shape or dtype, and for strides."""
    stored = weight.dtype
    known = stored == np.float32 or (bfloat16 and stored == ml_dtypes.bfloat16)
    if not known or weight.shape != shape or not weight.flags.c_contiguous:
        kinds = "float32 or bfloat16" if bfloat16 else "float32"
        raise ValueError(
            f"the fast operations want contiguous {kinds} weights of shape {list(shape)} here, got {stored} of "
            f"shape {list(weight.shape)} with strides {weight.strides}; use np.ascontiguousarray, or minglm.model.ops"
        )
    return weight


def _addresses(params: Experts, F: int, D: int, bfloat16: bool = True) -> Array:  # -> int64 [E, 3]
    """Where each expert's matrices begin: base + offset where they are stacked, one by one where they are not."""
    stacked = all(isinstance(part, np.ndarray) for part in params)
    for e in range(1 if stacked else len(params.gate_proj)):
        for part, shape in zip(expert(params, e), ((F, D), (F, D), (D, F)), strict=True):
            if check(part, *shape, bfloat16=bfloat16).dtype != params.gate_proj[0].dtype:
                raise ValueError(f"experts of a layer are of one dtype, got {part.dtype} in expert {e}")
    if stacked:
        return np.stack([part.ctypes.data + np.arange(len(part)) * part.strides[0] for part in params], axis=1)
    return np.array([[part.ctypes.data for part in expert(params, e)] for e in range(len(params.gate_proj))])


def _matrices(given: list[tuple[Array, Array, Array, float]]) -> tuple[Array, Array, int]:
    """What the kernel `muon` wants: its book and lengths, largest work first, and how much room a matrix needs."""
    book, lengths = [np.zeros((0, 5), np.int64)], []
    for p, g, m, length in given:
        *stacked, rows_, cols = p.shape
        offsets = 4 * rows_ * cols * np.arange(math.prod(stacked))
        starts = [check(part, *p.shape).ctypes.data + offsets for part in (p, g, m)]
        if not (p.flags.writeable and m.flags.writeable):
            raise ValueError("an update in place wants weights and means that can be written to; copy them")
        book.append(np.stack([*starts, np.full_like(offsets, rows_), np.full_like(offsets, cols)], axis=1))
        lengths += [length] * len(offsets)
    whole = np.concatenate(book)
    small, large = whole[:, 3:].min(axis=1), whole[:, 3:].max(axis=1)
    order = np.argsort(-(small**2) * (2 * large + small), kind="stable")
    room = 2 * int((small * (large + small)).max(initial=0))
    return whole[order], np.array(lengths, np.float32)[order], room


def first_keys(sight: Sight) -> Array:  # -> int [B, T]
    """The first key that each query sees."""
    segments = sight.key_segments
    begins = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    for row, starts in zip(segments, begins, strict=True):
        heads = row[starts & (row >= 0)]
        if len(np.unique(heads)) < len(heads):
            raise ValueError("a segment's tokens must stand together for the fast operations; use minglm.model.ops")
    run_start = np.maximum.accumulate(np.where(begins, np.arange(segments.shape[1]), 0), axis=1)
    return np.where(sight.segments < 0, sight.slots, np.take_along_axis(run_start, sight.slots, axis=1))


def _refuse(tap: Tap) -> None:
    if tap is not no_tap:
        raise ValueError("the fast operations cannot be tapped inside; use minglm.model.ops to watch every step")
