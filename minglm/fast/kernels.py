"""The small kernels: one row, one head or one token each. The steps in `decode.py` only call them.

Twins of functions in `minglm.model`: `dot` is an output of `linear`, `normalise_row` is `rms_norm`, `turn` is `rope`,
`attend_head` is `attend`, `choose` is `router`, `silu_times` is `swiglu`. All sums are in float32, in an order that
depends on nothing but the length of the sum. Kernels raise nothing: who calls them has checked sizes and dtypes.
"""

import numpy as np

from minglm.fast.jit import inlined
from minglm.fast.machine import widen

ZERO, ONE = np.float32(0), np.float32(1)
NOTHING = np.float32(-np.inf)
NOT_PICKED = np.float32(-1)  # in place of a combine weight, none of which is negative


@inlined
def dot(weight, out, x, n):
    """Row `out` of a weight [out, in] times the first entries of row n of x."""
    total = ZERO
    for i in range(weight.shape[1]):
        total += widen(weight[out, i]) * x[n, i]
    return total


@inlined
def normalise_row(x, n, weight, eps, into, m):
    """RMSNorm of row n of x, as long as the weight [D], written to row m of `into`."""
    D = len(weight)
    squares = ZERO
    for i in range(D):
        squares += x[n, i] * x[n, i]
    scale = ONE / np.sqrt(squares / np.float32(D) + eps)
    for i in range(D):
        into[m, i] = x[n, i] * scale * weight[i]


@inlined
def turn(x, m, cos, sin, position):
    """Rotate row m of x, one head, by the angles of a position; cos and sin [positions, r/2]."""
    half = cos.shape[1]
    for i in range(half):
        first, second = x[m, i], x[m, half + i]
        x[m, i] = first * cos[position, i] - second * sin[position, i]
        x[m, half + i] = second * cos[position, i] + first * sin[position, i]


# -- exponentials ------------------------------------------------------------------------------------------------


@inlined
def exp(x):
    """eˣ in float32 by range reduction and a polynomial, to 2 units in the last place; unlike the library's function
    the compiler can put it into vector registers. 0 below −87.3 (where results come near the smallest normal float32),
    ∞ above 88.37 (near the largest).

    Coefficients: Cephes `expf`.
    """
    bounded = min(max(x, np.float32(-87.3)), np.float32(88.7))
    steps = np.floor(bounded * np.float32(1.4426950408889634) + np.float32(0.5))  # of ln 2
    r = bounded - steps * np.float32(0.693359375) + steps * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + ONE
    power = np.int32((np.int32(steps) + np.int32(127)) << np.int32(23)).view(np.float32)
    return x if x != x else ZERO if x < np.float32(-87.3) else p * power  # NaN stays: as int32 it is anything


@inlined
def sigmoid(x):
    """1 / (1 + e⁻ˣ); e⁻ˣ may overflow to ∞, which gives the 0 that is right there."""
    return ONE / (ONE + exp(-x))


@inlined
def silu_times(gate, up, m, start, stop):
    """silu(gate) · up for entries start … stop of row m, written over `gate`."""
    gate_part, up_part = gate[m, start:stop], up[m, start:stop]  # a loop from 0 is one that the compiler vectorises
    for f in range(len(gate_part)):
        gate_part[f] = gate_part[f] * sigmoid(gate_part[f]) * up_part[f]


# -- attention ---------------------------------------------------------------------------------------------------


@inlined
def attend_head(q, n, head, k, v, layer, b, group, seen, segments, segment, scores, rank, into):
    """One query head of row n: softmax(q kᵀ / √d) v over the first `seen` keys of row b of the cache that are of its
    segment, and the last of them in any case, which is its own.

    q [N, H, d], k and v [L, B, capacity, G, d], segments [B, capacity]; scores [threads, capacity] is room to work in.
    """
    d = q.shape[2]
    scale = np.float32(d) ** np.float32(-0.5)
    own, first = seen - 1, 0
    while first < own and (segment < 0 or segments[b, first] != segment):
        first += 1  # what comes before its document leaves no trace in a row's bits
    highest = NOTHING
    for s in range(first, seen):
        product = ZERO
        for i in range(d):
            product += q[n, head, i] * k[layer, b, s, group, i]
        visible = s == own or (segment >= 0 and segments[b, s] == segment)
        score = product * scale if visible else NOTHING
        scores[rank, s] = score
        highest = max(highest, score)
    total = ZERO
    for s in range(first, seen):
        weight = exp(scores[rank, s] - highest)
        scores[rank, s] = weight
        total += weight
    for i in range(d):
        into[n, head * d + i] = ZERO
    for s in range(first, seen):
        weight = scores[rank, s] / total
        for i in range(d):
            into[n, head * d + i] += weight * v[layer, b, s, group, i]


# -- router ------------------------------------------------------------------------------------------------------


@inlined
def choose(scores, n, bias, groups, open_groups, K, normalise, factor, rank, biased, weights):
    """Row n of the router's scores [N, E] -> row n of this rank's `weights` [threads, N, E]: the combine weight of the
    K picked experts, NOT_PICKED at all others. `biased` [threads, E] is room to work in.

    The best biased scores are picked, the earlier expert at a tie; the weights come from the scores without bias.
    """
    E = scores.shape[1]
    size = E // groups
    for e in range(E):
        biased[rank, e] = scores[n, e] + bias[e]
        weights[rank, n, e] = NOT_PICKED
    if groups > 1:
        _close_groups(biased, rank, groups, size, open_groups)
    total = np.float32(1e-20)
    for _ in range(K):
        best = 0
        for e in range(1, E):
            if biased[rank, e] > biased[rank, best]:
                best = e
        biased[rank, best] = NOTHING
        weights[rank, n, best] = scores[n, best]
        total += scores[n, best]
    for e in range(E):
        if weights[rank, n, e] >= ZERO:
            if normalise:
                weights[rank, n, e] /= total
            weights[rank, n, e] *= factor


@inlined
def _close_groups(biased, rank, groups, size, open_groups):
    """Experts outside the `open_groups` best groups fall to −∞. A group is judged by the sum of its two best."""
    for _ in range(groups - open_groups):
        worst, least, still_open = -1, ZERO, 0
        for g in range(groups):
            first, second = NOTHING, NOTHING
            for e in range(g * size, (g + 1) * size):
                if biased[rank, e] > first:
                    first, second = biased[rank, e], first
                elif biased[rank, e] > second:
                    second = biased[rank, e]
            still_open += first > NOTHING
            if first > NOTHING and (worst < 0 or first + second <= least):  # at a tie the later group falls
                worst, least = g, first + second
        if still_open > open_groups:  # fewer where the bias itself has closed some
            for e in range(worst * size, (worst + 1) * size):
                biased[rank, e] = NOTHING
