"""What the machine can do at best, measured with kernels like ours: how fast it reads, and what its processor knows."""

import time

import numpy as np
from llvmlite import binding

from minglm.fast.team import parallel, share, team
from minglm.fast.vectors import products

COLUMNS, OUTPUTS = 4096, 64


@parallel
def read_rows(rank, threads, words, weight, x, own_rows, own_found):
    """A matrix–vector product: weight [out, in] (float32, or bfloat16 as uint16) · x [1, in]. Nobody wants it."""
    start, stop = share(rank, threads, len(weight))
    for first in range(start, stop, OUTPUTS):
        products(weight, x, 0, first, min(first + OUTPUTS, stop), x, own_rows[rank], 1, own_found[rank])


def read_bandwidth(megabytes: float, threads: int, bfloat16: bool = False, runs: int = 5) -> float:
    """Bytes per second at which a matrix of that size goes through `read_rows`; the best run, after one uncounted.

    The size should be several times the largest cache's.
    """
    kind = np.uint16 if bfloat16 else np.float32
    rows = max(int(megabytes * 1e6) // (COLUMNS * np.dtype(kind).itemsize), threads)
    one = 0x3F80 if bfloat16 else 1  # 1.0 in its bits; the integer 1 would be a subnormal, twenty times as slow
    weight, x = np.full((rows, COLUMNS), one, kind), np.ones((1, COLUMNS), np.float32)
    own = np.zeros((threads, 1), np.int64), np.zeros((threads, 1, OUTPUTS), np.float32)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        team(threads).run(read_rows, weight, x, *own)
        seconds.append(time.perf_counter() - start)
    assert own[1][0, 0, 0] == COLUMNS, "ones were summed"
    return float(weight.nbytes / min(seconds[1:]))


def processor() -> tuple[str, list[str]]:
    """The compiler's name for this processor, and which features that matter here it has."""
    features = binding.get_host_cpu_features()
    matter = ("avx2", "fma", "avx512f", "avx512bf16", "amx-bf16", "neon", "bf16", "sve")
    return binding.get_host_cpu_name(), [name for name in matter if features.get(name)]
