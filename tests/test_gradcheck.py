"""The gradient checker is itself checked: it must pass every true backward and catch every mutated one.

Leaf operations: the wrong formulas that students write. Sub-layers: one piece of their source replaced.
"""

import importlib

import numpy as np
import pytest

from minglm.model import (
    attention,
    attention_bwd,
    layer,
    layer_bwd,
    loss,
    make_layout,
    moe,
    moe_bwd,
    mtp_layer,
    mtp_layer_bwd,
    ops,
    rotation,
    routed_experts,
    routed_experts_bwd,
    router,
    router_bwd,
    shift_targets,
)
from minglm.model.params import Router
from minglm.model.router import Routing, _normalise_bwd
from tests import gradcheck
from tests.gradcheck import BOUND, check_gradients, check_model
from tests.helpers import MICRO, causal, flat, mutated, naive_silu, random_params, random_state, refilled, swapped

# the package has a function of this name, so the module itself is fetched by its path
transformer_module = importlib.import_module("minglm.model.transformer")
mtp_module = importlib.import_module("minglm.model.mtp")

RANDOM = random_state(0)
EPS = 1e-3


def normal(*shape):
    return RANDOM.standard_normal(shape)


def judge(f, true_bwd, wrong, inputs, choices=None, samples=24):
    """True passes, every wrong one is caught; returns how many were."""
    known = {}
    report = check_gradients(f, true_bwd, inputs, choices, samples, known=known)
    assert not report.wrong(), report.errors
    assert report.checked > 5 * report.skipped
    caught = [
        name for name, bwd in wrong.items() if check_gradients(f, bwd, inputs, choices, samples, known=known).wrong()
    ]
    assert len(caught) == len(wrong), f"not caught: {sorted(wrong.keys() - set(caught))}"
    return len(caught)


# -- leaf operations ---------------------------------------------------------------------------------------------


def test_linear_mutations_are_caught():
    inputs = {"x": normal(2, 3, 5), "weight": normal(5, 5), "bias": normal(5)}  # square: a lost transpose still fits

    def wrong(dx=lambda dy, w: dy @ w, dw=lambda dy, x: dy.T @ x, db=lambda dy: dy.sum(axis=0)):
        def bwd(dy, x, weight, bias):
            rows = dy.reshape(-1, 5)
            return dx(rows, weight).reshape(x.shape), dw(rows, x.reshape(-1, 5)), db(rows)

        return bwd

    mutants = {
        "dx without its transpose": wrong(dx=lambda dy, w: dy @ w.T),
        "dW transposed": wrong(dw=lambda dy, x: x.T @ dy),
        "dW halved": wrong(dw=lambda dy, x: dy.T @ x / 2),
        "db averaged": wrong(db=lambda dy: dy.mean(axis=0)),
        "db of one row": wrong(db=lambda dy: dy[0]),
        "db over the features": wrong(db=lambda dy: dy.sum(axis=1)[:5]),
    }
    assert judge(ops.linear, ops.linear_bwd, mutants, inputs) == 6


def test_rms_norm_mutations_are_caught():
    x = (normal(5, 6) + 0.7) * np.array([0.01, 0.3, 1, 5, 0.1])[:, None]
    inputs = {"x": x, "weight": 1.5 + RANDOM.uniform(-1, 1, 6)}

    def wrong(dx=None, dw=None):
        def bwd(dy, x, weight):
            r = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)
            g = dy * weight
            true_dx, true_dw = ops.rms_norm_bwd(dy, x, weight, EPS)
            return dx(dy, g, x, r) if dx else true_dx, dw(dy, x, r) if dw else true_dw

        return bwd

    def mean(a):
        return np.mean(a, axis=-1, keepdims=True)

    mutants = {
        "r held constant": wrong(dx=lambda dy, g, x, r: g / r),
        "sum for mean": wrong(dx=lambda dy, g, x, r: g / r - x * mean(g * x) * 6 / r**3),
        "dy for g in the second term": wrong(dx=lambda dy, g, x, r: g / r - x * mean(dy * x) / r**3),
        "r squared for r cubed": wrong(dx=lambda dy, g, x, r: g / r - x * mean(g * x) / r**2),
        "plus for minus": wrong(dx=lambda dy, g, x, r: g / r + x * mean(g * x) / r**3),
        "LayerNorm's mean term": wrong(dx=lambda dy, g, x, r: (g - mean(g)) / r - x * mean(g * x) / r**3),
        "dw averaged": wrong(dw=lambda dy, x, r: (dy * x / r).mean(axis=0)),
        "dw without 1/r": wrong(dw=lambda dy, x, r: (dy * x).sum(axis=0)),
    }
    true = lambda dy, x, weight: ops.rms_norm_bwd(dy, x, weight, EPS)  # noqa: E731
    assert judge(lambda x, weight: ops.rms_norm(x, weight, EPS), true, mutants, inputs) == 8


