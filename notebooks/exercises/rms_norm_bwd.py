"""Exercise rms_norm_bwd, 25 minutes.

rms_norm_bwd(dy [N, D], x [N, D], weight [D], eps) -> dx [N, D], dweight [D]. Notebook 10a, docs/derivations/rms-
norm.md.

Write the function; run this file to be told what is right and what went wrong. `python -i rms_norm_bwd.py` does
the same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint
(1, then 2, then 3).
"""

import numpy as np


def rms_norm_bwd(dy, x, weight, eps):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("rms_norm_bwd", rms_norm_bwd))
