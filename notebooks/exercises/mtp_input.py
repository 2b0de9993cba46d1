"""Exercise mtp_input, 25 minutes.

mtp_input(stream [T, D], ids int [T], embedding [V, D], norm [D], enorm [D], hnorm [D], eh_proj [D, 2·D], eps) -> x
[T − 1, D], targets int [T − 1]. stream is what the last decoder layer left. Row i joins the embedding of token i +
1, after a norm with enorm, and state i, after the final norm and a norm with hnorm, and multiplies by eh_proj; it
is to predict token i + 2, or -100 if that is not known. Notebook 09; arXiv 2412.19437, section 2.2.

Write the function; run this file to be told what is right and what went wrong. `python -i mtp_input.py` does the
same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1,
then 2, then 3).
"""

import numpy as np


def mtp_input(stream, ids, embedding, norm, enorm, hnorm, eh_proj, eps):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("mtp_input", mtp_input))
