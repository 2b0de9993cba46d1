"""Figures for slides and the data pack: `python docs/teaching/make.py` writes docs/teaching/figures and …/data.

Each figure twice, for light and dark slides, as SVG whose text stays text. Both are made of the shipped checkpoints, so
they can be made anew for another one.
"""

import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import minglm
from minglm.api import find
from minglm.look import plots
from minglm.look.history import read_history
from minglm.look.routing import load, max_violation

HERE = Path(__file__).resolve().parent
MODELS = ("glm-nano", "glm-tiny", "glm-tiny-balanced", "glm-tiny-unbalanced")
TEXT = "def mean(x):\n    return sum(x) / len(x)\n\ndef total(x):\n    return sum(x)\n"
INK, PAPER = {"light": "black", "dark": "#e8e8e8"}, {"light": "white", "dark": "#16181d"}

# -- drawings ------------------------------------------------------------------------------------------------------


def canvas(width, height):
    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.add_subplot()
    ax.set_xlim(0, width * 10)
    ax.set_ylim(0, height * 10)
    ax.axis("off")
    return figure, ax


def box(ax, x, y, width, height, text, colour="none"):
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.3", facecolor=colour, edgecolor="black"))
    dark = colour != "none"  # a filled box keeps black text, on light and dark slides alike
    ax.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11, color="#000001" if dark else "black"
    )


def arrow(ax, start, end):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="black", linewidth=1.3))


def layer():
    """One layer: what is read from the residual stream, and what is added to it."""
    figure, ax = canvas(10, 4.2)
    ax.plot([2, 98], [8, 8], color="black", linewidth=3)
    ax.text(2, 3.5, "residual stream [B, T, D]", fontsize=11)
    for x, parts in (
        (10, ("RMSNorm", "attention\nG key/value heads", "+")),
        (46, ("RMSNorm", "router\nK of E experts", "+")),
    ):
        box(ax, x, 14, 10, 5, parts[0], "#cfe3f3")
        box(ax, x + 3, 25, 20, 8, parts[1], "#cfe3f3")
        arrow(ax, (x + 5, 8), (x + 5, 13.5))
        arrow(ax, (x + 8, 19.5), (x + 10, 24.5))
        end = x + 33
        if x == 10:
            arrow(ax, (x + 23.5, 29), (end, 8.6))
        else:
            box(ax, x + 28, 32, 16, 5, "expert 3", "#f6d9c3")
            box(ax, x + 28, 25.5, 16, 5, "expert 7", "#f6d9c3")
            box(ax, x + 28, 16, 16, 5, "shared expert", "#d8ead8")
            arrow(ax, (x + 23.5, 31), (x + 27.5, 34))
            arrow(ax, (x + 23.5, 28), (x + 27.5, 28))
            arrow(ax, (x + 10.5, 16.5), (x + 27.5, 18))
            arrow(ax, (x + 36, 15.5), (x + 46.5, 8.8))
            arrow(ax, (x + 44.5, 28), (x + 47.5, 9.2))
            ax.text(x + 47, 23, "· w", fontsize=11, va="center")
        ax.text(end if x == 10 else x + 47.6, 8, "⊕", fontsize=16, ha="center", va="center")
    return figure


