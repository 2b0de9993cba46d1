"""Refusing what does not fit into memory before any of it is taken: a system that runs out kills the process."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

try:
    import resource  # not on Windows
except ImportError:
    resource = None  # type: ignore[assignment]

_CGROUP = Path("/sys/fs/cgroup")


def check_memory(what: str, needed: int, advice: str) -> None:
    """Raises ValueError if `needed` bytes are not there. Where the system does not tell, nothing is refused."""
    free = free_memory()
    if free is not None and needed > free:
        raise ValueError(f"{what}; {free / 1e9:,.1f} GB are free: {advice}")


def in_bytes(count: float, up: bool = False) -> str:
    """A number of bytes for people; `up`: never less than it is."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{(math.ceil(10 * count / size) / 10) if up else count / size:,.1f} {unit}"
    return f"{count:g} bytes"


def sizes_by_mode(numbers: int) -> str:
    """How much so many weights take, for each dtype that the fast engine reads."""
    return f"{numbers * 4 / 1e9:,.1f} GB in float32, {numbers * 2 / 1e9:,.1f} GB in bfloat16"


def free_memory() -> int | None:
    """Bytes that this process may still take: what the machine, a container and the process's own limit leave it."""
    return min(_limits(), default=None)


def _limits() -> Iterator[int]:
    with suppress(OSError, ValueError, KeyError):  # Linux: free, or only kept because nobody asked for it yet
        yield _table("/proc/meminfo")["MemAvailable:"] * 1024
    with suppress(OSError, ValueError, KeyError):
        used = int((_CGROUP / "memory.current").read_text()) - _table(_CGROUP / "memory.stat")["inactive_file"]
        yield int((_CGROUP / "memory.max").read_text()) - used
    with suppress(OSError, ValueError, AttributeError):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if limit != resource.RLIM_INFINITY:
            yield limit - pages * resource.getpagesize()
    if not Path("/proc/meminfo").exists():
        with suppress(OSError, ValueError, AttributeError):
            yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _table(path: str | Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for line in Path(path).read_text().splitlines() if len(words := line.split()) > 1}
