"""Whether experts specialise: by domain, by token, and in what their loss would cost; each beside its control."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minglm.look.plots.figure import (
    BLUE,
    CELLS,
    CONTROL,
    FONT,
    LOAD_COLOURS,
    UNIFORM,
    colour_bar,
    facts,
    figure_title,
    heat_map,
    layer_numbers,
    named,
    new_figure,
    short,
    ticks,
    title,
    tokens_said,
    write,
)
from minglm.look.routing import load
from minglm.look.specialisation import (
    VocabularyRow,
    domain_control,
    domain_shares,
    numbered,
    one_layer,
    some_layers,
    vocabulary_rows,
    vocabulary_specialisation,
)
from minglm.model.ops import Array


def plot_domains(
    indices: Array,
    domains: Any,
    experts: int,
    layer: int | None = None,
    tokens: Any = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    name: str = "",
) -> Figure:
    """Which share of a domain's tokens went to each expert: a row of bars for each domain, a column for each layer.

    indices: int [T, layer, K]; domains: T names or numbers; `layer`: one place along the layer axis, by default first,
    middle and last. The dashed line is K/E. The short black lines, with two standard deviations, are the same picture
    of shuffled choices; with `tokens`, T texts or ids, they move among the occurrences of the same token only: what
    is left then comes from which words a domain has. Up to eight domains, the first ones. The table behind it:
    `rows.domain_rows`. Raises ValueError as `domain_shares` does, and without tokens.
    """
    T, count, K = np.shape(indices)
    if not T or not count:
        raise ValueError(f"nothing to plot: indices are {list(np.shape(indices))}")
    places = some_layers(count) if layer is None else (layer,)
    chosen = np.stack([one_layer(indices, experts, i) for i in places], axis=1)
    names, shares = domain_shares(chosen, domains, experts)
    control = domain_control(chosen, domains, experts, tokens, seed)
    counts = np.bincount(numbered(domains, T, "domains")[1])
    numbers, rows = layer_numbers(layers, count), min(len(names), 8)
    width = min(0.9 + max(0.2 * experts, 2.5), 7.0) * len(places)
    figure, axes = new_figure(1 + width, 1.6 + 1.5 * rows, rows, len(places), sharex=True, sharey=True)
    for (d, i), ax in np.ndenumerate(axes):
        _bars_with_control(ax, 100 * shares[d, i], 100 * control.mean[d, i], 200 * control.sd[d, i], 100 * K / experts)
        if i == 0:
            ax.set_ylabel(f"{short(names[d], 18)}\nn = {counts[d]:,}", fontsize=FONT, parse_math=False)
        if d == 0:
            ax.set_title(f"layer {numbers[places[i]]}", fontsize=FONT + 1)
        if d == rows - 1:
            ax.set_xlabel("expert", fontsize=FONT + 1)
    how = "short lines" if experts <= 64 else "band"
    within = "shuffled among equal tokens" if tokens is not None else "shuffled"
    few = f" ({rows} shown)" if rows < len(names) else ""
    axes[0, 0].set_ylim(0, 108 * max(shares[:rows].max(), (control.mean + 2 * control.sd)[:rows].max(), K / experts))
    figure_title(
        figure,
        f"Experts by domain{named(name)}: % of the domain's tokens that went to each expert",
        f"{_of(places, count)}, E = {experts}, K = {K}, {tokens_said(T)}, {len(names)} domains{few}\n"
        f"dashed: uniform, K/E = {K / experts:.1%}; {how}: {within}, ± 2 standard deviations",
    )
    return figure


def _of(places: Sequence[int], count: int) -> str:
    return f"{len(places)} of {count} layers" if len(places) < count else f"{count} layer{'s' if count > 1 else ''}"


def _bars_with_control(ax: Any, shares: Array, control: Array, reach: Array, uniform: float) -> None:
    E = len(shares)
    ax.bar(range(E), shares, color="#8cbfe0", edgecolor=BLUE, linewidth=0.8 if E <= 64 else 0)
    ax.axhline(uniform, **UNIFORM)
    if E <= 64:
        ax.errorbar(range(E), control, yerr=reach, **CONTROL)
    else:  # no room for so many
        ax.fill_between(range(E), control - reach, control + reach, step="mid", color="black", alpha=0.4, linewidth=0)
    ticks(ax.xaxis, range(E), most=8)
    ax.tick_params(labelsize=FONT)
    ax.set_xlim(-0.7, E - 0.3)


def plot_vocabulary(
    indices: Array,
    tokens: Sequence[Any],
    experts: int,
    layer: int = 0,
    min_count: int = 10,
    most: int = 7,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    name: str = "",
) -> Figure:
    """A picture like a table: for each expert the tokens that have it as their first choice most purely, with the
    share of their occurrences and how many those are. The darker, the purer.

    indices: int [T, layer, K]; tokens: T texts or ids; `layer` counts along the layer axis. Tokens that occur less than
    `min_count` times are left out; at most 24 experts, those with most tokens. The control stands in the title. The
    table behind it: `specialisation.vocabulary_rows`. Raises ValueError as that does, and if no token is frequent.
    """
    rows = vocabulary_rows(indices, tokens, experts, layer, min_count)
    if not rows:
        raise ValueError(f"nothing to plot: no token occurs {min_count} times; give more text, or a smaller min_count")
    chosen = one_layer(indices, experts, layer)
    T, K = chosen.shape
    whole = vocabulary_specialisation(chosen[:, None], tokens, experts, min_count, seed)
    first = load(chosen[:, None, :1], experts)[0]
    of_expert = {e: [row for row in rows if row.expert == e] for e in range(experts)}
    fullest = range(experts) if experts <= 24 else sorted(sorted(of_expert, key=lambda e: -len(of_expert[e]))[:24])
    fullest = [e for e in fullest if experts <= 24 or of_expert[e]]

    figure, ax = new_figure(2.2 + 1.35 * most, 1.5 + 0.5 * len(fullest))
    for y, e in enumerate(fullest):
        _vocabulary_line(ax, y, of_expert[e], most)
    labels = [f"expert {e}\n{first[e] / T:.1%}" for e in fullest]
    ax.set_yticks(range(len(fullest)), labels=labels, fontsize=FONT)
    ax.set_xlim(-0.5, most - 0.5)
    ax.set_ylim(len(fullest) - 0.5, -0.5)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    few = f"; {len(fullest)} experts shown" if len(fullest) < experts else ""
    title(
        ax,
        f"Tokens by their first choice{named(name)}: % of a token's n occurrences; left, the expert's share",
        f"{facts(layer_numbers(layers, np.shape(indices)[1])[layer], experts, K, T)}; {whole.tokens} tokens occur "
        f"{min_count} times or more{few}\nmean of the largest share {whole.share[0]:.0%}; "
        f"shuffled {whole.control[0]:.0%} ± {2 * whole.control_sd[0]:.1%}; an expert's uniform share {1 / experts:.1%}",
    )
    return figure


def _vocabulary_line(ax: Any, y: int, rows: Sequence[VocabularyRow], most: int) -> None:
    for x, row in enumerate(rows[:most]):
        shade = colormaps["Blues"](0.5 * row.share)
        ax.add_patch(_cell(x, y, shade))
        ax.text(x, y - 0.2, short(row.token, 12), **_CELL_TEXT, family="monospace", fontweight="bold")
        ax.text(x, y + 0.2, f"{row.share:.0%} of {row.n:,}", **_CELL_TEXT)
    if not rows:
        ax.text(-0.48, y, "no frequent token", fontsize=FONT, va="center", ha="left", color="#555555")
    if len(rows) > most:
        ax.text(most - 0.5, y, f" +{len(rows) - most}", fontsize=FONT, va="center", ha="left")


_CELL_TEXT: dict[str, Any] = {
    "ha": "center",
    "va": "center",
    "fontsize": FONT,
    "color": "black",
    "parse_math": False,
    "clip_on": True,
}


def _cell(x: float, y: float, shade: Any) -> Any:
    return Rectangle((x - 0.48, y - 0.45), 0.96, 0.9, facecolor=shade, edgecolor="#555555", linewidth=0.6)


def plot_removal(
    costs: Array,
    names: Sequence[str] | None = None,
    loads: Array | None = None,
    layer: int | None = None,
    errors: Array | None = None,
    K: int | None = None,
    T: int | None = None,
    name: str = "",
) -> Figure:
    """What it costs to remove an expert, in bits per token, by domain; beside it the expert's load.

    costs: [E, domain], above 0 where the text is predicted worse without the expert; names of the domains; loads: [E],
    or [E, domain], shares of all slots, whose uniform 1/E is dashed; errors: [E, domain] standard errors: costs less
    than two of them from 0 stand in brackets. `layer`, `K` and `T` go into the title. The table behind it:
    `rows.removed_rows`. Raises ValueError for shapes that do not fit.
    """
    costs = np.asarray(costs, float)
    E, D = costs.shape if costs.ndim == 2 else (0, 0)
    names = [str(d) for d in range(D)] if names is None else names
    load_shape, error_shape = (() if a is None else np.shape(a) for a in (loads, errors))
    fits = len(names) == D and load_shape[:1] in ((), (E,)) and error_shape in ((), costs.shape)
    if not E or not D or not fits:
        raise ValueError(
            f"costs must be [E, domain], with a name for each domain, a load for each expert and errors alike; got "
            f"{list(costs.shape)}, {len(names)} names, loads {list(load_shape)}, errors {list(error_shape)}"
        )
    figure, map_ax, load_ax = _two_panels(4 + 1.1 * D, 2.2 + 0.28 * min(E, 60), loads is not None)
    _costs(figure, map_ax, costs, errors)
    ticks(map_ax.xaxis, [short(each, 16) for each in names], rotation=30 if D > 3 else 0, parse_math=False)
    map_ax.set_xlabel("domain", fontsize=FONT + 1)
    ticks((load_ax or map_ax).yaxis, range(E))
    (load_ax or map_ax).set_ylabel("expert removed", fontsize=FONT + 1)
    if load_ax is not None:
        _loads(load_ax, np.asarray(loads, float).reshape(E, -1).mean(axis=1))
    known = {"layer ": layer, "E = ": E, "K = ": K, "T = ": T}
    said = ", ".join(f"{what}{value:,}" for what, value in known.items() if value is not None)
    brackets = "" if errors is None else "; in brackets: less than two standard errors from 0"
    figure_title(figure, f"What removing an expert costs{named(name)}: bits per token more", f"{said}{brackets}")
    return figure


def _two_panels(width: float, height: float, with_loads: bool) -> tuple[Figure, Any, Any]:
    """The map, and a panel to its left for the loads if wanted."""
    if not with_loads:
        figure, ax = new_figure(width, height)
        return figure, ax, None
    figure, axes = new_figure(width + 2, height, 1, 2, width_ratios=[1, 2], sharey=True)
    return figure, axes[0, 1], axes[0, 0]


def _costs(figure: Figure, ax: Any, costs: Array, errors: Array | None) -> None:
    most = max(float(np.nanmax(np.abs(costs), initial=0)), 1e-9)
    norm = TwoSlopeNorm(vcenter=0, vmin=-most, vmax=most)
    heat_map(ax, costs, LOAD_COLOURS, norm, numbers=False)
    if len(costs) <= 40 and costs.shape[1] <= CELLS:
        unsure = np.zeros(costs.shape, bool) if errors is None else np.abs(costs) < 2 * np.asarray(errors)
        for e, d in np.ndindex(*costs.shape):
            text = f"{costs[e, d]:+.3f}" if costs[e, d] else "0"  # nobody picked it
            text = f"({text})" if unsure[e, d] else text
            write(ax, d, e, text, LOAD_COLOURS(norm(costs[e, d])))
    marks = {-most: f"−{most:.2g}", 0.0: "0 no cost", most: f"{most:.2g}"}
    colour_bar(figure, ax, norm, LOAD_COLOURS, "bits per token", 0, marks)


def _loads(ax: Any, loads: Array) -> None:
    E = len(loads)
    ax.barh(range(E), 100 * loads, color="#8cbfe0", edgecolor=BLUE, linewidth=0.8 if E <= 64 else 0)
    ax.axvline(100 / E, **UNIFORM)
    ax.set_xlabel(f"load, % of the picks\n(dashed: uniform, {1 / E:.1%})", fontsize=FONT + 1)
    ax.tick_params(labelsize=FONT)
