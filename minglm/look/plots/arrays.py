"""Any array as a picture, and attention."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from minglm.look.plots.figure import (
    FONT,
    LOAD_COLOURS,
    SHARE_COLOURS,
    colour_bar,
    figure_title,
    heat_map,
    label_axes,
    named,
    new_figure,
    short,
    ticks,
    title,
    write,
)
from minglm.model.ops import Array

NUMBERS = (12, 16)  # rows and columns up to which values are printed
LARGEST = (256, 512)  # rows and columns of a picture; of more, every n-th is shown


def plot_array(
    array: Array,
    axes: str = "T D",
    name: str = "",
    index: int | tuple[int, ...] = 0,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Figure:
    """An array as a heat map: the last axis across, the one before down; `axes` names all of them.

    Of an array with more axes, `index` chooses along the first ones: an int for all of them, or one for each. `rows`
    and `columns` label the two. Values of both signs get a scale around 0; up to 12 × 16 they are printed. Cells
    without a number (NaN, ±∞) are hatched. Of a large array one row or column of n is shown, as the title says.
    Raises ValueError for an array without axes or entries, for axes that do not fit, and for an index outside.
    """
    values, letters, at = _plane(np.asarray(array), axes.split(), index)
    steps = tuple(-(-size // most) for size, most in zip(values.shape, LARGEST, strict=True))
    shown = values[:: steps[0], :: steps[1]].astype(np.float64)
    known = shown[np.isfinite(shown)]
    colours, norm, marks, middle = _scale(known)
    printed = shown.shape[0] <= NUMBERS[0] and shown.shape[1] <= NUMBERS[1]
    wide = 0.62 * shown.shape[1] + 3 if printed else min(2.5 + max(0.03 * shown.shape[1], 5), 14)
    high = 0.34 * shown.shape[0] + 1.8 if printed else min(1.8 + max(0.03 * shown.shape[0], 2.5), 12)
    figure, ax = new_figure(wide, high)
    heat_map(ax, shown, colours, norm, numbers=False)
    if printed:
        _print_values(ax, shown, np.issubdtype(np.asarray(array).dtype, np.floating), colours, norm)
    for axis, labels, size, step in ((ax.yaxis, rows, 0, steps[0]), (ax.xaxis, columns, 1, steps[1])):
        texts = range(0, values.shape[size], step) if labels is None else [short(str(t)) for t in labels[::step]]
        turned = {"rotation": 90} if labels is not None and size == 1 else {}
        ticks(axis, texts, 32 if labels is not None or size == 0 else 16, parse_math=False, **turned)
    label_axes(ax, letters[1], letters[0])
    colour_bar(figure, ax, norm, colours, "value", middle, marks)
    spread = (
        f"mean {known.mean():.4g}, sd {known.std():.4g}, {known.min():.4g} … {known.max():.4g}" if known.size else ""
    )
    without = f", {shown.size - known.size:,} cells without a number hatched" if known.size < shown.size else ""
    title(
        ax,
        f"{_headline(name)}{at}",
        f"{_shape(np.shape(array), axes.split())}{_thinned(letters, steps)}\n{spread}{without}",
    )
    return figure


def _plane(array: Array, letters: list[str], index: int | tuple[int, ...]) -> tuple[Array, list[str], str]:
    """The two axes to show, their names, and what the title says of the others."""
    if not array.ndim or not array.size:
        raise ValueError(f"nothing to plot: an array of shape {list(array.shape)}")
    if len(letters) != array.ndim:
        letters = letters[len(letters) - array.ndim :] if len(letters) > array.ndim else letters
    if len(letters) != array.ndim:
        raise ValueError(f"axes names {len(letters)} axes ({' '.join(letters)}), the array has {array.ndim}")
    extra = array.ndim - 2
    if extra < 0:
        return array[None], ["", letters[0]], ""
    places = (index,) * extra if isinstance(index, int) else tuple(index)
    if len(places) != extra or any(not 0 <= i < size for i, size in zip(places, array.shape, strict=False)):
        raise ValueError(f"index = {index} does not choose along the first {extra} axes of {list(array.shape)}")
    said = "".join(f", {letter} = {i}" for letter, i in zip(letters, places, strict=False))
    return array[places] if places else array, letters[-2:], said


def _scale(known: Array) -> tuple[Any, Normalize, dict[float, str], float | None]:
    """Around 0 for values of both signs, else from the least to the most; the reference, if it is inside."""
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if low < 0 < high:
        most = max(-low, high)
        marks = {-most: f"{-most:.3g}", 0.0: "0", most: f"{most:.3g}"}
        return LOAD_COLOURS, TwoSlopeNorm(vcenter=0, vmin=-most, vmax=most), marks, 0.0
    high = high if high > low else low + 1
    return SHARE_COLOURS, Normalize(low, high), {low: f"{low:.3g}", high: f"{high:.3g}"}, None


def _print_values(ax: Any, values: Array, fractions: bool, colours: Any, norm: Normalize) -> None:
    most = np.max(np.abs(values), where=np.isfinite(values), initial=0)
    form = "{:.2f}" if 0.1 <= most < 100 and fractions else "{:.3g}"
    for i, j in np.ndindex(*values.shape):
        if np.isfinite(values[i, j]):
            write(ax, j, i, form.format(values[i, j]), colours(norm(values[i, j])))


def _headline(name: str) -> str:
    return named(name).removeprefix(", ") or "An array"


def _shape(shape: tuple[int, ...], letters: list[str]) -> str:
    letters = letters[len(letters) - len(shape) :]
    return f"[{', '.join(f'{letter} = {size:,}' for letter, size in zip(letters, shape, strict=True))}]"


def _thinned(letters: list[str], steps: tuple[int, ...]) -> str:
    return "".join(
        f"; 1 of {step} along {letter} shown" for letter, step in zip(letters, steps, strict=True) if step > 1
    )


# -- attention ---------------------------------------------------------------------------------------------------


def plot_attention(
    probs: Array,
    tokens: Sequence[str],
    heads: Sequence[int] | None = None,
    kv_heads: int | None = None,
    layer: int | None = None,
    name: str = "",
) -> Figure:
    """Attention probabilities, a panel for each query head; heads of the same key/value head stand in one row.

    probs: [H, T, S], each row sums to 1; tokens: S texts, of which the last T ask; `heads`: which ones to show, by
    default the first 24; `kv_heads`: G, with H/G query heads each, by default all in rows of six. One scale, 0 … 1.
    The table behind it is `probs`. Raises ValueError for shapes or heads that do not fit.
    """
    probs = np.asarray(probs)
    if probs.ndim != 3 or len(tokens) != probs.shape[2] or probs.shape[1] > probs.shape[2] or not probs.size:
        raise ValueError(f"probs must be [H, T, S] with S tokens, T ≤ S; got {list(probs.shape)}, {len(tokens)} tokens")
    H, T, S = probs.shape
    if kv_heads is not None and (kv_heads < 1 or H % kv_heads):
        raise ValueError(f"kv_heads = {kv_heads} must divide the {H} query heads")
    chosen = list(range(min(H, 24))) if heads is None else list(heads)
    if not chosen or min(chosen) < 0 or max(chosen) >= H:
        raise ValueError(f"heads = {chosen}: wanted some of 0 … {H - 1}")
    grid = _rows_of_heads(chosen, None if kv_heads is None else H // kv_heads)
    most = max(map(len, grid))
    side = 1.1 + 0.17 * S if S <= 24 else 2.4
    figure, axes = new_figure(1.5 + side * most, 1.4 + side * len(grid), len(grid), most)
    norm = Normalize(0, 1)
    texts = [short(token, 8) for token in tokens]
    for (row, column), ax in np.ndenumerate(axes):
        if column >= len(grid[row]):
            ax.set_visible(False)
            continue
        head = grid[row][column]
        group = "" if kv_heads is None else f", kv {head // (H // kv_heads)}"
        ax.imshow(probs[head], cmap=SHARE_COLOURS, norm=norm, aspect="equal", interpolation="nearest")
        ax.set_title(f"head {head}{group}", fontsize=FONT)
        _token_ticks(ax, texts, texts[S - T :], row == len(grid) - 1, column == 0)
    colour_bar(figure, axes[:, -1].tolist(), norm, SHARE_COLOURS, "probability", None, {0.0: "0", 0.5: "0.5", 1.0: "1"})
    of = "" if kv_heads is None else f", G = {kv_heads} key/value heads"
    where = "" if layer is None else f"layer {layer}, "
    few = f" ({len(chosen)} shown)" if len(chosen) < H else ""
    figure_title(
        figure,
        f"Attention{named(name)}: who (down) looks at whom (across)",
        f"{where}H = {H} query heads{few}{of}, T = {T:,}, S = {S:,} tokens",
    )
    return figure


def _rows_of_heads(chosen: list[int], per_group: int | None) -> list[list[int]]:
    """A row for each key/value head, or six heads in each."""
    if per_group is None:
        return [chosen[i : i + 6] for i in range(0, len(chosen), 6)]
    groups = dict.fromkeys(head // per_group for head in chosen)
    return [[head for head in chosen if head // per_group == group] for group in groups]


def _token_ticks(ax: Any, keys: Sequence[str], queries: Sequence[str], last: bool, first: bool) -> None:
    """Texts where there is room, else numbers; only at the margins of the figure."""
    room = len(keys) <= 24
    style: dict[str, Any] = {"family": "monospace", "parse_math": False} if room else {}
    ticks(ax.xaxis, keys if room else range(len(keys)), 24 if room else 6, rotation=90 if room else 0, **style)
    start = len(keys) - len(queries)
    ticks(ax.yaxis, queries if room else range(start, len(keys)), 24 if room else 6, **style)
    if not last:
        ax.set_xticklabels([])
    if not first:
        ax.set_yticklabels([])
