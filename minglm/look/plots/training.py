"""How routing settled: the picks of a text at moments of a training run beside those of the end."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from minglm.look.plots.figure import (
    FONT,
    SUBJECTS,
    UNIFORM,
    label_axes,
    layer_numbers,
    layer_styles,
    legend,
    named,
    new_figure,
    sizes,
    some,
    title,
    tokens_said,
)
from minglm.look.specialisation import saturation
from minglm.model.ops import Array


def plot_saturation(
    history: Array,
    final: Array | None = None,
    steps: Sequence[int] | None = None,
    experts: int | None = None,
    layers: Sequence[int] | None = None,
    name: str = "",
) -> Figure:
    """How many of a token's K experts are already those of the end: `saturation`, a line for each of up to six layers.

    history: int [moment, T, layer, K] (`history.read_history`); final: [T, layer, K], by default the last moment;
    steps: when that was, by default 0, 1, …; `experts`: E, for the line of chance K/E, by default the largest that
    was seen and one. The table behind it: `rows.saturation_rows`. Raises ValueError for shapes that do not fit.
    """
    found = saturation(history, final)
    moments = range(len(found)) if steps is None else steps
    if len(moments) != len(found):
        raise ValueError(f"steps names {len(moments)} moments, history holds {len(found)}")
    _, T, count, K = np.shape(history)
    E = int(np.max(history)) + 1 if experts is None else experts
    numbers, shown = layer_numbers(layers, count), some(count, len(SUBJECTS))
    figure, ax = new_figure(7.5, 4.5)
    for i, style in zip(shown, layer_styles(len(shown)), strict=True):
        ax.plot(moments, 100 * found[:, i], label=f"layer {numbers[i]}", **style)
    ax.axhline(100 * K / E, label=f"chance, K/E = {K / E:.1%}", **UNIFORM)
    if min(moments) > 0 and max(moments) >= 100 * min(moments):  # early moments are close together
        ax.set_xscale("log")
    label_axes(ax, "step", "% of the final experts")
    ax.set_ylim(0, 104)
    ax.grid(True, color="#dddddd")
    ax.tick_params(labelsize=FONT)
    legend(ax, loc="best")
    few = f" ({len(shown)} shown)" if len(shown) < count else ""
    against = f"step {moments[-1]:,}" if final is None else "the final routing"
    title(
        ax,
        f"Router saturation{named(name)}: overlap with {against}",
        f"{sizes(count, E, K)}{few}, {tokens_said(T)}, the same text each time",
    )
    return figure
