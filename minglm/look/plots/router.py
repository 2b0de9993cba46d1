"""What a router does with a token: who is picked, by which score, and how clear the choice was."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from minglm.look.plots.figure import (
    BLUE,
    FONT,
    RED,
    UNIFORM,
    cut,
    figure_title,
    label_axes,
    layer_numbers,
    legend,
    named,
    new_figure,
    short,
    sizes,
    some,
    ticks,
    title,
    tokens_said,
    write,
)
from minglm.look.routing import load
from minglm.look.rows import confidence, selection_rows
from minglm.model.ops import Array


def plot_picks(
    indices: Array,
    weights: Array,
    tokens: Sequence[str],
    experts: int,
    layers: Sequence[int] | None = None,
    limit: int = 40,
    name: str = "",
) -> Figure:
    """Who went where: tokens down, layers across; in each cell the token's experts, as ranked by their biased scores.

    Under them stand their weights, where there is room. A colour stands for an expert, light to dark by number.

    indices: int [T, layer, K]; weights: [T, layer, K]; tokens: T texts; `experts`: E. Shows the first `limit` tokens
    and as many ranks as fit, and says so in the title. The table behind it: `routing.pick_rows`.
    Raises ValueError for lengths that do not fit together.
    """
    if not load(indices, experts).any() or limit < 1:  # this checks the indices, too
        raise ValueError(f"nothing to plot: indices are {list(np.shape(indices))}, limit = {limit}")
    indices, weights = np.asarray(indices), np.asarray(weights)
    T, count, K = indices.shape
    if weights.shape != indices.shape or len(tokens) != T:
        raise ValueError(
            f"indices are {list(indices.shape)}, weights {list(weights.shape)}, tokens {len(tokens)}: weights must "
            "have the shape of indices, and there must be a token for each entry of their first axis"
        )
    numbers = layer_numbers(layers, count)
    rows, ranks = min(T, limit), max(1, min(K, 48 // count))
    with_weights = rows * count * ranks <= 400

    figure, ax = new_figure(2.5 + 0.42 * count * ranks, 1.8 + (0.42 if with_weights else 0.27) * rows)
    picks = _draw_picks(ax, indices[:rows, :, :ranks], weights[:rows, :, :ranks], experts, with_weights)
    ax.set_xticks([i * ranks + (ranks - 1) / 2 for i in range(count)], labels=[f"{n}" for n in numbers], fontsize=FONT)
    labels = [f"{t}  {short(tokens[t])}" for t in range(rows)]
    ax.set_yticks(range(rows), labels=labels, fontsize=FONT, family="monospace", parse_math=False)
    ax.set_xlabel("layer", fontsize=FONT + 1)
    title(
        ax,
        f"Who went where{named(name)}: expert{' over weight' if with_weights else ' numbers'}, in order of choice",
        f"{sizes(count, experts, K)}{cut(ranks, K)}, T = {T} tokens{cut(rows, T)}",
    )
    ticks(figure.colorbar(picks, ax=ax, pad=0.02, label="expert").ax.yaxis, range(experts))
    return figure


def _draw_picks(ax: Any, indices: Array, weights: Array, experts: int, with_weights: bool) -> ScalarMappable:
    """A cell for each token (down) and each layer and rank (across), a line between layers; [T, layer, rank] ×2."""
    rows, count, ranks = indices.shape
    who, loud = indices.reshape(rows, -1), weights.reshape(rows, -1)  # -> [T, layer · rank]
    colours = colormaps["viridis_r"].resampled(experts)
    picks = ScalarMappable(Normalize(-0.5, experts - 0.5), colours)
    ax.imshow(picks.to_rgba(who), aspect="auto", interpolation="nearest")
    for t, column in np.ndindex(*who.shape):
        text = f"{who[t, column]}" + (f"\n{loud[t, column]:.2f}" if with_weights else "")
        write(ax, column, t, text, picks.to_rgba(who[t, column]))
    for edge in range(count + 1):
        ax.axvline(edge * ranks - 0.5, color="white", linewidth=4)
    return picks


def plot_selection(
    scores: Array,
    biased_scores: Array,
    K: int,
    layer: int = 0,
    token: int = 0,
    tokens: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    name: str = "",
) -> Figure:
    """One token's choice in one layer: each expert's score as a bar, and where the selection bias moves it.

    scores, biased_scores: [T, layer, E]; K picked; `layer` counts along the layer axis, `token` along T; `tokens`: T
    texts. The K experts above the dashed line are picked, numbered by rank; those that the bias brought in or put out
    are named. Experts of closed groups (−∞) are crossed. The table behind it: `rows.selection_rows`.
    Raises ValueError for shapes, places or a K that do not fit.
    """
    rows = selection_rows(scores, biased_scores, K, layer, token)
    T, count, E = np.shape(scores)
    score, biased = (np.array([getattr(row, what) for row in rows], float) for what in ("score", "biased"))
    figure, ax = new_figure(3 + 0.42 * E, 5)
    picked = [row.rank is not None for row in rows]
    edges = {"edgecolor": "black", "linewidth": 0.6 if E <= 64 else 0.2}
    bars = ax.bar(range(E), score, color=[BLUE if each else "#dddddd" for each in picked], **edges)
    open_ = np.isfinite(biased)
    ax.vlines(np.flatnonzero(open_), score[open_], biased[open_], color="black", linewidth=1)
    ax.plot(np.flatnonzero(open_), biased[open_], "D", color="black", markersize=5, linestyle="none")
    ax.plot(np.flatnonzero(~open_), np.zeros((~open_).sum()), "x", color="black", markersize=6)
    top = max(score.max(), biased[open_].max(initial=0))
    for bar, row in zip(bars, rows, strict=True):
        _mark_choice(ax, bar, row, top)
    _threshold(ax, biased, K)
    ax.set_ylim(min(0, biased[open_].min(initial=0)) - 0.03 * top, 1.22 * top)
    label_axes(ax, "expert", "score")
    ticks(ax.xaxis, range(E))
    _selection_key(ax, K, bool((~open_).any()))
    text = f" {short(tokens[token])!r}" if tokens else ""
    title(
        ax,
        f"One token's choice{named(name)}: scores before (bars) and after (◆) the selection bias",
        f"token {token}{text}, layer {layer_numbers(layers, count)[layer]}, E = {E}, K = {K}, {tokens_said(T)}",
    )
    return figure


_BEHIND = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5}  # a label


def _mark_choice(ax: Any, bar: Any, row: Any, top: float) -> None:
    """The rank above an expert that is picked; what the bias changed, in words and as a hatch."""
    height = max(row.score, row.biased if np.isfinite(row.biased) else 0) + 0.03 * top
    words = "" if row.rank is None else f"{row.rank + 1}."
    if row.picked_without_bias != (row.rank is not None):
        bar.set(hatch="///", facecolor="white", edgecolor=BLUE if row.rank is not None else RED)
        words = f"in\n{words}" if row.rank is not None else "out"
    ax.text(row.expert, height, words, ha="center", va="bottom", fontsize=FONT, bbox=_BEHIND)


def _threshold(ax: Any, biased: Array, K: int) -> None:
    """Half-way between the last that is in and the first that is out."""
    ranked = -np.sort(-biased)
    if K < len(ranked) and np.isfinite(ranked[K]):
        ax.axhline((ranked[K - 1] + ranked[K]) / 2, **UNIFORM)


def _selection_key(ax: Any, K: int, closed: bool) -> None:
    handles = [
        Patch(facecolor=BLUE, edgecolor="black", label="score, picked"),
        Patch(facecolor="#dddddd", edgecolor="black", label="score, not picked"),
        Patch(facecolor="white", edgecolor=BLUE, hatch="///", label="in or out by the bias"),
        Line2D([], [], color="black", marker="D", markersize=5, label="with the bias"),
        Line2D([], [], label=f"halfway between pick {K} and the next", **UNIFORM),
    ]
    if closed:
        handles.append(Line2D([], [], color="black", marker="x", linestyle="none", label="group closed"))
    legend(ax, handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def plot_confidence(
    scores: Array, biased_scores: Array, K: int, layers: Sequence[int] | None = None, name: str = ""
) -> Figure:
    """How clear the choices were, a row of two histograms for each of up to six layers, evenly spread.

    Left ln E − H over the tokens, H being the entropy of the scores over their sum: 0 if all experts score alike.
    Right the margin between the K-th and the next biased score: left of the line rounding can change who is picked.
    scores, biased_scores: [T, layer, E]. The table behind it: `rows.confidence_rows`. Raises ValueError for shapes that
    do not fit, and without tokens.
    """
    gaps, margins = confidence(scores, biased_scores, K)
    T, count, E = np.shape(scores)
    numbers, shown = layer_numbers(layers, count), some(count, 6)
    figure, axes = new_figure(9, 1.2 + 1.25 * len(shown), len(shown), 2, sharex="col")
    widest = max(float(np.max(margins[:, shown], where=np.isfinite(margins[:, shown]), initial=1)), 1)
    bins = np.linspace(0, max(float(gaps[:, shown].max()), 1e-6), 41), np.geomspace(_ROUNDING / 10, widest, 41)
    for row, i in zip(axes, shown, strict=True):
        row[1].set_xscale("log")
        _histogram(row[0], gaps[:, i], bins[0], 0, (0.99, "right"))
        _histogram(row[1], margins[:, i], bins[1], _ROUNDING, (0.2, "left"))
        row[0].set_ylabel(f"layer {numbers[i]}\ntokens", fontsize=FONT)
    axes[-1, 0].set_xlabel("ln E − H, nats (dashed: all scores alike)", fontsize=FONT + 1)
    axes[-1, 1].set_xlabel("margin (dashed: rounding of float32, 1e-6)", fontsize=FONT + 1)
    few = f" ({len(shown)} shown)" if len(shown) < count else ""
    lost = int(np.isinf(margins).sum())
    without = f"; {lost:,} choices without another open expert left out" if lost else ""
    figure_title(
        figure,
        f"How clear the choices were{named(name)}",
        f"{sizes(count, E, K)}{few}, ln E = {np.log(E):.2f}, {tokens_said(T)}{without}",
    )
    return figure


_ROUNDING = 1e-6  # a margin below which two correct float32 programs may pick differently


def _histogram(ax: Any, values: Array, bins: Array, marked: float, where: tuple[float, str]) -> None:
    """With its median, written where there is room; what is outside the bins counts in the last one at that end."""
    known = values[np.isfinite(values)]
    ax.hist(np.clip(known, bins[0], bins[-1]), bins=bins, color="#8cbfe0", edgecolor=BLUE, linewidth=0.5)
    ax.axvline(marked, **UNIFORM)
    if known.size:
        middle = float(np.median(known))
        ax.axvline(max(middle, bins[0]), color=RED, linestyle=":", linewidth=2)
        text = f"median (dotted) {middle:.3g}"
        ax.set_ylim(0, 1.25 * ax.get_ylim()[1])
        ax.text(where[0], 0.95, text, transform=ax.transAxes, fontsize=FONT, ha=where[1], va="top")
    ax.tick_params(labelsize=FONT)
