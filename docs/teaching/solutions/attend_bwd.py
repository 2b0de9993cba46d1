"""A solution of the exercise `attend_bwd`: one head after the other, each adding to the keys and values it shares."""

import numpy as np


def attend_bwd(dy, q, k, v, probs):
    H, G = q.shape[1], k.shape[1]
    c = q.shape[-1] ** -0.5
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for h in range(H):
        g = h // (H // G)
        P = probs[h]  # [T, S]
        dP = dy[:, h] @ v[:, g].T
        dS = P * (dP - (dP * P).sum(axis=-1, keepdims=True))
        dq[:, h] = dS @ k[:, g] * c
        dk[:, g] += dS.T @ q[:, h] * c
        dv[:, g] += P.T @ dy[:, h]
    return dq, dk, dv
