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


@inlined
def hide(scores, t, S, b, slot, segment, key_segments, scale):
    """Scale query t's scores and put −∞ where it may not look: at later keys and at other segments'. Returns the
    highest."""
    highest = NOTHING
    for s in range(S):
        visible = s == slot or (s < slot and segment >= 0 and key_segments[b, s] == segment)
        score = scores[t, s] * scale if visible else NOTHING
        scores[t, s] = score
        highest = max(highest, score)
    return highest


@parallel
def attend_forward(rank, threads, words, blas, q, k, v, slots, segments, key_segments, own_scores, y, totals):
    """softmax(q kᵀ / √d) v. q, y [B, T, H, d]; k, v [B, S, G, d], rows any distance apart; slots, segments [B, T];
    key_segments [B, S]; totals [B, H, T]: log Σ exp(scores). own_scores [threads, BLOCK, S] is room."""
    B, T, H, d = q.shape
    G = k.shape[2]
    scale = np.float32(d) ** np.float32(-0.5)
    blocks = -(-T // BLOCK)
    room = own_scores[rank]
    piece = take(words, 0)
    while piece < B * H * blocks:
        b, h, first, last = block_of(piece, blocks, H, T)
        g, S, n = h // (H // G), slots[b, last - 1] + 1, last - first
        at = address(room)
        q_at = address(q) + 4 * ((b * T + first) * H + h) * d
        k_at = address(k) + b * k.strides[0] + 4 * g * d
        v_at = address(v) + b * v.strides[0] + 4 * g * d
        product(blas, False, True, n, S, d, ONE, q_at, H * d, k_at, k.strides[1] // 4, ZERO, at, room.shape[1])
        for t in range(n):
            slot, segment = slots[b, first + t], segments[b, first + t]
            highest = hide(room, t, S, b, slot, segment, key_segments, scale)
            total = ZERO
            for s in range(S):
                weight = exp(room[t, s] - highest)
                room[t, s] = weight
                total += weight
            for s in range(S):
                room[t, s] /= total
            totals[b, h, first + t] = highest + np.log(total)
        y_at = address(y) + 4 * ((b * T + first) * H + h) * d
        product(blas, False, False, n, d, S, ONE, at, room.shape[1], v_at, v.strides[1] // 4, ZERO, y_at, H * d)
        piece = take(words, 0)


@parallel
def attend_backward(
    rank, threads, words, blas, dy, q, k, v, y, totals, segments, own_scores, own_dscores, dk_heads, dv_heads,
    dq, dk, dv,
):  # fmt: skip
    """See `attend_bwd`; all contiguous, T = S. dk_heads, dv_heads [B, T, H, d]: each query head's part, summed over
    the heads of a group at the end."""
    B, T, H, d = q.shape
    G = k.shape[2]
    R = H // G
    scale = np.float32(d) ** np.float32(-0.5)
    probs, dscores = own_scores[rank], own_dscores[rank]
    width = probs.shape[1]
    p_at, ds_at = address(probs), address(dscores)
    piece = take(words, 0)
    while piece < B * H:
        b, h = piece // H, piece % H
        head, group = 4 * (b * T * H + h) * d, 4 * (b * T * G + h // R) * d
        for first in range((T - 1) // BLOCK * BLOCK, -1, -BLOCK):
            last = min(first + BLOCK, T)
            n, S, at = last - first, last, head + 4 * first * H * d
            keep = ZERO if last == T else ONE  # the first block to come writes dk and dv, the others add
            product(
                blas, False, True, n, S, d, ONE, address(q) + at, H * d, address(k) + group, G * d, ZERO, p_at, width
            )
            product(
                blas, False, True, n, S, d, ONE, address(dy) + at, H * d, address(v) + group, G * d, ZERO, ds_at, width
            )
            for t in range(n):
                hide(probs, t, S, b, first + t, segments[b, first + t], segments, scale)
                total, along = totals[b, h, first + t], ZERO
                for i in range(d):
                    along += dy[b, first + t, h, i] * y[b, first + t, h, i]
                for s in range(S):
                    p = exp(probs[t, s] - total)
                    probs[t, s] = p
                    dscores[t, s] = p * (dscores[t, s] - along) * scale
            product(
                blas, False, False, n, d, S, ONE, ds_at, width, address(k) + group, G * d, ZERO, address(dq) + at, H * d
            )
            product(
                blas, True, False, S, d, n, ONE, ds_at, width, address(q) + at, H * d, keep, address(dk_heads) + head,
                H * d,
            )  # fmt: skip
            product(
                blas, True, False, S, d, n, ONE, p_at, width, address(dy) + at, H * d, keep, address(dv_heads) + head,
                H * d,
            )  # fmt: skip
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
