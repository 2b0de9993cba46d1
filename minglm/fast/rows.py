"""Kernels that go over rows once: norms, rotations, sums, the embedding's gradient, cross-entropy, AdamW.

They are bound by memory: what a row needs is done in one pass over it.
"""

import numpy as np

from minglm.fast.jit import inlined
from minglm.fast.kernels import NOTHING, ONE, ZERO, choose, exp, sigmoid
from minglm.fast.machine import widen
from minglm.fast.team import barrier, parallel, share

BLOCK = 4096  # numbers that are summed in float32 before they go into a float64 total
ROWS = 128  # rows that are summed in one piece


@parallel
def norm_forward(rank, threads, words, x, weight, eps, y):
    """RMSNorm of the rows of x [N, D]."""
    N, D = x.shape
    start, stop = share(rank, threads, N)
    for n in range(start, stop):
        squares = ZERO
        for i in range(D):
            squares += x[n, i] * x[n, i]
        scale = ONE / np.sqrt(squares / np.float32(D) + eps)
        for i in range(D):
            y[n, i] = x[n, i] * scale * weight[i]


@parallel
def norm_backward(rank, threads, words, dy, x, weight, eps, dx, dweight, partial):
    """See `rms_norm_bwd`. partial [blocks of ROWS, D]: room for each block's part of dweight."""
    N, D = x.shape
    start, stop = share(rank, threads, len(partial))
    for block in range(start, stop):
        for i in range(D):
            partial[block, i] = ZERO
        for n in range(block * ROWS, min((block + 1) * ROWS, N)):
            squares, along = ZERO, ZERO
            for i in range(D):
                squares += x[n, i] * x[n, i]
                along += dy[n, i] * weight[i] * x[n, i]
            scale = ONE / np.sqrt(squares / np.float32(D) + eps)
            along *= scale * scale / np.float32(D)
            for i in range(D):
                dx[n, i] = (dy[n, i] * weight[i] - x[n, i] * along) * scale
                partial[block, i] += dy[n, i] * (x[n, i] * scale)
    barrier(words, threads)
    if rank == 0:
        sum_rows(partial, dweight)


@parallel
def route(
    rank, threads, words, scores, bias, groups, open_groups, normalise, factor, own_biased, own_weights,
    indices, weights,
):  # fmt: skip
    """The logits in `scores` [N, E] become scores; indices, weights [N, K]: see `router`. own_biased, own_weights
    [threads, E] are room to work in."""
    start, stop = share(rank, threads, len(scores))
    for n in range(start, stop):
        for e in range(scores.shape[1]):
            scores[n, e] = sigmoid(scores[n, e])
        by_expert = own_weights[rank]
        choose(scores[n], bias, groups, open_groups, normalise, factor, own_biased[rank], by_expert, indices[n])
        for k in range(indices.shape[1]):
            weights[n, k] = by_expert[indices[n, k]]


@inlined
def sum_rows(x, into):
    for i in range(len(into)):
        into[i] = ZERO
    for n in range(len(x)):
        for i in range(len(into)):
            into[i] += x[n, i]


@parallel
def turn_heads(rank, threads, words, x, cos, sin, direction, y):
    """Rotate x [N, heads, d] by the angles of cos and sin [N, r/2]; direction −1 turns back."""
    N, heads, d = x.shape
    half = cos.shape[1]
    start, stop = share(rank, threads, N)
    for n in range(start, stop):
        for h in range(heads):
            for i in range(half):
                first, second, s = x[n, h, i], x[n, h, half + i], sin[n, i] * direction
                y[n, h, i] = first * cos[n, i] - second * s
                y[n, h, half + i] = second * cos[n, i] + first * s
            for i in range(2 * half, d):
                y[n, h, i] = x[n, h, i]


@parallel
def add_rows(rank, threads, words, a, b, y):
    """y = a + b, all flat."""
    start, stop = share(rank, threads, len(y))
    a, b, y = a[start:stop], b[start:stop], y[start:stop]
    for i in range(len(y)):
        y[i] = a[i] + b[i]


@parallel
def widen_all(rank, threads, words, x, y):
    """y = x, both flat, from bfloat16 to float32."""
    start, stop = share(rank, threads, len(y))
    x, y = x[start:stop], y[start:stop]
    for i in range(len(y)):
        y[i] = widen(x[i])


@parallel
def embed_backward(rank, threads, words, dy, ids, dweight):
    """dweight [V, D]: each row the sum of the gradients of its uses, in their order."""
    start, stop = share(rank, threads, dweight.shape[1])
    dy, dweight = dy[:, start:stop], dweight[:, start:stop]
    for v in range(len(dweight)):
        for i in range(stop - start):
            dweight[v, i] = ZERO
    for n in range(len(ids)):
        for i in range(stop - start):
            dweight[ids[n], i] += dy[n, i]


# -- cross-entropy -----------------------------------------------------------------------------------------------


@parallel
def entropy_forward(rank, threads, words, logits, targets, ignore, losses, totals):
    """For each row −log softmax(logits)[target], 0 where the target is `ignore`. totals [N, 2]: each row's highest
    logit and the sum of exp(logit − highest), from which the backward makes the probabilities again."""
    N, V = logits.shape
    start, stop = share(rank, threads, N)
    for n in range(start, stop):
        highest = NOTHING
        for v in range(V):
            highest = max(highest, logits[n, v])
        total = ZERO
        for v in range(V):
            total += exp(logits[n, v] - highest)
        totals[n, 0], totals[n, 1] = highest, total
        losses[n] = ZERO if targets[n] == ignore else np.log(total) - (logits[n, targets[n]] - highest)


@parallel
def entropy_backward(rank, threads, words, logits, targets, ignore, totals, factor, dlogits):
    """factor · (softmax − one-hot), 0 on ignored rows."""
    N, V = logits.shape
    start, stop = share(rank, threads, N)
    for n in range(start, stop):
        highest, target = totals[n, 0], targets[n]
        share_of_one = ZERO if target == ignore else factor / totals[n, 1]
        for v in range(V):
            dlogits[n, v] = exp(logits[n, v] - highest) * share_of_one
        if target != ignore:
            dlogits[n, target] = (exp(logits[n, target] - highest) / totals[n, 1] - ONE) * factor


# -- the optimiser -----------------------------------------------------------------------------------------------


@parallel
def squares_of(rank, threads, words, x, partial):
    """partial[b] = Σ x² over block b of the flat x; NaN and ∞ stay what they are."""
    start, stop = share(rank, threads, len(partial))
    for b in range(start, stop):
        part, total = x[b * BLOCK : (b + 1) * BLOCK], ZERO
        for i in range(len(part)):
            total += part[i] * part[i]
        partial[b] = total


@parallel
def adamw(rank, threads, words, p, g, m, v, clip, b1, b2, share1, share2, rate, kept, eps):
    """One step of AdamW on flat arrays, in place; see `minglm.train.optim.AdamW`."""
    start, stop = share(rank, threads, len(p))
    p, g, m, v = p[start:stop], g[start:stop], m[start:stop], v[start:stop]
    for i in range(len(p)):
        gradient = g[i] * clip
        mean = b1 * m[i] + (ONE - b1) * gradient
        square = b2 * v[i] + (ONE - b2) * gradient * gradient
        m[i], v[i] = mean, square
        p[i] = p[i] * kept - rate * (mean / share1) / (np.sqrt(square / share2) + eps)
