"""Exercise rms_norm, 10 minutes.

rms_norm(x [.., D], weight [D], eps) -> [.., D]: each row over the root of the mean of its squares plus eps, times
the weight. Notebook 02; arXiv 1910.07467.

Write the function; run this file to be told what is right and what went wrong. `python -i rms_norm.py` does the
same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1,
then 2, then 3).
"""

import numpy as np


def rms_norm(x, weight, eps):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("rms_norm", rms_norm))
