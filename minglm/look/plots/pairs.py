"""Which experts go together: in one layer, and from layer to layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from minglm.look.plots.figure import (
    CELLS,
    FONT,
    LOAD_COLOURS,
    SHARE_COLOURS,
    colour_bar,
    facts,
    heat_map,
    label_axes,
    layer_numbers,
    named,
    new_figure,
    ticks,
    title,
    tokens_said,
)
from minglm.look.rows import Flow, flows
from minglm.look.specialisation import coactivation, coactivation_lift, random_coactivation, some_layers
from minglm.model.ops import Array


def plot_coactivation(
    indices: Array,
    experts: int,
    layer: int = 0,
    lift: bool = False,
    layers: Sequence[int] | None = None,
    name: str = "",
) -> Figure:
    """Heat map, expert × expert, of P(column picked | row picked), or of the lift, with what random routing gives as
    the middle of the scale.

    indices: int [T, layer, K]; `layer` counts along the layer axis, `layers` are the layers' numbers. The diagonal
    and rows of experts without a token are hatched. The table behind it: `rows.coactivation_rows`. Raises ValueError
    as `routing.load` does.
    """
    values = (coactivation_lift if lift else coactivation)(indices, experts, layer)
    np.fill_diagonal(values, np.nan)
    T, count, K = np.shape(indices)
    fair = random_coactivation(experts, K, lift)
    most = float(np.nanmax(values, initial=0)) if np.isfinite(values).any() else 0.0
    most = max(most, 2 * fair, 1e-6)
    colours = LOAD_COLOURS if fair else SHARE_COLOURS
    norm: Normalize = TwoSlopeNorm(vcenter=fair, vmin=0, vmax=most) if fair else Normalize(0, most)
    figure, ax = new_figure(3 + 0.48 * experts, 2 + 0.36 * experts) if experts <= CELLS else new_figure(10, 9)
    heat_map(ax, values, colours, norm)
    label_axes(ax, "also picked: expert j", "picked: expert i")
    ticks(ax.xaxis, range(experts), most=16)
    ticks(ax.yaxis, range(experts), most=16)
    marks = {0.0: "0", most: f"{most:.2g}"} | ({fair: f"{fair:.2g} random"} if fair else {})
    label = "N_ij · T / (N_i · N_j)" if lift else "P(j | i) = N_ij / N_i"
    colour_bar(figure, ax, norm, colours, label, fair or None, marks)
    baseline = f"random routing: {fair:.3g}" + ("; independent: 1" if lift else "")
    title(
        ax,
        f"Co-activation{named(name)}: {'lift' if lift else 'how often j is picked where i is'}",
        f"{facts(layer_numbers(layers, count)[layer], experts, K, T)}; {baseline}",
    )
    return figure


# -- from layer to layer -----------------------------------------------------------------------------------------

_WIDTH = 0.12  # of a box, layers being 1 apart
_BEHIND = {"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1}  # a label


def plot_paths(
    indices: Array,
    experts: int,
    layers: Sequence[int] | None = None,
    through: Sequence[int] | None = None,
    least: float = 1.5,
    name: str = "",
) -> Figure:
    """Alluvial: how many tokens go from which expert to which, first choices only.

    indices: int [T, layer, K]; `through`: places along the layer axis, by default first, middle and last; `layers`:
    the numbers of all layers. Experts with less than `least` times the uniform share and those
    beyond the 12 largest of a layer are one box, "other".
    The bar beside the boxes is as high as a uniform share. The table behind it: `rows.flow_rows`.
    Raises ValueError for no token, or for layers that are not there.
    """
    T, count, K = np.shape(indices)
    chosen = some_layers(count) if through is None else tuple(through)
    found = flows(indices, experts, chosen, least)
    named_layers = layer_numbers(layers, count)
    gap = 0.02 * T
    figure, ax = new_figure(2.8 + 2.6 * len(chosen), 6.5)
    places = [_boxes(ax, x, shares, T, experts, gap) for x, shares in enumerate(found.boxes)]
    for x, between in enumerate(found.flows):
        _bands(ax, x, between, places[x], places[x + 1], experts)
    ax.add_patch(Rectangle((-0.32, 0), 0.03, T / experts, color="black"))
    ax.text(-0.27, T / experts / 2, f"uniform\n{1 / experts:.1%}", fontsize=FONT, ha="left", va="center")
    ax.set_xlim(-0.45, len(chosen) - 1 + 0.6)
    ax.set_ylim(-gap, max(max(top for _, top in column.values()) for column in places) + gap)
    ax.set_xticks(range(len(chosen)), labels=[f"layer {named_layers[i]}" for i in chosen], fontsize=FONT + 1)
    ax.set_yticks([])
    ax.spines[["left", "right", "top"]].set_visible(False)
    others = f"other: under {least / experts:.1%} each" + (", or beyond the 12 largest" if found.cut else "")
    title(
        ax,
        f"Paths of first choices{named(name)}: boxes are experts, as high as their share of the tokens",
        f"E = {experts}, K = {K} (the first of them), {tokens_said(T)}; {others}",
    )
    return figure


def _boxes(
    ax: Any, x: float, shares: dict[int | None, int], T: int, experts: int, gap: float
) -> dict[int | None, tuple[float, float]]:
    """The boxes of one layer, from below; returns where each begins and ends."""
    places, at = {}, 0.0
    for expert, tokens in shares.items():
        places[expert] = (at, at + tokens)
        ax.add_patch(
            Rectangle((x - _WIDTH / 2, at), _WIDTH, tokens, facecolor=_colour(expert, experts), edgecolor="black")
        )
        label = f"{'other' if expert is None else f'expert {expert}'}  {tokens / T:.0%}"
        ax.text(x + _WIDTH / 2 + 0.02, at + tokens / 2, label, fontsize=FONT, va="center", bbox=_BEHIND)
        at += tokens + gap
    return places


def _bands(
    ax: Any,
    x: int,
    between: Sequence[Flow],
    left: dict[int | None, tuple[float, float]],
    right: dict[int | None, tuple[float, float]],
    experts: int,
) -> None:
    """A band for each pair of boxes, as thick as its tokens, in the colour of where it comes from."""
    from_at, to_at = {e: start for e, (start, _) in left.items()}, {e: start for e, (start, _) in right.items()}
    for source, target, tokens in between:
        a, b = from_at[source], to_at[target]
        from_at[source] += tokens
        to_at[target] += tokens
        start, end = x + _WIDTH / 2, x + 1 - _WIDTH / 2
        middle = (start + end) / 2
        corners = [(start, a), (middle, a), (middle, b), (end, b)]
        corners += [(end, b + tokens), (middle, b + tokens), (middle, a + tokens), (start, a + tokens), (start, a)]
        codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
        ax.add_patch(
            PathPatch(Path(corners, codes), facecolor=_colour(source, experts), alpha=0.45, edgecolor="white", lw=0.4)
        )


def _colour(expert: int | None, experts: int) -> Any:
    return "#bbbbbb" if expert is None else colormaps["viridis_r"]((expert + 0.5) / experts)
