"""The fast operations: each equals its twin in the book, in any shape, with the same bits on any number of threads."""

import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from minglm.fast.blas import one_thread_each
from minglm.fast.ops import FastOps, first_keys
from minglm.fast.team import cores
from minglm.model import ops as book
from minglm.model.experts import routed_experts, routed_experts_bwd
from minglm.model.kvcache import KVCache
from minglm.model.loss import loss_and_grads, shift_targets
from minglm.model.ops import IGNORE, Sight
from minglm.model.params import Experts, Router, walk_stacked
from minglm.model.router import Routing, router
from minglm.model.transformer import transformer
from tests.helpers import causal
from tests.variants import MICRO, VARIANTS, gradient_errors, random_params

THREADS = sorted({1, 2, 3, cores()} & set(range(1, cores() + 1)))
FAST = FastOps(THREADS[-1])
few = settings(max_examples=15, deadline=None)
size = st.integers(1, 70)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def flat(result: object) -> list[np.ndarray]:
    """The arrays of a result, whatever tuples they are in; what is saved for a backward is left out."""
    if isinstance(result, np.ndarray | np.floating):
        return [np.asarray(result)]
    return [a for part in result for a in flat(part)] if isinstance(result, tuple) else []  # type: ignore[union-attr]


def assert_twins(fast: object, slow: object, bound: float = 1e-5) -> None:
    """Errors relative to the largest number, or to a tenth where all cancel: inputs are near 1."""
    pairs = list(zip(flat(fast), flat(slow), strict=True))
    assert pairs
    for found, wanted in pairs:
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype == np.float32
        assert np.abs(found - wanted).max(initial=0) <= bound * max(np.abs(wanted).max(initial=0), 0.1)


# -- one by one --------------------------------------------------------------------------------------------------


@few
@given(size, size, size, st.booleans())
def test_linear(N, inputs, outputs, with_bias):
    x, w, dy = normal(N, inputs), normal(outputs, inputs, seed=1), normal(N, outputs, seed=2)
    bias = normal(outputs, seed=3) if with_bias else None
    assert_twins(FAST.linear(x, w, bias), book.linear(x, w, bias))
    fast, slow = FAST.linear_bwd(dy, x, w, bias), book.linear_bwd(dy, x, w, bias)
    assert (fast[2] is None) == (slow[2] is None)
    assert_twins(fast[: 2 + with_bias], slow[: 2 + with_bias])


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 2500])
def test_long_sums_are_cut_into_pieces(rows):
    x, w, dy = normal(rows, 65), normal(90, 65, seed=1), normal(rows, 90, seed=2)
    assert_twins(FAST.linear_bwd(dy, x, w), book.linear_bwd(dy, x, w)[:2])
    mlp = normal(30, 65), normal(30, 65, seed=1), normal(65, 30, seed=2)
    dy = normal(rows, 65, seed=3)
    fast, slow = FAST.expert_mlp(x, *mlp), book.expert_mlp(x, *mlp)
    assert_twins(fast[0], slow[0])
    assert_twins(FAST.expert_mlp_bwd(dy, fast[1], *mlp), book.expert_mlp_bwd(dy, slow[1], *mlp), 2e-5)


@few
@given(size, size)
def test_rms_norm(N, D):
    x, w, dy = normal(N, D) * 3, normal(D, seed=1), normal(N, D, seed=2)
    assert_twins(FAST.rms_norm(x, w, 1e-3), book.rms_norm(x, w, 1e-3))
    assert_twins(FAST.rms_norm_bwd(dy, x, w, 1e-3), book.rms_norm_bwd(dy, x, w, 1e-3))


@few
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.integers(0, 5))
def test_rope(T, heads, half, rest):
    x, cos, sin = normal(2, T, heads, 2 * half + rest), normal(2, T, half, seed=1), normal(2, T, half, seed=2)
    assert_twins(FAST.rope(x, cos, sin), book.rope(x, cos, sin))
    assert_twins(FAST.rope_bwd(x, cos, sin), book.rope_bwd(x, cos, sin))


