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
from minglm.fast.jit import DISABLE_JIT, ONE_THREAD, inlined, kernel, stage
from minglm.fast.machine import ARGUMENTS, call_published, fetch_add, give_way, load, publish, swap_if

# -- how many ----------------------------------------------------------------------------------------------------


def cores() -> int:
    """The processors that this process may use: its affinity, and a container's quota where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def thread_count(asked: int | None, decoding: Config | None = None) -> int:
    """How many threads to use: `asked`, else MINGLM_THREADS, else all cores; but for decoding with a model of this
    config at most one for each begun 4 MB of float32 weights that a token needs, because below that, waiting for each
    other takes longer than the reading. Without the JIT, or when it checks bounds, it is one.
    Raises ValueError outside 1 … cores."""
    given = os.environ.get("MINGLM_THREADS")
    if asked is None and not given:
        most = cores() if decoding is None else 1 + decoding.count_parameters().active * 4 // 4_000_000
        return 1 if ONE_THREAD else min(cores(), most)
    name, value = ("threads", asked) if asked is not None else ("MINGLM_THREADS", given)
    if name == "MINGLM_THREADS" and given and given.strip().isdecimal():
        value = int(given)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= cores():
        raise ValueError(f"{name} = {value!r} must be a whole number between 1 and {cores()}, the cores there are")
    return 1 if ONE_THREAD else int(value)


# -- inside kernels ----------------------------------------------------------------------------------------------
# Words that the ranks share, each group on a cache line of its own.

ARRIVED, PHASE, TASK, FUNCTION, NEXT = 0, 8, 16, 24, 32  # at FUNCTION + 1: its arguments
STAGES = 4  # of one task may hand out pieces by `take`
FAILED = 1  # 1 when a rank raised an error
CLOSED = -1  # in TASK: nobody is waiting any more
PATIENCE = 200_000  # looks for a task before a worker goes home, about a millisecond
STUBBORN = 500  # looks in a row before it gives way to other threads


@inlined
def share(rank, threads, n):
    """The part of n pieces of work that is this rank's: start and stop."""
    return n * rank // threads, n * (rank + 1) // threads


@inlined
def take(words, stage):
    """The number of the next piece of work of this stage that nobody has taken; for pieces of unequal size."""
    return fetch_add(words, NEXT + 8 * stage, 1)


@stage
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


@stage
def wait_for_task(words, number):
    """A worker: wait for task `number`. False: none came for a while, and the worker goes home."""
    for looks in range(PATIENCE):
        if load(words, TASK) != number - 1:
            return True
        if looks % STUBBORN == STUBBORN - 1:
            give_way()
    return not swap_if(words, TASK, number - 1, CLOSED) and load(words, TASK) == number


@kernel
def serve(rank, threads, words):
    """A worker: do its part of task 1, and of those after it, until none comes for a while."""
    number = 1
    while wait_for_task(words, number):
        if load(words, TASK) == CLOSED:
            return
        call_published(load(words, FUNCTION), rank, threads, load(words, FUNCTION + 1))
        barrier(words, threads)
        number += 1


@stage
def begin(words, threads):
    """Have what is published done by all ranks. False: the workers went home."""
    number = load(words, TASK)
    for each in range(STAGES):
        words[NEXT + 8 * each] = 0
    if threads > 1 and (number == CLOSED or not swap_if(words, TASK, number, number + 1)):
        return False
    call_published(words[FUNCTION], 0, threads, words[FUNCTION + 1])
    barrier(words, threads)
    return True


@kernel
def again(words, threads, function, arguments):
    """Launch what was published before, arguments and all."""
    words[FUNCTION], words[FUNCTION + 1] = function, arguments
    return begin(words, threads)


# -- a team ------------------------------------------------------------------------------------------------------


def parallel(body: Callable[..., None]) -> Any:
    """A kernel `body(rank, threads, words, …)` that all ranks of a team run at the same time: `team.run(name, …)`.

    What the name then stands for is the caller's side, `launch(words, threads, place, …)`: it publishes the body and
    its arguments, counts TASK up, which the workers wait for, does the part of rank 0, and meets the others at a
    barrier.
    """
    part = stage(body)

    def launch(words, threads, place, *arguments):
        publish(words, FUNCTION, part, (words, *arguments), place)
        return begin(words, threads)

    launch.__name__ = f"launch_{body.__name__}"
    launch.__qualname__ = f"launch.{body.__module__}.{body.__qualname__}"  # two of one name share no compiled code
    return kernel(launch) if not DISABLE_JIT else body


