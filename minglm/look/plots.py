"""Pictures of routing. Plain arrays in, a Matplotlib figure out: `figure.savefig("load.png")`.

Figures are made without pyplot, so nothing global changes and nothing has to be closed. Colour never stands alone:
each map also goes evenly from light to dark, and numbers are printed where they fit. The numbers behind the figures
come from `routing.load_rows` and `routing.pick_rows`.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from minglm.look.routing import load, utilisation
from minglm.look.tables import printable
from minglm.model.ops import Array

# Blue below the fair share, grey at it, red above. Other than in the usual diverging maps, lightness falls all the
# way, so that printed in grey an idle expert (light) does not look like a busy one (dark).
LOAD_COLOURS = LinearSegmentedColormap.from_list("load", ["#eaf4fd", "#a6cbe8", "#a9a9a9", "#c1553b", "#5a0a12"])
_FONT = 9  # points: the smallest text anywhere


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
    numbers = _layer_numbers(layers, len(counts))
    ratios = utilisation(counts)
    with_numbers = max(ratios.shape) <= 16
    size = (3 + 0.5 * experts, 2 + 0.38 * len(counts)) if with_numbers else (12, 2 + 0.14 * len(counts))

    figure, ax = _figure(*size)
    most = max(2.0, float(np.nanmax(ratios, initial=0)))
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=most)
    ax.imshow(ratios, cmap=LOAD_COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    if with_numbers:
        for i, e in np.ndindex(*ratios.shape):
            _write(ax, e, i, f"{ratios[i, e]:.2f}", LOAD_COLOURS(norm(ratios[i, e])))
    _ticks(ax.xaxis, range(experts))
    _ticks(ax.yaxis, numbers)
    ax.set_xlabel("expert", fontsize=_FONT + 1)
    ax.set_ylabel("layer", fontsize=_FONT + 1)
    K, picks = np.shape(indices)[2], int(counts[0].sum())  # K, K · T
    _title(
        ax,
        f"Expert load{_named(name)}: picks relative to uniform",
        f"{_sizes(len(counts), experts, K)}, T = {picks // K} tokens; uniform = {picks / experts:.4g} picks",
    )
    bar = figure.colorbar(ScalarMappable(norm, LOAD_COLOURS), ax=ax, pad=0.02)
    middle = (1 + most) / 2
    bar.set_ticks([0, 0.5, 1, middle, most], labels=["0", "0.5", "1 uniform", f"{middle:.3g}", f"{most:.3g}"])
    bar.set_label("picks ÷ uniform", fontsize=_FONT)
    bar.ax.axhline(1, color="black", linestyle="--", linewidth=1.2)
    return figure


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
    numbers = _layer_numbers(layers, count)
    rows, ranks = min(T, limit), max(1, min(K, 48 // count))
    with_weights = rows * count * ranks <= 400

    figure, ax = _figure(2.5 + 0.42 * count * ranks, 1.8 + (0.42 if with_weights else 0.27) * rows)
    picks = _draw_picks(ax, indices[:rows, :, :ranks], weights[:rows, :, :ranks], experts, with_weights)
    ax.set_xticks([i * ranks + (ranks - 1) / 2 for i in range(count)], labels=[f"{n}" for n in numbers], fontsize=_FONT)
    labels = [f"{t}  {_short(tokens[t])}" for t in range(rows)]
    ax.set_yticks(range(rows), labels=labels, fontsize=_FONT, family="monospace", parse_math=False)
    ax.set_xlabel("layer", fontsize=_FONT + 1)
    _title(
        ax,
        f"Who went where{_named(name)}: expert{' over weight' if with_weights else ' numbers'}, in order of choice",
        f"{_sizes(count, experts, K)}{_cut(ranks, K)}, T = {T} tokens{_cut(rows, T)}",
    )
    _ticks(figure.colorbar(picks, ax=ax, pad=0.02, label="expert").ax.yaxis, range(experts))
    return figure


# Okabe and Ito's palette, which colour-blind readers can tell apart; each subject has a marker of its own besides.
_SUBJECTS = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#555555", "x"), ("#e69f00", "v"))


def plot_roofline(
    points: Sequence[tuple[str, str, float, float]], bandwidth: float, peak: float, name: str = ""
) -> Figure:
    """What was reached of what the machine allows: GFLOP/s over FLOP per byte, both axes logarithmic.

    points: (work, subject, FLOP per byte, GFLOP/s); `bandwidth` in GB/s makes the slanted roof, `peak` in GFLOP/s the
    flat one; `name` of the machine. Raises ValueError without points.
    """
    if not points:
        raise ValueError("nothing to plot: no work was measured")
    figure, ax = _figure(9, 6)
    ax.set_xscale("log")
    ax.set_yscale("log")
    intensities = [point[2] for point in points]
    x = np.geomspace(min(intensities) / 3, max(*intensities, peak / bandwidth) * 3, 200)
    roof = f"reading {bandwidth:.0f} GB/s, products {peak:,.0f} GFLOP/s"
    ax.plot(x, np.minimum(x * bandwidth, peak), color="black", linewidth=1.5, label=roof)
    for i, subject in enumerate(dict.fromkeys(point[1] for point in points)):
        colour, marker = _SUBJECTS[i % len(_SUBJECTS)]
        own = [point for point in points if point[1] == subject]
        ax.plot([p[2] for p in own], [p[3] for p in own], marker, color=colour, label=printable(subject), markersize=7)
    works = _letter_works(ax, points)
    ax.set_xlabel("FLOP per byte that must be read", fontsize=_FONT + 1)
    ax.set_ylabel("GFLOP/s", fontsize=_FONT + 1)
    ax.set_ylim(min(point[3] for point in points) / 3, peak * 4)
    ax.grid(True, which="major", color="#dddddd")
    ax.legend(fontsize=_FONT, loc="lower right")
    _title(ax, f"Roofline{_named(name)}", f"{works} works; the nearer to the line, the less is left to gain")
    return figure


def _letter_works(ax: Any, points: Sequence[tuple[str, str, float, float]]) -> int:
    """A letter beside each point, and what they stand for in the corner above the roof. Returns how many works."""
    letters = {work: chr(ord("A") + i) for i, work in enumerate(dict.fromkeys(point[0] for point in points))}
    for work, _, x, y in points:
        ax.annotate(letters[work], (x, y), (7, 0), textcoords="offset points", fontsize=_FONT, va="center")
    key = "\n".join(f"{letter}  {printable(work)}" for work, letter in letters.items())
    ax.text(0.015, 0.98, key, transform=ax.transAxes, fontsize=_FONT, va="top")
    return len(letters)


# -- the parts ---------------------------------------------------------------------------------------------------


def _draw_picks(ax: Any, indices: Array, weights: Array, experts: int, with_weights: bool) -> ScalarMappable:
    """A cell for each token (down) and each layer and rank (across), a line between layers; [T, layer, rank] ×2."""
    rows, count, ranks = indices.shape
    who, loud = indices.reshape(rows, -1), weights.reshape(rows, -1)  # -> [T, layer · rank]
    colours = colormaps["viridis_r"].resampled(experts)
    picks = ScalarMappable(Normalize(-0.5, experts - 0.5), colours)
    ax.imshow(picks.to_rgba(who), aspect="auto", interpolation="nearest")
    for t, column in np.ndindex(*who.shape):
        text = f"{who[t, column]}" + (f"\n{loud[t, column]:.2f}" if with_weights else "")
        _write(ax, column, t, text, picks.to_rgba(who[t, column]))
    for edge in range(count + 1):
        ax.axvline(edge * ranks - 0.5, color="white", linewidth=4)
    return picks


class Picture(Figure):
    """A figure that a notebook shows by itself, without a backend, and small enough to be kept in the repository."""

    def _repr_png_(self) -> bytes:
        from PIL import Image

        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, dpi=80)
        Image.open(drawn).convert("RGB").quantize(64).save(small, "png", optimize=True)
        return small.getvalue()


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of so many inches, within what a page and a screen can show."""
    figure = Picture(figsize=(min(max(width, 6.5), 24), min(max(height, 2.6), 20)), layout="constrained")
    return figure, figure.add_subplot()


