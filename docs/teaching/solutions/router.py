"""A solution of the exercise `router`."""

import numpy as np


def router(h, gate, bias, K, normalise, scale, n_group, topk_group):
    scores = 1 / (1 + np.exp(-(h @ gate.T)))  # [N, E]
    biased = (scores + bias).reshape(len(h), n_group, -1)  # the bias decides who
    worth = np.sort(biased, axis=-1)[:, :, -2:].sum(axis=-1)  # [N, n_group]
    for n, best in enumerate(np.argsort(-worth, axis=-1)):
        biased[n, best[topk_group:]] = -np.inf
    indices = np.argsort(-biased.reshape(scores.shape), axis=-1)[:, :K]
    weights = np.take_along_axis(scores, indices, axis=-1)  # and not how loud
    if normalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return indices, weights * scale