def heads():
    """Grouped queries: query head h reads key/value head h // R."""
    figure, ax = canvas(7, 2.6)
    for h in range(6):
        box(ax, 4 + 11 * h, 18, 8, 5, f"q {h}", "#cfe3f3")
        arrow(ax, (8 + 11 * h, 17.5), (19 + 33 * (h // 3), 8.5))
    for g in range(2):
        box(ax, 13 + 33 * g, 3, 12, 5, f"k, v {g}", "#f6d9c3")
    ax.text(35, 0.5, "H = 6 query heads, G = 2 key/value heads, R = 3: head h reads h // R", ha="center", fontsize=10)
    return figure


def measured():
    """name -> figure: the load and one choice, from the shipped checkpoints."""
    model = minglm.load("glm-tiny")
    trace = model.trace(TEXT, keep="*.mlp.*")
    routing, K = trace.routing, model.config.num_experts_per_tok
    where = {"layers": routing.layers, "name": model.name}
    found = {
        "load": plots.plot_load(routing.indices, routing.experts, **where),
        "choice": plots.plot_selection(
            routing.scores, routing.biased_scores, K, layer=2, token=7, tokens=trace.tokens, **where
        ),
    }
    for name in ("glm-tiny-balanced", "glm-tiny-unbalanced"):
        history, config = read_history(find(name)), minglm.load(name).config
        layers = range(config.first_k_dense_replace, config.num_hidden_layers)
        found[f"training-{name.removeprefix('glm-tiny-')}"] = plots.plot_load_over_training(
            history.indices, config.n_routed_experts, history.steps, layer=1, layers=list(layers), name=name
        )
    return found


# -- light and dark ------------------------------------------------------------------------------------------------


def darken(figure):
    """Black lines and texts on paper become light ones; what lies on a colour stays as it is."""
    figure.set_facecolor(PAPER["dark"])
    for ax in figure.axes:
        ax.set_facecolor(PAPER["dark"])
        ax.tick_params(colors=INK["dark"], which="both")
        for spine in ax.spines.values():
            spine.set_edgecolor(INK["dark"])
        texts = [ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label, ax.xaxis.offsetText]
        outside = [text for text in ax.texts if text.get_color() == "black" and not ax.images and not ax.collections]
        for text in [*texts, *outside]:
            text.set_color(INK["dark"])
        for line in ax.lines:
            if line.get_color() == "black":
                line.set_color(INK["dark"])
        for patch in ax.patches:
            if isinstance(patch, FancyArrowPatch):
                patch.set_color(INK["dark"])
        for lines in ax.collections:
            if isinstance(lines, LineCollection):
                lines.set_color(INK["dark"])
        if ax.get_legend():
            for line in ax.get_legend().get_lines():
                line.set_color(INK["dark"])
            for text in ax.get_legend().get_texts():
                text.set_color(INK["dark"])
    if figure._suptitle:
        figure._suptitle.set_color(INK["dark"])


def save(name, figure, folder):
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "minglm", "font.family": "sans-serif"}):
        figure.savefig(folder / f"{name}-light.svg", metadata={"Date": None}, facecolor=PAPER["light"])
        darken(figure)
        figure.savefig(folder / f"{name}-dark.svg", metadata={"Date": None}, facecolor=PAPER["dark"])


# -- data ----------------------------------------------------------------------------------------------------------


def data(folder):
    """Two tables over the training of every shipped checkpoint: each expert's load, and each layer's MaxVio."""
    with (
        open(folder / "load-over-training.csv", "w", newline="", encoding="utf-8") as loads,
        open(folder / "maxvio-over-training.csv", "w", newline="", encoding="utf-8") as violations,
    ):
        by_expert, by_layer = csv.writer(loads), csv.writer(violations)
        by_expert.writerow(["model", "step", "layer", "expert", "picks", "relative_to_uniform"])
        by_layer.writerow(["model", "step", "layer", "max_violation", "experts_without_a_token"])
        for name in MODELS:
            history, config = read_history(find(name)), minglm.load(name).config
            for step, indices in zip(history.steps, history.indices, strict=True):
                counts = load(indices, config.n_routed_experts)
                for number, row in enumerate(counts):
                    at = [name, step, config.first_k_dense_replace + number]
                    by_layer.writerow([*at, f"{float(max_violation(row[None])[0]):.4f}", int((row == 0).sum())])
                    for expert, picks in enumerate(row):
                        by_expert.writerow([*at, expert, int(picks), f"{picks / np.mean(row):.4f}"])


def main(folder):
    for part in ("figures", "data"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, figure in {"layer": layer(), "heads": heads(), **measured()}.items():
        save(name, figure, folder / "figures")
    data(folder / "data")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
