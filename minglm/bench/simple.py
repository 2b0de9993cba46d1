"""How long a forward pass, a decoded token and a training step take here: medians of a few runs, one process."""

import time
from collections.abc import Callable

import numpy as np

from minglm.api import Model
from minglm.look.tables import table


def bench(model: Model, runs: int = 5) -> None:
    """Print a table. A timing taken while other work runs is worth nothing."""
    ids = np.random.default_rng(0).integers(0, model.usable_tokens, (4, 128))
    prompt = ids[0].tolist()
    rows = [
        ("forward, 1 × 128", 128, _median(lambda: model.forward(ids[:1]), runs)),
        ("forward, 4 × 128", 512, _median(lambda: model.forward(ids), runs)),
        ("loss and gradients, 4 × 128", 512, _median(lambda: model.loss_and_grads(ids), runs)),
        ("decode after 128", 1, _decode(model, prompt, 8 * runs)),
    ]
    print(f"{model!r}, NumPy engine, median of {runs}\n")
    print(table([(name, f"{1e3 * s:.2f}", f"{n / s:,.0f}") for name, n, s in rows], ("work", "ms", "tokens/s")))


def _median(work: Callable[[], object], runs: int) -> float:
    work()  # the first run warms caches and threads
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _decode(model: Model, prompt: list[int], tokens: int) -> float:
    steps = list(model.steps(prompt, tokens + 1, end_ids=()))
    return float(np.median([step.seconds for step in steps[1:]]))
