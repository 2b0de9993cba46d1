"""The small kernels: one row, one head or one token each. The steps in `decode.py` only call them.

Twins of functions in `minglm.model`: `dot` is an output of `linear`, `normalise_row` is `rms_norm`, `turn` is `rope`,
`attend_keys` with `join_parts` is `attend`, `choose` is `router`, `silu_times` is `swiglu`. All sums are in float32, in
an order that depends on nothing but the length of the sum. Kernels raise nothing: who calls them has checked sizes and
dtypes.
"""

import numpy as np

from minglm.fast.jit import inlined
from minglm.fast.machine import widen

ZERO, ONE = np.float32(0), np.float32(1)
NOTHING = np.float32(-np.inf)
CHUNK = 64  # keys that are read together for all query heads that share them
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
def first_key(segments, b, slot, segment):
    """The first key that a query of this segment in this slot sees; padding sees only itself."""
    first = 0
    while first < slot and (segment < 0 or segments[b, first] != segment):
        first += 1
    return first


@inlined
def attend_keys(q, n, g, k, v, layer, b, first, last, slot, segments, segment, scores, rank, chunk, parts):
    """The query heads of row n that read key/value head g, on the keys first … last − 1 of row b of the cache.

    They share the reading, and what they find is put together by `join_parts`: parts[n, head, chunk] gets Σ weight ·
    value, the highest score and Σ weight, with weight = exp(score − highest). A key of another segment gets no weight,
    except the query's own. q [N, H, d], k and v [L, B, capacity, G, d], segments [B, capacity]; scores [threads, CHUNK]
    is room.
    """
    d, R = q.shape[2], q.shape[1] // k.shape[3]
    scale = np.float32(d) ** np.float32(-0.5)
    weights, marks, whole = scores[rank, : last - first], segments[b, first:last], (last - first) // 4 * 4
    for head in range(g * R, g * R + R):
        for s in range(first, last):
            product = ZERO
            for i in range(d):
                product += q[n, head, i] * k[layer, b, s, g, i]
            scores[rank, s - first] = product * scale
        for s in range(len(weights)):
            weights[s] = weights[s] if marks[s] == segment or s == slot - first else NOTHING
        highest, total = NOTHING, ZERO
        for s in range(len(weights)):
            highest = max(highest, weights[s])
        shift = ZERO if highest == NOTHING else highest
        for s in range(len(weights)):
            weights[s] = exp(weights[s] - shift)
            total += weights[s]
        for i in range(d):
            parts[n, head, chunk, i] = ZERO
        for s in range(0, whole, 4):  # four at a time: the sum is written a fourth as often
            w0, w1, w2, w3, at = weights[s], weights[s + 1], weights[s + 2], weights[s + 3], first + s
            for i in range(d):
                parts[n, head, chunk, i] += (
                    w0 * v[layer, b, at, g, i]
                    + w1 * v[layer, b, at + 1, g, i]
                    + w2 * v[layer, b, at + 2, g, i]
                    + w3 * v[layer, b, at + 3, g, i]
                )
        for s in range(whole, last - first):
            for i in range(d):
                parts[n, head, chunk, i] += weights[s] * v[layer, b, first + s, g, i]
        parts[n, head, chunk, d], parts[n, head, chunk, d + 1] = highest, total


@inlined
def join_parts(parts, n, head, chunks, d, into):
    """Row n's answer of one head, from what was found on each chunk of its keys."""
    highest, total = NOTHING, ZERO
    for c in range(chunks):
        highest = max(highest, parts[n, head, c, d])
    for i in range(d):
        into[n, head * d + i] = ZERO
    for c in range(chunks):
        share_of_chunk = exp(parts[n, head, c, d] - highest)
        total += share_of_chunk * parts[n, head, c, d + 1]
        for i in range(d):
            into[n, head * d + i] += share_of_chunk * parts[n, head, c, i]
    for i in range(d):
        into[n, head * d + i] /= total


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
