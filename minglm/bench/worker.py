"""One measurement in a process of its own: `python -m minglm.bench.worker JOB`, with a `Job` as JSON.

The answer is the last line of the output. This file and what it imports need NumPy alone, so that an interpreter that
has only llama_cpp can run it.
"""

import importlib
import json
import sys

from minglm.bench.job import Answer, Job

RUNNERS = {
    "minglm": "minglm.bench.run_minglm",
    "bandwidth": "minglm.bench.run_machine",
    "products": "minglm.bench.run_machine",
    "torch": "minglm.bench.run_torch",
    "torch.compile": "minglm.bench.run_torch",
    "llama.cpp": "minglm.bench.run_llama",
}


def run(job: Job) -> Answer:
    """Measure. Raises ValueError for a subject that is not there."""
    if job.subject not in RUNNERS:
        raise ValueError(f"subject = {job.subject!r} must be one of {', '.join(RUNNERS)}")
    answer: Answer = importlib.import_module(RUNNERS[job.subject]).run(job)
    return {"left_out": {}, **answer, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int | None:
    """The most memory this process has had, mapped files included; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _stay_within(bytes_of_memory: int) -> None:
    """Have a MemoryError here instead of some process killed by the system, where it can be arranged (Linux)."""
    if sys.platform == "linux" and bytes_of_memory:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (bytes_of_memory, bytes_of_memory))


def main() -> None:
    job, memory = json.loads(sys.argv[1]), int(sys.argv[2])
    _stay_within(memory)
    answer = run(Job(**job))
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
