"""What a run shows while it goes on: held-out numbers, a plot, and the routing of a fixed text at several moments."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minglm.data.heldout import heldout_documents
from minglm.data.tasks import TASKS, heldout_items, plain
from minglm.formats.tensors import write_tensors
from minglm.model.transformer import transformer
from minglm.train.loop import Observe
from minglm.train.recipe import Recipe

if TYPE_CHECKING:
    from minglm.api import Model

ROUTING = "routing"  # folder of a run: one file for each moment


def observer(run: Path, recipe: Recipe, numbers: Callable[["Model"], dict[str, float]] | None) -> Observe:
    """Held-out numbers every `eval_every` steps, the probe's routing also early, and `training.png`."""

    from minglm.look.curves import plot_training, read_metrics

    def observe(model: "Model", step: int) -> dict[str, float]:
        (run / ROUTING).mkdir(exist_ok=True)
        write_tensors(run / ROUTING / f"{step:06d}.safetensors", {f"step_{step:06d}": probe_routing(model)})
        if step % recipe.eval_every and step != recipe.steps:
            return {}
        found = numbers(model) if numbers else {}
        lines = [*read_metrics(run), {"step": step - 1, **found}]
        figure = plot_training(lines, run.name, model.config.num_nextn_predict_layers)
        figure.savefig(run / "training.png", dpi=100)
        return found

    return observe


def probe_text() -> str:
    """The fixed text whose routing is kept: held-out code, prose and tasks, one after the other in one document."""
    code, prose = (heldout_documents(domain)[0].text[:600] for domain in ("code", "prose"))
    items = [heldout_items(TASKS[name], 2, seed=5)[i] for name in ("addition", "sums", "number_words") for i in (0, 1)]
    tasks = "".join("".join(plain(item, thinking=i % 2 == 0)) for i, item in enumerate(items))
    return code + prose + tasks


def probe_routing(model: "Model") -> np.ndarray:  # -> uint8 [T, layer, K]
    """The experts that each MoE layer's router picks for the probe text, by rank."""
    if model.tokenizer is None:
        raise ValueError("the probe is a text, and this model has no tokenizer")
    ids = np.array([model.tokenizer.encode(probe_text())[: model.config.max_position_embeddings]])
    found: list[np.ndarray] = []

    def watch(name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith("expert_indices"):
            found.append(array.astype(np.uint8))
        return array

    transformer(ids, model.params, model.config, tap=watch)
    if not found:
        return np.zeros((ids.shape[1], 0, model.config.num_experts_per_tok), np.uint8)
    return np.stack(found, axis=1)


def routing_over_time(run: Path) -> dict[str, np.ndarray]:
    """The probe's routing at every moment that was kept: "step_000100" -> uint8 [T, layer, K]."""
    from safetensors.numpy import load_file

    moments: dict[str, np.ndarray] = {}
    for path in sorted((run / ROUTING).glob("*.safetensors")):
        moments |= load_file(path)
    return moments
