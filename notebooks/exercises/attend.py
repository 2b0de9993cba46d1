"""Exercise attend, 30 minutes.

attend(q [T, H, d], k [S, G, d], v [S, G, d]) -> [T, H·d]. The T queries are the last of S positions. Scores over
√d, nobody sees the future, heads side by side. Notebook 04; arXiv 2305.13245.

Write the function; run this file to be told what is right and what went wrong, and how to look at the case that
failed. Stuck? hint("attend", 1), then 2, then 3: from minglm.learn import hint
"""

import numpy as np


def attend(q, k, v):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import check

    print(check("attend", attend))
