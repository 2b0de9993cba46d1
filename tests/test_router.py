"""The router: who is picked, how loud they speak, and how the load is balanced."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.model import balance_loss, expert_load, ops, router, router_bwd, update_bias
from minglm.model.params import Router
from tests.gradcheck import check_gradients
from tests.helpers import MICRO, assert_all_differ, assert_close, naive_route, naive_sigmoid, random_state

N, E, K, D = 40, 8, 3, 20
RANDOM = random_state(0)
X = RANDOM.standard_normal((N, D))
WEIGHT = RANDOM.standard_normal((E, D)) / 4
BIAS = RANDOM.uniform(-0.25, 0.25, E)
PLAIN = MICRO.replace(n_group=1, topk_group=1, routed_scaling_factor=2.5)  # K = 3 of E = 8
GROUPS = PLAIN.replace(n_group=4, topk_group=2)
NEGATIVE = BIAS - 2  # sigmoid scores lie below 1: every biased score is negative


def dense(routing):
    """[N, E]: each expert's weight, 0 if not picked: free of the order of the picks."""
    table = np.zeros((len(routing.indices), E))
    for n, k in np.ndindex(*routing.indices.shape):
        table[n, routing.indices[n, k]] += routing.weights[n, k]
    return table


def ours(config=PLAIN, bias=BIAS, x=X, weight=WEIGHT):
    return dense(router(x, Router(weight, bias), config)[0])


def naive(config=PLAIN, bias=BIAS):
    table = np.zeros((N, E))
    for n in range(N):
        for e, w in naive_route(X[n], WEIGHT, bias, config).items():
            table[n, e] = w
    return table


def top(values, count=K):
    return [int(e) for e in np.argsort(-values, kind="stable")[:count]]


def softmax(z):
    return ops.softmax(np.asarray(z))


def wrong_router(score=None, select=None, weigh=None, norm=None, scale=2.5, config=PLAIN):
    """One token at a time, with one decision changed."""
    table = np.zeros((N, E))
    for n in range(N):
        logits = WEIGHT @ X[n]
        s = score(logits) if score else np.array([naive_sigmoid(z) for z in logits])
        picks = select(s) if select else top(s + BIAS)
        w = weigh(s, picks, logits) if weigh else s[picks]
        if norm:
            w = norm(w, s)
        elif config.norm_topk_prob:
            w = w / w.sum()
        table[n, picks] = w * scale
    return table


WRONG = {
    "biased_weights": wrong_router(weigh=lambda s, picks, z: (s + BIAS)[picks]),
    "no_bias": wrong_router(select=top),
    "bias_in_logit": wrong_router(score=lambda z: ops.sigmoid(z + BIAS), select=top),
    "minus_bias": wrong_router(select=lambda s: top(s - BIAS)),
    "softmax": wrong_router(score=softmax),
    "softmax_topk": wrong_router(weigh=lambda s, picks, z: softmax(s[picks])),
    "norm_before": wrong_router(norm=lambda w, s: w / s.sum()),
    "no_norm": wrong_router(norm=lambda w, s: w),
    "norm_over_K": wrong_router(norm=lambda w, s: w / K),
    "no_scale": wrong_router(scale=1.0),
    "lowest": wrong_router(select=lambda s: top(-s - BIAS)),
    "unpaired": wrong_router(weigh=lambda s, picks, z: np.sort(s[picks])[::-1]),
}


def test_router_equals_the_naive_loops():
    assert_close(ours(), naive())
    assert_close(ours(), wrong_router())  # the frame of the wrong ones is right


def test_every_wrong_router_is_told_apart():
    assert len(WRONG) == 12
    assert_all_differ(WRONG, ours())


def test_without_normalisation_the_weights_are_the_scaled_scores():
    config = PLAIN.replace(norm_topk_prob=False)
    assert_close(ours(config), naive(config))
    wrong = {
        "normalised": ours(),
        "no_scale": wrong_router(config=config, scale=1.0),
        "biased_weights": wrong_router(config=config, weigh=lambda s, picks, z: (s + BIAS)[picks]),
        "softmax": wrong_router(config=config, score=softmax),
    }
    assert_all_differ(wrong, ours(config))


