"""A solution of the exercise `bias_update`."""

import numpy as np


def bias_update(bias, indices, valid, rate):
    load = np.bincount(indices[valid].ravel(), minlength=len(bias))
    return (bias + rate * np.sign(load.mean() - load)).astype(bias.dtype)
