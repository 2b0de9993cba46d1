"""Exercise orthogonalise, 30 minutes.

orthogonalise(x [.., rows, cols]) -> the same shape. Divide each matrix by its Frobenius norm (at least 1e-7), five
times x ← a·x + (b·A + c·A²)·x with A = x·xᵀ and (a, b, c) = (3.4445, −4.7750, 2.0315) on the side where A is
small, times 0.2 · √max(rows, cols). Notebook 11; arXiv 2502.16982.

Write the function; run this file to be told what is right and what went wrong, and how to look at the case that
failed. Stuck? hint("orthogonalise", 1), then 2, then 3: from minglm.learn import hint
"""

import numpy as np


def orthogonalise(x):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import check

    print(check("orthogonalise", orthogonalise))
