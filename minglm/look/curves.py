"""A training run over time: loss, balance, selection bias and learning rate on one axis."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def plot_training(lines: Sequence[dict[str, Any]], name: str = "") -> Figure:
    """Four panels over the steps, from the lines of `metrics.jsonl`: losses and held-out bits per byte; MaxVio of each
    router; their selection biases; learning rate. Stages are separated by a vertical line and named. Raises ValueError
    if no step is among the lines."""
    steps = [line for line in lines if "main" in line]
    if not steps:
        raise ValueError("nothing to plot: no step among the metrics")
    figure = Figure(figsize=(9, 9), layout="constrained")
    loss, balance, bias, rate = figure.subplots(4, 1, sharex=True, height_ratios=[3, 2, 2, 1])
    x = np.array([line["step"] for line in steps])

    for label, key, style in (("next token", "main", "-"), ("MTP", "mtp", "--")):
        y = np.array([line[key] for line in steps])
        loss.plot(x, y, style, color="#bbbbbb", linewidth=0.7)
        loss.plot(x, _smooth(y), style, color="black" if key == "main" else "#0072b2", label=f"{label}, nats per token")
    looks = [line for line in lines if "code_bits_per_byte" in line]
    for domain, marker, colour in (("code", "o", "#d55e00"), ("prose", "s", "#009e73")):
        y = [line[f"{domain}_bits_per_byte"] for line in looks]
        loss.plot([line["step"] for line in looks], y, marker, markersize=4, color=colour, label=f"{domain}, bits per byte")
    top = np.quantile([line["main"] for line in steps], 0.98) * 1.15
    loss.set_ylim(0, top)
    loss.set_ylabel("loss", fontsize=_FONT)

    layers = list(steps[-1]["max_violation"])
    colours = colormaps["viridis"](np.linspace(0, 0.85, max(len(layers), 1)))
    for i, layer in enumerate(layers):
        label, style = f"layer {layer}", LINES[i % len(LINES)]
        balance.plot(x, _smooth(np.array([line["max_violation"][layer] for line in steps])), style, color=colours[i], label=label)
        spread = np.array([line["bias"][layer] for line in steps])
        bias.plot(x, spread, style, color=colours[i], linewidth=0.7)
    balance.set_ylabel("MaxVio of the batch", fontsize=_FONT)
    balance.set_ylim(0, None)
    bias.set_ylabel("selection bias,\none line an expert", fontsize=_FONT)
    rate.plot(x, [line["learning_rate"] for line in steps], color="black")
    rate.set_ylabel("learning rate", fontsize=_FONT)
    rate.set_ylim(0, None)
    rate.set_xlabel("step", fontsize=_FONT + 1)

    for ax in (loss, balance, bias, rate):
        ax.grid(True, color="#dddddd")
        ax.tick_params(labelsize=_FONT)
        for line in (b for a, b in zip(steps, steps[1:], strict=False) if a["stage"] != b["stage"]):
            ax.axvline(line["step"], color="black", linestyle=":", linewidth=1)
    for line in (b for a, b in zip([{"stage": None}, *steps], steps, strict=False) if a["stage"] != b["stage"]):
        loss.text(line["step"], top, f" {printable(line['stage'])}", fontsize=_FONT, va="top")
    loss.legend(fontsize=_FONT, loc="upper right")
    if len(layers) > 1:
        balance.legend(fontsize=_FONT, loc="upper right", ncols=2)
    title = f"Training{', ' + printable(name) if name else ''}: {x[-1] + 1:,} steps"
    loss.set_title(title, fontsize=_FONT + 1, loc="left", parse_math=False)
    return figure


def _smooth(y: Array) -> Array:
    """A running mean over about a fiftieth of the run."""
    width = max(1, len(y) // 50)
    padded = np.concatenate([np.full(width // 2, y[0]), y, np.full(width - 1 - width // 2, y[-1])])
    return np.convolve(padded, np.full(width, 1 / width), "valid")