def group_router(value, fill, bias=NEGATIVE):
    """Groups of two experts, two groups kept; `value` of a group's biased scores, `fill` for closed groups."""
    table = np.zeros((N, E))
    for n in range(N):
        s = ops.sigmoid(WEIGHT @ X[n])
        biased = (s + bias).reshape(-1, 2)
        open_groups = top(np.array([value(g) for g in biased]), 2)
        kept = np.where(np.isin(np.arange(4), open_groups)[:, None], biased, fill).reshape(-1)
        picks = top(kept)
        table[n, picks] = 2.5 * s[picks] / s[picks].sum()
    return table


@pytest.mark.parametrize("bias", [BIAS, NEGATIVE])
def test_groups_equal_the_naive_loops_even_with_negative_biased_scores(bias):
    assert_close(ours(GROUPS, bias), naive(GROUPS, bias))
    assert_close(ours(GROUPS, bias), group_router(np.sum, -np.inf, bias))


def test_wrong_groups_are_told_apart_by_negative_biased_scores():
    wrong = {
        "group_max": group_router(np.max, -np.inf),
        "group_fill_zero": group_router(np.sum, 0.0),
        "groups ignored": ours(PLAIN, NEGATIVE),
        "least of the group": group_router(np.min, -np.inf),
    }
    assert_all_differ(wrong, ours(GROUPS, NEGATIVE))
    # with positive biased scores nobody would notice
    assert_close(group_router(np.sum, 0.0, BIAS + 1), ours(GROUPS, BIAS + 1))


def test_larger_groups_are_judged_by_their_two_best():
    config = PLAIN.replace(n_group=2, topk_group=1)
    assert_close(ours(config), naive(config))
    scores = np.array([[0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.1, 0.1]])  # star against pair
    logits = np.log(scores / (1 - scores))
    routing, _ = router(np.eye(1), Router(logits.T, np.zeros(8)), config.replace(num_experts_per_tok=2))
    assert sorted(routing.indices[0]) == [4, 5]


def test_one_expert_with_normalisation_has_the_scale_as_its_weight_and_no_gradient():
    config = PLAIN.replace(num_experts_per_tok=1)
    params = Router(WEIGHT, BIAS)
    routing, saved = router(X, params, config)
    assert_close(routing.weights, np.full((N, 1), 2.5))
    dx, dparams = router_bwd(RANDOM.standard_normal((N, 1)), saved, params, config)
    assert max(np.abs(dx).max(), np.abs(dparams.weight).max()) < 1e-14


def test_one_expert_without_normalisation_has_its_score_as_its_weight():
    config = PLAIN.replace(num_experts_per_tok=1, norm_topk_prob=False)
    assert_close(ours(config), naive(config))


def test_equal_scores_go_to_the_lower_number():
    """A rule is needed for runs to repeat; the lower number is what a stable sort gives."""
    routing, _ = router(X, Router(np.zeros((E, D)), np.zeros(E)), PLAIN)
    assert (routing.indices == [0, 1, 2]).all()
    routing, _ = router(X, Router(np.zeros((E, D)), np.array([0, 0, 0, 0, 0, 0.1, 0, 0.1])), PLAIN)
    assert (routing.indices == [5, 7, 0]).all()
    routing, _ = router(X, Router(np.zeros((E, D)), np.zeros(E)), GROUPS)
    assert (routing.indices == [0, 1, 2]).all()


def test_picks_come_best_first_and_differ():
    routing, saved = router(X, Router(WEIGHT, BIAS), PLAIN)
    biased = np.take_along_axis(saved.scores + BIAS, routing.indices, axis=-1)
    assert (np.diff(biased, axis=-1) <= 0).all()
    assert all(len(set(row)) == K for row in routing.indices.tolist())


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6), st.booleans())
def test_router_equals_the_naive_loops_for_any_grouping(tokens, groups, size, seed, norm):
    experts = groups * (size + 1)
    kept = 1 + seed % groups
    config = MICRO.replace(
        n_routed_experts=experts,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=1 + seed % (kept * (size + 1)),
        norm_topk_prob=norm,
    )
    random = random_state(seed)
    x, weight, bias = random.standard_normal((tokens, D)), random.standard_normal((experts, D)), random.randn(experts)
    routing, _ = router(x, Router(weight, bias), config)
    for n in range(tokens):
        wanted = naive_route(x[n], weight, bias, config)
        assert routing.indices[n].tolist() == list(wanted)
        assert_close(routing.weights[n], np.array(list(wanted.values())))


