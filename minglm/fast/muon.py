"""Muon's kernel: all matrices of a model in one call, each on one thread from its gradient to the weights.

So a matrix's bits do not depend on the number of threads. The ranks take one matrix after the other, largest first,
which leaves the small ones to even out who is done when. Rows of `book`, int64 [matrices, 5]: the addresses of weight,
gradient and running mean, then rows and columns.
"""

import numpy as np

from minglm.fast.blas import address, product
from minglm.fast.jit import inlined
from minglm.fast.kernels import ONE, ZERO
from minglm.fast.machine import vector
from minglm.fast.rows import BLOCK
from minglm.fast.team import parallel, take


@inlined
def look_ahead(g, m, clip, momentum, x):
    """m = the running mean with this gradient, x = with one more such gradient; all flat. Returns Σ x²."""
    total = 0.0  # float64, over blocks that are summed in float32
    for start in range(0, len(x), BLOCK):
        g_part, m_part, x_part = g[start : start + BLOCK], m[start : start + BLOCK], x[start : start + BLOCK]
        squares = ZERO
        for i in range(len(x_part)):
            gradient = (ONE - momentum) * (g_part[i] * clip)
            mean = momentum * m_part[i] + gradient
            ahead = momentum * mean + gradient
            m_part[i], x_part[i] = mean, ahead
            squares += ahead * ahead
        total += np.float64(squares)
    return total


@inlined
def polynomial(blas, gram, n, a, b, c, into):
    """into = a + b·G + c·G² for G [n, n]; both are given by address."""
    flat_gram, flat_into = vector(gram, n * n), vector(into, n * n)
    for i in range(n * n):
        flat_into[i] = flat_gram[i]
    product(blas, False, False, n, n, n, c, gram, n, gram, n, b, into, n)
    for i in range(n):
        flat_into[i * n + i] += a


@inlined
def orthogonalise(blas, x, rows, cols, y, gram, poly, a, b, c, steps):
    """`newton_schulz` of x [rows, cols], already divided by its size. Tall matrices are not turned: their Gram matrix
    is xᵀx, and the polynomial comes from the right. All arrays are given by address; x, y, gram and poly are room.
    Returns where the result is: in x or y."""
    n = min(rows, cols)
    for _ in range(steps):
        if rows > cols:
            product(blas, True, False, n, n, rows, ONE, x, cols, x, cols, ZERO, gram, n)
            polynomial(blas, gram, n, a, b, c, poly)
            product(blas, False, False, rows, n, n, ONE, x, cols, poly, n, ZERO, y, cols)
        else:
            product(blas, False, True, n, n, cols, ONE, x, cols, x, cols, ZERO, gram, n)
            polynomial(blas, gram, n, a, b, c, poly)
            product(blas, False, False, n, cols, n, ONE, poly, n, x, cols, ZERO, y, cols)
        x, y = y, x
    return x


@parallel
def muon(rank, threads, words, blas, book, lengths, clip, momentum, kept, a, b, c, tiny, steps, own_room):
    """One step of Muon on every matrix, in place; see `minglm.train.muon`. lengths [matrices] float32: the length of
    each one's step. own_room [threads, 2 · (the most that rows · cols + min(rows, cols)² comes to)]."""
    index = take(words, 0)
    while index < len(book):
        rows, cols, n = book[index, 3], book[index, 4], min(book[index, 3], book[index, 4])
        size, room = rows * cols, address(own_room[rank])
        p, x = vector(book[index, 0], size), vector(room, size)
        squares = look_ahead(vector(book[index, 1], size), vector(book[index, 2], size), clip, momentum, x)
        inverse = ONE / max(np.float32(np.sqrt(squares)), tiny)
        for i in range(size):
            x[i] *= inverse
        y, gram, poly = room + 4 * size, room + 8 * size, room + 8 * size + 4 * n * n
        found = vector(orthogonalise(blas, room, rows, cols, y, gram, poly, a, b, c, steps), size)
        for i in range(size):
            p[i] = p[i] * kept - lengths[index] * found[i]
        index = take(words, 0)
