"""Exercise router_bwd, 40 minutes.

router_bwd(dweights [N, K], h [N, D], gate [E, D], indices int [N, K], normalise, scale) -> dh [N, D], dgate [E,
D], dbias [E], for the weights that the exercise `router` returns. Notebook 10c; docs/derivations/router.md.

Write the function; run this file to be told what is right and what went wrong. `python -i router_bwd.py` does the
same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1,
then 2, then 3).
"""

import numpy as np


def router_bwd(dweights, h, gate, indices, normalise, scale):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("router_bwd", router_bwd))
