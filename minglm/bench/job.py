"""What a worker process is told and what it answers, and the clock they all use."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Answer = dict[str, Any]
# "seconds": {variant: {point: median seconds of a unit}}; a variant is one way to run a subject (torch has several), a
# point what was timed: "unit", or a number of keys. "left_out": {variant: why}, "peak_bytes": of the process.


class Job(NamedTuple):
    subject: str  # minglm, torch, torch.compile, llama.cpp, bandwidth or products
    folder: str  # of the weights; for llama.cpp the GGUF file
    work: str
    dtype: str
    prompt: int
    units: int
    rows: int = 1
    contexts: tuple[int, ...] = ()
    threads: int = 1  # for subjects that have no rule of their own
    budget: float = 4.0  # seconds after which a measurement stops early
    logits: str = ""  # decode: a .npy file for the scores after the prompt
    vocab_size: int = 0


def prompt_ids(job: Job, length: int | None = None) -> np.ndarray:  # -> int64 [length]
    """The same random tokens for every subject."""
    return np.random.default_rng(1).integers(0, job.vocab_size, job.prompt if length is None else length)


def median_seconds(unit: Callable[[], object], units: int, budget: float, uncounted: int = 1) -> float:
    """The median time of up to `units` calls, fewer if they take over `budget` seconds, but at least three in any case;
    the first `uncounted` ones warm caches and threads."""
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < units + uncounted:
        start = time.perf_counter()
        unit()
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= 3 + uncounted and time.perf_counter() - begin > budget:
            break
    return float(np.median(seconds[uncounted:]))


def keep_logits(job: Job, logits: Any) -> None:
    """Write the scores [V] for the comparison of subjects, if they are asked for."""
    if job.logits:
        np.save(Path(job.logits), np.asarray(logits, np.float32))
