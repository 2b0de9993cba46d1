"""Every small kernel is its NumPy twin: same numbers, same picks, nothing hidden at the ends of float32."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from minglm.config import PRESETS
from minglm.fast import kernels, machine
from minglm.fast.jit import DISABLE_JIT, kernel
from minglm.model import ops, router
from minglm.model.params import Router
from tests.helpers import difference, random_state

MICRO = PRESETS["micro"]
F32, CHUNK = np.float32, kernels.CHUNK


def numbers(seed, *shape):
    return random_state(seed).standard_normal(shape).astype(F32)


# -- the kernels, over whole arrays ------------------------------------------------------------------------------
# They are made to be copied into their callers; these are callers.


@kernel
def all_normalised(x, weight, eps, into):
    for n in range(len(x)):
        kernels.normalise_row(x, n, weight, eps, into, n)


@kernel
def all_turned(x, cos, sin, positions):
    for n in range(len(x)):
        kernels.turn(x, n, cos, sin, positions[n])


@kernel
def all_exp(x, into):
    for i in range(len(x)):
        into[i] = kernels.exp(x[i])


@kernel
def all_sigmoid(x, into):
    for i in range(len(x)):
        into[i] = kernels.sigmoid(x[i])


@kernel
def all_silu(gate, up, start, stop):
    for n in range(len(gate)):
        kernels.silu_times(gate, up, n, start, stop)


@kernel
def all_heads(q, k, v, layer, rows, slots, segments, segment, scores, parts, into):
    for n in range(len(q)):
        b, slot = rows[n], slots[n]
        first = kernels.first_key(segments, b, slot, segment[n])
        chunks = (slot - first) // CHUNK + 1
        for c in range(chunks):
            begin, end = first + c * CHUNK, min(first + (c + 1) * CHUNK, slot + 1)
            for g in range(k.shape[3]):
                kernels.attend_keys(
                    q, n, g, k, v, layer, b, begin, end, slot, segments, segment[n], scores, 1, c, parts
                )
        for h in range(q.shape[1]):
            kernels.join_parts(parts, n, h, chunks, q.shape[2], into)


@kernel
def all_chosen(scores, bias, groups, open_groups, normalise, factor, biased, weights, picks):
    for n in range(len(scores)):
        kernels.choose(scores[n], bias, groups, open_groups, normalise, factor, biased, weights[n], picks[n])


@kernel
def all_widened(x, into):
    for i in range(len(x)):
        into[i] = machine.widen(x[i])


@kernel
def all_at(address, rows, columns, like, vector_address, found, found_vector):
    matrix, vector = machine.matrix(address, rows, columns, like), machine.vector(vector_address, columns)
    for j in range(columns):
        found_vector[j] = vector[j]
        for i in range(rows):
            found[i, j] = machine.widen(matrix[i, j])


@kernel
def words_game(words, found):
    found[0] = machine.load(words, 1)
    found[1] = machine.fetch_add(words, 1, 5)
    found[2] = machine.swap_if(words, 1, 7, 100)
    found[3] = machine.swap_if(words, 1, found[0] + 5, 100)
    machine.give_way()
    found[4] = machine.load(words, 1)


# -- bfloat16 ------------------------------------------------------------------------------------------------------


def test_widen_is_exact_for_all_bfloat16():
    bits = np.arange(1 << 16, dtype=np.uint16)
    into = np.zeros(len(bits), F32)
    all_widened(bits, into)
    assert np.array_equal(into, bits.view(ml_dtypes.bfloat16).astype(F32), equal_nan=True)
    same = numbers(0, 100)
    all_widened(same, into)
    assert np.array_equal(into[:100], same)


# -- norm, rotation, activation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 8, 33, 128])
def test_normalise_row_is_rms_norm(size):
    x, weight = numbers(0, 4, size) * 3, numbers(1, size)
    for eps in (1e-5, 0.3):
        into = np.zeros_like(x)
        all_normalised(x, weight, F32(eps), into)
        assert difference(into, ops.rms_norm(x, weight, eps)) <= 1e-6
    in_place = x.copy()
    all_normalised(in_place, weight, F32(eps), in_place)
    assert np.array_equal(in_place, into)


def test_normalise_row_of_zeros_and_of_huge_numbers():
    x = np.array([[0, 0, 0], [1e-30, 0, 0], [1e18, 1e18, -1e18]], F32)
    into = np.zeros_like(x)
    all_normalised(x, np.ones(3, F32), F32(1e-5), into)
    assert difference(into, ops.rms_norm(x, np.ones(3, F32), 1e-5)) <= 1e-6


@pytest.mark.parametrize(("d", "r"), [(2, 2), (8, 4), (9, 2), (36, 18), (32, 32)])
def test_turn_is_rope(d, r):
    x, positions = numbers(0, 5, d), np.array([3, 0, 6, 6, 1])
    angles = numbers(1, 7, r // 2) * 3
    cos, sin = np.cos(angles) * F32(1.2), np.sin(angles) * F32(1.2)
    wanted = ops.rope(x[None, :, None], cos[positions][None], sin[positions][None])[0, :, 0]
    all_turned(x, cos, sin, positions)
    assert difference(x, wanted) <= 1e-6


@pytest.mark.parametrize("size", [1, 7, 64])
def test_silu_times_is_swiglu_between_start_and_stop(size):
    gate, up = numbers(0, 3, size) * 4, numbers(1, 3, size)
    for start, stop in ((0, size), (size // 2, size), (0, size // 2), (1, 1)):
        found = gate.copy()
        all_silu(found, up, start, stop)
        wanted = gate.copy()
        wanted[:, start:stop] = ops.swiglu(gate, up)[:, start:stop]
        assert difference(found, wanted) <= 1e-6
        assert np.array_equal(found[:, :start], gate[:, :start])
        assert np.array_equal(found[:, stop:], gate[:, stop:])


# -- exponentials ------------------------------------------------------------------------------------------------


def exp_of(x, of=all_exp):
    into = np.zeros(len(x), F32)
    of(np.asarray(x, F32), into)
    return into


def test_exp_is_within_two_units_in_the_last_place_over_its_range():
    count = 2000 if DISABLE_JIT else 2_000_000
    x = np.concatenate([np.linspace(-87.3, 88.36, count), np.geomspace(1e-38, 1, count // 10)]).astype(F32)
    x = np.concatenate([x, -x[-count // 10 :], [0, -0.0]]).astype(F32)
    wanted = np.exp(x.astype(np.float64))
    ulps = np.abs(exp_of(x) - wanted) / np.spacing(wanted.astype(F32))
    assert ulps.max() <= 2


def test_exp_beyond_its_range():
    assert np.array_equal(exp_of([-np.inf, -3e38, -1000, -88, -87.31]), np.zeros(5))
    assert np.array_equal(exp_of([88.73, 89, 1000, 3e38, np.inf]), np.full(5, np.inf))
    assert (exp_of([88.37, 88.5, 88.72]) >= np.exp(88.37) * 0.999).all()  # the last steps before ∞ may be ∞ already
    with np.errstate(invalid="ignore"):
        assert np.isnan(exp_of([np.nan, -np.nan])).all()


def test_exp_never_falls():
    x = np.sort(numbers(3, 20000) * 40)
    assert (np.diff(exp_of(x)[exp_of(x) < 1e38]) >= -2 * np.spacing(exp_of(x)[exp_of(x) < 1e38][1:])).all()


def test_sigmoid_is_its_twin():
    x = np.concatenate([numbers(0, 1000) * 10, [0, 80, -80, 88, -88, 1e5, -1e5, np.inf, -np.inf, 1e-9]]).astype(F32)
    assert np.allclose(exp_of(x, all_sigmoid), ops.sigmoid(x), rtol=1e-6, atol=1e-37)
    with np.errstate(invalid="ignore"):
        assert np.isnan(exp_of([np.nan], all_sigmoid)).all()


# -- attention ---------------------------------------------------------------------------------------------------


def attended(q, k, v, layer, rows, slots, segments, segment):
    N, H, d = q.shape
    into, scores = np.full((N, H * d), 99, F32), np.full((2, CHUNK), 99, F32)
    parts = np.full((N, H, k.shape[2] // CHUNK + 1, d + 2), 99, F32)
    all_heads(q, k, v, layer, rows, slots, segments, segment, scores, parts, into)
    assert (scores[0] == 99).all()  # room of another rank
    return into.reshape(q.shape)


def wanted_attention(q, k, v, layer, rows, slots, segments, segment):
    found = np.zeros_like(q)
    for n, (b, slot) in enumerate(zip(rows, slots, strict=True)):
        sight = ops.Sight(np.array([[slot]]), np.array([[segment[n]]]), segments[b : b + 1, : slot + 1])
        keys, values = k[layer, b : b + 1, : slot + 1], v[layer, b : b + 1, : slot + 1]
        found[n] = ops.attend(q[None, n : n + 1], keys, values, sight)[0][0, 0]
    return found


@pytest.mark.parametrize(
    ("H", "G", "d", "capacity"), [(1, 1, 1, 1), (6, 2, 8, 5), (4, 4, 5, 9), (4, 1, 33, 40), (4, 2, 8, 300)]
)
def test_keys_in_chunks_are_attend(H, G, d, capacity):
    random = random_state(d)
    k, v = numbers(1, 2, 3, capacity, G, d), numbers(2, 2, 3, capacity, G, d)
    N = 12
    q = numbers(0, N, H, d) * 2
    rows, slots = random.randint(0, 3, N), random.randint(0, capacity, N)
    slots[:3] = 0, capacity - 1, capacity // 2
    for segments in (
        np.zeros((3, capacity), np.int64),
        np.where(np.arange(capacity) < capacity // 3, -1, 0) + np.zeros((3, 1), np.int64),
        np.sort(random.randint(0, 3, (3, capacity)), axis=1),
        random.randint(-1, 2, (3, capacity)),
        np.full((3, capacity), -1),
    ):
        segment = segments[rows, slots]
        arguments = (q, k, v, 1, rows, slots, segments, segment)
        assert difference(attended(*arguments), wanted_attention(*arguments)) <= 2e-6


def test_attention_survives_scores_of_any_size():
    k, v = numbers(1, 1, 1, 6, 1, 4), numbers(2, 1, 1, 6, 1, 4)
    for scale in (1e-20, 1e3, 1e15):
        arguments = (numbers(0, 1, 1, 4) * F32(scale), k, v, 0, [0], [5], np.zeros((1, 6), np.int64), [0])
        arguments = tuple(np.array(a) if isinstance(a, list) else a for a in arguments)
        assert difference(attended(*arguments), wanted_attention(*arguments)) <= 1e-5


# -- router ------------------------------------------------------------------------------------------------------


def chosen(scores, bias, config):
    c, room, weights = config, np.full(scores.shape[1], 99, F32), np.full(scores.shape, 99, F32)
    picks = np.full((len(scores), c.num_experts_per_tok), 99, np.int64)
    factor = F32(c.routed_scaling_factor)
    all_chosen(scores, bias, c.n_group, c.topk_group, c.norm_topk_prob, factor, room, weights, picks)
    assert np.array_equal(np.sort(picks), np.nonzero(weights != kernels.NOT_PICKED)[1].reshape(picks.shape))
    return weights


def books_choice(scores, bias, config):
    """The book's router with these scores: it takes what a tap puts in place of its own."""
    E = scores.shape[1]
    params = Router(np.zeros((E, 1), F32), bias)
    routing, _ = router(
        np.zeros((len(scores), 1), F32), params, config, lambda name, a: scores if name == "router_scores" else a
    )
    weights = np.full(scores.shape, kernels.NOT_PICKED)
    np.put_along_axis(weights, routing.indices, routing.weights, axis=1)
    return weights


