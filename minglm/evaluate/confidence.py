"""Counts with 95 % confidence intervals."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minglm.model.ops import Array

Z = 1.959964  # standard normal quantile of 97.5 %


class Interval(NamedTuple):
    low: float
    high: float


def wilson(right: int, asked: int) -> Interval:
    """Wilson's score interval for a share p = right / asked (Wilson 1927):

        (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)

    Unlike p ± z √(p(1 − p)/n) it is not empty at 0 and 1. The answers must be independent of each other.
    ValueError for no answers or counts that are none.
    """
    if not 0 <= right <= asked or not asked:
        raise ValueError(f"{right} of {asked} is not a share")
    p, square = right / asked, Z * Z / asked
    middle = p + square / 2
    reach = Z * math.sqrt(p * (1 - p) / asked + square / (4 * asked))
    low, high = (middle - reach) / (1 + square), (middle + reach) / (1 + square)
    return Interval(max(low, 0.0) if right else 0.0, min(high, 1.0) if right < asked else 1.0)


def bootstrap(
    units: Array, statistic: Callable[[Array], Array], draws: int = 1000, seed: int = 0
) -> tuple[Array, Array]:
    """The 2.5 % and 97.5 % percentiles of a statistic of a sum over units [n, …], over draws of n units with
    replacement (Efron 1979). Units are what is independent of each other: documents, or rows."""
    n = len(units)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)  # how often each unit comes
    found = np.array([statistic(np.tensordot(chosen, units, axes=1)) for chosen in times])
    return np.percentile(found, 2.5, axis=0), np.percentile(found, 97.5, axis=0)