def test_swiglu_mutations_are_caught():
    inputs = {"gate": 2 * normal(4, 6), "up": normal(4, 6) + 0.5}

    def wrong(slope=None, dup=None, use=lambda slope, up: slope * up):
        def bwd(dy, gate, up):
            s = ops.sigmoid(gate)
            d = slope(gate, s) if slope else s * (1 + gate * (1 - s))
            return dy * use(d, up), dy * (dup(gate, s) if dup else gate * s)

        return bwd

    def swapped_answers(dy, gate, up):
        return ops.swiglu_bwd(dy, gate, up)[::-1]

    mutants = {
        "sigmoid_prime": wrong(lambda g, s: s * (1 - s)),
        "sigma_only": wrong(lambda g, s: s),
        "second_only": wrong(lambda g, s: g * s * (1 - s)),
        "lost_g": wrong(lambda g, s: s + s * (1 - s)),
        "silu_1_silu": wrong(lambda g, s: g * s * (1 - g * s)),
        "sigma_of_silu": wrong(lambda g, s: ops.sigmoid(g * s) * (1 + g * (1 - ops.sigmoid(g * s)))),
        "forgot_up": wrong(use=lambda slope, up: slope),
        "dup_sigma": wrong(dup=lambda g, s: s),
        "dup_gate": wrong(dup=lambda g, s: g),
        "swapped": swapped_answers,
        "roles": lambda dy, gate, up: ops.swiglu_bwd(dy, up, gate)[::-1],
        "no_dy": lambda dy, gate, up: ops.swiglu_bwd(np.ones_like(dy), gate, up),
    }
    assert judge(ops.swiglu, ops.swiglu_bwd, mutants, inputs) == 12


def test_right_forms_of_the_swiglu_backward_pass():
    inputs = {"gate": 2 * normal(4, 6), "up": normal(4, 6) + 0.5}

    def other_form(dy, gate, up):
        s = ops.sigmoid(gate)
        silu = np.vectorize(naive_silu)(gate)
        return dy * up * (silu + s * (1 - silu)), dy * silu

    assert judge(ops.swiglu, other_form, {}, inputs) == 0


def test_rope_mutations_are_caught():
    cos, sin = rotation(np.array([[5, 6, 9]]), MICRO, np.float64)
    inputs = {"x": normal(1, 3, 3, 8)}
    mutants = {
        "turned on, not back": lambda dy, x: (ops.rope(dy, cos, sin),),
        "not turned": lambda dy, x: (dy,),
        "turned twice": lambda dy, x: (ops.rope_bwd(ops.rope_bwd(dy, cos, sin), cos, sin),),
        "rest dropped": lambda dy, x: (ops.rope_bwd(dy, cos, sin) * (np.arange(8) < 4),),
        "only cos": lambda dy, x: (ops.rope(dy, cos, 0 * sin),),
    }
    true = lambda dy, x: (ops.rope_bwd(dy, cos, sin),)  # noqa: E731
    assert judge(lambda x: ops.rope(x, cos, sin), true, mutants, inputs) == 5


def test_a_rotation_that_also_scales_has_the_scale_in_its_backward():
    """YaRN puts a factor on cos and sin; the transpose keeps it, the inverse would divide by it."""
    cos, sin = (1.3 * a for a in rotation(np.array([[5, 6, 9]]), MICRO, np.float64))
    true = lambda dy, x: (ops.rope_bwd(dy, cos, sin),)  # noqa: E731
    inverse = lambda dy, x: (np.concatenate([a := ops.rope_bwd(dy, cos, sin)[..., :4] / 1.69, dy[..., 4:]], -1),)  # noqa: E731, F841
    assert judge(lambda x: ops.rope(x, cos, sin), true, {"inverse": inverse}, {"x": normal(1, 3, 3, 8)}) == 1


