"""Sampling: exact distributions against a naive twin, edge cases of temperature and draw, bad settings."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.generate.sampling import Sampling, draw, probabilities

LOGITS = np.array([2.0, -1.0, 0.5, 3.0, 0.5, -4.0], np.float64)


def naive(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The documented order in plain Python: temperature, top-k, top-p, min-p, each on what the one before left."""

    def normalised(ids: list[int]) -> dict[int, float]:
        largest = max(logits[i] for i in ids)
        weight = {i: math.exp((logits[i] - largest) / temperature) for i in ids}
        return {i: w / math.fsum(weight.values()) for i, w in weight.items()}

    ids = sorted((i for i in range(len(logits)) if logits[i] > -math.inf), key=lambda i: -logits[i])
    if 0 < top_k < len(ids):
        ids = [i for i in ids if logits[i] >= logits[ids[top_k - 1]]]  # ties with the k-th stay
    if top_p < 1:
        probs, kept, reached = normalised(ids), [], 0.0
        for i in ids:
            if reached >= top_p:
                break
            kept.append(i)
            reached += probs[i]
        ids = kept
    if min_p > 0:
        probs = normalised(ids)
        ids = [i for i in ids if probs[i] >= min_p * max(probs.values())]
    probs = normalised(ids)
    return [probs.get(i, 0.0) for i in range(len(logits))]


SETTINGS = [
    Sampling(1.0),
    Sampling(0.7),
    Sampling(3.0),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=3),
    Sampling(1.0, top_k=6),
    Sampling(1.0, top_k=99),
    Sampling(1.0, top_p=0.3),
    Sampling(1.0, top_p=0.9),
    Sampling(1.0, top_p=0.999),
    Sampling(1.0, min_p=0.05),
    Sampling(1.0, min_p=0.5),
    Sampling(1.0, min_p=1.0),
    Sampling(1.3, 4, 0.9, 0.1),
    Sampling(0.5, 3, 0.95, 0.2),
    Sampling(2.0, 2, 0.6, 0.0),
    Sampling(2.0, 0, 0.8, 0.3),
]


@pytest.mark.parametrize("how", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_same_as_the_naive_one(how: Sampling, seed: int) -> None:
    logits = LOGITS if seed == 0 else 2 * np.random.RandomState(seed).standard_normal(40)
    wanted = naive(logits, *how)
    np.testing.assert_allclose(probabilities(logits, how), wanted, rtol=1e-12, atol=0)
    single = probabilities(logits.astype(np.float32), how)
    np.testing.assert_allclose(single, wanted, rtol=2e-5, atol=1e-9)
    assert single.dtype == np.float32


def test_filters_by_hand() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2]))

    def probs(**how: float) -> list[float]:
        return probabilities(logits, Sampling(1.0, **how)).round(12).tolist()  # type: ignore[arg-type]

    assert probs() == [0.1, 0.4, 0.3, 0.2]
    assert probs(top_k=2) == [0, round(4 / 7, 12), round(3 / 7, 12), 0]
    assert probs(top_p=0.69) == probs(top_p=0.41) == probs(top_k=2)  # 0.4 has not reached it, 0.4 + 0.3 has
    assert probs(top_p=0.39) == [0, 1, 0, 0]
    assert probs(top_p=1e-9) == [0, 1, 0, 0]
    assert probs(min_p=0.6) == probs(top_k=2)  # at least 0.6 · 0.4 = 0.24
    assert probs(min_p=0.45) == probs(top_k=3)


def test_the_order_of_the_filters_shows() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    both = probabilities(logits, Sampling(1.0, top_k=2, top_p=0.5))
    np.testing.assert_allclose(both, [1, 0, 0, 0])  # of the two left, the first has 4/7; top-p first would keep two
    hot = probabilities(logits, Sampling(4.0, top_p=0.5))
    assert (hot > 0).sum() == 2  # the temperature comes before top-p: at 0.25 … 0.31 each, two reach a half
    assert (probabilities(logits, Sampling(0.25, top_p=0.5)) > 0).sum() == 1


def test_greedy_takes_the_first_best_and_ignores_filters() -> None:
    logits = np.array([1.0, 3.0, 3.0, -np.inf], np.float32)
    for how in (Sampling(), Sampling(0.0, 2, 0.1, 0.9)):
        probs = probabilities(logits, how)
        assert probs.tolist() == [0, 1, 0, 0]
        assert probs.dtype == np.float32


def test_greedy_needs_no_square_of_the_vocabulary() -> None:
    logits = np.zeros(151552, np.float32)
    logits[777] = 1
    assert draw(probabilities(logits, Sampling()), 0.5) == 777


