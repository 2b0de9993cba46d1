"""Exercise cross_entropy_bwd, 20 minutes.

cross_entropy_bwd(dloss, logits [N, V], targets int [N], −100 where there is none) -> dlogits [N, V], of the mean
of −log p over the rows that have a target. Notebook 10a.

Write the function; run this file to be told what is right and what went wrong. `python -i cross_entropy_bwd.py`
does the same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a
hint (1, then 2, then 3).
"""

import numpy as np


def cross_entropy_bwd(dloss, logits, targets):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("cross_entropy_bwd", cross_entropy_bwd))