def test_softmax_mutations_are_caught():
    inputs = {"x": normal(4, 4)}  # square: a wrong axis still fits
    mutants = {
        "no_rowsum": lambda dy, y: y * dy,
        "sigmoid_like": lambda dy, y: y * (1 - y) * dy,
        "rowsum_axis": lambda dy, y: y * (dy - (dy * y).sum(axis=0, keepdims=True)),
        "rowsum_no_P": lambda dy, y: y * (dy - dy.sum(axis=-1, keepdims=True)),
        "mean": lambda dy, y: y * (dy - (dy * y).mean(axis=-1, keepdims=True)),
        "no_outer_P": lambda dy, y: dy - (dy * y).sum(axis=-1, keepdims=True),
    }
    wrong = {name: lambda dy, x, m=m: (m(dy, ops.softmax(x)),) for name, m in mutants.items()}
    assert judge(ops.softmax, lambda dy, x: (ops.softmax_bwd(dy, ops.softmax(x)),), wrong, inputs) == 6


def test_ones_upstream_would_hide_every_softmax_mistake():
    """Why the checker projects with random numbers: Σ softmax = 1 whatever x is, so all slopes are zero."""
    y = ops.softmax(normal(4, 4))
    assert np.abs(ops.softmax_bwd(np.ones_like(y), y)).max() < 1e-15


CAUSAL = np.tril(np.ones((4, 4), bool))[None]


def attend_parts(dy, q, k, v):
    """The pieces of the attention backward per query head, from plain einsum: H = 6, G = 2."""
    k, v = np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2)  # [1, 4, 6, d]
    c = q.shape[-1] ** -0.5
    S = np.where(CAUSAL[:, None], np.einsum("bthd,bshd->bhts", q, k) * c, -np.inf)
    P = ops.softmax(S)
    dP = np.einsum("bthd,bshd->bhts", dy, v)
    dS = P * (dP - (dP * P).sum(axis=-1, keepdims=True))
    return k, c, np.where(np.isinf(S), 0, S), P, dP, dS


def grouped(x, how=np.sum):  # [1, S, 6, d] -> [1, S, 2, d]
    return how(x.reshape(1, 4, 2, 3, -1), axis=3)


def wrong_attend(dS=None, dV="bhts,bthd->bshd", dV_of=None, dK="bhts,bthd->bshd", scales=(1, 1), group=grouped):
    def bwd(dy, q, k, v):
        k_all, c, S, P, dP, true_dS = attend_parts(dy, q, k, v)
        d = true_dS if dS is None else dS(P, dP)
        dq = np.einsum("bhts,bshd->bthd", d, k_all) * c * scales[0]
        dk = np.einsum(dK, d, q) * c * scales[1]
        dv = np.einsum(dV, P if dV_of is None else dV_of(P, S), dy)
        return dq, group(dk), group(dv)

    return bwd


