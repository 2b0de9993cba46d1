"""Leaf operations: values against naive loops, wrong formulas told apart, dtypes, read-only inputs, large values."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.model import ops
from tests.gradcheck import check_gradients
from tests.helpers import (
    assert_all_differ,
    assert_close,
    causal,
    naive_attend,
    naive_cross_entropy,
    naive_mlp,
    naive_rms_norm,
    naive_rope,
    naive_sigmoid,
    naive_silu,
    naive_softmax,
    no_warnings,
    random_state,
    read_only,
)

few = settings(deadline=None, max_examples=15)
sizes = st.integers(1, 5)


def normal(*shape, seed=0):
    return random_state([seed, *shape]).standard_normal(shape)


# -- linear and embed --------------------------------------------------------------------------------------------


@few
@given(sizes, sizes, sizes, sizes, st.booleans())
def test_linear_is_a_sum_for_each_output(B, T, n_in, n_out, with_bias):
    x, weight, bias = normal(B, T, n_in), normal(n_out, n_in, seed=1), normal(n_out, seed=2) if with_bias else None
    wanted = np.zeros((B, T, n_out))
    for b, t, o in np.ndindex(*wanted.shape):
        wanted[b, t, o] = sum(x[b, t, i] * weight[o, i] for i in range(n_in)) + (bias[o] if with_bias else 0)
    assert_close(ops.linear(x, weight, bias), wanted, 1e-11)
    dx, dweight, dbias = ops.linear_bwd(wanted, x, weight, bias)
    assert (dx.shape, dweight.shape) == (x.shape, weight.shape)
    assert (dbias is None) == (bias is None)


def test_embed_takes_rows_and_its_backward_adds_up_repeated_ids():
    weight, ids, dy = normal(6, 4), np.array([[3, 1, 3], [0, 3, 3]]), normal(2, 3, 4, seed=1)
    assert np.array_equal(ops.embed(ids, weight)[1, 2], weight[3])
    wanted = np.zeros((6, 4))
    for b, t in np.ndindex(2, 3):
        wanted[ids[b, t]] += dy[b, t]
    assert_close(ops.embed_bwd(dy, ids, weight), wanted)


# -- RMSNorm -----------------------------------------------------------------------------------------------------


def norm_inputs():
    x = (normal(5, 6) + 0.7) * np.array([0.01, 0.3, 1, 5, 0.1])[:, None]
    return x, 1.5 + random_state(1).uniform(-1, 1, 6), 1e-3


def test_rms_norm_is_x_over_the_root_mean_square():
    x, weight, eps = norm_inputs()
    right = ops.rms_norm(x, weight, eps)
    assert_close(right, naive_rms_norm(x, weight, eps))

    def mean(a, axis=-1):
        return np.mean(a, axis=axis, keepdims=True)

    var = mean((x - mean(x)) ** 2)
    one_row = {  # rows of very different size: each wrong answer is compared on the row where it shows most
        "layer_norm": (x - mean(x)) / np.sqrt(var + eps) * weight,
        "std_only": x / np.sqrt(var + eps) * weight,
        "sum_not_mean": x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + eps) * weight,
        "eps_outside": x / (np.sqrt(mean(x * x)) + eps) * weight,
        "no_sqrt": x / (mean(x * x) + eps) * weight,
        "axis_all": x / np.sqrt(np.mean(x * x) + eps) * weight,
        "axis_tokens": x / np.sqrt(mean(x * x, 0) + eps) * weight,
        "weight_first": x * weight / np.sqrt(mean((x * weight) ** 2) + eps),
        "one_plus_w": x / np.sqrt(mean(x * x) + eps) * (1 + weight),
    }
    assert_all_differ(one_row, right)


@few
@given(sizes, st.integers(2, 9), st.floats(0.1, 100))
def test_rms_norm_ignores_the_size_of_a_row_and_its_gradient_is_orthogonal_to_it(N, D, scale):
    x, weight, dy = normal(N, D) + 0.5, normal(D, seed=1), normal(N, D, seed=2)
    assert_close(ops.rms_norm(scale * x, weight, 1e-30), ops.rms_norm(x, weight, 1e-30), 1e-10)
    dx, _ = ops.rms_norm_bwd(dy, x, weight, 1e-30)
    assert np.abs((dx * x).sum(axis=-1)).max() < 1e-10


# -- sigmoid and SwiGLU ------------------------------------------------------------------------------------------


def test_sigmoid_equals_its_formula_and_sums_to_one_with_its_mirror():
    z = np.linspace(-30, 30, 61)
    assert_close(ops.sigmoid(z), np.array([naive_sigmoid(v) for v in z]))
    assert_close(ops.sigmoid(z) + ops.sigmoid(-z), np.ones(61))
    assert ops.sigmoid(np.array([-30.0]))[0] > 0  # small values keep their digits


def test_swiglu_is_silu_of_the_gate_times_up():
    gate, up = 2 * normal(4, 6), normal(4, 6, seed=1) + 0.5
    right = ops.swiglu(gate, up)
    silu = np.vectorize(naive_silu)
    assert_close(right, silu(gate) * up)
    wrong = {
        "swap": silu(up) * gate,
        "silu_prod": silu(gate * up),
        "sigmoid only": ops.sigmoid(gate) * up,
        "relu": np.maximum(gate, 0) * up,
    }
    assert_all_differ(wrong, right)


def test_expert_mlp_equals_the_naive_one():
    x, matrices = normal(2, 3, 5), (normal(7, 5, seed=1), normal(7, 5, seed=2), normal(5, 7, seed=3))
    right, _ = ops.expert_mlp(x, *matrices)
    assert_close(right, np.array([[naive_mlp(row, *matrices) for row in rows] for rows in x]))
    gate, up, down = matrices
    assert_all_differ({"swap": ops.expert_mlp(x, up, gate, down)[0], "add_residual": right + x}, right)


# -- rope --------------------------------------------------------------------------------------------------------


def test_rope_turns_each_row_and_position_by_its_own_angle():
    """Values and wrong variants are in test_rope.py; here: batches and heads."""
    positions = np.array([[5, 6, 9], [0, 2, 1]])
    x = normal(2, 3, 4, 12)
    angles = positions[:, :, None] * 100.0 ** (-np.arange(0, 4, 2) / 4)
    right = ops.rope(x, np.cos(angles), np.sin(angles))
    assert_close(right, np.stack([naive_rope(x[b], positions[b], 100.0, 4) for b in range(2)]))
    assert_close(ops.rope_bwd(right, np.cos(angles), np.sin(angles)), x)


# -- softmax -----------------------------------------------------------------------------------------------------


@few
@given(sizes, st.integers(1, 6), st.floats(-1e4, 1e4))
def test_softmax_rows_sum_to_one_and_ignore_a_shift(N, S, shift):
    x = 3 * normal(N, S)
    y = ops.softmax(x)
    assert_close(y, np.array([naive_softmax(row) for row in x]))
    assert_close(y.sum(axis=-1), np.ones(N))
    assert_close(ops.softmax(x + shift), y, 1e-11)


def test_softmax_gives_exactly_zero_where_the_input_is_minus_infinity():
    y = ops.softmax(np.array([[0.0, -np.inf, 1.0]]))
    assert y[0, 1] == 0
    assert ops.softmax_bwd(normal(1, 3), y)[0, 1] == 0


# -- attend ------------------------------------------------------------------------------------------------------


@few
@given(sizes, st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_attend_equals_the_naive_loops_for_any_shape(T, past, G, R, d):
    S = T + past
    q, k, v = normal(2, T, G * R, d), normal(2, S, G, d, seed=1), normal(2, S, G, d, seed=2)
    y, _ = ops.attend(q, k, v, causal(2, T, S))
    assert_close(y, np.stack([naive_attend(q[b], k[b], v[b]) for b in range(2)]), 1e-10)


# -- cross-entropy -----------------------------------------------------------------------------------------------

TARGETS = np.array([2, -100, 0, 4, -100, 1, 3])


def loss_logits():
    logits = normal(7, 6)
    logits[3] += 900
    return logits


def test_cross_entropy_averages_over_the_targets_that_count():
    logits = loss_logits()
    right, _ = ops.cross_entropy(logits, TARGETS)
    assert right == pytest.approx(naive_cross_entropy(logits, TARGETS), rel=1e-12)
    log_p = np.log(ops.softmax(logits))
    valid = TARGETS != -100
    taken = -log_p[np.flatnonzero(valid), TARGETS[valid]]
    p = ops.softmax(logits)
    wrong = {
        "no_mean": taken.sum(),
        "divides_by_N": taken.sum() / 7,
        "ignored rows leak": -log_p[np.arange(7), TARGETS % 6].mean(),
        "double_softmax": naive_cross_entropy(p, TARGETS),
        "base 2": right / math.log(2),
        "softmax_axis": -np.log(ops.softmax(logits.T).T[np.flatnonzero(valid), TARGETS[valid]] + 1e-300).mean(),
        "double_shift": naive_cross_entropy(logits, np.roll(TARGETS, 1)),
    }
    assert_all_differ(wrong, right)


def test_cross_entropy_gradient_is_softmax_minus_onehot_over_the_count():
    logits, wanted = loss_logits(), np.zeros((7, 6))
    _, saved = ops.cross_entropy(logits, TARGETS)
    for n, target in enumerate(TARGETS):
        if target != -100:
            wanted[n] = np.array(naive_softmax(logits[n])) - (np.arange(6) == target)
    assert_close(ops.cross_entropy_bwd(1.7, saved), 1.7 * wanted / 5)


def test_cross_entropy_without_any_target_is_zero_and_has_no_gradient():
    loss, saved = ops.cross_entropy(normal(2, 3, 6), np.full((2, 3), ops.IGNORE))
    assert loss == 0
    assert not ops.cross_entropy_bwd(1.0, saved).any()


def test_an_ignored_row_may_hold_anything():
    logits = loss_logits()
    other = logits.copy()
    other[1] = 1e4 * normal(6, seed=5)
    (a, saved_a), (b, saved_b) = ops.cross_entropy(logits, TARGETS), ops.cross_entropy(other, TARGETS)
    assert a == b
    assert np.array_equal(ops.cross_entropy_bwd(1.0, saved_a), ops.cross_entropy_bwd(1.0, saved_b))


# -- what holds for all of them ----------------------------------------------------------------------------------

IDS = np.array([[3, 1, 3], [0, 3, 4]])
COS_SIN = [f(np.arange(6).reshape(1, 3, 2)) for f in (np.cos, np.sin)]

# name -> (float inputs, forward, backward given dy); forward returns one array, backward a tuple in input order
OPERATIONS = {
    "linear": ([normal(2, 3, 5), normal(4, 5, seed=1), normal(4, seed=2)], ops.linear, ops.linear_bwd),
    "linear without bias": (
        [normal(2, 3, 5), normal(4, 5, seed=1)],
        ops.linear,
        lambda dy, x, w: ops.linear_bwd(dy, x, w)[:2],
    ),
    "rms_norm": (
        list(norm_inputs()[:2]),
        lambda x, w: ops.rms_norm(x, w, 1e-3),
        lambda dy, x, w: ops.rms_norm_bwd(dy, x, w, 1e-3),
    ),
    "swiglu": ([2 * normal(4, 6), normal(4, 6, seed=1)], ops.swiglu, ops.swiglu_bwd),
    "expert_mlp": (
        [normal(3, 5), normal(7, 5, seed=1), normal(7, 5, seed=2), normal(5, 7, seed=3)],
        lambda *a: ops.expert_mlp(*a)[0],
        lambda dy, *a: ops.expert_mlp_bwd(dy, ops.expert_mlp(*a)[1], *a[1:]),
    ),
    "rope": (
        [normal(1, 3, 2, 6), *COS_SIN],
        ops.rope,
        lambda dy, x, cos, sin: (ops.rope_bwd(dy, cos, sin), None, None),  # no gradient is wanted for an angle
    ),
    "softmax": ([normal(3, 4)], ops.softmax, lambda dy, x: (ops.softmax_bwd(dy, ops.softmax(x)),)),
    "attend": (
        [normal(1, 4, 6, 8), normal(1, 4, 2, 8, seed=1), normal(1, 4, 2, 8, seed=2)],
        lambda *a: ops.attend(*a, causal(len(a[0]), 4))[0],
        lambda dy, *a: ops.attend_bwd(dy, ops.attend(*a, causal(len(a[0]), 4))[1]),
    ),
    "embed": ([normal(6, 4)], lambda w: ops.embed(IDS, w), lambda dy, w: (ops.embed_bwd(dy, IDS, w),)),
    "cross_entropy": (
        [loss_logits()],
        lambda z: ops.cross_entropy(z, TARGETS)[0],
        lambda dloss, z: (ops.cross_entropy_bwd(dloss, ops.cross_entropy(z, TARGETS)[1]),),
    ),
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


@every_operation
def test_backward_equals_central_differences(name):
    arrays, forward, backward = OPERATIONS[name]
    names = [f"{i}" for i, g in enumerate(backward(forward(*arrays), *arrays)) if g is not None]

    def complete(some):
        return [some.get(f"{i}", array) for i, array in enumerate(arrays)]

    report = check_gradients(
        lambda **some: forward(*complete(some)),
        lambda dy, **some: tuple(g for g in backward(dy, *complete(some)) if g is not None),
        {name: arrays[int(name)] for name in names},
    )
    assert not report.wrong(), report.errors


@every_operation
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_in_is_dtype_out_and_inputs_stay_as_they_were(name, dtype):
    arrays, forward, backward = OPERATIONS[name]
    given_arrays = read_only(*(a.astype(dtype) for a in arrays))  # writing into one would raise
    y = forward(*given_arrays)
    dy = y if np.ndim(y) == 0 else read_only(y)[0]
    gradients = backward(dy, *given_arrays)
    assert y.dtype == dtype
    for gradient, array in zip(gradients, given_arrays, strict=True):
        if gradient is not None:
            assert (gradient.dtype, gradient.shape) == (dtype, array.shape)
    for before, after in zip(arrays, given_arrays, strict=True):
        assert np.array_equal(before.astype(dtype), after)


@every_operation
def test_float32_agrees_with_float64(name):
    arrays, forward, _ = OPERATIONS[name]
    assert_close(forward(*(a.astype(np.float32) for a in arrays)), forward(*arrays), 1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_values_give_finite_answers_without_a_warning(dtype):
    large = np.array([[-1000, 0, 1000], [-1e4, 1e4, 1]], dtype)
    with no_warnings():
        assert np.array_equal(ops.sigmoid(large[0]), np.array([0, 0.5, 1], dtype))
        assert np.array_equal(ops.swiglu(large[0], large[0] * 0 + 1), np.array([0, 0, 1000], dtype))
        assert np.isfinite(ops.swiglu_bwd(large, large, large)[0]).all()
        assert np.isfinite(ops.rms_norm(large, large[0], 1e-5)).all()
        assert np.isfinite(ops.rms_norm_bwd(large, 0 * large, large[0], 1e-5)[0]).all()
        assert np.array_equal(ops.softmax(large).argmax(axis=-1), [2, 1])
        loss, saved = ops.cross_entropy(loss_logits().astype(dtype), TARGETS)
        assert np.isfinite(loss)
        assert np.isfinite(ops.cross_entropy_bwd(1.0, saved)).all()
        loss, _ = ops.cross_entropy(large, np.array([0, 1]))
        assert loss == 1000  # row 0: the target is 2000 below the best; row 1: certain
        k = 1000 * normal(1, 4, 2, 8).astype(dtype)
        assert np.isfinite(ops.attend(k, k, k, causal(len(k), 4))[0]).all()
