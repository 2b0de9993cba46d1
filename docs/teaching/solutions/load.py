"""A solution of the exercise `load`."""

import numpy as np


def load(indices, weights, valid, E):
    counts = np.bincount(indices[valid].reshape(-1), minlength=E)  # the weights have no say
    ratio = counts / counts.mean()
    shares = counts[counts > 0] / counts.sum()  # 0 · ln 0 counts as 0: leave those out
    return counts, ratio.max() - 1, ratio.std(), -(shares * np.log(shares)).sum()