def test_attend_mutations_are_caught():
    inputs = {"q": normal(1, 4, 6, 8), "k": normal(1, 4, 2, 8), "v": normal(1, 4, 2, 8)}

    def dK_uses_k(dy, q, k, v):
        k_all, c, _, _, _, dS = attend_parts(dy, q, k, v)
        dq, _, dv = wrong_attend()(dy, q, k, v)
        return dq, grouped(np.einsum("bhts,bthd->bshd", dS, k_all) * c), dv

    def rows(a):
        return a.sum(axis=-1, keepdims=True)

    mutants = {
        "no_rowsum": wrong_attend(lambda P, dP: P * dP),
        "sigmoid_like": wrong_attend(lambda P, dP: P * (1 - P) * dP),
        "rowsum_axis": wrong_attend(lambda P, dP: P * (dP - (dP * P).sum(axis=-2, keepdims=True))),
        "rowsum_no_P": wrong_attend(lambda P, dP: P * (dP - rows(dP))),
        "mean": wrong_attend(lambda P, dP: P * (dP - rows(dP * P) / 4)),
        "no_outer_P": wrong_attend(lambda P, dP: dP - rows(dP * P)),
        "PdO": wrong_attend(dV="bhst,bthd->bshd"),
        "dV_from_scores": wrong_attend(dV_of=lambda P, S: S),
        "dS_not_transposed": wrong_attend(dK="bhst,bthd->bshd"),
        "dK_uses_k": dK_uses_k,
        "no_scale": wrong_attend(scales=(8**0.5, 8**0.5)),
        "scale_twice": wrong_attend(scales=(8**-0.5, 8**-0.5)),
        "scale_q_only": wrong_attend(scales=(1, 8**0.5)),
        "mean over the group": wrong_attend(group=lambda x: grouped(x, np.mean)),
        "first of the group": wrong_attend(group=lambda x: x[:, :, ::3]),
        "last of the group": wrong_attend(group=lambda x: x[:, :, 2::3]),
        "tile_group": wrong_attend(group=lambda x: x.reshape(1, 4, 3, 2, -1).sum(axis=2)),
    }
    forward = lambda q, k, v: ops.attend(q, k, v, causal(len(q), 4))[0]  # noqa: E731
    true = lambda dy, q, k, v: ops.attend_bwd(dy, ops.attend(q, k, v, causal(len(q), 4))[1])  # noqa: E731
    assert judge(forward, wrong_attend(), {}, inputs) == 0  # the mutants' unmutated frame is right
    assert judge(forward, true, mutants, inputs) == 17


def test_embed_mutations_are_caught():
    ids = np.array([[3, 1, 3], [0, 3, 4]])

    def keeps_last(dy, weight):
        dweight = np.zeros_like(weight)
        dweight[ids] += dy
        return (dweight,)

    def averages(dy, weight):
        counts = np.maximum(np.bincount(ids.reshape(-1), minlength=len(weight)), 1)
        return (ops.embed_bwd(dy, ids, weight) / counts[:, None],)

    def shifted(dy, weight):
        return (ops.embed_bwd(dy, np.roll(ids, 1, axis=1), weight),)

    true = lambda dy, weight: (ops.embed_bwd(dy, ids, weight),)  # noqa: E731
    wrong = {"keeps last": keeps_last, "averages": averages, "shifted": shifted}
    assert judge(lambda weight: ops.embed(ids, weight), true, wrong, {"weight": normal(6, 4)}) == 3


def test_cross_entropy_mutations_are_caught():
    targets = np.array([2, -100, 0, 4, -100, 1, 1])
    logits = normal(7, 7)
    logits[3] += 900
    valid = targets != -100
    onehot = np.zeros((7, 7))
    onehot[np.flatnonzero(valid), targets[valid]] = 1

    def wrong(formula, keep=valid, n=5):
        return lambda dloss, logits: (dloss * formula(ops.softmax(logits)) * keep[:, None] / n,)

    every = np.ones(7, bool)

    def unstable(z):
        return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)

    mutants = {
        "p_only": wrong(lambda p: p),
        "target_only": wrong(lambda p: (p - 1) * onehot),
        "d_wrt_prob": wrong(lambda p: -onehot / p),
        "sign": wrong(lambda p: onehot - p),
        "no_mean": wrong(lambda p: p - onehot, n=1),
        "divides_by_N": wrong(lambda p: p - onehot, n=7),
        "masked_rows_leak": wrong(lambda p: p - onehot, keep=every),
        "softmax_axis": lambda dloss, logits: wrong(lambda p: ops.softmax(logits.T).T - onehot)(dloss, logits),
        "double_softmax": wrong(lambda p: ops.softmax(p) - onehot),
        "log_not_prob": wrong(lambda p: np.log(p) - onehot),
        "double_shift": wrong(lambda p: p - np.roll(onehot, 1, axis=0)),
        "ignores_dloss": lambda dloss, logits: wrong(lambda p: p - onehot)(1.0, logits),
        "unstable_exp": lambda dloss, logits: wrong(lambda p: unstable(logits) - onehot)(dloss, logits),
    }
    forward = lambda logits: ops.cross_entropy(logits, targets)[0]  # noqa: E731
    true = lambda dloss, logits: (ops.cross_entropy_bwd(dloss, ops.cross_entropy(logits, targets)[1]),)  # noqa: E731
    with np.errstate(over="ignore", invalid="ignore"):  # unstable_exp is meant to overflow
        assert judge(forward, true, mutants, {"logits": logits}) == 13


