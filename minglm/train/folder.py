"""The folder of a run: its recipe, its metrics, and checkpoints that are whole or not there.

It holds `recipe.toml`, `metrics.jsonl` and `checkpoint-NNNNNN` folders. Each of these is a model folder that
`minglm.load` reads, with the optimiser's state beside it. A folder gets its name in one rename when all of it is
written, so whatever is there under that name is whole.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from minglm.api import Model
from minglm.formats.checkpoint import load_checkpoint
from minglm.formats.files import write_text
from minglm.formats.tensors import write_tensors
from minglm.train.recipe import Recipe
from minglm.train.step import OPTIMISERS, State, optimiser_options

KEPT = 2  # checkpoints left in a run folder


def same_recipe(run: Path, recipe: Recipe) -> None:
    path = run / "recipe.toml"
    if not path.exists():
        write_text(path, recipe.to_toml())
    elif path.read_text("utf-8") != recipe.to_toml():
        raise ValueError(f"{run} holds a run with another recipe (see recipe.toml); give another folder or remove it")


# -- checkpoints of a run ----------------------------------------------------------------------------------------


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the most steps."""
    return max(_checkpoints(run), key=steps_of, default=None)


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]


def steps_of(checkpoint: Path) -> int:
    """After how many steps it was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_it(damaged: Path) -> str:
    """What to do about the newest checkpoint of a run when it cannot be read."""
    others = [path for path in _checkpoints(damaged.parent) if path != damaged]
    rest = f"goes on from {max(others, key=steps_of).name}" if others else "begins anew"
    return f"Without {damaged.name}, if you remove that folder, the run {rest}"


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
    for old in sorted(_checkpoints(run), key=steps_of)[:-KEPT]:
        os.replace(old, unfinished)  # so that none is half there under its name
        shutil.rmtree(unfinished)
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
        if (step := about["step"]) != steps_of(folder):
            raise ValueError(f"state.json tells of step {step!r}")
        arrays = load_file(folder / "optimiser.safetensors")
        optimiser = OPTIMISERS[recipe.optimiser].restore(params, arrays, step, **optimiser_options(recipe))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: its optimiser state cannot be read ({error}). {remove_it(folder)}") from error
    for name, here in _versions().items():
        if about.get(name) != here:
            warnings.warn(
                f"{run} was trained with {name} {about.get(name)}, this is {here}: bits may differ", stacklevel=3
            )
    return State(params, optimiser, step)


# -- metrics -----------------------------------------------------------------------------------------------------


class Log:
    """metrics.jsonl, one object a line. On resuming, lines of steps that will be made again are dropped."""

    def __init__(self, run: Path, step: int):
        path = run / "metrics.jsonl"
        write_text(path, "".join(line for line in _lines(path) if _step_of(line) < step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> "Log":
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
