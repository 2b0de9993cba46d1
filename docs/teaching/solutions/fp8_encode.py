"""A solution of the exercise `fp8_encode`: look for the nearest of the format's 127 sizes."""

import numpy as np


def fp8_encode(x):
    codes = np.arange(127)
    exponent, mantissa = codes // 8, codes % 8
    sizes = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    size = np.minimum(np.abs(x.astype(np.float64)), 448)
    low = np.searchsorted(sizes, size, side="right") - 1  # the largest that is not above
    high = np.minimum(low + 1, 126)
    below, above = size - sizes[low], sizes[high] - size
    up = (above < below) | ((above == below) & (low % 2 == 1))  # a tie goes to the even code
    return (np.where(up, high, low) | np.where(np.signbit(x), 128, 0)).astype(np.uint8)
