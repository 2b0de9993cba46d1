"""Dispatch and combine: every token reaches its experts, and every answer finds its way back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.model import experts as experts_module
from minglm.model import mlp, mlp_bwd, moe, moe_bwd, ops, routed_experts, routed_experts_bwd
from minglm.model.params import expert
from minglm.model.router import Routing
from tests.gradcheck import check_gradients
from tests.helpers import (
    MICRO,
    assert_all_differ,
    assert_close,
    flat,
    mutated,
    naive_mlp,
    naive_moe,
    random_params,
    random_state,
    refilled,
)

# nine tokens, six experts, two picks; nobody picks expert 3, many pick 4; the weights of a token add up to 2.5
N, E, K, D = 9, 6, 2, 20
CONFIG = MICRO.replace(n_routed_experts=E, n_group=1, topk_group=1, num_experts_per_tok=K, routed_scaling_factor=2.5)
RANDOM = random_state(0)
X = RANDOM.standard_normal((N, D))
INDICES = np.array([[4, 0], [1, 4], [4, 5], [0, 4], [4, 2], [5, 4], [0, 1], [4, 1], [2, 0]])
SHARE = RANDOM.uniform(0.2, 0.8, N)
WEIGHTS = 2.5 * np.stack([SHARE, 1 - SHARE], axis=1)
LAYER = random_params(CONFIG, 1).layers[1].mlp
EXPERTS = LAYER.experts


def answer(e, x):
    return naive_mlp(x, *(matrix[e] for matrix in EXPERTS))


PARTS = np.array([[answer(INDICES[n, k], X[n]) for k in range(K)] for n in range(N)])  # [N, K, D]
SHARED = np.array([naive_mlp(x, *(part.weight for part in LAYER.shared_experts)) for x in X])
RIGHT = (WEIGHTS[..., None] * PARTS).sum(axis=1)
ORDER = np.argsort(INDICES.reshape(-1), kind="stable")  # slots, expert by expert


def ours(indices=INDICES, weights=WEIGHTS, x=X, params=EXPERTS):
    return routed_experts(x, Routing(indices, weights), params)[0]


def fancy_add():
    y = np.zeros((N, D))
    y[np.repeat(np.arange(N), K)] += (WEIGHTS[..., None] * PARTS).reshape(-1, D)
    return y


def by_expert(weights, tokens):
    """Sorted parts, put back with these weights [N·K] and to these tokens [N·K]."""
    y = np.zeros((N, D))
    np.add.at(y, tokens, weights[:, None] * PARTS.reshape(-1, D)[ORDER])
    return y


def shifted_experts():
    """Boundaries from np.unique: the expert without tokens shifts all later ones."""
    _, dense_number = np.unique(INDICES, return_inverse=True)
    dense_number = dense_number.reshape(INDICES.shape)
    return sum(WEIGHTS[:, k, None] * np.array([answer(dense_number[n, k], X[n]) for n in range(N)]) for k in range(K))


def capacity(limit=N * K // E):
    y, used = np.zeros((N, D)), np.zeros(E, int)
    for n, k in np.ndindex(N, K):
        if used[INDICES[n, k]] < limit:
            y[n] += WEIGHTS[n, k] * PARTS[n, k]
        used[INDICES[n, k]] += 1
    return y


def other_mlp(e, x, act):
    gate, up, down = (matrix[e] for matrix in EXPERTS)
    return down @ act(gate @ x, up @ x)


def all_with(act):
    return sum(
        WEIGHTS[:, k, None] * np.array([other_mlp(INDICES[n, k], X[n], act) for n in range(N)]) for k in range(K)
    )


def silu(z):
    return z * ops.sigmoid(z)


flat_weights = WEIGHTS.reshape(-1)
WRONG = {
    "fancy_add": fancy_add(),
    "weights_unsorted": by_expert(flat_weights, ORDER // K),
    "token_mod": by_expert(flat_weights[ORDER], ORDER % N),
    "no_unsort": (flat_weights[ORDER, None] * PARTS.reshape(-1, D)[ORDER]).reshape(N, K, D).sum(axis=1),
    "shifted_experts": shifted_experts(),
    "weight_on_input": np.array([sum(answer(INDICES[n, k], WEIGHTS[n, k] * X[n]) for k in range(K)) for n in range(N)]),
    "ones": PARTS.sum(axis=1),
    "mean": PARTS.mean(axis=1),
    "top1": WEIGHTS[:, :1] * PARTS[:, 0],
    "capacity": capacity(),
    "swap": all_with(lambda gate, up: silu(up) * gate),
    "silu_prod": all_with(lambda gate, up: silu(up * gate)),
    "add_residual": RIGHT + X,
}


def test_routed_experts_equal_the_naive_sum():
    assert_close(ours(), RIGHT)
    assert_close(by_expert(flat_weights[ORDER], ORDER // K), RIGHT)  # the frame of the wrong ones is right


def test_every_wrong_dispatch_is_told_apart():
    assert len(WRONG) == 13
    assert_all_differ(WRONG, ours())


def test_each_picked_expert_is_visited_once_with_all_its_tokens():
    history = routed_experts(X, Routing(INDICES, WEIGHTS), EXPERTS)[1]
    assert [visit.expert for visit in history] == [0, 1, 2, 4, 5]
    for visit in history:
        assert visit.tokens.tolist() == [n for n in range(N) if visit.expert in INDICES[n]]
        assert (INDICES.reshape(-1)[visit.slots] == visit.expert).all()
        assert_close(visit.out, np.array([answer(visit.expert, X[n]) for n in visit.tokens]))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6))
def test_any_routing_equals_the_naive_sum_and_the_order_of_picks_is_free(tokens, picks, seed):
    random = random_state(seed)
    x = random.standard_normal((tokens, D))
    indices = np.array([random.permutation(E)[:picks] for _ in range(tokens)])
    weights = random.uniform(0.1, 2, (tokens, picks))
    y = ours(indices, weights, x)
    wanted = [sum(weights[n, k] * answer(indices[n, k], x[n]) for k in range(picks)) for n in range(tokens)]
    assert_close(y, np.array(wanted), 1e-11)
    assert_close(ours(indices[:, ::-1], weights[:, ::-1], x), y)


def test_no_token_gives_no_answer():
    y, history = routed_experts(X[:0], Routing(INDICES[:0], WEIGHTS[:0]), EXPERTS)
    assert (y.shape, history) == ((0, D), [])
    dx, dweights, _ = routed_experts_bwd(y, history, Routing(INDICES[:0], WEIGHTS[:0]), EXPERTS)
    assert (dx.shape, dweights.shape) == ((0, D), (0, K))


def test_experts_are_reached_one_by_one():
    for e in range(E):
        assert all(np.array_equal(a, b[e]) for a, b in zip(expert(EXPERTS, e), EXPERTS, strict=True))


# -- with router and shared expert -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"n_shared_experts": 0},
        {"num_experts_per_tok": 6},
        {"n_group": 3, "topk_group": 2},
    ],
)
@pytest.mark.parametrize("shape", [(3, 3), (1, 1)])
def test_moe_equals_the_naive_one(changes, shape):
    config = CONFIG.replace(**changes)
    params = random_params(config, 2).layers[1].mlp
    assert (params.shared_experts is None) == (config.n_shared_experts == 0)
    x = X[: shape[0] * shape[1]]
    y, _ = moe(x.reshape(*shape, D), params, config)
    assert_close(y.reshape(-1, D), np.array([naive_moe(row, params, config) for row in x]), 1e-11)


def test_wrong_shared_experts_are_told_apart():
    right, saved = moe(X[None], LAYER, CONFIG)
    routed = routed_experts(X, saved.router.routing, EXPERTS)[0]
    assert_close(right[0], routed + SHARED)
    wrong = {
        "shared_scaled": routed + 2.5 * SHARED,
        "no_shared": routed,
        "shared_avg": routed + SHARED / CONFIG.n_shared_experts,
        "shared in the mean": (routed + SHARED) / 2,
        "scaled twice": 2.5 * routed + SHARED,
        "add_residual": routed + SHARED + X,
        "shared reads the sum": routed + np.array(mlp(X + routed, LAYER.shared_experts)[0]),
    }
    assert_all_differ(wrong, right[0])


def test_emptying_the_routed_experts_leaves_the_shared_one():
    empty = LAYER._replace(experts=EXPERTS._replace(down_proj=0 * EXPERTS.down_proj))
    assert_close(moe(X[None], empty, CONFIG)[0][0], SHARED)


def test_tokens_do_not_disturb_each_other():
    together = moe(X[None], LAYER, CONFIG)[0][0]
    alone = np.concatenate([moe(x[None, None], LAYER, CONFIG)[0][0] for x in X])
    assert_close(together, alone)


# -- backward ----------------------------------------------------------------------------------------------------


def test_routed_experts_backward_equals_central_differences():
    def run(x, weights, **matrices):
        return routed_experts(x, Routing(INDICES, weights), refilled(EXPERTS, matrices))

    def backward(dy, x, weights, **matrices):
        history = run(x, weights, **matrices)[1]
        routing = Routing(INDICES, weights)
        dx, dweights, dparams = routed_experts_bwd(dy, history, routing, refilled(EXPERTS, matrices))
        return {"x": dx, "weights": dweights, **flat(dparams)}

    inputs = {"x": X, "weights": WEIGHTS, **flat(EXPERTS)}
    report = check_gradients(lambda **i: run(**i)[0], backward, inputs, samples=60)
    assert not report.wrong(), report.errors
    dexperts = backward(RANDOM.standard_normal((N, D)), **inputs)
    for name in flat(EXPERTS):
        assert not dexperts[name][3].any()  # nobody picked it
        assert dexperts[name][[0, 1, 2, 4, 5]].any(axis=(1, 2)).all()


@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 0}, {"norm_topk_prob": False, "num_experts_per_tok": 1}])
def test_moe_backward_equals_central_differences(changes):
    config = CONFIG.replace(**changes)
    params = random_params(config, 3).layers[1].mlp

    def run(x, **arrays):
        return moe(x, refilled(params, arrays), config)

    def backward(dy, x, **arrays):
        dx, dparams = moe_bwd(dy, run(x, **arrays)[1], refilled(params, arrays), config)
        return {"x": dx, **flat(dparams)}

    report = check_gradients(
        lambda **i: run(**i)[0],
        backward,
        {"x": X.reshape(3, 3, D), **flat(params)},
        lambda **i: run(**i)[1].router.routing.indices,
    )
    assert not report.wrong(), report.errors


def test_mlp_backward_equals_central_differences():
    params = random_params(CONFIG, 4).layers[0].mlp

    def backward(dy, x, **arrays):
        record = refilled(params, arrays)
        dx, dparams = mlp_bwd(dy, mlp(x, record)[1], record)
        return {"x": dx, **flat(dparams)}

    forward = lambda x, **arrays: mlp(x, refilled(params, arrays))[0]  # noqa: E731
    report = check_gradients(forward, backward, {"x": X.reshape(3, 3, D), **flat(params)})
    assert not report.wrong(), report.errors


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moe_and_its_gradients_keep_the_dtype_and_its_inputs(dtype):
    params, x = random_params(CONFIG, 1, dtype).layers[1].mlp, X[None].astype(dtype)
    for array in (x, *flat(params).values()):
        array.flags.writeable = False
    y, saved = moe(x, params, CONFIG)
    routing, history = saved.router.routing, saved.history
    dx_routed, dweights, _ = routed_experts_bwd(y[0], history, routing, params.experts)
    assert {dx_routed.dtype, dweights.dtype} == {np.dtype(dtype)}
    dx, dparams = moe_bwd(y, saved, params, CONFIG, np.ones((N, E), dtype))
    assert {a.dtype for a in (y, dx, *flat(dparams).values())} == {np.dtype(dtype)}
    assert_close(y, moe(X[None], LAYER, CONFIG)[0], 1e-5 if dtype == np.float32 else 0)


def test_the_tests_above_notice_a_broken_dispatch():
    """Sources with one piece replaced give other answers on these inputs."""
    broken_visits = mutated(
        experts_module.picks_by_expert, "order[starts[e] : ends[e]] // K", "order[starts[e] : ends[e]] % len(indices)"
    )
    run = mutated(routed_experts, "weights[slots] * out", "weights[tokens] * out")
    with_visits = mutated(routed_experts, "in picks_by_expert(", "in broken_visits(")
    with_visits.__globals__["broken_visits"] = broken_visits
    routing = Routing(INDICES, WEIGHTS)
    wrong = {f.__name__ + str(i): f(X, routing, EXPERTS)[0] for i, f in enumerate([run, with_visits])}
    assert_all_differ(wrong, RIGHT)
