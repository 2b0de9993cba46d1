"""A solution of the exercise `router_bwd`."""

import numpy as np


def router_bwd(dweights, h, gate, indices, normalise, scale):
    scores = 1 / (1 + np.exp(-(h @ gate.T)))  # [N, E]
    picked = np.take_along_axis(scores, indices, axis=-1)
    dpicked = dweights * scale
    if normalise:  # w = p / Σp: what all picks have in common changes nothing
        total = picked.sum(axis=-1, keepdims=True)
        dpicked = (dpicked - (dpicked * picked).sum(axis=-1, keepdims=True) / total) / total
    dscores = np.zeros_like(scores)
    np.put_along_axis(dscores, indices, dpicked, axis=-1)
    dlogits = dscores * scores * (1 - scores)
    return dlogits @ gate, dlogits.T @ h, np.zeros(len(gate), h.dtype)
