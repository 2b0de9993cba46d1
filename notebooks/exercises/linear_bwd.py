"""Exercise linear_bwd, 15 minutes.

linear_bwd(dy [N, out], x [N, in], weight [out, in]) -> dx [N, in], dweight [out, in], dbias [out], for y = x ·
weightᵀ + bias. Notebook 10a.

Write the function; run this file to be told what is right and what went wrong. `python -i linear_bwd.py` does the
same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1,
then 2, then 3).
"""

import numpy as np


def linear_bwd(dy, x, weight):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("linear_bwd", linear_bwd))
