"""Exercise rms_norm_bwd, 25 minutes.

rms_norm_bwd(dy [N, D], x [N, D], weight [D], eps) -> dx [N, D], dweight [D]. Notebook 10a, docs/derivations/rms-
norm.md.

Write the function; run this file to be told what is right and what went wrong, and how to look at the case that
failed. Stuck? hint("rms_norm_bwd", 1), then 2, then 3: from minglm.learn import hint
"""

import numpy as np


def rms_norm_bwd(dy, x, weight, eps):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import check

    print(check("rms_norm_bwd", rms_norm_bwd))
