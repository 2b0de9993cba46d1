"""Exercise moe, 30 minutes.

moe(x [N, D], indices int [N, K], weights [N, K], experts, shared) -> [N, D]. experts is E functions, shared is
one, each rows [n, D] -> [n, D]. Token t gets Σ_k weights[t, k] · experts[indices[t, k]](x[t]) + shared(x[t]).
Notebook 06; arXiv 2401.06066.

Write the function; run this file to be told what is right and what went wrong, and how to look at the case that
failed. Stuck? hint("moe", 1), then 2, then 3: from minglm.learn import hint
"""

import numpy as np


def moe(x, indices, weights, experts, shared):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import check

    print(check("moe", moe))
