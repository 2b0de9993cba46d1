"""The small kernels: one row, one token, or the heads that share a key each. The stages in `decode.py` only call them.

Twins of functions in `minglm.model`: `normalise_row` is `rms_norm`, `turn` is `rope`,
`attend_keys` with `join_parts` is `attend`, `choose` is `router`, `silu_times` is `swiglu`. All sums are in float32, in
an order that depends on nothing but the length of the sum. Kernels raise nothing: who calls them has checked sizes and
dtypes.
"""

import numpy as np

from minglm.fast.jit import inlined

ZERO, ONE = np.float32(0), np.float32(1)
NOTHING = np.float32(-np.inf)
CHUNK = 64  # keys that are read together for all query heads that share them
NOT_PICKED = np.float32(-1)  # in place of a combine weight, none of which is negative


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
    weights, marks = scores[rank, : last - first], segments[b, first:last]
    keys, values = k[layer, b, first:last], v[layer, b, first:last]  # [keys, G, d]
    for head in range(g * R, g * R + R):
        score_keys(q[n, head], keys, g, weights)
        for s in range(len(weights)):
            weights[s] = weights[s] if marks[s] == segment or s == slot - first else NOTHING
        highest, total = NOTHING, ZERO
        for s in range(len(weights)):
            highest = max(highest, weights[s])
        shift = ZERO if highest == NOTHING else highest
        for s in range(len(weights)):
            weights[s] = exp(weights[s] - shift)
            total += weights[s]
        found = parts[n, head, chunk]
        sum_values(weights, values, g, found[:d])
        found[d], found[d + 1] = highest, total


@inlined
def score_keys(query, keys, g, into):
    """into[s] = query · key / √d, four keys at a time: the loop over d begins a fourth as often."""
    d, whole = len(query), len(into) // 4 * 4
    scale = np.float32(d) ** np.float32(-0.5)
    for s in range(0, whole, 4):
        p0, p1, p2, p3 = ZERO, ZERO, ZERO, ZERO
        for i in range(d):
            p0 += query[i] * keys[s, g, i]
            p1 += query[i] * keys[s + 1, g, i]
            p2 += query[i] * keys[s + 2, g, i]
            p3 += query[i] * keys[s + 3, g, i]
        into[s], into[s + 1], into[s + 2], into[s + 3] = p0 * scale, p1 * scale, p2 * scale, p3 * scale
    for s in range(whole, len(into)):
        product = ZERO
        for i in range(d):
            product += query[i] * keys[s, g, i]
        into[s] = product * scale


@inlined
def sum_values(weights, values, g, into):
    """into [d] = Σ weight · value, four at a time: the sum is written a fourth as often."""
    d, whole = len(into), len(weights) // 4 * 4
    for i in range(d):
        into[i] = ZERO
    for s in range(0, whole, 4):
        w0, w1, w2, w3 = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
        for i in range(d):
            into[i] += (
                w0 * values[s, g, i] + w1 * values[s + 1, g, i] + w2 * values[s + 2, g, i] + w3 * values[s + 3, g, i]
            )
    for s in range(whole, len(weights)):
        for i in range(d):
            into[i] += weights[s] * values[s, g, i]


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
def choose(scores, bias, groups, open_groups, normalise, factor, biased, weights, picks):
    """One token's scores [E] -> picks [K], the best biased score first and the earlier expert at a tie, and weights
    [E]: the combine weight of the picked experts, from scores without bias, and NOT_PICKED at all others. `biased` [E]
    is room to work in."""
    E = len(scores)
    for e in range(E):
        biased[e] = scores[e] + bias[e]
        weights[e] = NOT_PICKED
    if groups > 1:
        _close_groups(biased, groups, E // groups, open_groups)
    total = np.float32(1e-20)
    for k in range(len(picks)):
        best = -1
        for e in range(E):
            if weights[e] == NOT_PICKED and (best < 0 or biased[e] > biased[best]):
                best = e
        picks[k], weights[best] = best, scores[best]
        total += scores[best]
    for k in range(len(picks)):
        if normalise:
            weights[picks[k]] /= total
        weights[picks[k]] *= factor


@inlined
def _close_groups(biased, groups, size, open_groups):
    """Experts outside the `open_groups` best groups fall to −∞. A group is judged by the sum of its two best."""
    for _ in range(groups - open_groups):
        worst, least, still_open = -1, ZERO, 0
        for g in range(groups):
            first, second = NOTHING, NOTHING
            for e in range(g * size, (g + 1) * size):
                if biased[e] > first:
                    first, second = biased[e], first
                elif biased[e] > second:
                    second = biased[e]
            still_open += first > NOTHING
            if first > NOTHING and (worst < 0 or first + second <= least):  # at a tie the later group falls
                worst, least = g, first + second
        if still_open > open_groups:  # fewer where the bias itself has closed some
            for e in range(worst * size, (worst + 1) * size):
                biased[e] = NOTHING
