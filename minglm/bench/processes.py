"""Workers: which subjects there are, in which interpreter each runs, and one measurement in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import minglm
from minglm.bench.job import Answer, Job
from minglm.bench.machine import free_memory

OPPONENTS = ("torch", "torch.compile", "llama.cpp")
PACKAGE = Path(minglm.__file__).parent
PATIENCE = 1800  # seconds for one measurement
LEFT_ALONE = 500_000_000  # bytes of free memory that no worker takes


class WorkerError(Exception):
    """A worker ended without an answer; the text says why."""


class Subject(NamedTuple):
    name: str
    python: str
    missing: str = ""  # how to install what it needs, if that is not there


def subjects(against: list[str], llama_python: str = sys.executable) -> list[Subject]:
    """minglm and its opponents, in the order in which they take turns; the machine's own limits come for each work."""
    found = [Subject("minglm", sys.executable)]
    for name in against:
        if name == "llama.cpp":
            found.append(Subject(name, llama_python, _missing_for_llama(llama_python)))
        else:
            lacking = [package for package in ("torch", "transformers") if find_spec(package) is None]
            found.append(Subject(name, sys.executable, _install(lacking)))
    return found


def _missing_for_llama(python: str) -> str:
    if find_spec("gguf") is None:
        return _install(["gguf"])
    try:
        done = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(
            f"--llama-python {python} cannot be started: {error}; give the path of an interpreter"
        ) from error
    here = "" if python == sys.executable else f" in {python}"
    return "" if done.returncode == 0 else _install(["llama_cpp"], here + " (or name another with --llama-python)")


def _install(lacking: list[str], more: str = "") -> str:
    return f"{', '.join(lacking)} missing: in minglm's folder, pip install -e '.[bench]'{more}" if lacking else ""


def measure(subject: Subject, job: Job) -> Answer:
    """Run a job in a new process. Raises WorkerError with the reason if it fails."""
    memory = max((free_memory() or 0) - LEFT_ALONE, 0)
    with _package_path(subject.python) as path:
        paths = [path, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            done = subprocess.run(
                [subject.python, "-m", "minglm.bench.worker", json.dumps(job._asdict()), str(memory)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, cwd=path,
                capture_output=True, text=True, timeout=PATIENCE,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise WorkerError(f"no answer in {PATIENCE // 60} minutes") from error
    if done.returncode:
        raise WorkerError(_reason(done))
    answer: Answer = json.loads(done.stdout.splitlines()[-1])
    return answer


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}" + (", out of memory?" if done.returncode == -9 else "")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"ended with code {done.returncode}"


@contextmanager
def _package_path(python: str) -> Iterator[str]:
    """A folder from which `python` can import minglm. For another interpreter one that holds nothing else: beside an
    installed minglm stand packages that were built for this one."""
    if python == sys.executable:
        yield str(PACKAGE.parent)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "minglm").symlink_to(PACKAGE, target_is_directory=True)
        yield folder


# -- start -------------------------------------------------------------------------------------------------------

START = """
import json, time
begin = time.perf_counter()
import minglm
imported = time.perf_counter()
next(iter(minglm.load("glm-nano").steps("17+25=", 1)))
print(json.dumps([imported - begin, time.perf_counter() - begin]))
"""


def measure_start() -> dict[str, float]:
    """Seconds to import minglm, and until the first token of glm-nano with kernels from the cache and without any."""
    with tempfile.TemporaryDirectory() as cache:
        _, empty = _start(cache)
        imported, cached = _start(cache)
    return {"import minglm": imported, "first token, kernels cached": cached, "first token, empty cache": empty}


def _start(cache: str) -> tuple[float, float]:
    env = {**os.environ, "MINGLM_CACHE": cache}
    command = [sys.executable, "-c", START]
    done = subprocess.run(command, env=env, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise WorkerError(_reason(done))
    imported, token = json.loads(done.stdout.splitlines()[-1])
    return imported, token


def clock() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
