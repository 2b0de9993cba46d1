"""The training loop: batches in, a checkpoint out, resumable bit for bit."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from minglm.api import Model
from minglm.data.batches import Batch
from minglm.formats.files import only_one
from minglm.model import ops as numpy_ops
from minglm.train.folder import Log, newest_checkpoint, newest_state, same_recipe, save_state
from minglm.train.recipe import Recipe
from minglm.train.step import DivergedError, Metrics, State, operations, staged, start, train_step


class Batches(Protocol):
    """Where batches come from: a pure function of the step, so resuming needs no state of its own. The batch of a step
    has the size that the recipe names there."""

    def batch(self, step: int) -> Batch: ...


Observe = Callable[[Model, int], dict[str, float]]  # the model after so many steps -> numbers for the metrics
EARLY = (1, 10, 30, 100)  # steps after which a run is observed besides every `eval_every`


def train(
    model: Model,
    recipe: Recipe,
    batches: Batches,
    run: Path,
    observe: Observe | None = None,
    stop_after: int | None = None,
    progress: bool = True,
    threads: int | None = None,
    ops: Any = None,
) -> Model:
    """Train until `recipe.steps`, from the newest checkpoint in `run` if there is one; returns the trained model.

    `observe(model, step)` is called every `eval_every` steps, and some times early, with the metrics so far on disk;
    its numbers are added to them. `stop_after` ends the session after that many steps (for tests). `ops`: compute with
    these, not with the recipe's engine (for ablations). Raises ValueError for a run folder of another recipe,
    DivergedError with the last good checkpoint when the loss blows up, OSError when another process is training in
    `run`.
    """
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    with only_one(run):
        same_recipe(run, recipe)
        state = newest_state(run, recipe, model.compute_dtype) or start(model, recipe)
        last = recipe.steps if stop_after is None else min(recipe.steps, state.step + stop_after)
        ops = operations(recipe, threads) if ops is None else ops
        return _train(model, recipe, batches, run, observe, state, last, progress, ops)


def _train(
    model: Model,
    recipe: Recipe,
    batches: Batches,
    run: Path,
    observe: Observe | None,
    state: State,
    last: int,
    progress: bool,
    ops: Any,
) -> Model:
    from threadpoolctl import threadpool_limits

    with (
        # so that sums do not depend on the machine's cores, and NumPy's threads do not wait
        threadpool_limits(1) if ops is numpy_ops else ops.one_thread_each(),
        _CtrlC() as ctrl_c,
        Log(run, state.step) as log,
        _Progress(state.step, recipe, progress) as bar,
    ):
        while state.step < last and not ctrl_c.noted:
            try:
                state, metrics = train_step(state, batches.batch(state.step), model, recipe, ops)
            except DivergedError as error:
                kept = newest_checkpoint(run)
                rest = (
                    f"; the last good checkpoint is kept: --from {kept} --run-folder NEW goes on from it"
                    if kept
                    else ""
                )
                raise DivergedError(f"{error}; lower the learning rate{rest}") from error
            done = state.step == recipe.steps
            bar.show(metrics)
            if metrics.step % recipe.log_every == 0 or done:
                log.write(metrics._asdict())
            if observe and (state.step % recipe.eval_every == 0 or state.step in EARLY or done):
                log.flush()
                if numbers := observe(_with(model, state, recipe), state.step):
                    log.write({"step": metrics.step, **numbers})
            if state.step % recipe.save_every == 0 or done or ctrl_c.noted:
                log.flush()
                save_state(run, _with(model, state, recipe), state, recipe)
    if ctrl_c.noted and state.step < last:
        raise KeyboardInterrupt
    return _with(model, state, recipe)


def _with(model: Model, state: State, recipe: Recipe) -> Model:
    """The model as it is after the state's last step."""
    config = staged(model.config, recipe.at(max(state.step - 1, 0)).stage)
    return Model(config, state.params, model.tokenizer, model.chat_template, model.name)


class _CtrlC:
    """Within: the first Ctrl-C is noted, so that the run ends, saved, between two steps and never in the middle of an
    update, which writes over the parameters, of an evaluation or of a save. The second one breaks in at once."""

    noted = False

    def __enter__(self) -> "_CtrlC":
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *signal: object) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)


class _Progress:
    """How far, how fast, time left and losses: a bar of tokens, because steps differ; a line every minute where
    nobody watches a terminal."""

    def __init__(self, step: int, recipe: Recipe, show: bool):
        from tqdm.std import tqdm

        watched = sys.stderr.isatty()
        self._recipe, self._lines, self._next = recipe, show and not watched, time.monotonic() + 10
        done = sum(recipe.tokens_at(before) for before in range(step))
        options: dict[str, Any] = {
            "unit": "tok",
            "unit_scale": True,
            "smoothing": 0.02,
            "disable": not (show and watched),
        }
        self._bar = tqdm(total=recipe.tokens, initial=done, **options)
        self._done, self._begin, self._began = done, 0, 0.0

    def show(self, metrics: Metrics) -> None:
        recipe, tokens = self._recipe, self._recipe.tokens_at(metrics.step)
        losses = f"step {metrics.step + 1}, loss {metrics.main:.3f}, mtp {metrics.mtp:.3f}"
        self._bar.set_description(metrics.stage, refresh=False)
        self._bar.set_postfix_str(losses, refresh=False)
        self._bar.update(tokens)
        self._done += tokens
        if not self._began:  # the first step compiles
            self._begin, self._began = self._done, time.monotonic()
        elif self._lines and time.monotonic() >= self._next:
            self._next = time.monotonic() + 60
            speed = (self._done - self._begin) / (time.monotonic() - self._began)
            left = (recipe.tokens - self._done) / speed / 60
            share = f"{self._done / recipe.tokens:.0%}"
            print(f"{metrics.stage}: {losses}; {share}, {speed:,.0f} tokens/s, {left:.0f} min left", file=sys.stderr)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
