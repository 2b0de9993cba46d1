"""The training loop: batches in, a checkpoint out, resumable bit for bit.

A run folder holds `recipe.toml`, `metrics.jsonl` and `checkpoint-NNNNNN` folders. Each of these is a model folder
that `minglm.load` reads, with the optimiser's state beside it. A folder gets its name in one rename when all of it is
written, so whatever is there under that name is whole.
"""

import json
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from minglm.api import Model
from minglm.config import Config
from minglm.data.batches import Batch
from minglm.formats.checkpoint import load_checkpoint, write_tensors
from minglm.formats.files import only_one, write_text
from minglm.model import ops as numpy_ops
from minglm.model.loss import Loss, loss_and_grads
from minglm.model.params import Params, map_arrays, walk_stacked
from minglm.model.router import update_bias
from minglm.train.muon import Muon
from minglm.train.optim import AdamW, clip, global_norm, sum_of_squares
from minglm.train.recipe import Recipe, Stage

KEPT = 2  # checkpoints left in a run folder
OPTIMISERS: dict[str, Any] = {"adamw": AdamW, "muon": Muon}
Optimiser = AdamW | Muon


class Batches(Protocol):
    """Where batches come from: a pure function of the step, so resuming needs no state of its own. The batch of a step
    has the size that the recipe names there."""

    def batch(self, step: int) -> Batch: ...


class State(NamedTuple):
    """Everything that a step changes."""

    params: Params
    optimiser: Optimiser
    step: int  # updates made so far


class Metrics(NamedTuple):
    """What one step tells: losses in nats per token, and how even the routers' loads are."""

    step: int
    loss: float
    main: float
    mtp: float
    balance: float
    gradient_norm: float
    learning_rate: float
    load: dict[int, list[int]]  # layer -> picks per expert
    max_violation: dict[int, float]  # layer -> (largest load − mean load) / mean load


class DivergedError(ValueError):
    """The loss, a gradient or a parameter is no longer a number."""


# -- one step ----------------------------------------------------------------------------------------------------


def start(model: Model, recipe: Recipe) -> State:
    params = map_arrays(lambda name, array: array.copy(), model.params)  # a fast step writes over them
    return State(params, OPTIMISERS[recipe.optimiser].start(params, weight_decay=recipe.weight_decay), 0)


def operations(recipe: Recipe, threads: int | None = None) -> Any:
    """What the recipe's engine computes with, for `train_step`, on all cores unless `threads` or MINGLM_THREADS say
    otherwise; the results do not depend on it."""
    if recipe.engine == "numpy":
        return numpy_ops
    from minglm.fast.ops import FastOps
    from minglm.fast.team import thread_count

    return FastOps(thread_count(threads))


def train_step(state: State, batch: Batch, model: Model, recipe: Recipe, ops: Any = numpy_ops) -> tuple[State, Metrics]:
    """Loss, gradients, clipping, the optimiser, and the routers' biases, as the recipe wants them at this step.

    Raises DivergedError, before anything is changed if the loss or a gradient is to blame. With fast `ops` the new
    state's arrays are the old one's.
    """
    now = recipe.at(state.step)
    rate, weights = now.learning_rate, (now.stage.mtp_weight, now.stage.balance_weight)
    config = staged(model.config, now.stage)
    loss, grads = loss_and_grads(
        batch.ids, batch.targets, state.params, config, *weights, segments=batch.segments, ops=ops
    )
    squares = getattr(ops, "squares", sum_of_squares)
    norm = global_norm(grads, squares)
    if not np.isfinite([float(loss.total), norm]).all():
        raise DivergedError(f"step {state.step}: loss {float(loss.total)}, gradient norm {norm}")
    if ops is numpy_ops:
        params, optimiser = state.optimiser.update(state.params, clip(grads, norm, recipe.clip_norm), rate)
    else:
        params, scale = state.params, min(1.0, recipe.clip_norm / max(norm, 1e-30))
        optimiser = state.optimiser.update_in_place(params, grads, rate, scale, ops)
    params = _balanced(params, loss.load, now.stage.bias_rate)
    if broken := [name for name, array in walk_stacked(params) if not np.isfinite(squares(array))]:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise DivergedError(f"step {state.step}: the update would make {broken[0]}{more} NaN or infinite")
    return State(params, optimiser, state.step + 1), _metrics(state.step, loss, norm, rate)


def staged(config: Config, stage: Stage) -> Config:
    """The model's config in this stage."""
    return config if stage.rope_theta is None else config.replace(rope_theta=stage.rope_theta)


def _balanced(params: Params, load: dict[int, np.ndarray], rate: float) -> Params:
    """Every router's bias one step towards an even load."""
    by_name = {f"model.layers.{i}.mlp.gate.e_score_correction_bias": counts for i, counts in load.items()}
    return map_arrays(lambda n, a: update_bias(a, by_name[n], rate) if n in by_name else a, params)


def _metrics(step: int, loss: Loss, norm: float, rate: float) -> Metrics:
    return Metrics(
        step=step,
        loss=float(loss.total),
        main=float(loss.main),
        mtp=float(loss.mtp),
        balance=float(loss.balance),
        gradient_norm=norm,
        learning_rate=rate,
        load={i: counts.tolist() for i, counts in loss.load.items()},
        max_violation={i: float(counts.max() / max(counts.mean(), 1e-9) - 1) for i, counts in loss.load.items()},
    )


# -- a run -------------------------------------------------------------------------------------------------------

Evaluate = Callable[[Model], dict[str, float]]


