"""Kernels around matrix products: linear maps, gated MLPs and routed experts, with their backwards.

A product is cut into tiles, an expert's tokens into chunks, both by size alone; the ranks take one after the other.
Where a stage has several products, their tiles stand in one line: a rank that holds piece 9 when the first product has
8 goes on with the second's tile 1. Parts of arrays are given by address, so `+ 4 * n` means n numbers further on.
"""

from minglm.fast.blas import address, product
from minglm.fast.jit import inlined
from minglm.fast.kernels import ONE, ZERO, sigmoid
from minglm.fast.machine import matrix, widen
from minglm.fast.rows import sum_rows
from minglm.fast.team import barrier, parallel, share, take

TILES = 8  # a result is cut into at least this many, unless they become smaller than …
LEAST = 64  # rows or columns
LONG = 1024  # a weight gradient's sum over rows is cut into pieces of this length, added up at the end
CHUNK = 256  # tokens of an expert that go through it together, at most


@inlined
def tile_size(m, n):
    """Rows and columns of the tiles that an [m, n] result is cut into."""
    rows, columns = min(m, 1024), min(n, 1024)
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


@inlined
def gradient(words, stage, piece, before, blas, dy, outputs, x, inputs, N, partial):
    """A weight's gradient dyᵀ x in pieces of LONG rows: partial [pieces, outputs, inputs], to be added up later."""
    rows, columns = min(outputs, 512), min(inputs, 512)
    across = -(-inputs // columns)
    tiles = -(-outputs // rows) * across
    count = tiles * -(-N // LONG)
    while piece < before + count:
        part, tile = (piece - before) // tiles, (piece - before) % tiles
        i, j, first = tile // across * rows, tile % across * columns, part * LONG
        product(
            blas, True, False, min(rows, outputs - i), min(columns, inputs - j), min(LONG, N - first), ONE,
            dy + 4 * (first * outputs + i), outputs, x + 4 * (first * inputs + j), inputs, ZERO,
            partial + 4 * ((part * outputs + i) * inputs + j), inputs,
        )  # fmt: skip
        piece = take(words, stage)
    return piece, before + count


@inlined
def add_up(rank, threads, partial, into):
    """into [n] = Σ partial [pieces, n]."""
    start, stop = share(rank, threads, len(into))
    into = into[start:stop]
    for i in range(len(into)):
        into[i] = partial[0, start + i]
    for p in range(1, len(partial)):
        part = partial[p, start:stop]
        for i in range(len(into)):
            into[i] += part[i]


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
def linear_backward(rank, threads, words, blas, dy, x, weight, dx, partial, dweight, dbias):
    """dx = dy W, dW = dyᵀ x, db = Σ dy. partial [pieces, out·in] is room; with one piece it is dweight itself."""
    (N, inputs), outputs = x.shape, len(weight)
    piece, before = take(words, 0), 0
    piece, before = gradient(
        words, 0, piece, before, blas, address(dy), outputs, address(x), inputs, N, address(partial)
    )
    multiply(
        words, 0, piece, before, blas, False, False, N, inputs, outputs, address(dy), address(weight), ZERO, address(dx)
    )
    start, stop = share(rank, threads, len(dbias))
    if len(dbias):
        sum_rows(dy[:, start:stop], dbias[start:stop])
    if len(partial) > 1:
        barrier(words, threads)
        add_up(rank, threads, partial, dweight)


# -- a gated MLP -------------------------------------------------------------------------------------------------


@inlined
def gated(gate, up, hidden, start, stop):
    """hidden = silu(gate) · up for rows start … stop."""
    for n in range(start, stop):
        for f in range(gate.shape[1]):
            hidden[n, f] = gate[n, f] * sigmoid(gate[n, f]) * up[n, f]


@inlined
def gated_backward(dhidden, gate, up, dup, n):
    """`swiglu_bwd` for row n: dgate is written over dhidden."""
    for f in range(gate.shape[1]):
        s, d = sigmoid(gate[n, f]), dhidden[n, f]
        dup[n, f] = d * gate[n, f] * s
        dhidden[n, f] = d * up[n, f] * s * (ONE + gate[n, f] * (ONE - s))


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
    rank, threads, words, blas, dy, x, gate_proj, up_proj, down_proj, gate, up, hidden, dup, dgate, partials,
    dx, dgate_proj, dup_proj, ddown_proj,
):  # fmt: skip
    """The gradients of `mlp_forward`. dgate, dup [N, F] and partials [3, pieces, F·D] are room."""
    (N, D), F = x.shape, len(gate_proj)
    x_at, dy_at, dgate_at, dup_at = address(x), address(dy), address(dgate), address(dup)
    piece, before = take(words, 0), 0
    piece, before = multiply(
        words, 0, piece, before, blas, False, False, N, F, D, dy_at, address(down_proj), ZERO, dgate_at
    )
    gradient(words, 0, piece, before, blas, dy_at, D, address(hidden), F, N, address(partials[2]))
    barrier(words, threads)
    start, stop = share(rank, threads, N)
    for n in range(start, stop):
        gated_backward(dgate, gate, up, dup, n)
    barrier(words, threads)
    piece, before = take(words, 1), 0
    piece, before = gradient(words, 1, piece, before, blas, dgate_at, F, x_at, D, N, address(partials[0]))
    piece, before = gradient(words, 1, piece, before, blas, dup_at, F, x_at, D, N, address(partials[1]))
    multiply(words, 1, piece, before, blas, False, False, N, D, F, dgate_at, address(gate_proj), ZERO, address(dx))
    barrier(words, threads)
    piece = take(words, 2)
    multiply(words, 2, piece, 0, blas, False, False, N, D, F, dup_at, address(up_proj), ONE, address(dx))
    add_up(rank, threads, partials[0], dgate_proj)
    add_up(rank, threads, partials[1], dup_proj)
    add_up(rank, threads, partials[2], ddown_proj)


# -- routed experts ----------------------------------------------------------------------------------------------
# The N·K picks stand in a line, sorted by expert: pick p is slots[p] of the picks as they came (token · K + rank),
# expert e has those from starts[e] to starts[e + 1]; places [N, K] says where each token's picks stand, experts in
# ascending order.


@inlined
def sort_picks(indices, weights, slots, starts, places, sorted_weights):
    """A counting sort of the picks. Within an expert they stay in order."""
    (N, K), E = indices.shape, len(starts) - 1
    for e in range(E + 1):
        starts[e] = 0
    for t in range(N):
        for k in range(K):
            starts[indices[t, k]] += 1
    before = 0
    for e in range(E + 1):  # counts become the places of each expert's next pick
        starts[e], before = before, before + starts[e]
    for t in range(N):
        for k in range(K):
            p = starts[indices[t, k]]
            starts[indices[t, k]] += 1
            slots[p], places[t, k], sorted_weights[p] = t * K + k, p, weights[t, k]
        for k in range(1, K):
            p, j = places[t, k], k
            while j > 0 and places[t, j - 1] > p:
                places[t, j] = places[t, j - 1]
                j -= 1
            places[t, j] = p
    for e in range(E, 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = 0


@inlined
def chunk_of(starts, piece):
    """The expert and the picks of chunk number `piece`; expert −1: there are fewer chunks."""
    for e in range(len(starts) - 1):
        n = starts[e + 1] - starts[e]
        count = -(-n // CHUNK)
        if piece < count:
            return e, starts[e] + n * piece // count, starts[e] + n * (piece + 1) // count
        piece -= count
    return -1, 0, 0


@inlined
def gather(x, slots, K, first, last, into):
    for p in range(first, last):
        t = slots[p] // K
        for i in range(x.shape[1]):
            into[p, i] = x[t, i]


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


@inlined
def wide(at, size, kind, room):
    """The address of a weight's float32 numbers: its own, or that of `room`, into which bfloat16 is widened."""
    if len(room) == 0:
        return at
    stored = matrix(at, 1, size, kind)[0]
    for i in range(size):
        room[i] = widen(stored[i])
    return address(room)


@parallel
def experts_forward(
    rank, threads, words, blas, x, indices, chosen_weights, slots, starts, places, weights, experts, kind, own_wide,
    picked_x, gate, up, hidden, out, y,
):  # fmt: skip
    """y[t] = Σ_k chosen_weights[t, k] · expert indices[t, k] of x[t]. `experts` int64 [E, 3]: the addresses of
    gate_proj, up_proj [F, D] and down_proj [D, F].
    slots … weights [picks], picked_x [picks, D], gate, up, hidden [picks, F] are kept for the backward; out [picks, D]
    is room, and own_wide [threads, 3, F·D], or [threads, 3, 0] for float32 weights, whose `kind` is float32 [0]."""
    D, F = x.shape[1], gate.shape[1]
    x_at, gate_at, up_at = address(picked_x), address(gate), address(up)
    hidden_at, out_at = address(hidden), address(out)
    if rank == 0:
        sort_picks(indices, chosen_weights, slots, starts, places, weights)
    barrier(words, threads)
    e, first, last = chunk_of(starts, take(words, 0))
    while e >= 0:
        n = last - first
        gather(x, slots, indices.shape[1], first, last, picked_x)
        gate_proj = wide(experts[e, 0], F * D, kind, own_wide[rank, 0])
        up_proj = wide(experts[e, 1], F * D, kind, own_wide[rank, 1])
        down_proj = wide(experts[e, 2], F * D, kind, own_wide[rank, 2])
        rows, at = x_at + 4 * first * D, hidden_at + 4 * first * F
        product(blas, False, True, n, F, D, ONE, rows, D, gate_proj, D, ZERO, gate_at + 4 * first * F, F)
        product(blas, False, True, n, F, D, ONE, rows, D, up_proj, D, ZERO, up_at + 4 * first * F, F)
        gated(gate, up, hidden, first, last)
        product(blas, False, True, n, D, F, ONE, at, F, down_proj, F, ZERO, out_at + 4 * first * D, D)
        e, first, last = chunk_of(starts, take(words, 0))
    barrier(words, threads)
    start, stop = share(rank, threads, len(x))
    sum_places(out, places, weights, start, stop, y)


@parallel
def experts_backward(
    rank, threads, words, blas, dy, slots, starts, places, weights, experts, picked_x, gate, up, hidden,
    picked_dy, dgate, dup, weighted, dpicked, dx, dweights, gradients,
):  # fmt: skip
    """The gradients of `experts_forward`: dx [N, D], dweights [N, K] and, at the addresses `gradients` [E, 3], those
    of the experts that were picked. picked_dy, dpicked [picks, D] and dgate, dup, weighted [picks, F] are room.

    With r = dy down_proj, before any weighing: dweight = r · hidden, so the experts' answers need not be kept.
    """
    D, F = dy.shape[1], gate.shape[1]
    dy_at, dgate_at, dup_at, dx_at = address(picked_dy), address(dgate), address(dup), address(dpicked)
    e, first, last = chunk_of(starts, take(words, 0))
    while e >= 0:
        n, at_D, at_F = last - first, 4 * first * D, 4 * first * F
        gather(dy, slots, places.shape[1], first, last, picked_dy)
        product(blas, False, False, n, F, D, ONE, dy_at + at_D, D, experts[e, 2], F, ZERO, dgate_at + at_F, F)
        for p in range(first, last):
            along = ZERO
            for f in range(F):
                along += dgate[p, f] * hidden[p, f]
                weighted[p, f] = weights[p] * hidden[p, f]
                dgate[p, f] *= weights[p]
            dweights[slots[p] // places.shape[1], slots[p] % places.shape[1]] = along
            gated_backward(dgate, gate, up, dup, p)
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
