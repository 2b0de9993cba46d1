"""The routing of a fixed text at moments of a training run, as shipped checkpoints and runs keep it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from minglm.model.ops import Array


class History(NamedTuple):
    steps: list[int]  # after so many, ascending
    indices: Array  # uint8 [moment, T, layer, K]


def read_history(folder: str | Path) -> History:
    """`routing.safetensors` of a checkpoint's folder, or the files in `routing/` of a run's. Raises ValueError if
    there is none, or if the moments do not belong together."""
    from safetensors.numpy import load_file

    folder = Path(folder)
    files = [p for p in (folder / "routing.safetensors",) if p.is_file()] or sorted(
        folder.glob("routing/*.safetensors")
    )
    moments: dict[str, Array] = {}
    for path in files:
        moments |= load_file(path)
    if not moments:
        raise ValueError(
            f"{folder}: no routing.safetensors and no routing/: this model kept no routing of its training"
        )
    names = sorted(moments, key=lambda name: int(name.removeprefix("step_")))
    shapes = {moments[name].shape for name in names}
    if len(shapes) > 1:
        raise ValueError(f"{folder}: moments of different shapes: {sorted(shapes)}; wanted one text and one model")
    return History([int(name.removeprefix("step_")) for name in names], np.stack([moments[name] for name in names]))
