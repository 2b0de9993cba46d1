"""A training run over time: loss, balance, selection bias and learning rate on one axis."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from minglm.look.tables import printable
from minglm.model.ops import Array

_FONT = 9  # points
LINES = ("-", "--", ":", "-.")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in a run's or a shipped checkpoint's folder; an unfinished last line is left out.
    Raises ValueError if there is none."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder of a run, or of a checkpoint that keeps its metrics")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def plot_training(lines: Sequence[dict[str, Any]], name: str = "", mtp_layers: int = 0) -> Figure:
    """Four panels over the steps, from the lines of `metrics.jsonl`: losses and held-out bits per byte; MaxVio of each
    router, of which the last `mtp_layers` are called so; their selection biases; learning rate. Stages are separated by
    a vertical line and named. Raises ValueError if no step is among the lines."""
    from minglm.look.plots import Picture

    steps = [line for line in lines if "main" in line]
    if not steps:
        raise ValueError("nothing to plot: no step among the metrics")
    figure = Picture(figsize=(9, 9), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[3, 2, 2, 1])
    x = np.array([line["step"] for line in steps])
    _losses(panels[0], x, steps, [line for line in lines if "code_bits_per_byte" in line])
    _routers(panels[1], panels[2], x, steps, mtp_layers)
    panels[3].plot(x, [line["learning_rate"] for line in steps], color="black")
    for ax, label in zip(panels, ("loss", "MaxVio of the batch", "selection bias", "learning rate"), strict=True):
        ax.set_ylabel(label, fontsize=_FONT)
        ax.grid(True, color="#dddddd")
        ax.tick_params(labelsize=_FONT)
    _name_stages(panels, steps)
    panels[3].set_ylim(0, None)
    panels[3].set_xlabel("step", fontsize=_FONT + 1)
    title = f"Training{', ' + printable(name) if name else ''}: {x[-1] + 1:,} steps"
    panels[0].set_title(title, fontsize=_FONT + 1, loc="left", parse_math=False)
    return figure


def _losses(ax: Any, x: Array, steps: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]]) -> None:
    for label, key, style, colour in (("next token", "main", "-", "black"), ("MTP", "mtp", "--", "#0072b2")):
        y = np.array([line[key] for line in steps])
        ax.plot(x, y, style, color="#bbbbbb", linewidth=0.7)
        ax.plot(x, _smooth(y), style, color=colour, label=f"{label}, nats per token")
    for domain, marker, colour in (("code", "o", "#d55e00"), ("prose", "s", "#009e73")):
        at, bits = [line["step"] for line in looks], [line[f"{domain}_bits_per_byte"] for line in looks]
        ax.plot(at, bits, marker, markersize=4, color=colour, label=f"{domain}, bits per byte")
    ax.set_ylim(0, np.quantile([line["main"] for line in steps], 0.98) * 1.15)
    ax.legend(fontsize=_FONT, loc="upper right")


def _routers(balance: Any, bias: Any, x: Array, steps: Sequence[dict[str, Any]], mtp_layers: int) -> None:
    """MaxVio of each layer, and a line for each expert's bias."""
    layers = list(steps[-1]["max_violation"])
    colours = colormaps["viridis"](np.linspace(0, 0.85, max(len(layers), 1)))
    for i, layer in enumerate(layers):
        style = {"color": colours[i], "linestyle": LINES[i % len(LINES)]}
        violations = np.array([line["max_violation"][layer] for line in steps])
        name = f"layer {layer}" + " (MTP)" * (i >= len(layers) - mtp_layers)
        balance.plot(x, _smooth(violations), label=name, **style)
        bias.plot(x, [line["bias"][layer] for line in steps], linewidth=0.7, **style)
    balance.set_ylim(0, None)
    if layers:
        balance.legend(fontsize=_FONT, loc="upper right", ncols=2)


def _name_stages(panels: Sequence[Any], steps: Sequence[dict[str, Any]]) -> None:
    firsts = [steps[0], *(after for before, after in pairwise(steps) if before["stage"] != after["stage"])]
    for line in firsts:
        for ax in panels:
            ax.axvline(line["step"], color="black", linestyle=":", linewidth=1)
        place, name = panels[0].get_xaxis_transform(), f" {printable(line['stage'])}"
        panels[0].text(line["step"], 0.02, name, fontsize=_FONT, va="bottom", transform=place)


def _smooth(y: Array) -> Array:
    """The mean of the last fiftieth of the run at each point: nothing shows before it happens."""
    width = max(1, len(y) // 50)
    padded = np.concatenate([np.full(width - 1, y[0]), y])
    return np.convolve(padded, np.full(width, 1 / width), "valid")


# -- several models beside each other ----------------------------------------------------------------------------

# Okabe and Ito's palette, which colour-blind readers can tell apart; each model has a dash and a marker of its own too.
_MODELS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))


class Panel(NamedTuple):
    """One measure over the training of several models."""

    label: str
    lines: dict[str, list[tuple[Array, Array]]]  # model -> (x, y) of each seed
    zero: bool = False  # mark zero; the first model is not the one that others are compared with


def plot_seeds(panels: Sequence[Panel], title: str = "") -> Figure:
    """A panel for each measure: every seed a thin line, a model's mean a thick one where all its seeds have values."""
    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    for i, panel in enumerate(panels):
        ax = figure.add_subplot(1, len(panels), i + 1)
        for number, (model, seeds) in enumerate(panel.lines.items(), start=int(panel.zero)):
            style: dict[str, Any] = {
                "color": _MODELS[number % len(_MODELS)],
                "linestyle": _DASHES[number % len(_DASHES)],
            }
            for x, y in seeds:
                ax.plot(x, y, linewidth=0.5, alpha=0.6, **style)
            x, y = mean_curve(seeds)
            ax.plot(x, y, linewidth=1.6, label=printable(model), **style)
        if panel.zero:
            ax.axhline(0, color="#999999", linewidth=0.8)
        else:
            ax.legend(fontsize=_FONT - 2)
        ax.set_ylabel(panel.label, fontsize=_FONT)
        ax.set_xlabel("million tokens", fontsize=_FONT)
        ax.grid(True, color="#dddddd")
        ax.tick_params(labelsize=_FONT - 1)
    figure.suptitle(printable(title), fontsize=_FONT + 1, x=0.01, ha="left")
    return figure


def mean_curve(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The mean at every x that all curves have."""
    common = curves[0][0].round(6)
    for x, _ in curves[1:]:
        common = np.intersect1d(common, x.round(6))
    return common, np.mean([y[np.isin(x.round(6), common)] for x, y in curves], axis=0)
