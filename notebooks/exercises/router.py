"""Exercise router, 20 minutes.

router(h [N, D], gate [E, D], bias [E], K, normalise, scale, n_group, topk_group) -> indices [N, K], weights [N,
K]. Sigmoid of h · gate; the K best of score + bias; their scores without the bias, divided by their sum if
`normalise`, times scale. The experts stand in n_group groups of equal size (GLM-4.5: one): only those in the
topk_group groups whose two best add up to most are open. Notebook 05; arXiv 2412.19437.

Write the function; run this file to be told what is right and what went wrong. `python -i router.py` does the same
and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1, then
2, then 3).
"""

import numpy as np


def router(h, gate, bias, K, normalise, scale, n_group, topk_group):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("router", router))
