"""Exercise kv_cache, 40 minutes.

kv_cache(cache, layer, start, q [T, H, d], k [T, G, d], v [T, G, d], rotate) -> y [T, H·d], cache. Called for each
layer of each step with what is new: tokens start … start + T − 1; earlier ones are in the cache, and what it holds
from `start` on was refused. The cache is None at first, and later what you returned: arrays and numbers in tuples,
lists and dicts, to be written to as you like; there are never more than 32 tokens and 2 layers. rotate(x [T,
heads, d], positions int [T]) turns queries or keys; then as in `attend`: scores over √d, nobody sees the future,
H/G query heads in a row share a key/value head. Notebook 04.

Write the function; run this file to be told what is right and what went wrong. `python -i kv_cache.py` does the
same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint (1,
then 2, then 3).
"""

import numpy as np


def kv_cache(cache, layer, start, q, k, v, rotate):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("kv_cache", kv_cache))
