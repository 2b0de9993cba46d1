"""How long a forward pass, a decoded token and a training step take here: medians of a few runs, one process."""

import time
from collections.abc import Callable

import numpy as np

from minglm.api import Model
from minglm.generate.loop import Step
from minglm.look.tables import table


def bench(model: Model, runs: int = 5) -> None:
    """Print a table. A timing taken while other work runs is worth nothing."""
    ids = np.random.default_rng(0).integers(0, model.usable_tokens, (4, 128))
    prompt = ids[0].tolist()
    step = _decode(model, prompt, 8 * runs)
    rows = [
        ("forward, 1 × 128", 128, _median(lambda: model.forward(ids[:1]), runs)),
        ("forward, 4 × 128", 512, _median(lambda: model.forward(ids), runs)),
        ("loss and gradients, 4 × 128", 512, _median(lambda: model.loss_and_grads(ids), runs)),
        (f"decode after 128, {step.engine}", 1, step.seconds),
    ]
    print(f"{model!r}, the book's NumPy unless a row says otherwise, median of {runs}\n")
    print(table([(name, f"{1e3 * s:.2f}", f"{n / s:,.0f}") for name, n, s in rows], ("work", "ms", "tokens/s")))


def _median(work: Callable[[], object], runs: int) -> float:
    work()  # the first run warms caches and threads
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _decode(model: Model, prompt: list[int], tokens: int) -> Step:
    """The step of median time, without the first."""
    steps = list(model.steps(prompt, tokens + 1, end_ids=()))[1:]
    return sorted(steps, key=lambda step: step.seconds)[len(steps) // 2]
