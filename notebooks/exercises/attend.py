"""Exercise attend, 30 minutes.

attend(q [T, H, d], k [S, G, d], v [S, G, d]) -> [T, H·d]. The T queries are the last of S positions. Scores over
√d, nobody sees the future, heads side by side. Notebook 04; arXiv 2305.13245.

Write the function; run this file to be told what is right and what went wrong. `python -i attend.py` does the same
and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1, then
2, then 3).
"""

import numpy as np


def attend(q, k, v):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("attend", attend))