# -- backward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, GROUPS, PLAIN.replace(norm_topk_prob=False)])
def test_router_backward_equals_central_differences(config):
    def run(x, weight, bias):
        return router(x, Router(weight, bias), config)

    def backward(dy, x, weight, bias):
        dx, dparams = router_bwd(dy, run(x, weight, bias)[1], Router(weight, bias), config)
        return dx, *dparams

    report = check_gradients(
        lambda **i: run(**i)[0].weights,
        backward,
        {"x": X[:9], "weight": WEIGHT, "bias": BIAS},
        lambda **i: run(**i)[0].indices,
    )
    assert not report.wrong(), report.errors


def test_no_gradient_reaches_the_selection_bias_and_it_has_no_say_in_the_weights():
    params = Router(WEIGHT, BIAS)
    routing, saved = router(X, params, PLAIN)
    _, dparams = router_bwd(RANDOM.standard_normal((N, K)), saved, params, PLAIN, RANDOM.standard_normal((N, E)))
    assert not dparams.e_score_correction_bias.any()
    shifted, _ = router(X, Router(WEIGHT, BIAS + 0.5), PLAIN)  # all alike: the same experts
    assert np.array_equal(shifted.indices, routing.indices)
    assert np.array_equal(shifted.weights, routing.weights)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_router_and_balance_keep_the_dtype_and_do_not_write_into_their_inputs(dtype):
    params, x, dscores = Router(WEIGHT.astype(dtype), BIAS.astype(dtype)), X.astype(dtype), np.ones((N, E), dtype)
    for array in (*params, x, dscores):
        array.flags.writeable = False
    routing, saved = router(x, params, GROUPS)
    dx, dparams = router_bwd(routing.weights, saved, params, GROUPS, dscores)
    loss, gradient = balance_loss(saved.scores[None], routing.indices[None], np.ones((1, N), bool))
    arrays = [routing.weights, saved.scores, dx, *dparams, loss, gradient]
    assert {a.dtype for a in arrays} == {np.dtype(dtype)}
    bias = update_bias(params.e_score_correction_bias, expert_load(routing.indices, E), 1e-3)
    assert bias.dtype == dtype


# -- loss-free balancing -----------------------------------------------------------------------------------------

# 16 valid tokens and 4 of padding: N·K/E = 6 picks each on average, and expert 1 has exactly 6
VALID = np.arange(20) < 16
LOAD = np.array([8, 6, 6, 14, 5, 4, 2, 3])


def picks_with_load():
    """[20, 3] picks with those loads over the valid tokens: the fullest remaining experts first; padding on 7."""
    left, indices = LOAD.copy(), []
    for _ in range(16):
        row = top(left)
        left[row] -= 1
        indices.append(row)
    assert not left.any()
    return np.array(indices + [[7, 6, 5]] * 4)


def test_expert_load_counts_every_pick_of_every_valid_token():
    indices = picks_with_load()
    assert expert_load(indices, E, VALID).tolist() == LOAD.tolist()
    assert expert_load(indices, E, VALID.reshape(2, 10)).tolist() == LOAD.tolist()
    assert expert_load(indices, E).tolist() == [8, 6, 6, 14, 5, 8, 6, 7]
    assert expert_load(indices, E, np.zeros(20, bool)).tolist() == [0] * E


def test_bias_moves_one_step_against_the_load_and_not_at_all_at_the_mean():
    bias, rate = RANDOM.uniform(-0.3, 0.3, E), 1e-3
    new = update_bias(bias, LOAD, rate)

    def steps(after):
        return (np.asarray(after) - bias) / rate  # never `after` itself: a step of 1e-3 disappears in a relative error

    assert_close(steps(new), np.array([-1.0, 0, 0, -1, 1, 1, 1, 1]), 1e-9)
    indices = picks_with_load()
    share = LOAD / LOAD.sum()
    wrong = {
        "sign": bias + rate * np.sign(LOAD - 6),
        "proportional": bias + rate * (6 - LOAD),
        "relative": bias + rate * (6 - LOAD) / 6,
        "N_over_E": bias + rate * np.sign(2 - LOAD),
        "share_vs_count": bias + rate * np.sign(1 / E - LOAD),
        "top1": bias + rate * np.sign(2 - expert_load(indices[:, :1], E, VALID)),
        "padding": update_bias(bias, expert_load(indices, E), rate),
        "replace": new - bias,
        "geq": bias + rate * np.where(LOAD >= 6, -1, 1),
        "median": bias + rate * np.sign(np.median(LOAD) - LOAD),
        "absent_only": bias + rate * (LOAD == 0),
        "times_bias": bias * (1 + rate * np.sign(6 - LOAD)),
        "recentred": new - new.mean(),
    }
    assert_close(share.sum(), 1.0)
    assert len(wrong) == 13
    assert_all_differ({name: steps(after) for name, after in wrong.items()}, steps(new))
    assert np.isclose(bias, update_bias(new, 12 - LOAD, rate)).all()  # the old array was left alone


