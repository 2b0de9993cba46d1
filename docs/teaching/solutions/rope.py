"""A solution of the exercise `rope`: pair after pair."""

import numpy as np


def rope(x, positions, theta, r):
    y = x.copy()  # what is not turned passes through
    for i in range(r // 2):
        angle = (positions * theta ** (-2 * i / r))[:, None].astype(x.dtype)  # [T, 1]: the same for every head
        a, b = x[..., i], x[..., i + r // 2]
        y[..., i] = a * np.cos(angle) - b * np.sin(angle)
        y[..., i + r // 2] = b * np.cos(angle) + a * np.sin(angle)
    return y
