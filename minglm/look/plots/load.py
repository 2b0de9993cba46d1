"""How evenly the experts are used: all layers, one layer, over a training run, and what a capacity would lose."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from minglm.look.plots.figure import (
    BLUE,
    CELLS,
    FONT,
    LOAD_COLOURS,
    SUBJECTS,
    UNIFORM,
    colour_bar,
    facts,
    heat_map,
    label_axes,
    layer_numbers,
    layer_styles,
    legend,
    named,
    new_figure,
    sizes,
    some,
    ticks,
    title,
    tokens_said,
)
from minglm.look.routing import coefficient_of_variation, load, max_violation, utilisation
from minglm.look.specialisation import one_layer, would_drop
from minglm.model.ops import Array


def plot_load(
    indices: Array, experts: int, layers: Sequence[int] | None = None, valid: Array | None = None, name: str = ""
) -> Figure:
    """Heat map, layer × expert, of each expert's picks relative to the fair share K·T/E.

    indices: int [T, layer, K]; `experts`: E; `layers`: their numbers, by default 0, 1, …; `valid`: bool [T], False
    for padding; `name` goes into the title: which model and text. One colour scale for all layers. The table behind
    it: `routing.load_rows`. Raises ValueError as `routing.load` does, if nothing was picked, and if `layers` has
    another length.
    """
    counts = load(indices, experts, valid)
    if not counts.any():
        raise ValueError("nothing to plot: no layer, or no token that is not masked")
    numbers = layer_numbers(layers, len(counts))
    K, picks = np.shape(indices)[2], int(counts[0].sum())  # K, K · T
    figure, ax = _ratio_map(utilisation(counts), numbers, "layer")
    title(
        ax,
        f"Expert load{named(name)}: picks relative to uniform",
        f"{sizes(len(counts), experts, K)}, T = {picks // K} tokens; uniform = {picks / experts:.4g} picks",
    )
    return figure


def plot_load_over_training(
    history: Array,
    experts: int,
    steps: Sequence[int] | None = None,
    layer: int = 0,
    layers: Sequence[int] | None = None,
    name: str = "",
) -> Figure:
    """Heat map, moment × expert, of one layer's load relative to the fair share at moments of a training run.

    history: int [moment, T, layer, K], the routing of one text (`history.read_history`); steps: when that was, by
    default 0, 1, …; `layer` counts along the layer axis, `layers` are the layers' numbers. The table behind it:
    `rows.load_history_rows`. Raises ValueError for other shapes.
    """
    history = np.asarray(history)
    if history.ndim != 4 or not len(history):
        raise ValueError(f"history must be [moment, T, layer, K], got {list(history.shape)}")
    moments = range(len(history)) if steps is None else steps
    if len(moments) != len(history):
        raise ValueError(f"steps names {len(moments)} moments, history holds {len(history)}")
    _, T, count, K = history.shape
    counts = np.array([load(one_layer(moment, experts, layer)[:, None], experts)[0] for moment in history])
    number = layer_numbers(layers, count)[layer]
    figure, ax = _ratio_map(utilisation(counts), [f"{step:,}" for step in moments], "step")
    title(
        ax,
        f"Expert load over training{named(name)}: picks relative to uniform",
        f"{facts(number, experts, K, T)}, the same text each time; uniform = {K * T / experts:.4g} picks",
    )
    return figure


def _ratio_map(ratios: Array, labels: Sequence[Any], what: str) -> tuple[Figure, Any]:
    """[row, E], 1 being uniform, as a heat map with its scale."""
    rows, experts = ratios.shape
    with_numbers = max(ratios.shape) <= CELLS
    size = (3 + 0.5 * experts, 2 + 0.38 * rows) if with_numbers else (12, 2 + 0.14 * rows)
    figure, ax = new_figure(*size)
    most = max(2.0, float(np.nanmax(ratios, initial=0)))
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=most)
    heat_map(ax, ratios, LOAD_COLOURS, norm)
    label_axes(ax, "expert", what)
    ticks(ax.xaxis, range(experts))
    ticks(ax.yaxis, labels)
    middle = (1 + most) / 2
    marks = {0: "0", 0.5: "0.5", 1: "1 uniform", middle: f"{middle:.3g}", most: f"{most:.3g}"}
    colour_bar(figure, ax, norm, LOAD_COLOURS, "picks ÷ uniform", 1, marks)
    return figure, ax


def plot_bars(
    indices: Array, experts: int, layer: int = 0, layers: Sequence[int] | None = None, name: str = ""
) -> Figure:
    """The load of one layer as bars, with the fair share K/E of the tokens as a line.

    indices: int [T, layer, K]; `layer` counts along the layer axis, `layers` are the layers' numbers. MaxVio and CV
    stand in the title. The table behind it: `routing.load_rows`. Raises ValueError as `routing.load` does.
    """
    chosen = one_layer(indices, experts, layer)
    T, K = chosen.shape
    number = layer_numbers(layers, np.shape(indices)[1])[layer]
    counts = load(chosen[:, None], experts)
    figure, ax = new_figure(2.5 + 0.4 * experts, 4)
    ax.bar(range(experts), 100 * counts[0] / T, color=BLUE, edgecolor="black", linewidth=0.6 if experts <= 64 else 0)
    ax.axhline(100 * K / experts, label=f"uniform, K/E = {K / experts:.1%}", **UNIFORM)
    label_axes(ax, "expert", "% of the tokens")
    ticks(ax.xaxis, range(experts))
    ax.set_xlim(-0.6, experts - 0.4)
    ax.margins(y=0.15)
    legend(ax, loc="upper right", frameon=True)
    vio, cv = float(max_violation(counts)[0]), float(coefficient_of_variation(counts)[0])
    title(
        ax,
        f"Load of one layer{named(name)}: MaxVio {vio:.2f}, CV {cv:.2f}, {(counts == 0).sum()} without a token",
        facts(number, experts, K, T),
    )
    return figure


def plot_drops(
    indices: Array,
    experts: int,
    factors: Sequence[float] = (1, 1.25, 1.5, 2, 3),
    layers: Sequence[int] | None = None,
    name: str = "",
) -> Figure:
    """The share of picks that would be lost if each expert took at most ⌈factor · K·T/E⌉: `would_drop`.

    A line for each of up to six layers, evenly spread. GLM-4.5 has no capacity and loses nothing. The table behind
    it: `rows.drop_rows`. Raises ValueError without tokens or factors.
    """
    T, count, K = np.shape(indices)
    numbers = layer_numbers(layers, count)
    if not T or not count or not len(factors):
        raise ValueError(f"nothing to plot: indices are {list(np.shape(indices))}, factors {list(factors)}")
    lost = 100 * would_drop(indices, experts, factors)
    shown = some(count, len(SUBJECTS))
    figure, ax = new_figure(7.5, 4.5)
    for i, style in zip(shown, layer_styles(len(shown)), strict=True):
        ax.plot(factors, lost[:, i], label=f"layer {numbers[i]}", **style)
    ax.axhline(0, label="GLM-4.5: no capacity, no loss", **UNIFORM)
    label_axes(ax, "capacity factor: capacity ÷ uniform load K·T/E", "% of the picks lost")
    ax.set_xticks(list(factors), labels=[f"{factor:g}" for factor in factors], fontsize=FONT)
    ax.grid(True, color="#dddddd")
    ax.margins(y=0.08)
    legend(ax, loc="upper right")
    few = f" ({len(shown)} shown)" if len(shown) < count else ""
    title(
        ax,
        f"What a capacity would lose{named(name)}",
        f"{sizes(count, experts, K)}{few}, {tokens_said(T)} in one batch; uniform load = {K * T / experts:.4g} picks",
    )
    return figure
