"""Exercise swiglu_bwd, 15 minutes.

swiglu_bwd(dy [N, F], gate [N, F], up [N, F]) -> dgate, dup [N, F], for y = gate · sigmoid(gate) · up. Notebook
10c.

Write the function; run this file to be told what is right and what went wrong. `python -i swiglu_bwd.py` does the
same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1,
then 2, then 3).
"""

import numpy as np


def swiglu_bwd(dy, gate, up):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("swiglu_bwd", swiglu_bwd))
