"""A solution of the exercise `attend`: one head after the other."""

import numpy as np


def attend(q, k, v):
    (T, H, d), (S, G, _) = q.shape, k.shape
    hidden = np.arange(S)[None, :] > np.arange(T)[:, None] + S - T  # query t is token S − T + t
    out = np.empty_like(q)
    for h in range(H):
        g = h // (H // G)
        scores = np.where(hidden, -np.inf, q[:, h] @ k[:, g].T / d**0.5)  # [T, S]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, h] = weights @ v[:, g] / weights.sum(axis=-1, keepdims=True)
    return out.reshape(T, H * d)
