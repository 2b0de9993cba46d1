"""Exercise linear_bwd, 15 minutes.

linear_bwd(dy [N, out], x [N, in], weight [out, in]) -> dx [N, in], dweight [out, in], dbias [out], for y = x ·
weightᵀ + bias. Notebook 10a.

Write the function; run this file to be told what is right and what went wrong, and how to look at the case that
failed. Stuck? hint("linear_bwd", 1), then 2, then 3: from minglm.learn import hint
"""

import numpy as np


def linear_bwd(dy, x, weight):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import check

    print(check("linear_bwd", linear_bwd))
