"""One training step: loss, gradients, clipping, the optimiser, the routers' biases."""

import math
from typing import Any, NamedTuple

import numpy as np

from minglm.api import Model
from minglm.config import Config
from minglm.data.batches import Batch
from minglm.model import ops as numpy_ops
from minglm.model.loss import Loss, loss_and_grads
from minglm.model.params import Params, map_arrays, walk_stacked
from minglm.model.router import update_bias
from minglm.train.muon import Muon
from minglm.train.optim import AdamW, clip, global_norm, sum_of_squares
from minglm.train.recipe import Now, Recipe, Stage

OPTIMISERS: dict[str, Any] = {"adamw": AdamW, "muon": Muon}
Optimiser = AdamW | Muon


class State(NamedTuple):
    """Everything that a step changes."""

    params: Params
    optimiser: Optimiser
    step: int  # updates made so far


class Metrics(NamedTuple):
    """What one step tells: losses in nats per token, and how even the routers' loads are."""

    step: int
    stage: str
    loss: float
    main: float
    mtp: float
    balance: float
    gradient_norm: float
    learning_rate: float
    load: dict[int, list[int]]  # layer -> picks per expert
    max_violation: dict[int, float]  # layer -> (largest load − mean load) / mean load
    bias: dict[int, list[float]]  # layer -> selection bias per expert, after the step


BLOWN_UP = 1.5  # times the loss of a blind guess, ln V


class DivergedError(ValueError):
    """The loss, a gradient or a parameter is no longer a number, or the loss is far worse than guessing."""


# -- one step ----------------------------------------------------------------------------------------------------


def start(model: Model, recipe: Recipe) -> State:
    params = map_arrays(lambda name, array: array.copy(), model.params)  # a fast step writes over them
    return State(params, OPTIMISERS[recipe.optimiser].start(params, **optimiser_options(recipe)), 0)


def optimiser_options(recipe: Recipe) -> dict[str, Any]:
    """What the recipe's optimiser is started or restored with."""
    head = {"head": recipe.head_optimiser} if recipe.optimiser == "muon" and recipe.head_optimiser else {}
    return {"weight_decay": recipe.weight_decay, **head}


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
    if float(loss.main) > BLOWN_UP * math.log(config.vocab_size):
        raise DivergedError(
            f"step {state.step}: loss {float(loss.main):.2f}, where guessing blindly would give "
            f"{math.log(config.vocab_size):.2f}"
        )
    if ops is numpy_ops:
        params, optimiser = state.optimiser.update(state.params, clip(grads, norm, recipe.clip_norm), rate)
    else:
        params, scale = state.params, min(1.0, recipe.clip_norm / max(norm, 1e-30))
        optimiser = state.optimiser.update_in_place(params, grads, rate, scale, ops)
    params = _balanced(params, loss.load, now.stage.bias_rate)
    if broken := [name for name, array in walk_stacked(params) if not np.isfinite(squares(array))]:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise DivergedError(f"step {state.step}: the update would make {broken[0]}{more} NaN or infinite")
    return State(params, optimiser, state.step + 1), _metrics(state.step, now, loss, norm, params)


def staged(config: Config, stage: Stage) -> Config:
    """The model's config in this stage."""
    return config if stage.rope_theta is None else config.replace(rope_theta=stage.rope_theta)


def _balanced(params: Params, load: dict[int, np.ndarray], rate: float) -> Params:
    """Every router's bias one step towards an even load."""
    by_name = {_bias_name(i): counts for i, counts in load.items()}
    return map_arrays(lambda n, a: update_bias(a, by_name[n], rate) if n in by_name else a, params)


def _metrics(step: int, now: Now, loss: Loss, norm: float, params: Params) -> Metrics:
    biases = dict(walk_stacked(params))
    return Metrics(
        step=step,
        stage=now.stage.name,
        loss=float(loss.total),
        main=float(loss.main),
        mtp=float(loss.mtp),
        balance=float(loss.balance),
        gradient_norm=norm,
        learning_rate=now.learning_rate,
        load={i: counts.tolist() for i, counts in loss.load.items()},
        max_violation={
            i: round(float(counts.max() / max(counts.mean(), 1e-9) - 1), 4) for i, counts in loss.load.items()
        },
        bias={i: [round(float(b), 5) for b in biases[_bias_name(i)]] for i in loss.load},
    )


def _bias_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
