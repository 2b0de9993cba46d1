"""What all plots share: size, type, titles, ticks, colours that fall evenly from light to dark."""

import io
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from minglm.look.tables import printable
from minglm.model.ops import Array

FONT = 9  # points: the smallest text anywhere

# Blue below the reference, grey at it, red above. Other than in the usual diverging maps, lightness falls all the way,
# so that printed in grey an idle expert (light) does not look like a busy one (dark).
LOAD_COLOURS = LinearSegmentedColormap.from_list("load", ["#eaf4fd", "#a6cbe8", "#a9a9a9", "#c1553b", "#5a0a12"])
SHARE_COLOURS = LinearSegmentedColormap.from_list("share", ["#ffffff", "#9ecae1", "#2171b5", "#04152e"])  # from nothing

# Okabe and Ito's palette, which colour-blind readers can tell apart; each subject has a marker, a line and a hatch of
# its own besides.
SUBJECTS = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#555555", "x"), ("#e69f00", "v"))
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
BLUE, RED = SUBJECTS[0][0], SUBJECTS[1][0]
UNIFORM: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}
CONTROL: dict[str, Any] = {"color": "black", "fmt": "_", "markersize": 7, "markeredgewidth": 1.6, "elinewidth": 1}

CELLS = 16  # rows or columns up to which numbers are printed


class Picture(Figure):
    """A figure that a notebook shows by itself, without a backend, and small enough to be kept in the repository."""

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        """The image, and its titles as the text that stands for it (Jupyter: metadata `alt`)."""
        from PIL import Image

        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, dpi=80)
        Image.open(drawn).convert("RGB").quantize(64).save(small, "png", optimize=True)
        titles = [self.get_suptitle(), *(ax.get_title(loc) for ax in self.axes for loc in ("left", "center"))]
        return small.getvalue(), {"alt": "; ".join(title.replace("\n", "; ") for title in titles if title)}


def new_figure(
    width: float, height: float, rows: int | None = None, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure of so many inches, within what a page and a screen can show, and its panel or [rows, columns]."""
    figure = Picture(figsize=(min(max(width, 6.5), 24), min(max(height, 2.6), 20)), layout="constrained")
    if rows is None:
        return figure, figure.add_subplot()
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def layer_styles(count: int) -> list[dict[str, Any]]:
    """Colour, marker and dash for a line of each of so many layers, dark to light."""
    colours = colormaps["viridis"](np.linspace(0, 0.75, count))
    return [
        {
            "color": colour,
            "marker": SUBJECTS[i % len(SUBJECTS)][1],
            "linestyle": DASHES[i % len(DASHES)],
            "markersize": 6,
        }
        for i, colour in enumerate(colours)
    ]


def layer_numbers(layers: Sequence[int] | None, count: int) -> Sequence[int]:
    if layers is not None and len(layers) != count:
        raise ValueError(f"layers names {len(layers)} layers, indices hold {count}")
    return range(count) if layers is None else layers


def ticks(axis: Any, labels: Sequence[Any], most: int = 32, **style: Any) -> None:
    """About thirty labels at most, the first one among them."""
    step = max(-(-len(labels) // most), 1)
    shown = [f"{label}" for label in labels[::step]]
    axis.set_ticks(range(0, len(labels), step), labels=shown, fontsize=FONT, **style)


def label_axes(ax: Any, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=FONT + 1)
    ax.set_ylabel(y, fontsize=FONT + 1)
    ax.tick_params(labelsize=FONT)


def write(ax: Any, x: float, y: float, text: str, background: Any) -> None:
    """Black on light, white on dark (luminance by ITU-R BT.709)."""
    red, green, blue = background[:3]
    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
    ax.text(x, y, text, ha="center", va="center", fontsize=FONT, color="white" if dark else "black", parse_math=False)


def heat_map(ax: Any, values: Array, colours: Any, norm: Normalize, form: str = "{:.2f}", numbers: bool = True) -> bool:
    """[row, column] as cells, hatched where there is no number. Up to 16 × 16 the numbers are printed; says if so."""
    ax.patch.set(facecolor="white", hatch="////", edgecolor="#bbbbbb")
    ax.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    printed = numbers and max(values.shape) <= CELLS
    if printed:
        for i, j in np.ndindex(*values.shape):
            if np.isfinite(values[i, j]):
                write(ax, j, i, form.format(values[i, j]), colours(norm(values[i, j])))
    return printed


def colour_bar(
    figure: Figure, ax: Any, norm: Normalize, colours: Any, label: str, marked: float | None, ticks: dict[float, str]
) -> None:
    """The scale of a heat map, with a dashed line at the reference if there is one."""
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=ax, pad=0.02)
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.set_label(label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    if marked is not None:
        bar.ax.axhline(marked, **UNIFORM)


def title(ax: Any, headline: str, facts: str) -> None:
    ax.set_title(f"{headline}\n{facts}", fontsize=FONT + 1, loc="left", parse_math=False)


def figure_title(figure: Figure, headline: str, facts: str) -> None:
    text = figure.suptitle(f"{headline}\n{facts}", fontsize=FONT + 1, x=0.01, ha="left")
    text.set_parse_math(False)


def legend(ax: Any, **options: Any) -> None:
    for text in ax.legend(fontsize=FONT, **options).get_texts():
        text.set_parse_math(False)


def unhidden(text: str) -> str:
    """A label: Matplotlib leaves those that begin with an underscore out of a legend."""
    return f" {text}" if text.startswith("_") else text


def sizes(layers: int, experts: int, K: int) -> str:
    return f"{layers} layer{'s' if layers != 1 else ''}, E = {experts}, K = {K}"


def facts(number: int, experts: int, K: int, T: int) -> str:
    """What every plot of one layer says."""
    return f"layer {number}, E = {experts}, K = {K}, {tokens_said(T)}"


def tokens_said(T: int) -> str:
    return f"T = {T:,} token{'s' if T != 1 else ''}"


def cut(shown: int, all_of_them: int) -> str:
    return f" (the first {shown} shown)" if shown < all_of_them else ""


def named(name: str) -> str:
    return f", {printable(name)}" if name else ""


def short(text: str, most: int = 14) -> str:
    """A token as a label: spaces at its ends are made visible, escapes stand for what cannot be printed or is not in
    the font; cut when long."""
    known = _characters()
    inner = text.strip(" ")
    at = text.index(inner)
    text = "␣" * at + inner + "␣" * (len(text) - at - len(inner))
    label = "".join(c if ord(c) in known else f"\\u{ord(c):04x}" for c in printable(text))
    return label if len(label) <= most else label[: most - 1] + "…"


@cache
def _characters() -> frozenset[int]:
    """What the font of tokens can draw; it has no Chinese, for one."""
    return frozenset(get_font(findfont(FontProperties(family="monospace"))).get_charmap())


def some(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly spread, first and last among them."""
    return list(range(count)) if count <= most else sorted({round(i) for i in np.linspace(0, count - 1, most)})
