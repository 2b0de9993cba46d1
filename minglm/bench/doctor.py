"""`minglm doctor`: what minglm finds on this machine, for a bug report and for a reader who wonders about speed."""

from typing import Any

from minglm.bench import machine
from minglm.bench.shapes import SHAPES
from minglm.config import PRESETS, Config
from minglm.fast.jit import DISABLE_JIT
from minglm.fast.team import thread_count
from minglm.look.tables import table


def doctor(megabytes: float | None = None, size: int = 2048) -> None:
    """Print the facts, then measure for a few seconds: a matrix of so many megabytes (default: what no cache holds) is
    read, two size × size matrices are multiplied."""
    facts = machine.facts()
    print(table([*_software(facts), *_hardware(facts), *_threads()], ("what", "found")))
    print()
    if DISABLE_JIT:
        print("NUMBA_DISABLE_JIT is set: kernels are plain Python, there is nothing to measure.")
        return
    print(table(_measured(machine.matrix_megabytes() if megabytes is None else megabytes, size), ("measured", "value")))
    print("\nTimings count only while nothing else runs.")


def _software(facts: dict[str, Any]) -> list[tuple[str, str]]:
    packages = facts["packages"]
    kept = machine.kernel_cache()
    where = "nowhere to keep them (set MINGLM_CACHE to a folder): every process compiles anew"
    if kept["folder"] is not None:
        where = f"{kept['folder']}, writable, {kept['files']} files, {kept['bytes'] / 1e6:.1f} MB"
    return [
        ("minglm", f"{packages['minglm'] or 'not installed, run from its folder'}; Python {facts['python']}"),
        *((name, packages[name] or "not installed") for name in ("numpy", "scipy", "numba")),
        ("for minglm bench", ", ".join(f"{n} {packages[n] or 'missing'}" for n in machine.PACKAGES[4:])),
        ("BLAS", "; ".join(map(_library, facts["blas"])) or "not recognised"),
        ("compiled kernels", where),
    ]


def _library(blas: dict[str, Any]) -> str:
    return f"{blas['internal_api']} {blas['version']} for {blas['architecture']}, {blas['num_threads']} threads"


def _hardware(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cache, free = facts["largest_cache_bytes"], facts["free_memory_bytes"]
    return [
        ("system", facts["system"]),
        ("processor", f"{facts['processor']} ({facts['processor_kind']})"),
        ("its features", ", ".join(facts["features"]) or "none of those that matter here"),
        ("largest cache", "not told by the system" if cache is None else f"{cache / 2**20:.0f} MiB"),
        ("free memory", "not told by the system" if free is None else f"{free / 1e9:.1f} GB"),
        ("cores", f"{facts['cores']} that this process may use"),
    ]


def _threads() -> list[tuple[str, str]]:
    configs: dict[str, Config] = {"glm-nano": PRESETS["glm-nano"], **{s.name: s.config for s in SHAPES.values()}}
    try:
        picked = ", ".join(f"{name} {thread_count(None, config)}" for name, config in configs.items())
    except ValueError as error:
        picked = f"none: {error}"
    return [("MINGLM_THREADS", machine.asked_threads() or "not set"), ("threads for decoding", picked)]


def _measured(megabytes: float, size: int) -> list[tuple[str, str]]:
    rows = [
        (f"reading {megabytes:,.0f} MB, {how}", f"{rate / 1e9:.1f} GB/s")
        for how, rate in machine.bandwidths(megabytes).items()
    ]
    product = f"NumPy float32 product, {size} × {size}, all BLAS threads"
    return [*rows, (product, f"{machine.product_rate(size) / 1e9:,.0f} GFLOP/s")]
