"""The n-gram yardstick: by hand on a tiny text, probabilities that sum to one, limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.evaluate.ngram import ngram_bits_per_byte, ngram_fit, ngram_probabilities

SMALL = st.text("abc", max_size=40).map(str.encode)


def test_by_hand() -> None:
    """Train on "aab". Single bytes: c = 3, u = 2; after "a": c = 2, u = 2 (aa, ab); after "b": nothing."""
    model = ngram_fit(b"aab", order=2)
    a, b, x = (2 + 2 / 256) / 5, (1 + 2 / 256) / 5, (0 + 2 / 256) / 5
    expected = [a, (1 + 2 * b) / 4, a, (0 + 2 * x) / 4]  # P(a), P(b|a), P(a|b) = P(a), P(x|a)
    np.testing.assert_allclose(ngram_probabilities(model, b"abax"), expected, rtol=1e-15)
    bits = ngram_bits_per_byte(b"aab", b"abax", order=2)
    assert bits == pytest.approx(-np.mean(np.log2(expected)), rel=1e-14)


@given(train=SMALL, context=SMALL, order=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_sums_to_one_in_every_context(train: bytes, context: bytes, order: int) -> None:
    model = ngram_fit(train, order)
    total = sum(ngram_probabilities(model, context + bytes([byte]))[-1] for byte in range(256))
    assert total == pytest.approx(1, abs=1e-12)


@given(train=SMALL, test=SMALL, order=st.integers(1, 5))
def test_only_the_last_bytes_matter(train: bytes, test: bytes, order: int) -> None:
    """A byte's probability depends on the order - 1 bytes before it, and on nothing after it."""
    model = ngram_fit(train, order)
    whole = ngram_probabilities(model, test + b"cab")[: len(test)]
    np.testing.assert_array_equal(whole, ngram_probabilities(model, test))
    for at in range(order - 1, len(test)):
        assert ngram_probabilities(model, test[at - order + 1 : at + 1])[-1] == whole[at]


def test_limits() -> None:
    assert ngram_bits_per_byte(b"", b"anything") == 8
    assert ngram_bits_per_byte(b"ab" * 5000, b"ab" * 50, order=3) < 0.1
    noise = np.random.default_rng(0).bytes(200_000)
    assert ngram_bits_per_byte(noise[:100_000], noise[100_000:], order=1) == pytest.approx(8, abs=0.01)
    all_bytes = bytes(range(256))
    assert np.isfinite(ngram_bits_per_byte(all_bytes, all_bytes[::-1], order=8))


def test_errors() -> None:
    with pytest.raises(ValueError, match="empty"):
        ngram_bits_per_byte(b"ab", b"")
    for order in (0, 9):
        with pytest.raises(ValueError, match=f"order {order}.*1 to 8"):
            ngram_fit(b"ab", order)
