"""From logits to the next token: temperature, top-k, top-p, min-p, a draw."""

import math
from typing import NamedTuple

import numpy as np

from minglm.model.ops import Array, softmax


class Sampling(NamedTuple):
    """How to choose the next token. Temperature 0 takes the best one and ignores the rest."""

    temperature: float = 0.0
    top_k: int = 0  # keep the k best; 0: all
    top_p: float = 1.0  # keep the smallest set of best tokens whose probabilities reach p
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the best one

    def check(self) -> "Sampling":
        """Returns itself. Raises ValueError naming the setting that makes no sense."""
        for name in ("temperature", "top_p", "min_p"):
            if not isinstance(getattr(self, name), int | float | np.integer | np.floating):
                raise ValueError(f"{name} = {getattr(self, name)!r} must be a number")
        if not _is_finite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature!s:.40} must be a finite number, 0 or more")
        if not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must be a whole number, 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p} must lie between 0 and 1")
        return self


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def probabilities(logits: Array, how: Sampling) -> Array:  # [V] -> [V]
    """The distribution that a token is drawn from, filters applied in the order temperature, top-k, top-p, min-p,
    each on what the one before left, as transformers does."""
    if how.temperature == 0:
        best = np.zeros_like(logits)
        best[np.argmax(logits)] = 1
        return best
    with np.errstate(over="ignore"):  # the largest is 0 and stays; at a tiny temperature all others may fall to −∞
        scaled = (logits - logits.max()).astype(np.float64) / how.temperature
        kept = scaled.astype(logits.dtype)  # float32 would turn 1e-50 into 0, and −∞ / 1e50 into NaN
    if 0 < how.top_k < len(kept):
        kept = np.where(kept >= np.sort(kept)[-how.top_k], kept, -np.inf)
    if how.top_p < 1:
        kept = _nucleus(kept, how.top_p)
    if how.min_p > 0:
        likely = softmax(kept)
        kept = np.where(likely >= how.min_p * likely.max(), kept, -np.inf)
    return softmax(kept)


def _nucleus(logits: Array, top_p: float) -> Array:
    """A token stays while the ones before it, best first, have not yet reached `top_p`; so the best always stays."""
    order = np.argsort(-logits, kind="stable")
    sorted_probs = softmax(logits[order])
    before = np.cumsum(sorted_probs) - sorted_probs
    kept = np.full_like(logits, -np.inf)
    stays = order[before < top_p]
    kept[stays] = logits[stays]
    return kept


def draw(probs: Array, u: float) -> int:
    """The token at which the cumulative distribution passes u, a uniform number in [0, 1)."""
    cumulative = np.cumsum(probs.astype(np.float64))
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