@few
@given(size, size, size)
def test_expert_mlp(N, D, F):
    x, dy = normal(N, D), normal(N, D, seed=9)
    weights = normal(F, D, seed=1), normal(F, D, seed=2), normal(D, F, seed=3)
    (y, saved), (wanted, book_saved) = FAST.expert_mlp(x, *weights), book.expert_mlp(x, *weights)
    assert_twins(y, wanted)
    assert_twins(FAST.expert_mlp_bwd(dy, saved, *weights), book.expert_mlp_bwd(dy, book_saved, *weights))


@few
@given(st.integers(1, 60), st.sampled_from([(1, 1, 2), (2, 1, 3), (4, 2, 2), (3, 3, 2)]), st.booleans(), st.booleans())
def test_router(N, layout, normalise, bias_ties):
    """The same picks in the same order, ties included, and weights from scores without bias."""
    groups, open_groups, size = layout
    config = MICRO.replace(
        n_routed_experts=groups * size,
        n_group=groups,
        topk_group=open_groups,
        num_experts_per_tok=max(open_groups * size - 1, 1),
        norm_topk_prob=normalise,
        routed_scaling_factor=1.7,
    )
    params = Router(normal(groups * size, 9), np.round(normal(groups * size, seed=1) * 2) / 2)
    if bias_ties:
        params = params._replace(weight=np.zeros_like(params.weight))
    x = normal(N, 9, seed=2)
    (routing, saved), (wanted, wanted_saved) = FAST.router(x, params, config), router(x, params, config)
    assert np.array_equal(routing.indices, wanted.indices)
    assert_twins((routing.weights, saved.scores), (wanted.weights, wanted_saved.scores))


@few
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_routed_experts(N, E, K, seed):
    K, D, F = min(K, E), 13, 7
    random = np.random.RandomState(seed)
    indices = np.argsort(random.rand(N, E), axis=1)[:, :K]
    indices[: N // 2] = np.argsort(random.rand(E))[:K]  # a crowd at some, nobody at others
    routing = Routing(indices, random.rand(N, K).astype(np.float32))
    params = Experts(normal(E, F, D, seed=1), normal(E, F, D, seed=2), normal(E, D, F, seed=3))
    x, dy = normal(N, D), normal(N, D, seed=4)
    (y, visits), (wanted, history) = FAST.routed_experts(x, routing, params), routed_experts(x, routing, params)
    assert_twins(y, wanted)
    assert_twins(FAST.routed_experts_bwd(dy, visits, routing, params), routed_experts_bwd(dy, history, routing, params))


@few
@given(st.integers(1, 150), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 1000))
def test_attend_whole_sequences(T, G, R, d, seed):
    random = np.random.RandomState(seed)
    q, k, v, dy = (normal(2, T, h, d, seed=i) for i, h in enumerate((G * R, G, G, G * R)))
    lengths = random.randint(1, 40, T)
    segments = np.stack([np.repeat(np.arange(T), lengths)[:T], np.sort(random.randint(-1, 2, T))])
    sight = Sight(np.broadcast_to(np.arange(T), (2, T)), segments, segments)
    (y, saved), (wanted, book_saved) = FAST.attend(q, k, v, sight), book.attend(q, k, v, sight)
    assert_twins(y, wanted)
    assert_twins(FAST.attend_bwd(dy, saved), book.attend_bwd(dy, book_saved), 2e-5)


@few
@given(st.integers(1, 90), st.integers(0, 40))
def test_attend_behind_a_cache(T, past):
    cache = normal(2, 2, past + T + 5, 2, 8)  # keys and values are parts of larger arrays
    q, k, v = normal(2, T, 4, 8, seed=1), cache[0][:, : past + T], cache[1][:, : past + T]
    sight = causal(2, T, past + T)
    assert_twins(FAST.attend(q, k, v, sight)[0], book.attend(q, k, v, sight)[0])


