"""Exercise verify, 40 minutes.

verify(drafts int [n], q [n, V], p [n + 1, V], u [n], v) -> a list of 1 … n + 1 tokens. Draft i was drawn from
q[i]; p[i] is the model's distribution there. Keep draft i if u[i] < p[i]/q[i] of its token; at the first one
refused draw from max(p[i] − q[i], 0), made to add up to 1, and stop; if all are kept draw from p[n], too. To draw
with v: the first token at which the sum of the probabilities so far passes v. Notebook 09; arXiv 2211.17192.

Write the function; run this file to be told what is right and what went wrong. `python -i verify.py` does the same
and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1, then
2, then 3).
"""

import numpy as np


def verify(drafts, q, p, u, v):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("verify", verify))
