"""Exercise swiglu_bwd, 15 minutes.

swiglu_bwd(dy [N, F], gate [N, F], up [N, F]) -> dgate, dup [N, F], for y = gate · sigmoid(gate) · up. Notebook
10c.

Write the function; run this file to be told what is right and what went wrong, and how to look at the case that
failed. Stuck? hint("swiglu_bwd", 1), then 2, then 3: from minglm.learn import hint
"""

import numpy as np


def swiglu_bwd(dy, gate, up):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import check

    print(check("swiglu_bwd", swiglu_bwd))
