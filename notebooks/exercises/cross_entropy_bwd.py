"""Exercise cross_entropy_bwd, 20 minutes.

cross_entropy_bwd(dloss, logits [N, V], targets int [N], −100 where there is none) -> dlogits [N, V], of the mean
of −log p over the rows that have a target. Notebook 10a.

Write the function; run this file to be told what is right and what went wrong, and how to look at the case that
failed. Stuck? hint("cross_entropy_bwd", 1), then 2, then 3: from minglm.learn import hint
"""

import numpy as np


def cross_entropy_bwd(dloss, logits, targets):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import check

    print(check("cross_entropy_bwd", cross_entropy_bwd))