# -- the router --------------------------------------------------------------------------------------------------


def router_backward(formula=None, finish=None):
    """The router's backward with another formula for dpicked, or with its result changed afterwards."""

    def bwd(dy, x, weight, e_score_correction_bias):
        params = router_params(weight, e_score_correction_bias)
        saved = router(x, params, MICRO)[1]
        scores, indices = saved.scores, saved.routing.indices
        picked = np.take_along_axis(scores, indices, axis=-1)
        dpicked = formula(dy, picked) if formula else _normalise_bwd(dy, picked, MICRO)
        dscores = np.zeros_like(scores)
        np.put_along_axis(dscores, indices, dpicked, axis=-1)
        dlogits = dscores * scores * (1 - scores)
        if finish:
            dlogits = finish(dlogits, dscores, scores)
        return dlogits @ weight, dlogits.T @ x, np.zeros_like(e_score_correction_bias)

    return bwd


def router_params(weight, bias):
    return Router(weight, bias)


def test_router_mutations_are_caught():
    gate = random_params(MICRO, 1).layers[1].mlp.gate
    inputs = {"x": normal(9, 20), **gate._asdict()}
    c = MICRO.routed_scaling_factor

    def total(p):
        return p.sum(axis=-1, keepdims=True)

    def to_the_bias(dy, x, weight, e_score_correction_bias):
        dx, dweight, _ = router_backward()(dy, x, weight, e_score_correction_bias)
        return dx, dweight, np.full_like(e_score_correction_bias, 0.1)

    mutants = {
        "sum held constant": router_backward(lambda dw, p: dw * c / total(p)),
        "scale dropped": router_backward(lambda dw, p: _normalise_bwd(dw, p, MICRO) / c),
        "plain mean for the weighted one": router_backward(
            lambda dw, p: c / total(p) * (dw - dw.mean(axis=-1, keepdims=True))
        ),
        "softmax's Jacobian": router_backward(lambda dw, p: c * ops.softmax_bwd(dw, p / total(p))),
        "sigmoid's slope dropped": router_backward(finish=lambda dlogits, dscores, s: dscores),
        "gradient to experts not picked": router_backward(
            finish=lambda dlogits, dscores, s: (dscores - dscores.mean(axis=-1, keepdims=True)) * s * (1 - s)
        ),
        "gradient to the bias": to_the_bias,
    }

    def forward(x, weight, e_score_correction_bias):
        return router(x, router_params(weight, e_score_correction_bias), MICRO)[0].weights

    def chosen(x, weight, e_score_correction_bias):
        return router(x, router_params(weight, e_score_correction_bias), MICRO)[0].indices

    def true(dy, x, weight, e_score_correction_bias):
        params = router_params(weight, e_score_correction_bias)
        dx, dparams = router_bwd(dy, router(x, params, MICRO)[1], params, MICRO)
        return dx, *dparams

    assert judge(forward, router_backward(), {}, inputs, chosen) == 0
    assert judge(forward, true, mutants, inputs, chosen) == 7


def test_equal_upstream_on_the_picks_would_hide_the_router():
    """The K weights always add up to the scale, so an equal dw on all K moves nothing."""
    gate = random_params(MICRO, 1).layers[1].mlp.gate
    routing, saved = router(normal(9, 20), gate, MICRO)
    dx, dgate = router_bwd(np.ones_like(routing.weights), saved, gate, MICRO)
    assert max(np.abs(dx).max(), np.abs(dgate.weight).max()) < 1e-14


