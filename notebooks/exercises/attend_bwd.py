"""Exercise attend_bwd, 40 minutes.

attend_bwd(dy [T, H, d], q [T, H, d], k [S, G, d], v [S, G, d], probs [H, T, S]) -> dq, dk, dv, shaped as q, k, v,
for y = probs · v, probs = softmax(q · k / √d), where query head h reads key/value head h // (H // G). Notebook
10b; docs/derivations/softmax-and-attention.md.

Write the function; run this file to be told what is right and what went wrong. `python -i attend_bwd.py` does the
same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1,
then 2, then 3).
"""

import numpy as np


def attend_bwd(dy, q, k, v, probs):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("attend_bwd", attend_bwd))
