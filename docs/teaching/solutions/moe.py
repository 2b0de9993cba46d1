"""A solution of the exercise `moe`: expert after expert, each with all of its tokens at once."""

import numpy as np


def moe(x, indices, weights, experts, shared):
    y = shared(x)
    for e, expert in enumerate(experts):
        tokens, ranks = np.nonzero(indices == e)
        if len(tokens):  # a token picks an expert at most once, so += loses nothing
            y[tokens] += weights[tokens, ranks, None] * expert(x[tokens])
    return y
