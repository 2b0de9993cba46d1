"""The multi-token-prediction layer: how often its drafts are taken, and whether it routes as another layer does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from minglm.look.plots.figure import (
    BLUE,
    CONTROL,
    DASHES,
    FONT,
    RED,
    SUBJECTS,
    UNIFORM,
    label_axes,
    layer_numbers,
    legend,
    named,
    new_figure,
    short,
    sizes,
    ticks,
    title,
    tokens_said,
    unhidden,
)
from minglm.look.rows import overlap_rows
from minglm.model.ops import Array


def plot_acceptance(rows: Sequence[tuple[Any, ...]], name: str = "") -> Figure:
    """The share of drafts that were accepted, by depth, a line for each text, with its counts.

    rows: (text, depth, accepted, drafted), or `rows.AcceptanceRow`, whose interval is drawn. Depth 1 is the token after
    the next one. A share counts drafts at that depth, whatever became of those before. Raises ValueError without rows,
    and for counts that are none.
    """
    if not rows or any(not 0 <= row[2] <= row[3] or row[1] < 1 for row in rows):
        raise ValueError(
            "wanted rows (text, depth from 1, accepted, drafted) with 0 ≤ accepted ≤ drafted, at least one"
        )
    texts = list(dict.fromkeys(row[0] for row in rows))
    depths = sorted({row[1] for row in rows})
    figure, ax = new_figure(4.5 + 1.3 * len(depths), 4.8)
    for n, text in enumerate(texts):
        own = sorted(row for row in rows if row[0] == text and row[3])
        colour, marker = SUBJECTS[n % len(SUBJECTS)]
        x = [row[1] + 0.04 * (n - (len(texts) - 1) / 2) for row in own]  # side by side, so that bars can be told apart
        shares = [100 * row[2] / row[3] for row in own]
        if own and all(len(row) > 5 and row[4] is not None for row in own):
            ends = [[share - 100 * row[4], 100 * row[5] - share] for row, share in zip(own, shares, strict=True)]
            ax.errorbar(x, shares, yerr=np.maximum(ends, 0).T, color=colour, fmt="none", capsize=3)
        counts = ", ".join(f"{row[3]:,}" for row in own)
        style = {"color": colour, "marker": marker, "linestyle": DASHES[n % len(DASHES)], "markersize": 6}
        ax.plot(x, shares, label=f"{unhidden(short(str(text), 24))} (n = {counts})", **style)
    label_axes(ax, "depth: tokens beyond the next one", "% of the drafts accepted")
    ax.set_xticks(depths, labels=[f"{depth}" for depth in depths], fontsize=FONT)
    ax.set_xlim(min(depths) - 0.4, max(depths) + 0.4)
    ax.set_ylim(0, 103)
    ax.grid(True, axis="y", color="#dddddd")
    legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1 + (len(texts) > 3))
    title(
        ax,
        f"Drafts accepted{named(name)}, by depth",
        f"{len(texts)} text{'s' if len(texts) > 1 else ''}; n: drafts at each depth"
        + ("; bars: 95 %" if any(len(row) > 5 and row[4] is not None for row in rows) else ""),
    )
    return figure


def plot_overlap(
    indices_a: Array,
    indices_b: Array,
    experts: int,
    layers: Sequence[int] | None = None,
    of: tuple[str, str] = ("A", "B"),
    seed: int = 0,
    name: str = "",
) -> Figure:
    """How many of a token's K experts two routings share, a bar for each layer, beside chance and two controls.

    indices_a, indices_b: int [T, layer, K] of the same tokens, or [T, K]; one may have a single layer, which then
    stands beside each of the other's, as the MTP layer's beside the trunk's. `of`: what the two are called. Experts of
    different layers share their numbers only: there a bar says something only outside the range that random
    renumbering gives. The table behind it: `rows.overlap_rows`. Raises ValueError for shapes that do not fit.
    """
    rows = overlap_rows(indices_a, indices_b, experts, None, seed)
    numbers = layer_numbers(layers, len(rows))
    T, K = np.shape(indices_a)[0], np.shape(indices_a)[-1]
    figure, ax = new_figure(3 + 0.6 * len(rows), 4.4)
    x = range(len(rows))
    thin = len(rows) > 64
    ax.bar(x, [100 * row.overlap for row in rows], color="#8cbfe0", edgecolor=BLUE, linewidth=0 if thin else 0.8)
    size = {"markersize": 4 if thin else 12}
    reach, middle = [200 * row.renumbered_sd for row in rows], [100 * row.renumbered for row in rows]
    ax.errorbar(x, middle, reach, label="experts renumbered, ± 2 sd", capsize=4, **{**CONTROL, "fmt": "none"})
    ax.plot(
        x, [100 * row.shuffled for row in rows], "_", color=RED, markeredgewidth=2.5, label="tokens shuffled", **size
    )
    ax.axhline(100 * rows[0].chance, label=f"chance, K/E = {rows[0].chance:.1%}", **UNIFORM)
    if not thin and len(rows) <= 16:
        for place, row in enumerate(rows):
            top = 100 * max(row.overlap, row.renumbered + 2 * row.renumbered_sd, row.chance)
            ax.text(place, top + 1, f"{row.overlap:.1%}", ha="center", va="bottom", fontsize=FONT)
    label_axes(ax, "layer", "% of the experts shared")
    ticks(ax.xaxis, list(numbers))
    ax.set_xlim(-0.8, len(rows) - 0.2)
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])
    legend(ax, loc="upper right", ncols=2)
    title(
        ax,
        f"Experts in common{named(name)}: {of[0]} beside {of[1]}",
        f"{sizes(len(rows), experts, K)}, {tokens_said(T)}",
    )
    return figure
