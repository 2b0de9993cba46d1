"""What this machine is and what it can do at best: the facts that stand beside every timing."""

import ctypes
import os
import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from minglm.fast.jit import cache_folder
from minglm.fast.measure import processor, read_bandwidth
from minglm.fast.team import cores

PACKAGES = ("minglm", "numpy", "scipy", "numba", "torch", "transformers", "llama-cpp-python", "gguf")


def facts() -> dict[str, Any]:
    """Everything that is known without measuring: versions, processor, BLAS, memory. JSON types only."""
    name, features = processor()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {package: _version(package) for package in PACKAGES},
        "processor": processor_name(),
        "processor_kind": name,
        "features": features,
        "cores": cores(),
        "largest_cache_bytes": largest_cache(),
        "blas": [
            {key: library.get(key) for key in ("internal_api", "version", "num_threads", "architecture")}
            for library in blas()
        ],
        "free_memory_bytes": free_memory(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def blas() -> list[dict[str, Any]]:
    """The libraries behind NumPy's matrix products, as threadpoolctl sees them. Apple's Accelerate it does not see."""
    from threadpoolctl import threadpool_info

    return [library for library in threadpool_info() if library["user_api"] == "blas"]


def processor_name() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text("utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def largest_cache() -> int | None:
    """Bytes of the processor's largest cache, where the system tells."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.match(r"(\d+)([KMG])", path.read_text("utf-8")):
            sizes.append(int(found[1]) << {"K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes, default=None)


def free_memory() -> int | None:
    """Bytes that can be taken without swapping (file caches count as free), where the system tells."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text("utf-8"))
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    return _free_memory_of_windows() if sys.platform == "win32" else None


def _free_memory_of_windows() -> int | None:
    fields = np.zeros(8, np.uint64)  # MEMORYSTATUSEX: length and load, total, available, …
    fields[0] = 64
    told = ctypes.windll.kernel32.GlobalMemoryStatusEx(fields.ctypes.data_as(ctypes.c_void_p))  # type: ignore[attr-defined,unused-ignore]
    return int(fields[2]) if told else None


def load() -> float | None:
    """How many processes wanted a processor on average in the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def kernel_cache() -> dict[str, Any]:
    """Folder of compiled kernels (None: nowhere to write), its files and bytes."""
    folder = cache_folder()
    files = [] if folder is None else [path.stat().st_size for path in folder.glob("*.kernel")]
    return {"folder": None if folder is None else str(folder), "files": len(files), "bytes": sum(files)}


# -- measurements ------------------------------------------------------------------------------------------------


def matrix_megabytes() -> float:
    """A size that no cache holds, and that leaves most of the memory alone."""
    wanted = max(256e6, 6 * (largest_cache() or 0))
    return min(wanted, (free_memory() or 4e9) / 8) / 1e6


def bandwidths(megabytes: float) -> dict[str, float]:
    """Bytes per second of reading, by dtype and threads: "float32, 1 thread" …"""
    counts = sorted({1, cores()})
    return {
        f"{'bfloat16' if narrow else 'float32'}, {n} thread{'s' * (n > 1)}": read_bandwidth(megabytes, n, narrow)
        for narrow in (False, True)
        for n in counts
    }


def product_rate(size: int = 2048, runs: int = 5) -> float:
    """FLOP per second of NumPy's float32 product of two size × size matrices; the best of some runs."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    out = np.empty_like(a)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        np.matmul(a, a, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def asked_threads() -> str | None:
    return os.environ.get("MINGLM_THREADS")