def test_bias_updates_even_out_a_skewed_router():
    skewed = Router(WEIGHT, np.linspace(0, 0.8, E))
    spread = []
    for _ in range(400):
        load = expert_load(router(X, skewed, PLAIN)[0].indices, E)
        spread.append(load.max() - load.min())
        skewed = skewed._replace(e_score_correction_bias=update_bias(skewed.e_score_correction_bias, load, 5e-3))
    assert np.mean(spread[-50:]) < 0.3 * spread[0]


# -- the sequence-level balance loss -----------------------------------------------------------------------------


def naive_balance(scores, indices, valid):
    """The mean over sequences of Σ_e f_e · P_e."""
    losses = []
    for s, picks, v in zip(scores, indices, valid, strict=True):
        tokens = [t for t in range(len(v)) if v[t]]
        if not tokens:
            continue
        experts, k = s.shape[-1], picks.shape[-1]
        total = 0.0
        for e in range(experts):
            f = experts / (k * len(tokens)) * sum(e in picks[t] for t in tokens)
            total += f * sum(s[t, e] / s[t].sum() for t in tokens) / len(tokens)
        losses.append(total)
    return np.mean(losses)


def balance_inputs():
    scores = random_state(5).uniform(0.05, 0.95, (4, 6, E))
    indices = np.argsort(-scores - BIAS, axis=-1)[..., :K]
    valid = np.ones((4, 6), bool)
    valid[1, :2], valid[2, 3:], valid[3] = False, False, False  # left padding, right padding, no token at all
    return scores, indices, valid


def test_balance_loss_equals_the_naive_loops_and_leaves_padding_out():
    scores, indices, valid = balance_inputs()
    right, _ = balance_loss(scores, indices, valid)
    assert right == pytest.approx(naive_balance(scores, indices, valid), rel=1e-12)
    every = np.ones_like(valid)
    raw = [
        sum(E / (K * 6) * expert_load(i, E)[e] * s[:, e].mean() for e in range(E))
        for s, i in zip(scores, indices, strict=True)
    ]
    wrong = {
        "padding counted": naive_balance(scores, indices, every),
        "batch for sequence": naive_balance(scores[valid][None], indices[valid][None], np.ones((1, valid.sum()), bool)),
        "scores not divided by their sum": np.mean(raw),
        "empty sequence counted": right * 3 / 4,
        "without E/K": right * K / E,
    }
    assert_all_differ(wrong, right)


def test_balance_loss_is_one_when_balanced_and_E_over_K_when_all_go_to_the_same():
    even = np.full((1, 8, E), 0.5)
    turns = (np.arange(8)[:, None] + np.arange(K)) % E
    assert balance_loss(even, turns[None], np.ones((1, 8), bool))[0] == pytest.approx(1)
    same = np.where(np.arange(E) < K, 0.9, 1e-9) * np.ones((1, 8, 1))
    picks = np.broadcast_to(np.arange(K), (1, 8, K))
    assert balance_loss(same, picks, np.ones((1, 8), bool))[0] == pytest.approx(E / K, rel=1e-6)


def test_balance_gradient_equals_central_differences_and_is_zero_on_padding():
    scores, indices, valid = balance_inputs()
    report = check_gradients(
        lambda scores: balance_loss(scores, indices, valid)[0],
        lambda dloss, scores: (dloss * balance_loss(scores, indices, valid)[1],),
        {"scores": scores},
        samples=60,
    )
    assert not report.wrong(), report.errors
    gradient = balance_loss(scores, indices, valid)[1]
    assert not gradient[~valid].any()
    assert_close((gradient * scores).sum(axis=-1) + 1, np.ones(valid.shape))  # only shares matter: doubling s is free


def test_a_batch_of_padding_has_no_balance_loss():
    scores, indices, valid = balance_inputs()
    loss, gradient = balance_loss(scores, indices, np.zeros_like(valid))
    assert loss == 0
    assert not gradient.any()
