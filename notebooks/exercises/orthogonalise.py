"""Exercise orthogonalise, 30 minutes.

orthogonalise(x [.., rows, cols]) -> the same shape. Divide each matrix by its Frobenius norm (at least 1e-7), five
times x ← a·x + (b·A + c·A²)·x with A = x·xᵀ and (a, b, c) = (3.4445, −4.7750, 2.0315) on the side where A is
small, times 0.2 · √max(rows, cols). Notebook 11; arXiv 2502.16982.

Write the function; run this file to be told what is right and what went wrong. `python -i orthogonalise.py` does
the same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint
(1, then 2, then 3).
"""

import numpy as np


def orthogonalise(x):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("orthogonalise", orthogonalise))
