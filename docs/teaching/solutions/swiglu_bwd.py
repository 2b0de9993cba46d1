"""A solution of the exercise `swiglu_bwd`."""

import numpy as np


def swiglu_bwd(dy, gate, up):
    s = 1 / (1 + np.exp(-gate))
    silu = gate * s
    return dy * up * (s + silu * (1 - s)), dy * silu