def test_coordinates_whose_experts_change_are_skipped_and_counted():
    """Two experts tied for the last place: any step along their logits changes the choice."""
    config = MICRO.replace(n_group=1, topk_group=1, num_experts_per_tok=1, norm_topk_prob=False)
    weight = np.zeros((8, 20))
    weight[5], weight[6] = 0.5, 0.5

    def run(weight):
        return router(np.ones((1, 20)), router_params(weight, np.zeros(8)), config)

    def true(dy, weight):
        return (router_bwd(dy, run(weight)[1], router_params(weight, np.zeros(8)), config)[1].weight,)

    report = check_gradients(
        lambda weight: run(weight)[0].weights,
        true,
        {"weight": weight},
        lambda weight: run(weight)[0].indices,
        samples=160,
    )
    assert (report.checked, report.skipped) == (120, 40)
    assert not report.wrong()


# -- sub-layers: one piece of source replaced --------------------------------------------------------------------


def judge_source(run, backward, call, record, arrays, mutations, choices=None):
    """`run(params, **arrays) -> (y, saved)`; `call(bwd, dy, saved, params, **arrays) -> {name: gradient}`;
    mutations: (old text, new text) in the source of `backward`."""
    inputs = {**arrays, **flat(record)}

    def split(values):
        return refilled(record, values), {name: values[name] for name in arrays}

    def as_bwd(function):
        def bwd(dy, **values):
            params, rest = split(values)
            return call(function, dy, run(params, **rest)[1], params, **rest)

        return bwd

    def forward(**values):
        params, rest = split(values)
        return run(params, **rest)[0]

    def chosen(**values):
        params, rest = split(values)
        return choices(run(params, **rest)[1])

    wrong = {f"{old} -> {new}": as_bwd(mutated(backward, old, new)) for old, new in mutations}
    assert len(wrong) == len(mutations)
    return judge(forward, as_bwd(backward), wrong, inputs, chosen if choices else None, samples=8)


def test_expert_mlp_mutations_are_caught():
    inputs = {"x": normal(4, 5), "gate_proj": normal(5, 5), "up_proj": normal(5, 5), "down_proj": normal(5, 5)}

    def as_bwd(function):
        return lambda dy, **i: function(dy, ops.expert_mlp(**i)[1], i["gate_proj"], i["up_proj"], i["down_proj"])

    mutations = [
        ("dx_gate + dx_up", "dx_gate"),
        ("dx_gate + dx_up", "dx_up"),
        ("linear_bwd(dy, hidden, down_proj)", "linear_bwd(dy, up, down_proj)"),
        ("swiglu_bwd(dhidden, gate, up)", "swiglu_bwd(dy, gate, up)"),
        ("linear_bwd(dup, x, up_proj)", "linear_bwd(dup, x, up_proj.T)"),
        ("dgate, dup = swiglu", "dup, dgate = swiglu"),
    ]
    wrong = {f"{old} -> {new}": as_bwd(mutated(ops.expert_mlp_bwd, old, new)) for old, new in mutations}
    assert judge(lambda **i: ops.expert_mlp(**i)[0], as_bwd(ops.expert_mlp_bwd), wrong, inputs) == 6


def test_routed_experts_mutations_are_caught():
    indices = np.array([[0, 4], [4, 1], [0, 1], [5, 4], [4, 0]])  # nobody picks 2 and 3
    experts = random_params(MICRO.replace(n_routed_experts=6, n_group=1, topk_group=1), 2).layers[1].mlp.experts

    def run(params, x, w):
        return routed_experts(x, Routing(indices, w), params)

    def call(function, dy, saved, params, x, w):
        dx, dw, dparams = function(dy, saved, Routing(indices, w), params)
        return {"x": dx, "w": dw, **flat(dparams)}

    mutations = [
        ("weights[slots] * dy[tokens]", "dy[tokens]"),
        ("(dy[tokens] * out)", "(dy[tokens] * weights[slots] * out)"),
        ("dweights[slots] =", "dweights[tokens] ="),
        ("dx[tokens] += dx_e", "dx[tokens] = dx_e"),
        ("gradient[e] = matrix", "gradient[e - 1] = matrix"),
        ("gradient[e] = matrix", "gradient[e] = matrix / len(tokens)"),
    ]
    arrays = {"x": normal(5, 20), "w": RANDOM.uniform(0.2, 2, (5, 2))}
    assert judge_source(run, routed_experts_bwd, call, experts, arrays, mutations) == 6


LAYOUT = make_layout((2, 5), MICRO, np.float64)


