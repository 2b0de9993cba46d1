"""Exercise fp8_encode, 30 minutes.

fp8_encode(x float32 [n], finite) -> uint8 [n]. Bits: sign, four of exponent (bias 7), three of mantissa; below 2⁻⁶
steps of 2⁻⁹; to the nearest, ties to the even code; beyond ±448 to ±448. Notebook 12; arXiv 2209.05433.

Write the function; run this file to be told what is right and what went wrong. `python -i fp8_encode.py` does the
same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1,
then 2, then 3).
"""

import numpy as np


def fp8_encode(x):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("fp8_encode", fp8_encode))
