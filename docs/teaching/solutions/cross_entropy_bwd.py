"""A solution of the exercise `cross_entropy_bwd`."""

import numpy as np


def cross_entropy_bwd(dloss, logits, targets):
    valid = targets >= 0
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    p[valid, targets[valid]] -= 1
    p[~valid] = 0
    return p * (dloss / int(valid.sum()))
