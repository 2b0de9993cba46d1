"""Exercise rms_norm, 10 minutes.

rms_norm(x [.., D], weight [D], eps) -> [.., D]: each row over the root of the mean of its squares plus eps, times
the weight. Notebook 02; arXiv 1910.07467.

Write the function; run this file to be told what is right and what went wrong, and how to look at the case that
failed. Stuck? hint("rms_norm", 1), then 2, then 3: from minglm.learn import hint
"""

import numpy as np


def rms_norm(x, weight, eps):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import check

    print(check("rms_norm", rms_norm))
