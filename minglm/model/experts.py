"""The mixture of experts: send each token to its K experts, weigh their answers, add the shared expert's."""

from typing import Any, NamedTuple

import numpy as np

from minglm.config import Config
from minglm.model import ops as numpy_ops
from minglm.model.ops import Array, Ops, Tap, no_tap, scoped
from minglm.model.params import Experts, Mlp, Moe, Weight, expert, zeros_like
from minglm.model.router import RouterSaved, Routing, router, router_bwd

# -- a gated MLP with its record: the dense layers' and the shared expert ----------------------------------------


def mlp(x: Array, params: Mlp, tap: Tap = no_tap, ops: Ops = numpy_ops) -> tuple[Array, Any]:  # [.., D] -> [.., D]
    """`ops.expert_mlp` on the weights of one record."""
    return ops.expert_mlp(x, *_matrices(params), tap)


def mlp_bwd(
    dy: Array, saved: Any, params: Mlp, ops: Ops = numpy_ops
) -> tuple[Array, Mlp]:  # [.., D] -> [.., D], the record
    """`ops.expert_mlp_bwd`, its gradients in a record."""
    dx, dgate, dup, ddown = ops.expert_mlp_bwd(dy, saved, *_matrices(params))
    return dx, Mlp(Weight(dgate), Weight(dup), Weight(ddown))


def _matrices(params: Mlp) -> tuple[Array, Array, Array]:
    return params.gate_proj.weight, params.up_proj.weight, params.down_proj.weight


# -- the routed experts ------------------------------------------------------------------------------------------


class Visit(NamedTuple):
    """What happened at one expert that was picked: n slots of the flattened picks [N·K]."""

    expert: int
    slots: Array  # [n] token · K + rank
    tokens: Array  # [n]
    out: Array  # [n, D] the expert's answers, not yet weighted
    saved: Any


def picks_by_expert(indices: Array, experts: int) -> list[tuple[int, Array, Array]]:  # [N, K] -> (e, slots, tokens)
    """Sort the N·K picks by expert; experts that nobody picked are left out."""
    K = indices.shape[1]
    order = np.argsort(indices.reshape(-1), kind="stable")  # slots, expert by expert
    ends = np.cumsum(np.bincount(indices.reshape(-1), minlength=experts))
    starts = np.concatenate([[0], ends[:-1]])
    return [
        (e, order[starts[e] : ends[e]], order[starts[e] : ends[e]] // K) for e in range(experts) if starts[e] < ends[e]
    ]


def routed_experts(
    x: Array, routing: Routing, params: Experts, tap: Tap = no_tap, ops: Ops = numpy_ops
) -> tuple[Array, list[Visit]]:  # [N, D] -> [N, D]
    """y[t] = Σ_k weights[t, k] · expert_{indices[t, k]}(x[t]). No token is ever dropped.

    One matrix product per expert over all of its tokens: gathering the weights of each token's experts instead would
    read them once per token.
    """
    y = np.zeros_like(x)
    weights = routing.weights.reshape(-1, 1)  # [N·K, 1]
    history = []
    for e, slots, tokens in picks_by_expert(routing.indices, len(params.gate_proj)):
        tap(f"experts.{e}.tokens", tokens)  # to be seen, not replaced: they follow from the picks
        answers, saved = ops.expert_mlp(x[tokens], *expert(params, e), scoped(tap, f"experts.{e}."))
        out = tap(f"experts.{e}.out", answers)  # [n, D]
        y[tokens] += weights[slots] * out  # within one expert every token is different: += loses nothing
        history.append(Visit(e, slots, tokens, out, saved))
    return y, history


def routed_experts_bwd(
    dy: Array, history: list[Visit], routing: Routing, params: Experts, ops: Ops = numpy_ops
) -> tuple[Array, Array, Experts]:
    """Returns dx [N, D], dweights [N, K] and the experts' gradients (zero for an expert that nobody picked)."""
    dx = np.zeros_like(dy)
    weights = routing.weights.reshape(-1, 1)
    dweights = np.zeros(routing.weights.size, dy.dtype)
    dparams = zeros_like(params)
    for e, slots, tokens, out, saved in history:
        dweights[slots] = (dy[tokens] * out).sum(axis=-1)
        dout = weights[slots] * dy[tokens]
        dx_e, *dmatrices = ops.expert_mlp_bwd(dout, saved, *expert(params, e))
        dx[tokens] += dx_e
        for gradient, matrix in zip(dparams, dmatrices, strict=True):
            gradient[e] = matrix
    return dx, dweights.reshape(routing.weights.shape), dparams


# -- router, routed experts and shared expert together -----------------------------------------------------------


class MoeSaved(NamedTuple):
    x: Array  # [N, D]
    router: RouterSaved
    history: list[Visit]
    shared: Any


def moe(
    x: Array, params: Moe, config: Config, tap: Tap = no_tap, ops: Ops = numpy_ops
) -> tuple[Array, MoeSaved]:  # [B, T, D] -> [B, T, D]
    """The K picked experts' weighted answers plus the shared expert's (arXiv 2401.06066).

    The scaling factor is in the routed weights; the shared expert sees the same input and is added as it is.
    """
    rows = x.reshape(-1, x.shape[-1])  # -> [N, D]
    # 1. router
    routing, saved_router = getattr(ops, "router", router)(rows, params.gate, config, tap, ops)
    # 2. routed experts
    answers, history = getattr(ops, "routed_experts", routed_experts)(rows, routing, params.experts, tap, ops)
    out = routed = tap("routed", answers)
    # 3. shared expert
    saved_shared = None
    if params.shared_experts is not None:
        answer, saved_shared = mlp(rows, params.shared_experts, scoped(tap, "shared_experts."), ops)
        out = ops.add(routed, tap("shared", answer))
    return out.reshape(x.shape), MoeSaved(rows, saved_router, history, saved_shared)


def moe_bwd(
    dout: Array, saved: MoeSaved, params: Moe, config: Config, dscores: Array | None = None, ops: Ops = numpy_ops
) -> tuple[Array, Moe]:  # [B, T, D] -> [B, T, D], the record
    """x was used by the router, the routed experts and the shared expert: three gradients add up.

    `dscores` [N, E]: the balance loss's gradient at the router's scores.
    """
    x, saved_router, history, saved_shared = saved
    drows = dout.reshape(x.shape)
    # 3. shared expert
    gradients, dshared = [], None
    if params.shared_experts is not None:
        dx_shared, dshared = mlp_bwd(drows, saved_shared, params.shared_experts, ops)
        gradients.append(dx_shared)
    # 2. routed experts
    backward = getattr(ops, "routed_experts_bwd", routed_experts_bwd)
    dx_routed, dweights, dexperts = backward(drows, history, saved_router.routing, params.experts, ops)
    # 1. router
    route_bwd = getattr(ops, "router_bwd", router_bwd)
    dx_router, dgate = route_bwd(dweights, saved_router, params.gate, config, dscores, ops)
    return ops.add(dx_routed, dx_router, *gradients).reshape(dout.shape), Moe(dgate, dexperts, dshared)
