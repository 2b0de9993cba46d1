"""Exercise load, 20 minutes.

load(indices int [N, K], weights [N, K], valid bool [N], E) -> load [E], max_vio, cv, entropy. load counts the
picks of tokens that are no padding; max_vio = (largest load − mean load) / mean load; cv = standard deviation of
all E loads / mean load; entropy = −Σ p·ln p of the shares p = load / Σ load, where 0·ln 0 is 0. Notebook 08a;
arXiv 2408.15664, equation 4.

Write the function; run this file to be told what is right and what went wrong. `python -i load.py` does the same
and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1, then
2, then 3).
"""

import numpy as np


def load(indices, weights, valid, E):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("load", load))
