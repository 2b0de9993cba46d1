"""Exercise rope, 20 minutes.

rope(x [T, H, d], positions int [T], theta, r) -> [T, H, d]. Of the first r entries of each head entry i turns with
entry i + r/2, by the angle position · theta^(−2i/r); the other d − r pass through. Notebook 03; arXiv 2104.09864,
with the pairs of 2204.06745.

Write the function; run this file to be told what is right and what went wrong. `python -i rope.py` does the same
and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1, then
2, then 3).
"""

import numpy as np


def rope(x, positions, theta, r):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("rope", rope))
