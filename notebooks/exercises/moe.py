"""Exercise moe, 30 minutes.

moe(x [N, D], indices int [N, K], weights [N, K], experts, shared) -> [N, D]. experts is E functions, shared is
one, each rows [n, D] -> [n, D]. Token t gets Σ_k weights[t, k] · experts[indices[t, k]](x[t]) + shared(x[t]).
Notebook 06; arXiv 2401.06066.

Write the function; run this file to be told what is right and what went wrong. `python -i moe.py` does the same
and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1, then
2, then 3).
"""

import numpy as np


def moe(x, indices, weights, experts, shared):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("moe", moe))
