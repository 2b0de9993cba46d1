"""Attention over whole sequences without the T×S matrix: blocks of queries, one head at a time.

Each block's scores fit into the processor's cache. The backward computes them again from the log of each row's sum
(FlashAttention, arXiv 2205.14135), which costs less than keeping them.
"""

import numpy as np

from minglm.fast.blas import address, product
from minglm.fast.jit import inlined
from minglm.fast.kernels import NOTHING, ONE, ZERO, exp
from minglm.fast.team import barrier, parallel, share, take

BLOCK = 64  # queries


@inlined
def block_of(piece, blocks, H, T):
    """Row, head, first and last query of a piece. The last blocks, which see most keys, are taken first."""
    b, rest = piece // (H * blocks), piece % (H * blocks)
    block = blocks - 1 - rest // H
    return b, rest % H, block * BLOCK, min((block + 1) * BLOCK, T)


@parallel
def attend_forward(rank, threads, words, blas, q, k, v, begins, slots, own_scores, y, totals):
    """softmax(q kᵀ / √d) v. q, y [B, T, H, d]; k, v [B, S, G, d], rows any distance apart; query t of row b sees keys
    begins[b, t] … slots[b, t]; totals [B, H, T]: log Σ exp(scores). own_scores [threads, BLOCK, S] is room."""
    B, T, H, d = q.shape
    G = k.shape[2]
    scale = ONE / np.sqrt(np.float32(d))
    blocks = -(-T // BLOCK)
    scores = own_scores[rank]
    at, width = address(scores), scores.shape[1]
    piece = take(words, 0)
    while piece < B * H * blocks:
        b, h, first, last = block_of(piece, blocks, H, T)
        g, S, n = h // (H // G), slots[b, last - 1] + 1, last - first
        q_at = address(q) + 4 * ((b * T + first) * H + h) * d
        k_at = address(k) + b * k.strides[0] + 4 * g * d
        v_at = address(v) + b * v.strides[0] + 4 * g * d
        product(blas, False, True, n, S, d, scale, q_at, H * d, k_at, k.strides[1] // 4, ZERO, at, width)
        for t in range(n):
            begin, end = begins[b, first + t], slots[b, first + t] + 1
            seen = scores[t, begin:end]
            highest, total = NOTHING, ZERO
            for s in range(len(seen)):
                highest = max(highest, seen[s])
            for s in range(len(seen)):
                seen[s] = exp(seen[s] - highest)
                total += seen[s]
            for s in range(len(seen)):
                seen[s] /= total
            scores[t, :begin] = ZERO
            scores[t, end:S] = ZERO
            totals[b, h, first + t] = highest + np.log(total)
        y_at = address(y) + 4 * ((b * T + first) * H + h) * d
        product(blas, False, False, n, d, S, ONE, at, width, v_at, v.strides[1] // 4, ZERO, y_at, H * d)
        piece = take(words, 0)


@parallel
def attend_backward(
    rank, threads, words, blas, dy, q, k, v, y, totals, begins, own_scores, own_dscores, dk_heads, dv_heads,
    dq, dk, dv,
):  # fmt: skip
    """See `attend_bwd`; all contiguous, T = S. dk_heads, dv_heads [B, T, H, d]: each query head's part, summed over
    the heads of a group at the end."""
    B, T, H, d = q.shape
    G = k.shape[2]
    R = H // G
    scale = ONE / np.sqrt(np.float32(d))
    probs, dscores = own_scores[rank], own_dscores[rank]
    p_at, ds_at, width = address(probs), address(dscores), probs.shape[1]
    piece = take(words, 0)
    while piece < B * H:
        b, h = piece // H, piece % H
        head, group = 4 * (b * T * H + h) * d, 4 * (b * T * G + h // R) * d
        k_at, v_at, dk_at, dv_at = (
            address(k) + group,
            address(v) + group,
            address(dk_heads) + head,
            address(dv_heads) + head,
        )
        for first in range((T - 1) // BLOCK * BLOCK, -1, -BLOCK):
            last = min(first + BLOCK, T)
            n, S, at = last - first, last, head + 4 * first * H * d
            q_at, dy_at = address(q) + at, address(dy) + at
            product(blas, False, True, n, S, d, scale, q_at, H * d, k_at, G * d, ZERO, p_at, width)
            product(blas, False, True, n, S, d, ONE, dy_at, H * d, v_at, G * d, ZERO, ds_at, width)
            for t in range(n):
                total, along = totals[b, h, first + t], ZERO
                for i in range(d):
                    along += dy[b, first + t, h, i] * y[b, first + t, h, i]
                begin, end = begins[b, first + t], first + t + 1
                p, ds = probs[t, begin:end], dscores[t, begin:end]
                for s in range(len(p)):
                    p[s] = exp(p[s] - total)
                    ds[s] = p[s] * (ds[s] - along) * scale
                for hidden in (probs, dscores):
                    hidden[t, :begin] = ZERO
                    hidden[t, end:S] = ZERO
            keep = ZERO if last == T else ONE  # the first block to come writes dk and dv, the others add
            product(blas, False, False, n, d, S, ONE, ds_at, width, k_at, G * d, ZERO, address(dq) + at, H * d)
            product(blas, True, False, S, d, n, ONE, ds_at, width, q_at, H * d, keep, dk_at, H * d)
            product(blas, True, False, S, d, n, ONE, p_at, width, dy_at, H * d, keep, dv_at, H * d)
        piece = take(words, 0)
    barrier(words, threads)
    start, stop = share(rank, threads, B * T)
    for row in range(start, stop):
        b, t = row // T, row % T
        for g in range(G):
            for i in range(d):
                sum_k, sum_v = ZERO, ZERO
                for r in range(R):
                    sum_k += dk_heads[b, t, g * R + r, i]
                    sum_v += dv_heads[b, t, g * R + r, i]
                dk[b, t, g, i], dv[b, t, g, i] = sum_k, sum_v