def test_attention_mutations_are_caught():
    params = random_params(MICRO, 3).layers[0].self_attn

    def run(params, x):
        return attention(x, params, MICRO, LAYOUT)

    def call(function, dy, saved, params, x):
        dx, dparams = function(dy, saved, params, MICRO)
        return {"x": dx, **flat(dparams)}

    mutations = [
        ("ops.add(dx_q, dx_k, dx_v)", "dx_q + dx_k"),
        ("ops.add(dx_q, dx_k, dx_v)", "dx_q + dx_v"),
        ("ops.add(dx_q, dx_k, dx_v)", "dx_k + dx_v"),
        ("rope_bwd(dq_turned, layout.cos, layout.sin)", "rope(dq_turned, layout.cos, layout.sin)"),
        ("ops.rope_bwd(dk_turned, layout.cos, layout.sin)", "dk_turned"),
        ("_head_norm_bwd(dk_normed, k, params.k_norm", "_head_norm_bwd(dk_normed, k, params.q_norm"),
        ("_head_norm_bwd(dq_normed, q, params.q_norm", "_head_norm_bwd(dq_normed, heads, params.q_norm"),
        ("Linear(dq_weight, dq_bias)", "Linear(dq_weight, dq_bias * 2)"),
        ("Linear(dk_weight, dk_bias)", "Linear(dv_weight, dk_bias)"),
    ]
    assert judge_source(run, attention_bwd, call, params, {"x": normal(2, 5, 20)}, mutations) == 9


def test_attention_notices_mutated_operations():
    params = random_params(MICRO, 3).layers[0].self_attn
    x, dy = normal(2, 5, 20), normal(2, 5, 20)
    saved = attention(x, params, MICRO, LAYOUT)[1]
    right = attention_bwd(dy, saved, params, MICRO)[0]
    no_rowsum = mutated(ops.rms_norm_bwd, "dnormalised - normalised * along_x", "dnormalised")
    wrong = attention_bwd(dy, saved, params, MICRO, swapped(ops, rms_norm_bwd=no_rowsum))[0]
    assert np.abs(wrong - right).max() > 1e-3


def test_moe_mutations_are_caught():
    params = random_params(MICRO, 4).layers[1].mlp

    def run(params, x):
        return moe(x, params, MICRO)

    def call(function, dy, saved, params, x):
        dx, dparams = function(dy, saved, params, MICRO)
        return {"x": dx, **flat(dparams)}

    mutations = [
        ("dx_routed, dx_router, *gradients", "dx_routed, *gradients"),
        ("dx_routed, dx_router, *gradients", "dx_routed, dx_router"),
        ("mlp_bwd(drows, saved_shared", "mlp_bwd(drows * config.routed_scaling_factor, saved_shared"),
        ("route_bwd(dweights, saved_router", "route_bwd(-dweights, saved_router"),
        ("params.experts, ops)", "params.experts._replace(up_proj=params.experts.gate_proj), ops)"),
    ]
    choices = lambda saved: saved.router.routing.indices  # noqa: E731
    assert judge_source(run, moe_bwd, call, params, {"x": normal(2, 5, 20)}, mutations, choices) == 5


@pytest.mark.parametrize(("index", "caught"), [(0, 6), (1, 5)])
def test_layer_mutations_are_caught(index, caught):
    params = random_params(MICRO, 5).layers[index]

    def run(params, x):
        return layer(x, params, MICRO, LAYOUT)

    def call(function, dy, saved, params, x):
        dx, dparams = function(dy, saved, params, MICRO)
        return {"x": dx, **flat(dparams)}

    mutations = [
        ("dmiddle = ops.add(dout, dmiddle_branch)", "dmiddle = dmiddle_branch"),
        ("dmiddle = ops.add(dout, dmiddle_branch)", "dmiddle = dout"),
        ("return ops.add(dmiddle, dx_branch)", "return dx_branch"),
        ("return ops.add(dmiddle, dx_branch)", "return dout + dx_branch"),
        ("rms_norm_bwd(dmlp_in, middle,", "rms_norm_bwd(dmlp_in, x,"),
    ]
    if index == 0:
        mutations.append(("mlp_bwd(dout, saved_mlp, params.mlp, ops)", "mlp_bwd(dout / 2, saved_mlp, params.mlp, ops)"))
    choices = (lambda saved: saved.mlp.router.routing.indices) if index else None
    assert judge_source(run, layer_bwd, call, params, {"x": normal(2, 5, 20)}, mutations, choices) == caught