def layouts():
    for E, groups in ((2, 1), (7, 1), (8, 1), (8, 2), (8, 4), (9, 3), (24, 8), (64, 1)):
        for open_groups in sorted({1, groups // 2 or 1, groups}):
            most = open_groups * (E // groups)
            for K in sorted({1, (most + 1) // 2, most}):
                yield E, groups, open_groups, K


@pytest.mark.parametrize("kind", ["plain", "ties", "closed"])
def test_choose_picks_the_books_experts(kind):
    """Exactly: with ties (scores and biases in eighths, so that sums tie too) and with experts closed by their bias."""
    count = 20 if DISABLE_JIT else 400
    for (E, groups, open_groups, K), normalise in itertools.product(layouts(), (True, False)):
        config = MICRO.replace(
            n_routed_experts=E,
            n_group=groups,
            topk_group=open_groups,
            num_experts_per_tok=K,
            norm_topk_prob=normalise,
            routed_scaling_factor=1.7,
        )
        random = random_state(E * K)
        scores, bias = random.uniform(0, 1, (count, E)), random.uniform(-0.5, 0.5, E)
        if kind == "ties":
            scores, bias = np.round(scores * 8) / 8, np.round(bias * 4) / 4
        if kind == "closed":
            closed = random.permutation(E)[: max(E - K - E // 2, 0)]
            bias[closed] = -np.inf
        scores, bias = scores.astype(F32), bias.astype(F32)
        found, wanted = chosen(scores, bias, config), books_choice(scores, bias, config)
        if kind == "closed":  # rows where enough experts are left: otherwise any choice is as bad as another
            enough = np.isfinite(bias).reshape(groups, -1).sum(axis=1)
            if np.sort(enough)[:open_groups].sum() < K:
                continue
        assert np.array_equal(found == kernels.NOT_PICKED, wanted == kernels.NOT_PICKED), (E, groups, open_groups, K)
        assert ((found != kernels.NOT_PICKED).sum(axis=1) == K).all()
        assert difference(found, wanted) <= 1e-6


def test_a_group_that_its_bias_closes_takes_no_place_from_others():
    config = MICRO.replace(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
    scores = random_state(0).uniform(0.1, 0.9, (50, 8)).astype(F32)
    bias = np.array([-np.inf, -np.inf, 0, 0, 0, 0, 0, 0], F32)
    found, wanted = chosen(scores, bias, config), books_choice(scores, bias, config)
    assert np.array_equal(found == kernels.NOT_PICKED, wanted == kernels.NOT_PICKED)
    assert difference(found, wanted) <= 1e-6


def test_scores_of_zero_are_picked_with_weight_zero():
    config = MICRO.replace(n_group=1, topk_group=1)
    found = chosen(np.zeros((1, 8), F32), np.zeros(8, F32), config)
    assert found[0].tolist() == [0, 0, 0, -1, -1, -1, -1, -1]


# -- the machine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, ml_dtypes.bfloat16])
def test_arrays_at_an_address(dtype):
    array, vector = numbers(0, 3, 5).astype(dtype), numbers(1, 5)
    array.flags.writeable = vector.flags.writeable = False
    like = np.zeros(0, F32 if dtype is F32 else np.uint16)
    found, found_vector = np.zeros((3, 5), F32), np.zeros(5, F32)
    all_at(array.ctypes.data, 3, 5, like, vector.ctypes.data, found, found_vector)
    assert np.array_equal(found, array.astype(F32))
    assert np.array_equal(found_vector, vector)


def test_atomic_words():
    words, found = np.array([50, 3, 60]), np.zeros(5, np.int64)
    words_game(words, found)
    assert found.tolist() == [3, 3, 0, 1, 100]
    assert words.tolist() == [50, 100, 60]