@few
@given(size, st.integers(2, 300), st.integers(0, 1000))
def test_cross_entropy(N, V, seed):
    random = np.random.RandomState(seed)
    logits, targets = normal(N, V) * 5, np.where(random.rand(N) < 0.3, IGNORE, random.randint(0, V, N))
    (loss, saved), (wanted, book_saved) = FAST.cross_entropy(logits, targets), book.cross_entropy(logits, targets)
    assert loss.dtype == np.float32
    assert abs(loss - wanted) <= 1e-5 * max(abs(wanted), 1)
    assert_twins(FAST.cross_entropy_bwd(0.7, saved), book.cross_entropy_bwd(0.7, book_saved))


def test_embedding_gradient_and_sums():
    ids = np.array([[3, 1, 3], [3, 0, 1]])
    dy, table = normal(2, 3, 37), normal(5, 37)
    assert_twins(FAST.embed_bwd(dy, ids, table), book.embed_bwd(dy, ids, table))
    assert_twins(FAST.add(dy, 2 * dy, -dy), 2 * dy)
    assert FAST.squares(normal(9000)) == pytest.approx(float((normal(9000).astype(float) ** 2).sum()), rel=1e-6)
    assert np.isnan(FAST.squares(np.array([1, np.nan], np.float32)))
    assert np.isinf(FAST.squares(np.array([1, np.inf], np.float32)))


# -- together ----------------------------------------------------------------------------------------------------

IDS = np.random.RandomState(5).randint(0, 61, (3, 13))
SEGMENTS = np.array([[0] * 13, [0] * 5 + [1] * 8, [-1] * 3 + [2] * 10])


def gradients(config, params, ops=book):
    targets = shift_targets(IDS, SEGMENTS)
    loss, grads = loss_and_grads(IDS, targets, params, config, 0.3, 0.1, segments=SEGMENTS, ops=ops)
    return loss, dict(walk_stacked(grads))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_gradient_of_every_variant_is_the_books(name):
    config, own_ends = VARIANTS[name]
    params = random_params(config, 0, np.float32, own_ends)
    (loss, grads), (wanted_loss, wanted) = gradients(config, params, FAST), gradients(config, params)
    assert abs(loss.total - wanted_loss.total) <= 1e-5 * abs(wanted_loss.total)
    wanted = {n: a for n, a in wanted.items() if not n.endswith("e_score_correction_bias")}
    assert max(gradient_errors(grads, wanted).values()) <= 1e-5


def test_bits_do_not_depend_on_the_number_of_threads_nor_on_used_buffers():
    params = random_params(MICRO, 0, np.float32)
    first = gradients(MICRO, params, FastOps(1))
    for threads in [*THREADS, THREADS[-1]]:
        ops = FastOps(threads)
        for _ in range(2):
            loss, grads = gradients(MICRO, params, ops)
            assert loss.total == first[0].total
            assert all(np.array_equal(grads[n], a) for n, a in first[1].items())


