"""Kernels around matrix products: linear maps, gated MLPs and routed experts, with their backwards.

A product is cut into tiles, an expert's tokens into chunks, both by size alone; the ranks take them one after the other.
Where a result sums over rows (weight gradients), one piece does the whole sum.
"""

import numpy as np

from minglm.fast.blas import address, product
from minglm.fast.jit import inlined
from minglm.fast.kernels import ONE, ZERO, sigmoid
from minglm.fast.team import barrier, parallel, share, take

TILES = 16  # a product is cut into at least this many, unless they become smaller than …
LEAST = 32  # rows or columns
CHUNK = 128  # tokens of an expert that go through it together


@inlined
def tile_size(m, n):
    """Rows and columns of the tiles that an [m, n] result is cut into."""
    rows, columns = min(m, 256), min(n, 512)
    while -(-m // rows) * -(-n // columns) < TILES and max(rows, columns) >= 2 * LEAST:
        if rows >= columns:
            rows = (rows + 1) // 2
        else:
            columns = (columns + 1) // 2
    return rows, columns


@inlined
def multiply(words, stage, piece, before, blas, turn_a, turn_b, m, n, k, a, b, keep, c):
    """One product of a stage that may hold several: this rank's tiles of C [m, n] = A B + keep · C.

    `piece` is the piece this rank has in hand, `before` how many pieces earlier products have. Returns both for the
    next one. Arrays are given by address and contiguous.
    """
    rows, columns = tile_size(m, n)
    across = -(-n // columns)
    count = -(-m // rows) * across
    a_row, b_row = (m if turn_a else k), (k if turn_b else n)
    while piece < before + count:
        i, j = (piece - before) // across * rows, (piece - before) % across * columns
        product(
            blas, turn_a, turn_b, min(rows, m - i), min(columns, n - j), k, ONE,
            a + 4 * (i if turn_a else i * k), a_row, b + 4 * (j * k if turn_b else j), b_row, keep,
            c + 4 * (i * n + j), n,
        )  # fmt: skip
        piece = take(words, stage)
    return piece, before + count


# -- linear ------------------------------------------------------------------------------------------------------


@parallel
def linear_forward(rank, threads, words, blas, x, weight, bias, y):
    """y [N, out] = x [N, in] Wᵀ + b; a bias of length 0 is none."""
    (N, inputs), outputs = x.shape, len(weight)
    start, stop = share(rank, threads, N)
    if len(bias):
        for n in range(start, stop):
            for i in range(outputs):
                y[n, i] = bias[i]
        barrier(words, threads)
    keep = ONE if len(bias) else ZERO
    piece = take(words, 0)
    multiply(words, 0, piece, 0, blas, False, True, N, outputs, inputs, address(x), address(weight), keep, address(y))


@parallel
def linear_backward(rank, threads, words, blas, dy, x, weight, dx, dweight, dbias):
    """dx = dy W, dW = dyᵀ x, db = Σ dy."""
    (N, inputs), outputs = x.shape, len(weight)
    dy_at = address(dy)
    piece, before = take(words, 0), 0
    piece, before = multiply(
        words, 0, piece, before, blas, True, False, outputs, inputs, N, dy_at, address(x), ZERO, address(dweight)
    )
    multiply(words, 0, piece, before, blas, False, False, N, inputs, outputs, dy_at, address(weight), ZERO, address(dx))
    start, stop = share(rank, threads, len(dbias))
    for i in range(start, stop):
        dbias[i] = ZERO
    for n in range(N):
        for i in range(start, stop):
            dbias[i] += dy[n, i]


# -- a gated MLP -------------------------------------------------------------------------------------------------


@inlined
def gated(gate, up, hidden, start, stop):
    """hidden = silu(gate) · up for rows start … stop."""
    for n in range(start, stop):
        for f in range(gate.shape[1]):
            hidden[n, f] = gate[n, f] * sigmoid(gate[n, f]) * up[n, f]


@inlined
def gated_backward(dhidden, gate, up, n):
    """For row n: dgate over `gate`'s place in dhidden … see `swiglu_bwd`. Returns nothing; writes dgate over dhidden
    and dup over `up`."""
    for f in range(gate.shape[1]):
        g = gate[n, f]
        s = sigmoid(g)
        d = dhidden[n, f]
        dhidden[n, f] = d * up[n, f] * s * (ONE + g * (ONE - s))
        up[n, f] = d * g * s


@parallel
def mlp_forward(rank, threads, words, blas, x, gate_proj, up_proj, down_proj, gate, up, hidden, y):
    """y = down(silu(gate(x)) · up(x)); gate, up and hidden [N, F] are kept for the backward."""
    (N, D), F = x.shape, len(gate_proj)
    x_at = address(x)
    piece, before = take(words, 0), 0
    piece, before = multiply(
        words, 0, piece, before, blas, False, True, N, F, D, x_at, address(gate_proj), ZERO, address(gate)
    )
    multiply(words, 0, piece, before, blas, False, True, N, F, D, x_at, address(up_proj), ZERO, address(up))
    barrier(words, threads)
    start, stop = share(rank, threads, N)
    gated(gate, up, hidden, start, stop)
    barrier(words, threads)
    piece = take(words, 1)
    multiply(words, 1, piece, 0, blas, False, True, N, D, F, address(hidden), address(down_proj), ZERO, address(y))


@parallel
def mlp_backward(
    rank, threads, words, blas, dy, x, gate_proj, up_proj, down_proj, gate, up, hidden, dup, dgate,
    dx, dgate_proj, dup_proj, ddown_proj,
):  # fmt: skip
    """The gradients of `mlp_forward`; dgate and dup [N, F] are room to work in."""
    (N, D), F = x.shape, len(gate_proj)
    x_at, dy_at = address(x), address(dy)
    piece, before = take(words, 0), 0
    piece, before = multiply(
        words, 0, piece, before, blas, False, False, N, F, D, dy_at, address(down_proj), ZERO, address(dgate)
    )
    multiply(words, 0, piece, before, blas, True, False, D, F, N, dy_at, address(hidden), ZERO, address(ddown_proj))
    barrier(words, threads)
    start, stop = share(rank, threads, N)
    for n in range(start, stop):
        for f in range(F):
            dup[n, f] = up[n, f]
        gated_backward(dgate, gate, dup, n)
    barrier(words, threads)
    dgate_at, dup_at = address(dgate), address(dup)
    piece, before = take(words, 1), 0
    piece, before = multiply(
        words, 1, piece, before, blas, True, False, F, D, N, dgate_at, x_at, ZERO, address(dgate_proj)
    )
    piece, before = multiply(words, 1, piece, before, blas, True, False, F, D, N, dup_at, x_at, ZERO, address(dup_proj))
    multiply(words, 1, piece, before, blas, False, False, N, D, F, dgate_at, address(gate_proj), ZERO, address(dx))
    barrier(words, threads)
    piece = take(words, 2)
    multiply(words, 2, piece, 0, blas, False, False, N, D, F, dup_at, address(up_proj), ONE, address(dx))


# -- routed experts ----------------------------------------------------------------------------------------------
# The N·K picks stand in a line, sorted by expert: pick p is token tokens[p], expert e has picks starts[e] … starts[e+1].
# places [N, K] says where each token's picks stand, experts in ascending order.


@inlined
def chunk_of(starts, piece):
    """The expert and the picks of chunk number `piece`; expert −1: there are fewer chunks."""
    for e in range(len(starts) - 1):
        count = -(-(starts[e + 1] - starts[e]) // CHUNK)
        if piece < count:
            first = starts[e] + piece * CHUNK
            return e, first, min(first + CHUNK, starts[e + 1])
        piece -= count
    return -1, 0, 0


@inlined
def gather(x, tokens, first, last, into):
    for p in range(first, last):
        for i in range(x.shape[1]):
            into[p, i] = x[tokens[p], i]


@inlined
def sum_places(rows, places, weights, start, stop, into):
    """into[t] = Σ_k weight · rows[places[t, k]]; `weights` [picks], or of length 0: all 1."""
    for t in range(start, stop):
        for i in range(into.shape[1]):
            into[t, i] = ZERO
        for k in range(places.shape[1]):
            p = places[t, k]
            weight = weights[p] if len(weights) else ONE
            for i in range(into.shape[1]):
                into[t, i] += weight * rows[p, i]


@parallel
def experts_forward(
    rank, threads, words, blas, x, tokens, starts, places, weights, experts, picked_x, gate, up, hidden, out, y
):
    """y[t] = Σ weight · expert(x[t]). `experts` int64 [E, 3]: addresses of gate_proj, up_proj [F, D], down_proj [D, F].
    picked_x [picks, D], gate, up, hidden [picks, F] are kept for the backward; out [picks, D] is room to work in."""
    D, F = x.shape[1], gate.shape[1]
    x_at, gate_at, up_at = address(picked_x), address(gate), address(up)
    hidden_at, out_at = address(hidden), address(out)
    e, first, last = chunk_of(starts, take(words, 0))
    while e >= 0:
        n = last - first
        gather(x, tokens, first, last, picked_x)
        rows = x_at + 4 * first * D
        product(blas, False, True, n, F, D, ONE, rows, D, experts[e, 0], D, ZERO, gate_at + 4 * first * F, F)
        product(blas, False, True, n, F, D, ONE, rows, D, experts[e, 1], D, ZERO, up_at + 4 * first * F, F)
        gated(gate, up, hidden, first, last)
        at = hidden_at + 4 * first * F
        product(blas, False, True, n, D, F, ONE, at, F, experts[e, 2], F, ZERO, out_at + 4 * first * D, D)
        e, first, last = chunk_of(starts, take(words, 0))
    barrier(words, threads)
    start, stop = share(rank, threads, len(x))
    sum_places(out, places, weights, start, stop, y)


@parallel
def experts_backward(
    rank, threads, words, blas, dy, tokens, starts, places, weights, experts, picked_x, gate, up, hidden,
    picked_dy, dgate, dup, weighted, dpicked, dx, dweights, gradients,
):  # fmt: skip
    """The gradients of `experts_forward`: dx [N, D], dweights [picks] and, at the addresses `gradients` [E, 3], those
    of the experts that were picked. picked_dy, dpicked [picks, D] and dgate, dup, weighted [picks, F] are room.

    With r = dy down_proj, before any weighing: dweight = r · hidden, so the experts' answers need not be kept.
    """
    D, F = dy.shape[1], gate.shape[1]
    dy_at, dgate_at, dup_at, dx_at = address(picked_dy), address(dgate), address(dup), address(dpicked)
    e, first, last = chunk_of(starts, take(words, 0))
    while e >= 0:
        n, at_D, at_F = last - first, 4 * first * D, 4 * first * F
        gather(dy, tokens, first, last, picked_dy)
        product(blas, False, False, n, F, D, ONE, dy_at + at_D, D, experts[e, 2], F, ZERO, dgate_at + at_F, F)
        for p in range(first, last):
            along = ZERO
            for f in range(F):
                along += dgate[p, f] * hidden[p, f]
                weighted[p, f] = weights[p] * hidden[p, f]
                dgate[p, f] *= weights[p]
                dup[p, f] = up[p, f]
            dweights[p] = along
            gated_backward(dgate, gate, dup, p)
        product(blas, False, False, n, D, F, ONE, dgate_at + at_F, F, experts[e, 0], D, ZERO, dx_at + at_D, D)
        product(blas, False, False, n, D, F, ONE, dup_at + at_F, F, experts[e, 1], D, ONE, dx_at + at_D, D)
        e, first, last = chunk_of(starts, take(words, 0))
    barrier(words, threads)
    x_at, weighted_at = address(picked_x), address(weighted)
    piece = take(words, 1)
    while piece < 3 * len(experts):
        e, part = piece // 3, piece % 3
        n, at_D, at_F = starts[e + 1] - starts[e], 4 * starts[e] * D, 4 * starts[e] * F
        if n and part == 0:
            product(blas, True, False, F, D, n, ONE, dgate_at + at_F, F, x_at + at_D, D, ZERO, gradients[e, 0], D)
        elif n and part == 1:
            product(blas, True, False, F, D, n, ONE, dup_at + at_F, F, x_at + at_D, D, ZERO, gradients[e, 1], D)
        elif n:
            product(blas, True, False, D, F, n, ONE, dy_at + at_D, D, weighted_at + at_F, F, ZERO, gradients[e, 2], F)
        piece = take(words, 1)
    start, stop = share(rank, threads, len(dx))
    sum_places(dpicked, places, weights[:0], start, stop, dx)