def test_ties() -> None:
    logits = np.array([1.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, top_k=1)), [1 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, top_p=0.3)), [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, min_p=1.0)), [1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-50, 1e-45, 1e-40, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(dtype: type, temperature: float) -> None:
    logits = np.array([2.0, 3.0, -1000.0, -np.inf], dtype)
    assert probabilities(logits, Sampling(temperature)).tolist() == [0, 1, 0, 0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [1e30, 1e50, 1e308])
def test_a_huge_temperature_is_uniform_over_what_is_possible(dtype: type, temperature: float) -> None:
    logits = np.array([2.0, 3.0, -1000.0, -np.inf], dtype)
    np.testing.assert_allclose(probabilities(logits, Sampling(temperature)), [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)


FINITE = st.floats(-60, 60, width=32, allow_subnormal=False)  # half the smallest is 0
HOW = st.builds(
    Sampling,
    temperature=st.floats(0.01, 100) | st.just(0.0) | st.just(np.float64(0.7)),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.001, 1.0),
    min_p=st.floats(0.0, 1.0),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(FINITE | st.just(-math.inf), min_size=1, max_size=12), FINITE, HOW, st.floats(0, 1, exclude_max=True))
def test_properties(others: list[float], one: float, how: Sampling, u: float) -> None:
    logits = np.array([*others, one], np.float32)  # at least one is finite
    before = logits.copy()
    probs = probabilities(logits, how)
    assert np.array_equal(before, logits)
    assert (probs.dtype, probs.shape) == (np.float32, logits.shape)
    assert probs[np.argmax(logits)] == probs.max() > 0  # the best token always stays
    assert abs(probs.sum() - 1) < 1e-6
    assert (probs >= 0).all()
    assert not probs[np.isneginf(logits)].any()
    drawn = draw(probs, u)
    assert type(drawn) is int
    assert probs[drawn] > 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=10).filter(any), st.floats(0, 1, exclude_max=True))
def test_draw_against_the_exact_cumulative_sum(weights: list[int], u: float) -> None:
    """Small whole numbers over a power of two add up without rounding: the token is the first whose sum passes u."""
    probs = np.array(weights, np.float64) / 64
    token = next(i for i in range(len(weights)) if sum(weights[: i + 1]) / 64 > u * (sum(weights) / 64))
    assert draw(probs, u) == token
    assert draw(probs.astype(np.float32), u) == token


LAST = 1 - 2**-53  # the largest that Generator.random gives


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_draw_at_the_edges(dtype: type) -> None:
    probs = np.array([0, 0, 0.25, 0.5, 0, 0.25, 0, 0], dtype)
    assert [draw(probs, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, LAST)] == [2, 2, 3, 3, 5, 5]
    assert draw(np.array([1.0], dtype), LAST) == 0
    for seed in range(50):  # sums that are not exactly 1, a last token that can never come
        uneven = np.append(np.random.RandomState(seed).dirichlet(np.ones(999)), 0).astype(dtype)
        assert draw(uneven, LAST) <= 998
        assert draw(np.append(0, uneven).astype(dtype), 0.0) >= 1


def test_draw_follows_the_distribution() -> None:
    probs = probabilities(LOGITS.astype(np.float32), Sampling(1.0, top_k=4))
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(probs, rng.random()) for _ in range(20000)], minlength=6)
    assert np.abs(counts / 20000 - probs).max() < 0.012  # more than three standard deviations
    assert counts[probs == 0].sum() == 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Sampling(-0.1), r"temperature = -0.1 must be a finite number, 0 or more"),
        (Sampling(math.nan), r"temperature = nan must be"),
        (Sampling(math.inf), r"temperature = inf must be"),
        (Sampling(1.0, top_k=-1), r"top_k = -1 must be a whole number, 0 \(all tokens\) or more"),
        (Sampling(1.0, top_k=1.5), r"top_k = 1.5 must be"),  # type: ignore[arg-type]
        (Sampling(1.0, top_k=math.nan), r"top_k = nan must be"),  # type: ignore[arg-type]
        (Sampling(1.0, top_k=math.inf), r"top_k = inf must be"),  # type: ignore[arg-type]
        (Sampling(1.0, top_p=0.0), r"top_p = 0.0 must be above 0 and at most 1"),
        (Sampling(1.0, top_p=1.1), r"top_p = 1.1 must be"),
        (Sampling(1.0, top_p=math.nan), r"top_p = nan must be"),
        (Sampling(1.0, min_p=-0.1), r"min_p = -0.1 must lie between 0 and 1"),
        (Sampling(1.0, min_p=1.1), r"min_p = 1.1 must lie"),
        (Sampling(1.0, min_p=math.nan), r"min_p = nan must lie"),
    ],
)
def test_bad_settings(how: Sampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        how.check()


def test_good_settings_come_back() -> None:
    for how in [*SETTINGS, Sampling(), Sampling(np.float32(0.5), np.int64(3))]:  # type: ignore[arg-type]
        assert how.check() is how
