"""minglm's part of the benchmark. Each function below has the one call that it times."""

import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from minglm.api import Model, load
from minglm.bench.job import Answer, Job, keep_logits, median_seconds, prompt_ids
from minglm.data.batches import Batch
from minglm.fast.engine import FastEngine
from minglm.model.loss import shift_targets
from minglm.train.recipe import Recipe, Stage
from minglm.train.step import operations, start, train_step


def run(job: Job) -> Answer:
    model = load(job.folder, job.dtype)
    return {"seconds": {"": WORKS[job.work](model, job)}}


def _decode(model: Model, job: Job) -> dict[str, float]:
    """Seconds for the logits of one token, as `Model.steps` tells them."""
    ids = prompt_ids(job).tolist()
    steps = model.steps(ids, job.units + 4, end_ids=())
    keep_logits(job, next(steps).logits)
    seconds, begin = [], time.perf_counter()
    for step in steps:
        seconds.append(step.seconds)
        if len(seconds) > 5 and time.perf_counter() - begin > job.budget:
            break
    return {"unit": float(np.median(seconds[2:]))}


def _prefill(model: Model, job: Job) -> dict[str, float]:
    ids = prompt_ids(job).tolist()
    engines = iter([FastEngine(model.params, model.config, len(ids)) for _ in range(job.units + 1)])
    return {"unit": median_seconds(lambda: next(engines).feed(ids), job.units, job.budget)}


def _growth(model: Model, job: Job) -> dict[str, float]:
    """Seconds for one token after so many keys."""
    room = job.units + 2
    ids = prompt_ids(job, max(job.contexts) + room).tolist()
    engine = FastEngine(model.params, model.config, len(ids))
    tokens, fed, found = iter(ids), 0, {}

    def feed(count: int) -> None:
        nonlocal fed
        engine.feed([next(tokens) for _ in range(count)])
        fed += count

    for context in job.contexts:
        feed(context - fed)
        found[str(context)] = median_seconds(lambda: feed(1), job.units, job.budget)
    return found


def _train(model: Model, job: Job) -> dict[str, float]:
    ids = prompt_ids(job, job.rows * job.prompt).reshape(job.rows, job.prompt)
    segments = np.zeros_like(ids)
    step = _trainer(model, Batch(ids, shift_targets(ids, segments), segments))
    with threadpool_limits(1):  # as `minglm.train.loop.train` does
        return {"unit": median_seconds(step, job.units, job.budget)}


def _trainer(model: Model, batch: Batch) -> Callable[[], None]:
    """What makes one training step, the same every time: loss, gradients, clipping, AdamW."""
    rows, length = batch.ids.shape
    stage = Stage("bench", 1000, rows, length, {}, learning_rate=1e-3)
    recipe = Recipe("glm-nano", (stage,), config={"max_position_embeddings": length}, optimiser="adamw")
    state, ops = start(model, recipe), operations(recipe)

    def step() -> None:
        nonlocal state
        state, _ = train_step(state, batch, model, recipe, ops)

    return step


WORKS: dict[str, Callable[[Model, Job], dict[str, float]]] = {
    "decode": _decode,
    "prefill": _prefill,
    "growth": _growth,
    "train": _train,
}
