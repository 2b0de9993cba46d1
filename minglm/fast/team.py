"""The threads that compute together.

Python threads, not Numba's: kernels release the interpreter's lock, so these run at once, on every system alike, and
several callers, a forked child or a missing OpenMP do no harm. A team is made once per process and number of threads.

Work is cut by size alone, never by the number of threads, or each output row is computed by one thread: so the bits of
a result do not depend on how many threads there are.
"""

import functools
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minglm.config import Config
from minglm.fast.jit import inlined, kernel
from minglm.fast.machine import fetch_add, give_way, load, swap_if

Work = Callable[[int], Any]  # work(rank), for ranks 0 … threads − 1


# -- how many ----------------------------------------------------------------------------------------------------


def cores() -> int:
    """The processors that this process may use: its affinity, and a container's quota where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def thread_count(asked: int | None, config: Config) -> int:
    """How many threads to use: `asked`, else MINGLM_THREADS, else one for every 4 MB that a token reads, at most one
    per core: below that, waiting for each other takes longer than the reading. Raises ValueError outside 1 … cores."""
    if asked is None and not (given := os.environ.get("MINGLM_THREADS")):
        return min(cores(), 1 + config.count_parameters().active * 4 // 4_000_000)
    name, value = ("threads", asked) if asked is not None else ("MINGLM_THREADS", given)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= cores():
        raise ValueError(f"{name} = {value!r} must be a whole number between 1 and {cores()}, the cores there are")
    return int(value)


# -- a team ------------------------------------------------------------------------------------------------------


class Team:
    """The caller, who is rank 0, and `threads` − 1 workers that wait for work. One caller at a time.

    `run` is for work that each rank does alone. For steps that follow each other within microseconds, and in which
    the ranks meet at barriers, waking sleeping threads takes too long: there the workers stay in a kernel (`attend`)
    and look for the next step themselves. They leave when none comes for a while, or when the team is needed.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self._reset()
        _teams.add(self)

    def _reset(self) -> None:
        self.lock = threading.RLock()
        self._go = [_closed_lock() for _ in range(self.threads - 1)]
        self._done = [_closed_lock() for _ in range(self.threads - 1)]
        self._started = False
        self._errors: list[BaseException] = []
        self._meeting: np.ndarray | None = None
        self._lost_threads = False

    def run(self, work: Work) -> None:
        """Call work(rank) for every rank at the same time, and return when all have returned."""
        with self.lock:
            self._adjourn()
            self._start(work)
            try:
                work(0)
            finally:
                self._join()

    def meet(self, words: np.ndarray, step: int, work: Work) -> None:
        """Have the workers wait in `work`, a kernel around `wait_for_step`, for this step and those after it."""
        with self.lock:
            self._adjourn()
            words[STEP] = step - 1
            self._meeting = words
            self._start(work)

    def _adjourn(self) -> None:
        """End a meeting whose workers may still be waiting for its next step."""
        if self._meeting is not None:
            close(self._meeting)
            self._meeting = None
            self._join()

    def _start(self, work: Work) -> None:
        if not self._started:
            for rank in range(1, self.threads):
                threading.Thread(target=self._serve, args=(rank,), name=f"minglm-{rank}", daemon=True).start()
            self._started = True
        self._work = work
        for go in self._go:
            go.release()

    def _join(self) -> None:
        for done in self._done:
            done.acquire()
        if self._errors:
            raise self._errors.pop()

    def _serve(self, rank: int) -> None:
        go, done = self._go[rank - 1], self._done[rank - 1]
        while True:
            go.acquire()
            try:
                self._work(rank)
            except BaseException as error:
                self._errors.append(error)
            finally:
                done.release()

    def ranks(self) -> int:
        """How many compute: all, or the caller alone in a forked child, where threads do not survive. Says so once."""
        if self._lost_threads:
            self._lost_threads = False
            warnings.warn("a forked process computes with one thread; start it with 'spawn' to use all", stacklevel=2)
        return self.threads

    def after_fork(self) -> None:
        lost = self.threads > 1
        self.threads = 1
        self._reset()
        self._lost_threads = lost


def _closed_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


_teams: weakref.WeakSet[Team] = weakref.WeakSet()


@functools.cache
def team(threads: int) -> Team:
    """The process's team of this size."""
    return Team(threads)


def _after_fork() -> None:
    for each in list(_teams):
        each.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# -- meeting inside kernels --------------------------------------------------------------------------------------
# Words that the ranks share, each on a cache line of its own.

ARRIVED, PHASE, STEP = 0, 8, 16
CLOSED = -1  # in STEP: nobody is waiting any more
PATIENCE = 200_000  # looks at STEP before a worker goes home, about a millisecond
STUBBORN = 500  # looks in a row before it gives way to other threads


def meeting_words() -> np.ndarray:
    words = np.zeros(24, np.int64)
    words[STEP] = CLOSED
    return words


@kernel
def barrier(words, threads):
    """Wait until every rank is here."""
    if threads == 1:
        return
    phase = load(words, PHASE)
    if fetch_add(words, ARRIVED, 1) == threads - 1:
        fetch_add(words, ARRIVED, -threads)
        fetch_add(words, PHASE, 1)
        return
    looks = 0
    while load(words, PHASE) == phase:
        looks += 1
        if looks % STUBBORN == 0:
            give_way()


@inlined
def call_step(words, step):
    """Rank 0: begin step number `step`, if the workers are waiting for it."""
    return swap_if(words, STEP, step - 1, step)


@kernel
def wait_for_step(words, step):
    """A worker: wait for step number `step`. False: the meeting is over."""
    for looks in range(PATIENCE):
        if load(words, STEP) != step - 1:
            return load(words, STEP) == step
        if looks % STUBBORN == STUBBORN - 1:
            give_way()
    return not swap_if(words, STEP, step - 1, CLOSED) and load(words, STEP) == step


@kernel
def close(words):
    """Rank 0, between steps: send the workers home."""
    swap_if(words, STEP, load(words, STEP), CLOSED)


@inlined
def share(rank, threads, n):
    """The part of n pieces of work that is this rank's: start and stop."""
    return n * rank // threads, n * (rank + 1) // threads
