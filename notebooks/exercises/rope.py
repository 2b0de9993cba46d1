"""Exercise rope, 20 minutes.

rope(x [T, H, d], positions int [T], theta, r) -> [T, H, d]. Of the first r entries of each head entry i turns with
entry i + r/2, by the angle position · theta^(−2i/r); the other d − r pass through. Notebook 03; arXiv 2104.09864,
with the pairs of 2204.06745.

Write the function; run this file to be told what is right and what went wrong, and how to look at the case that
failed. Stuck? hint("rope", 1), then 2, then 3: from minglm.learn import hint
"""

import numpy as np


def rope(x, positions, theta, r):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import check

    print(check("rope", rope))