def test_mtp_layer_mutations_are_caught():
    mtp = random_params(MICRO, 6).mtp[0]
    ids = np.array([[3, 1, 3, 7, 1], [0, 60, 4, 4, 9]])

    def run(params, hidden, table):
        return mtp_layer(hidden, ids, params, table, MICRO, LAYOUT)

    def call(function, dy, saved, params, hidden, table):
        dhidden, dtable, dparams = function(dy, saved, params, table, MICRO)
        return {"hidden": dhidden, "table": dtable, **flat(dparams)}

    mutations = [
        ("dtoken_part, dstate_part = np.split", "dstate_part, dtoken_part = np.split"),
        ("embed_bwd(dembedding, ids,", "embed_bwd(dtoken_part, ids,"),
        ("rms_norm_bwd(dnormed, out,", "rms_norm_bwd(dnormed, hidden,"),
        ("params.hnorm.weight", "params.enorm.weight"),
        ("enorm=Weight(denorm)", "enorm=Weight(dhnorm)"),
    ]
    arrays = {"hidden": normal(2, 5, 20), "table": normal(61, 20)}
    choices = lambda saved: saved.layer.mlp.router.routing.indices  # noqa: E731
    assert judge_source(run, mtp_layer_bwd, call, mtp, arrays, mutations, choices) == 5


# -- the whole model ---------------------------------------------------------------------------------------------

SMALL = MICRO.replace(
    vocab_size=17, num_hidden_layers=2, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2
)
WHOLE_MODEL = [  # which module's function, and the piece of it that goes wrong
    (loss, "loss_and_grads", "dhidden + dstate", "dhidden"),
    (
        loss,
        "loss_and_grads",
        "dembedding.weight + dtable_mtp, dhead_main + dhead_mtp",
        "dembedding.weight, dhead_main + dhead_mtp",
    ),
    (
        loss,
        "loss_and_grads",
        "dembedding.weight + dtable_mtp, dhead_main + dhead_mtp",
        "dembedding.weight + dtable_mtp, dhead_main",
    ),
    (mtp_module, "mtp_chain_bwd", "dloss / len(chain)", "dloss"),
    (mtp_module, "mtp_chain_bwd", "dnormed[:, : dstate.shape[1]] += dstate", "pass"),
    (mtp_module, "mtp_chain_bwd", "dtable += dtable_here", "dtable = dtable_here"),
    (mtp_module, "mtp_chain_bwd", "dhead += dhead_here", "dhead = dhead_here"),
    (loss, "_balance", "gradient.reshape(saved.scores.shape) * weight", "gradient.reshape(saved.scores.shape)"),
    (loss, "_balance", "dscores[layer] = gradient", "dscores[layer] = -gradient"),
    (transformer_module, "transformer_bwd", "saved.last", "saved.layers[-1].x"),
    (transformer_module, "transformer_bwd", "tuple(reversed(dlayers))", "tuple(dlayers)"),
    (transformer_module, "transformer_bwd", "dscores.get(i)", "None"),
]


def test_whole_model_mutations_are_caught(monkeypatch):
    params = random_params(SMALL, 7)
    ids = random_state(8).randint(0, 17, (2, 6))
    arguments = {"ids": ids, "targets": shift_targets(ids), "params": params, "config": SMALL, "balance_weight": 0.1}
    known = {}
    assert not check_model(**arguments, known=known).wrong()
    caught = 0
    for module, name, old, new in WHOLE_MODEL:
        with monkeypatch.context() as patch:
            mutant = mutated(getattr(module, name), old, new)
            patch.setattr(gradcheck if name == "loss_and_grads" else loss, name, mutant)  # where its caller looks
            caught += bool(check_model(**arguments, samples=3, leave_out=r"experts\.", known=known).wrong())
    assert caught == len(WHOLE_MODEL) == 12


def test_the_bound_is_the_designs():
    assert BOUND == 1e-6
