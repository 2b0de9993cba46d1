"""Exercise bias_update, 15 minutes.

bias_update(bias [E], indices int [N, K], valid bool [N], rate) -> the new bias [E]: + rate where an expert's load
is below the mean, − rate where it is above, unchanged at the mean. Notebook 11; arXiv 2408.15664.

Write the function; run this file to be told what is right and what went wrong. `python -i bias_update.py` does the
same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1,
then 2, then 3).
"""

import numpy as np


def bias_update(bias, indices, valid, rate):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("bias_update", bias_update))
