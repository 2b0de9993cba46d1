"""An interpolated byte n-gram model: the yardstick that a trained model must beat in bits per byte.

Witten-Bell interpolation (Witten and Bell 1991; Chen and Goodman 1998, section 2.5): with c(h) occurrences of
the context h and u(h) different bytes seen after it,

    P(b | h) = (c(h b) + u(h) · P(b | h shortened by its oldest byte)) / (c(h) + u(h)),

down to the uniform 1/256 below the single bytes. A context never seen passes the shorter context's
probability on.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_ORDER = 8  # an n-gram is one uint64


class Counts(NamedTuple):
    """Counts for one n-gram length: the sorted n-grams, and their contexts (all but the last byte)."""

    grams: NDArray[np.uint64]
    gram_counts: NDArray[np.int64]
    contexts: NDArray[np.uint64]
    context_counts: NDArray[np.int64]  # c(h)
    context_kinds: NDArray[np.int64]  # u(h): different bytes after h


def ngram_fit(train_bytes: bytes, order: int = 3) -> list[Counts]:
    """Counts of all n-grams of length 1..order. ValueError for an order outside 1..8."""
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"n-gram order {order}: wanted 1 to {MAX_ORDER}")
    return [_count(_grams(train_bytes, length)) for length in range(1, order + 1)]


def ngram_probabilities(model: list[Counts], data: bytes) -> NDArray[np.float64]:
    """P(byte | the bytes before it in `data`), float64 [len(data)]; the first bytes have shorter contexts."""
    probabilities = np.full(len(data), 1 / 256)
    for length, counts in enumerate(model, start=1):
        grams = _grams(data, length)
        shorter = probabilities[length - 1 :]  # a view: the update is in place
        gram_count = _look_up(counts.grams, counts.gram_counts, grams)
        context_count = _look_up(counts.contexts, counts.context_counts, grams >> np.uint64(8))
        kinds = _look_up(counts.contexts, counts.context_kinds, grams >> np.uint64(8))
        seen = context_count > 0
        mixed = (gram_count + kinds * shorter) / np.maximum(context_count + kinds, 1)
        shorter[seen] = mixed[seen]
    return probabilities


def ngram_bits_per_byte(train_bytes: bytes, test_bytes: bytes, order: int = 3) -> float:
    """Bits per byte of `test_bytes` under the model fitted on `train_bytes`; order 3 is a trigram.

    ValueError for an empty test text or an order outside 1..8. An empty training text gives 8 bits.
    """
    if not test_bytes:
        raise ValueError("n-gram test text is empty: bits per byte need at least one byte")
    return float(-np.log2(ngram_probabilities(ngram_fit(train_bytes, order), test_bytes)).mean())


def _grams(data: bytes, length: int) -> NDArray[np.uint64]:
    """Every run of `length` bytes as an integer, oldest byte highest: bytes [n] -> uint64 [n-length+1]."""
    values = np.frombuffer(data, np.uint8).astype(np.uint64)
    count = max(len(values) - length + 1, 0)
    grams = np.zeros(count, np.uint64)
    for offset in range(length):
        grams = grams << np.uint64(8) | values[offset : offset + count]
    return grams


def _count(all_grams: NDArray[np.uint64]) -> Counts:
    grams, gram_counts = np.unique(all_grams, return_counts=True)
    # The grams are sorted, so those of one context are neighbours: sums over runs give the context's counts.
    contexts, first, kinds = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
    context_counts = np.add.reduceat(gram_counts, first) if len(first) else first
    return Counts(grams, gram_counts, contexts, context_counts, kinds)


def _look_up(keys: NDArray[np.uint64], values: NDArray[np.int64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The value of each wanted key, 0 where there is none; `keys` are sorted."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