def _layer_numbers(layers: Sequence[int] | None, count: int) -> Sequence[int]:
    if layers is not None and len(layers) != count:
        raise ValueError(f"layers names {len(layers)} layers, indices hold {count}")
    return range(count) if layers is None else layers


def _ticks(axis: Any, numbers: Sequence[int]) -> None:
    """About thirty labels at most, the first one among them."""
    step = -(-len(numbers) // 32)
    axis.set_ticks(range(0, len(numbers), step), labels=[f"{n}" for n in numbers[::step]], fontsize=_FONT)


def _write(ax: Any, x: float, y: float, text: str, background: Any) -> None:
    """Black on light, white on dark (luminance by ITU-R BT.709)."""
    red, green, blue = background[:3]
    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
    ax.text(x, y, text, ha="center", va="center", fontsize=_FONT, color="white" if dark else "black")


def _title(ax: Any, headline: str, facts: str) -> None:
    ax.set_title(f"{headline}\n{facts}", fontsize=_FONT + 1, loc="left", parse_math=False)


def _sizes(layers: int, experts: int, K: int) -> str:
    return f"{layers} layer{'s' if layers != 1 else ''}, E = {experts}, k = {K}"


def _cut(shown: int, all_of_them: int) -> str:
    return f" (the first {shown} shown)" if shown < all_of_them else ""


def _named(name: str) -> str:
    return f", {printable(name)}" if name else ""


def _short(text: str, most: int = 14) -> str:
    """A token as a label: visible spaces, escapes for control characters, cut when long."""
    label = printable(text).replace(" ", "␣")
    return label if len(label) <= most else label[: most - 1] + "…"