class Team:
    """The caller, who is rank 0, and `threads` − 1 workers. One caller at a time.

    Between tasks that follow each other quickly the workers stay in a kernel (`serve`) and look for the next one
    themselves: waking a sleeping thread takes longer than many a task. When none comes for a millisecond the first to
    notice sets TASK to CLOSED, and all go home: they sleep on locks, until a caller finds TASK closed and has them
    gathered. A lock here is a signal, closed until somebody releases it: rank 1 waits for `_call`, the caller for
    `_gathered`, each other worker for its `_go`; `_home` is open while that worker is at home.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self._reset()
        _teams.add(self)

    def _reset(self) -> None:
        self.lock = threading.RLock()
        self.words = np.zeros(NEXT + 8 * STAGES, np.int64)
        self.words[TASK] = CLOSED
        self._place = np.empty(ARGUMENTS, np.uint8)
        self._call, self._gathered, self._leading = _closed_lock(), _closed_lock(), threading.Lock()
        self._go = [_closed_lock() for _ in range(2, self.threads)]
        self._home = [threading.Lock() for _ in range(2, self.threads)]
        self._started = 2
        self._trouble: RuntimeError | None = None
        self._lost_threads = False

    def run(self, task: Any, *arguments: Any) -> None:
        """Run a `parallel` kernel on all ranks; returns when all are done."""
        self._run(task, self._place, *arguments)

    def prepare(self, task: Any, *arguments: Any) -> Callable[[], None]:
        """`run` with these arguments, as often as it is called: Numba takes them apart only once, which for the many
        arrays of a decoding step takes as long as a small model's layer."""
        place, published = np.empty(ARGUMENTS, np.uint8), np.zeros(0, np.int64)

        def once_more() -> None:
            nonlocal published
            if DISABLE_JIT or not len(published):
                self._run(task, place, *arguments)
                published = self.words[FUNCTION : FUNCTION + 2].copy()
            else:
                self._launch(again, int(published[0]), int(published[1]))

        return once_more

    def _run(self, task: Any, place: np.ndarray, *arguments: Any) -> None:
        if DISABLE_JIT:
            with self.lock:
                self.ranks()
                self.words[NEXT:] = 0
                task(0, 1, self.words, *arguments)
            return
        self._launch(task, place, *arguments)

    def _launch(self, launch: Any, *arguments: Any) -> None:
        with self.lock:
            threads = self.ranks()
            while not launch(self.words, threads, *arguments):
                self._gather()
            if self.words[FAILED]:  # only with NUMBA_BOUNDSCHECK=1, which has one rank
                self.words[FAILED] = 0
                raise RuntimeError("an error in a kernel; NUMBA_DISABLE_JIT=1 shows where")

    def ranks(self) -> int:
        """How many compute: all, or the caller alone in a forked child, where threads do not survive. Says so once."""
        if self._lost_threads:
            self._lost_threads = False
            warnings.warn("a forked process computes with one thread; start it with 'spawn' to use all", stacklevel=3)
        return self.threads

    def _gather(self) -> None:
        """Have the workers woken. Rank 1 wakes the others: Ctrl-C, which comes to the main thread only, must not leave
        some of them awake, waiting for the rest for ever."""
        if not self._leading.locked():
            threading.Thread(target=self._lead, name="minglm-1", daemon=True).start()
        if self._call.locked():
            self._call.release()
        self._gathered.acquire()
        if self._trouble is not None:
            raise self._trouble

    def _lead(self) -> None:
        if not self._leading.acquire(blocking=False):
            return  # a second one, because Ctrl-C came when the first was just starting
        while True:
            self._call.acquire()
            try:
                self._trouble = None
                while self._started < self.threads:
                    name, rank = f"minglm-{self._started}", self._started
                    threading.Thread(target=self._serve, args=(rank,), name=name, daemon=True).start()
                    self._started += 1
            except RuntimeError as error:  # the system gives no more threads
                self._trouble = error
            else:
                for home in self._home:
                    home.acquire()
                self.words[TASK] = 0
                for go in self._go:
                    go.release()
            if self._gathered.locked():
                self._gathered.release()
            if self._trouble is None:
                serve(1, self.threads, self.words)

    def _serve(self, rank: int) -> None:
        go, home = self._go[rank - 2], self._home[rank - 2]
        while True:
            go.acquire()
            serve(rank, self.threads, self.words)
            home.release()

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
    return Team(1 if ONE_THREAD else threads)


def _after_fork() -> None:
    for each in list(_teams):
        each.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