def test_results_are_not_overwritten_by_the_next_call():
    x, w = normal(700, 200), normal(200, 200, seed=1)
    first = FAST.linear(x, w)
    kept = first.copy()
    second = FAST.linear(-x, w)
    assert np.array_equal(first, kept)
    assert np.array_equal(second, -kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_fills_the_cache_as_the_book_does(dtype):
    from minglm.formats.storage import as_storage, cast
    from minglm.model.params import map_arrays

    kind = as_storage(dtype)
    params = map_arrays(lambda n, a: cast(n, a, kind), random_params(MICRO, 0, np.float32))
    caches = KVCache(MICRO, 2, 30), KVCache(MICRO, 2, 30)
    segments = np.array([[-1] * 4 + [0] * 16, [0] * 9 + [1] * 11])
    ids = np.random.RandomState(1).randint(0, 61, (2, 20))
    for start, stop in ((0, 12), (12, 13), (13, 20)):
        part = slice(start, stop)
        states = [
            transformer(ids[:, part], params, MICRO, cache, segments=segments[:, part], ops=ops)[0]
            for cache, ops in zip(caches, (FAST, book), strict=True)
        ]
        assert_twins(*states)
    assert_twins((caches[0].k, caches[0].v), (caches[1].k, caches[1].v))


# -- what is refused, and what is not ----------------------------------------------------------------------------


def test_strided_and_read_only_inputs_give_the_same():
    x, w = normal(20, 16), normal(8, 16, seed=1)
    strided = np.repeat(x, 2, axis=0)[::2]
    assert not strided.flags.c_contiguous
    assert np.array_equal(FAST.linear(strided, w), FAST.linear(x, w))
    for array in (x, w):
        array.flags.writeable = False
    assert_twins(FAST.linear(x, w), book.linear(x, w))


def test_other_dtypes_and_taps_are_refused():
    with pytest.raises(ValueError, match=r"compute in float32, got float64; use minglm\.model\.ops"):
        FAST.rms_norm(np.ones((2, 3)), np.ones(3), 1e-5)
    params = random_params(MICRO, 0, np.float32)
    with pytest.raises(ValueError, match="cannot be tapped inside"):
        transformer(IDS, params, MICRO, tap=lambda name, array: array, ops=FAST)


def test_strided_weights_are_refused():
    x, w = normal(5, 8), normal(8, 16, seed=1)[:, ::2]
    for call in (lambda: FAST.linear(x, w), lambda: FAST.linear_bwd(x, x, w), lambda: FAST.expert_mlp(x, w, w, w)):
        with pytest.raises(ValueError, match=r"want contiguous float32.* weights of shape \[8, 8\]"):
            call()


def test_weights_and_targets_that_do_not_fit_are_refused():
    """Kernels check nothing: what does not fit would be read, or written, beyond the end of an array."""
    x, w, short = normal(5, 8), normal(6, 8, seed=1), normal(7)
    experts = Experts(normal(4, 3, 8), normal(4, 3, 8), normal(4, 8, 3))
    routing = Routing(np.zeros((5, 1), np.int64), np.ones((5, 1), np.float32))
    calls = [
        lambda: FAST.linear(x[:, :7], w),
        lambda: FAST.linear(x, w, short),
        lambda: FAST.linear(x, w.astype(">f4")),
        lambda: FAST.linear(x, w.astype(np.float16)),
        lambda: FAST.linear_bwd(x, x, w),
        lambda: FAST.linear_bwd(normal(5, 6), x, w.astype(ml_dtypes.bfloat16)),
        lambda: FAST.rms_norm(x, short, 1e-5),
        lambda: FAST.rms_norm_bwd(x, x, short, 1e-5),
        lambda: FAST.expert_mlp(x, w, w[:5], w.T.copy()),
        lambda: FAST.expert_mlp(x, w, w, w),
        lambda: FAST.routed_experts(x, routing, experts._replace(down_proj=experts.gate_proj)),
        lambda: FAST.routed_experts(x, routing, Experts(*(part.astype(np.float16) for part in experts))),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"want contiguous float32.* weights of shape .* here, got"):
            call()
    mixed = experts._replace(up_proj=experts.up_proj.astype(ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match="of one dtype, got bfloat16 in expert 0"):
        FAST.routed_experts(x, routing, mixed)
    for target in (8, 500, 3 * 10**7, -1, -7):
        with pytest.raises(IndexError, match=f"target {target} is not in a vocabulary of 8"):
            FAST.cross_entropy(x, np.array([0, 1, target, IGNORE, 2]))


def test_products_stay_on_one_thread_until_the_last_caller_leaves():
    def counts() -> list[int]:
        return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]

    first, second, before = one_thread_each(), one_thread_each(), counts()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(counts()) == {1}
    leave = threading.Thread(target=second.__exit__, args=(None, None, None))
    leave.start()
    leave.join()
    assert set(counts()) == set(before)


def test_a_segment_in_two_places_is_refused():
    segments = np.array([[0, 1, 0]])
    with pytest.raises(ValueError, match="must stand together"):
        first_keys(Sight(np.arange(3)[None], segments, segments))
    padding = np.array([[-1, 0, -1, 1]])
    assert first_keys(Sight(np.arange(4)[None], padding, padding)).tolist() == [[0, 1, 2, 3]]
