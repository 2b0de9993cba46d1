"""Rotary positions: which entries turn with whom, how fast, and from where positions count."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import PRESETS
from minglm.model import inverse_frequencies, ops, rotation
from tests.helpers import MICRO, assert_all_differ, assert_close, naive_rope, random_state

# T = H = 3: a swapped axis broadcasts instead of raising. A third of the head turns. Positions do not start at 0.
ROT, D, THETA = 4, 12, 100.0
CONFIG = MICRO.replace(head_dim=D, partial_rotary_factor=1 / 3, rope_theta=THETA)
POSITIONS = np.array([5, 6, 9])
X = random_state(0).standard_normal((3, 3, D))


def turned(x, positions, config=CONFIG):
    """[T, H, d] through minglm's rotation and rope, as one row of a batch."""
    return ops.rope(x[None], *rotation(np.asarray(positions)[None], config, x.dtype))[0]


def turn(pairs, frequency, position=lambda t, h: POSITIONS[t], sign=1, rest=1.0):
    """A rope with every decision open: pair number i is pairs[i] and turns by position · frequency(i)."""
    y = X.copy()
    y[..., ROT:] *= rest
    for t, h in np.ndindex(3, 3):
        for i, (a, b) in enumerate(pairs):
            angle = sign * position(t, h) * frequency(i)
            y[t, h, a] = X[t, h, a] * math.cos(angle) - X[t, h, b] * math.sin(angle)
            y[t, h, b] = X[t, h, b] * math.cos(angle) + X[t, h, a] * math.sin(angle)
    return y


HALF_SPLIT = [(0, 2), (1, 3)]


def right_speed(i):
    return THETA ** (-2 * i / ROT)


def not_a_rotation(table, minus):
    """Half-split partners with a wrong table of angles, or without the minus of rotate-half."""
    y = X.copy()
    for t, h, i in np.ndindex(3, 3, 2):
        a, b = POSITIONS[t] * table(i), POSITIONS[t] * table(i + 2)
        y[t, h, i] = X[t, h, i] * math.cos(a) + minus * X[t, h, i + 2] * math.sin(a)
        y[t, h, i + 2] = X[t, h, i + 2] * math.cos(b) + X[t, h, i] * math.sin(b)
    return y


WRONG = {
    "all_dims": turn([(i, i + 6) for i in range(6)], lambda i: THETA ** (-2 * i / D)),
    "interleaved": turn([(0, 1), (2, 3)], right_speed),
    "half_of_d": turn([(0, 6), (1, 7)], right_speed),
    "last_dims": turn([(8, 10), (9, 11)], right_speed),
    "freq_over_d": turn(HALF_SPLIT, lambda i: THETA ** (-2 * i / D)),
    "exp1": turn(HALF_SPLIT, lambda i: THETA ** (-i / ROT)),
    "sign": turn(HALF_SPLIT, right_speed, sign=-1),
    "mixed": not_a_rotation(lambda j: THETA ** (-2 * (j // 2) / ROT), minus=-1),
    "noneg": not_a_rotation(lambda j: right_speed(j % 2), minus=1),
    "head_axis": turn(HALF_SPLIT, right_speed, lambda t, h: POSITIONS[h]),
    "start1": turn(HALF_SPLIT, right_speed, lambda t, h: t + 1),
    "restart0": turn(HALF_SPLIT, right_speed, lambda t, h: t),
    "zero_rest": turn(HALF_SPLIT, right_speed, rest=0.0),
}


def test_rope_equals_the_naive_loops():
    assert_close(turned(X, POSITIONS), naive_rope(X, POSITIONS, THETA, ROT))
    assert_close(turn(HALF_SPLIT, right_speed), naive_rope(X, POSITIONS, THETA, ROT))


def test_every_wrong_rope_is_told_apart():
    assert len(WRONG) == 13
    assert_all_differ(WRONG, turned(X, POSITIONS))


def test_the_right_answer_by_complex_multiplication_is_the_same():
    z = (X[..., :2] + 1j * X[..., 2:4]) * np.exp(1j * POSITIONS[:, None, None] * np.array([1, THETA**-0.5]))
    assert_close(turned(X, POSITIONS), np.concatenate([z.real, z.imag, X[..., 4:]], axis=-1))


def test_the_rest_of_a_head_passes_through_bit_for_bit():
    assert np.array_equal(turned(X, POSITIONS)[..., ROT:], X[..., ROT:])


def test_position_zero_turns_nothing():
    assert np.array_equal(turned(X, [0, 0, 0]), X)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 10**5))
def test_scores_depend_on_the_distance_alone(query_at, key_at, shift):
    q, k = X[:1], X[1:2]

    def score(a, b):
        return np.sum(turned(q, [a]) * turned(k, [b]), axis=-1)

    assert_close(score(query_at + shift, key_at + shift), score(query_at, key_at), 1e-8)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**5))