def train(
    model: Model,
    recipe: Recipe,
    batches: Batches,
    run: Path,
    evaluate: Evaluate | None = None,
    stop_after: int | None = None,
    progress: bool = True,
    threads: int | None = None,
) -> Model:
    """Train until `recipe.steps`, from the newest checkpoint in `run` if there is one; returns the trained model.

    `evaluate(model)` is called every `eval_every` steps and its numbers are written to the metrics. `stop_after`
    ends the session after that many steps (for tests). Raises ValueError for a run folder of another recipe,
    DivergedError with the last good checkpoint when the loss is no longer a number, OSError when another process is
    training in `run`.
    """
    run.mkdir(parents=True, exist_ok=True)
    with only_one(run):
        _same_recipe(run, recipe)
        state = newest_state(run, recipe, model.compute_dtype) or start(model, recipe)
        last = recipe.steps if stop_after is None else min(recipe.steps, state.step + stop_after)
        return _train(model, recipe, batches, run, evaluate, state, last, progress, threads)


def _train(
    model: Model,
    recipe: Recipe,
    batches: Batches,
    run: Path,
    evaluate: Evaluate | None,
    state: State,
    last: int,
    progress: bool,
    threads: int | None,
) -> Model:
    from threadpoolctl import threadpool_limits

    ops = operations(recipe, threads)
    with (
        # so that sums do not depend on the machine's cores, and NumPy's threads do not wait
        threadpool_limits(1) if ops is numpy_ops else ops.one_thread_each(),
        _CtrlC() as ctrl_c,
        _Log(run, state.step) as log,
        _Progress(state.step, recipe, progress) as bar,
    ):
        while state.step < last and not ctrl_c.noted:
            try:
                state, metrics = train_step(state, batches.batch(state.step), model, recipe, ops)
            except DivergedError as error:
                kept = newest_checkpoint(run)
                raise DivergedError(
                    f"{error}; last good checkpoint: {kept or 'none yet'}; lower the learning rate"
                ) from error
            done = state.step == recipe.steps
            bar.show(metrics)
            if metrics.step % recipe.log_every == 0 or done:
                log.write(metrics._asdict())
            if evaluate and (state.step % recipe.eval_every == 0 or done):
                log.write({"step": metrics.step, **evaluate(_with(model, state, recipe))})
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


def _same_recipe(run: Path, recipe: Recipe) -> None:
    path = run / "recipe.toml"
    if not path.exists():
        write_text(path, recipe.to_toml())
    elif path.read_text("utf-8") != recipe.to_toml():
        raise ValueError(f"{run} holds a run with another recipe (see recipe.toml); give another folder or remove it")


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


# -- checkpoints of a run ----------------------------------------------------------------------------------------


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the most steps."""
    return max(_checkpoints(run), key=_steps, default=None)


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def save_state(run: Path, model: Model, state: State, recipe: Recipe) -> Path:
    """Write `checkpoint-NNNNNN`, then remove the oldest but `KEPT`."""
    final, unfinished = run / f"checkpoint-{state.step:06d}", run / "unfinished"
    if final.exists():  # the same step of the same run: the same bits
        return final
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save(unfinished, dtype=model.compute_dtype)
    write_tensors(unfinished / "optimiser.safetensors", dict(state.optimiser.walk()))
    about = {"step": state.step, **_versions()}
    (unfinished / "state.json").write_text(json.dumps(about) + "\n", "utf-8")
    os.replace(unfinished, final)
    for old in sorted(_checkpoints(run), key=_steps)[:-KEPT]:
        shutil.rmtree(old)
    return final


def _versions() -> dict[str, str]:
    """What the bits of a step depend on besides the processor."""
    return {name: version(name) for name in ("numpy", "scipy", "numba")}


def newest_state(run: Path, recipe: Recipe, dtype: Any = np.float32) -> State | None:
    """The state in the newest checkpoint, or None if there is none yet."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = newest_checkpoint(run)
    if folder is None:
        return None
    _, params = load_checkpoint(folder, dtype)
    try:
        about = json.loads((folder / "state.json").read_text("utf-8"))
        step = about["step"]
        arrays = load_file(folder / "optimiser.safetensors")
        optimiser = OPTIMISERS[recipe.optimiser].restore(params, arrays, step, weight_decay=recipe.weight_decay)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: its optimiser state cannot be read ({error}); remove this checkpoint") from error
    for name, here in _versions().items():
        if about.get(name) != here:
            warnings.warn(
                f"{run} was trained with {name} {about.get(name)}, this is {here}: bits may differ", stacklevel=3
            )
    return State(params, optimiser, step)


# -- telling -----------------------------------------------------------------------------------------------------


class _Log:
    """metrics.jsonl, one object a line. On resuming, lines of steps that will be made again are dropped."""

    def __init__(self, run: Path, step: int):
        path = run / "metrics.jsonl"
        write_text(path, "".join(line for line in _lines(path) if _step_of(line) < step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _lines(path: Path) -> Iterator[str]:
    """The complete lines of a file that may end in the middle of one, or not exist."""
    if path.exists():
        yield from (line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n"))


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for a damaged line, which is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class _Progress:
    """A bar of tokens, because steps differ: how far, time left, losses."""

    def __init__(self, step: int, recipe: Recipe, show: bool):
        from tqdm.std import tqdm

        self._recipe = recipe
        done = sum(recipe.tokens_at(before) for before in range(step))
        self._bar = tqdm(
            total=recipe.tokens, initial=done, unit="tok", unit_scale=True, smoothing=0.02, disable=None if show else True
        )

    def show(self, metrics: Metrics) -> None:
        self._bar.set_description(self._recipe.at(metrics.step).stage.name, refresh=False)
        self._bar.set_postfix_str(f"step {metrics.step + 1}, loss {metrics.main:.3f}, mtp {metrics.mtp:.3f}", refresh=False)
        self._bar.update(self._recipe.tokens_at(metrics.step))

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