def test_each_pair_keeps_its_length(position):
    y = turned(X[:1], [position])
    assert_close(y[..., :2] ** 2 + y[..., 2:4] ** 2, X[:1, :, :2] ** 2 + X[:1, :, 2:4] ** 2)


# -- where the angles come from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_angles_are_computed_in_the_wanted_dtype(dtype):
    assert {a.dtype for a in rotation(POSITIONS[None], CONFIG, dtype)} == {np.dtype(dtype)}
    yarn = CONFIG.replace(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    assert {a.dtype for a in rotation(POSITIONS[None], yarn, dtype)} == {np.dtype(dtype)}


def test_glm_45_turns_half_of_each_head_with_32_speeds():
    frequencies, scale = inverse_frequencies(PRESETS["GLM-4.5"])
    assert_close(frequencies, np.array([1e6 ** (-2 * i / 64) for i in range(32)]))
    assert scale == 1


def test_linear_scaling_divides_every_speed():
    config = CONFIG.replace(rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert_close(inverse_frequencies(config)[0], inverse_frequencies(CONFIG)[0] / 4)


def naive_yarn(config, factor, original, fast=32, slow=1):
    """Pair i turns original · frequency / 2π times over the original context: kept above `fast` turns, divided by
    `factor` below `slow`, mixed in between along the pair's number (arXiv 2309.00071, with its rounding outwards)."""
    r, theta = config.rotary_dim, config.rope_theta
    low = math.floor(r * math.log(original / (fast * 2 * math.pi)) / (2 * math.log(theta)))
    high = math.ceil(r * math.log(original / (slow * 2 * math.pi)) / (2 * math.log(theta)))
    low, high = max(low, 0), min(high, r - 1)
    frequencies = []
    for i in range(r // 2):
        kept = theta ** (-2 * i / r)
        slowed = min(max((i - low) / (high - low), 0), 1)
        frequencies.append(kept * (1 - slowed) + kept / factor * slowed)
    return np.array(frequencies)


def test_yarn_slows_the_slow_pairs_and_keeps_the_fast_ones():
    config = PRESETS["GLM-4.5"]
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain, _ = inverse_frequencies(config)
    stretched, scale = inverse_frequencies(config.replace(rope_scaling=scaling))
    assert_close(stretched, naive_yarn(config, 4.0, 32768))
    assert np.array_equal(stretched[:8], plain[:8])
    assert_close(stretched[-8:], plain[-8:] / 4)
    assert scale == pytest.approx(0.1 * math.log(4) + 1)
    assert_all_differ({"plain": np.ones(32), "linear": np.full(32, 1 / 4)}, stretched / plain)


@pytest.mark.parametrize(("theta", "original"), [(100.0, 16), (100.0, 64), (4.0, 400)])
def test_yarn_keeps_its_ramp_between_pair_0_and_the_last_entry(theta, original):
    """In a short context no pair makes 32 turns: the ramp would begin below 0. With a small theta it would end late."""
    config = CONFIG.replace(partial_rotary_factor=2 / 3, rope_theta=theta)  # 8 entries, 4 pairs
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}
    assert_close(inverse_frequencies(config.replace(rope_scaling=scaling))[0], naive_yarn(config, 4.0, original))


def test_yarn_scale_multiplies_the_turned_part():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5}
    config = CONFIG.replace(rope_scaling=scaling)
    y = turned(X, POSITIONS, config)
    assert_close((y[..., :ROT] ** 2).sum(axis=-1), 1.5**2 * (X[..., :ROT] ** 2).sum(axis=-1))
    assert np.array_equal(y[..., ROT:], X[..., ROT:])
