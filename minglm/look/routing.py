"""Who went where: the routing of a prompt as plain arrays, and measures of load and confidence.

Everything takes arrays, so traces of other models can be measured too: `indices` and `weights` [T, layer, K], scores
[T, layer, E]. T counts tokens without padding; a mask `valid` [T] leaves padding out where it is still in.

With c_e the number of picks that expert e got from T tokens, Σ_e c_e = K·T, and the fair share is c̄ = K·T/E.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.look.tables import html_table, table
from minglm.model.ops import Array

# -- the table ---------------------------------------------------------------------------------------------------


class RoutingTable(NamedTuple):
    """Every choice of every router for T tokens: the rows of a batch one after another, padding left out."""

    indices: Array  # int [T, layer, K], in the order of their biased scores
    weights: Array  # [T, layer, K] normalised and scaled: what the experts' outputs are multiplied by
    scores: Array  # [T, layer, E] sigmoid of the logits
    biased_scores: Array  # [T, layer, E] with the selection bias; −∞ in groups that were closed
    layers: tuple[int, ...]  # layer numbers, one for each entry of the layer axis
    experts: int  # E

    @property
    def margins(self) -> Array:  # -> [T, layer]
        """K-th minus (K+1)-th biased score: how near each choice was to falling otherwise.

        Infinite where no further expert was open: K = E, or the groups left open hold just K. The choice of the
        groups comes before and is not in here; nor is a choice that a tap forced.
        """
        K = self.indices.shape[2]
        if K == self.experts:
            return np.full(self.indices.shape[:2], np.inf, self.biased_scores.dtype)
        ranked = -np.sort(-self.biased_scores, axis=-1)
        return ranked[..., K - 1] - ranked[..., K]

    def to_csv(self, path: str | Path | None = None, tokens: Sequence[str] | None = None) -> str:
        """One line per token, layer and rank (see `PickRow`) as CSV text, also written to `path` if there is one."""
        return to_csv(pick_rows(self.indices, self.weights, self.layers, tokens), PickRow, path)

    def _title(self) -> str:
        T, layers, K = self.indices.shape
        numbers = ", ".join(map(str, self.layers))
        return f"Routing: T = {T} tokens, K = {K} of E = {self.experts} experts, {layers} layers ({numbers})"

    def __repr__(self) -> str:
        return f"{self._title()}\n{table(summary(self), SummaryRow._fields)}"

    def _repr_html_(self) -> str:
        return html_table(summary(self), SummaryRow._fields, self._title())


def from_taps(arrays: Mapping[str, Array], valid: Array | None = None) -> RoutingTable:
    """The routing of all decoder layers among `arrays`, tap name -> array, as a trace or your own tap collects them.

    `valid`: bool, one entry per token (any shape with N entries), False for padding. Raises ValueError if no layer
    has all four of its routing taps.
    """
    found = {}
    for name in arrays:
        if m := re.fullmatch(r"(layers\.(\d+)\.mlp\.)expert_indices", name):
            parts = [m[1] + tap for tap in ("expert_indices", "expert_weights", "router_scores", "biased_scores")]
            if all(part in arrays for part in parts):
                found[int(m[2])] = [arrays[part] for part in parts]
    if not found:
        raise ValueError(
            "no routing here: wanted the taps layers.*.mlp.expert_indices, .expert_weights, .router_scores and "
            ".biased_scores of at least one layer (dense layers have no router)"
        )
    layers = sorted(found)
    stacked = [np.stack([found[i][part] for i in layers], axis=1) for part in range(4)]
    if valid is not None:
        stacked = [part[_mask(valid, len(part))] for part in stacked]
    indices, weights, scores, biased = stacked
    return RoutingTable(indices, weights, scores, biased, tuple(layers), scores.shape[-1])


# -- load --------------------------------------------------------------------------------------------------------


def load(indices: Array, experts: int, valid: Array | None = None) -> Array:  # [T, layer, K] -> int [layer, E]
    """Picks per expert, c_e = Σ_t 1[e among the K experts of t]. Each layer's row sums to K·T.

    Raises ValueError for indices of another rank or kind or outside 0 … E − 1, and for a mask that is not [T].
    """
    indices = np.asarray(indices)
    if indices.ndim != 3 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"indices must be whole numbers [T, layer, K], got {indices.dtype} of shape {list(indices.shape)}; "
            "add a layer axis with indices[:, None] if there is just one layer"
        )
    outside = indices[(indices < 0) | (indices >= experts)]
    if outside.size:
        raise ValueError(f"expert {outside[0]} is outside 0 … E − 1 = {experts - 1}; is `experts` right?")
    if valid is not None:
        indices = indices[_mask(valid, len(indices))]
    layers = indices.shape[1]
    offsets = np.arange(layers)[:, None] * experts  # each layer counts in its own stretch of bins
    return np.bincount((indices + offsets).reshape(-1), minlength=layers * experts).reshape(layers, experts)


def utilisation(counts: Array) -> Array:  # [.., E] -> [.., E]
    """Load relative to the fair share, c_e / c̄: 1 is uniform, E/K the most there can be. NaN if nothing was picked."""
    counts = np.asarray(counts, np.float64)
    with np.errstate(invalid="ignore"):
        return counts / counts.mean(axis=-1, keepdims=True)


def max_violation(counts: Array) -> Array:  # [.., E] -> [..]
    """MaxVio = (max_e c_e − c̄) / c̄: 0 when balanced, at most E/K − 1 (arXiv 2408.15664, equation 4).

    Not the largest |c_e − c̄|: a dead expert alone does not raise it. Over one batch it is MaxVio_batch, over a whole
    held-out set MaxVio_global; the two are not comparable.
    """
    return utilisation(counts).max(axis=-1) - 1


def min_violation(counts: Array) -> Array:  # [.., E] -> [..]
    """MinVio = (min_e c_e − c̄) / c̄: 0 when balanced, −1 when an expert got nothing."""
    return utilisation(counts).min(axis=-1) - 1


def coefficient_of_variation(counts: Array) -> Array:  # [.., E] -> [..]
    """std(c) / c̄ with the population's standard deviation; its square is the balance term of arXiv 1701.06538."""
    return utilisation(counts).std(axis=-1)


class DeadExperts(NamedTuple):
    """A fraction of experts without a pick says something only beside the number of tokens that could have picked."""

    fraction: Array  # [layer]
    tokens: int  # T


def dead_experts(indices: Array, experts: int, valid: Array | None = None) -> DeadExperts:
    """mean_e [c_e = 0] for each layer, and T, on which it depends: few tokens leave many experts idle."""
    counts = load(indices, experts, valid)
    tokens = len(indices) if valid is None else int(_mask(valid, len(indices)).sum())
    return DeadExperts((counts == 0).mean(axis=-1), tokens)


def load_entropy(counts: Array) -> Array:  # [.., E] -> [..]
    """H(p) = −Σ_e p_e ln p_e in nats, with p_e = c_e / Σc: ln E when balanced, at least ln K."""
    return _entropy(counts)


def diversity(counts: Array) -> Array:  # [.., E] -> [..]
    """exp(H(p)) / E: the share of the experts that the load is spread over, 1 when balanced."""
    return np.exp(load_entropy(counts)) / np.shape(counts)[-1]


def score_entropy(scores: Array) -> Array:  # [T, layer, E] -> [T, layer]
    """How undecided a router was: −Σ_e q_e ln q_e in nats over all E experts, with q_e = s_e / Σs. From 0 to ln E.

    `scores` are the unbiased sigmoid scores. Because each is between 0 and 1 on its own, an untrained router is
    close to ln E. Given the weights [T, layer, K] instead, it is the entropy over the K picked, from 0 to ln K.
    """
    return _entropy(scores)


def _entropy(amounts: Array) -> Array:
    amounts = np.asarray(amounts)
    amounts = amounts.astype(np.result_type(amounts.dtype, np.float32), copy=False)
    with np.errstate(invalid="ignore"):
        p = amounts / amounts.sum(axis=-1, keepdims=True)
    return -(p * np.log(np.where(p == 0, 1, p))).sum(axis=-1) + 0.0  # 0 · ln 0 counts as 0; + 0 makes −0 a 0


def _mask(valid: Array, tokens: int) -> Array:
    mask = np.asarray(valid)
    if mask.dtype != bool or mask.size != tokens:
        raise ValueError(
            f"valid must be bool with one entry for each of the {tokens} tokens, got {mask.dtype} of shape "
            f"{list(mask.shape)}"
        )
    return mask.reshape(-1)


# -- rows: what is behind a figure, and CSV ----------------------------------------------------------------------


class SummaryRow(NamedTuple):
    layer: int
    T: int
    k: int
    E: int
    max_vio: float
    min_vio: float
    cv: float
    dead: float  # fraction of the experts
    entropy: float  # of the load, nats
    diversity: float
    busiest: int  # expert
    score_entropy: float  # mean over tokens, nats
    least_margin: float


def summary(routing: RoutingTable) -> list[SummaryRow]:
    """One row of measures for each layer; the columns are named in `SummaryRow`, the formulas are with the functions
    of this file."""
    counts = load(routing.indices, routing.experts)
    T, layers, K = routing.indices.shape
    none = np.full(layers, np.nan)
    columns = [
        max_violation(counts),
        min_violation(counts),
        coefficient_of_variation(counts),
        dead_experts(routing.indices, routing.experts).fraction,
        load_entropy(counts),
        diversity(counts),
        counts.argmax(axis=-1),
        score_entropy(routing.scores).mean(axis=0) if T else none,
        routing.margins.min(axis=0) if T else none,
    ]
    per_layer = zip(*(column.tolist() for column in columns), strict=True)
    return [SummaryRow(i, T, K, routing.experts, *values) for i, values in zip(routing.layers, per_layer, strict=True)]


class PickRow(NamedTuple):
    token: int
    text: str
    layer: int
    rank: int  # 0: the expert with the highest biased score
    expert: int
    weight: Any


def pick_rows(
    indices: Array, weights: Array, layers: Sequence[int] | None = None, tokens: Sequence[str] | None = None
) -> list[PickRow]:
    """One row for each token, layer and rank: what is behind `plots.plot_picks`."""
    T, count, K = np.shape(indices)
    numbers = range(count) if layers is None else layers
    return [
        PickRow(t, tokens[t] if tokens else "", numbers[i], rank, int(indices[t, i, rank]), weights[t, i, rank])
        for t in range(T)
        for i in range(count)
        for rank in range(K)
    ]


class LoadRow(NamedTuple):
    layer: int
    expert: int
    picks: int
    ratio: float  # to the fair share


def load_rows(
    indices: Array, experts: int, layers: Sequence[int] | None = None, valid: Array | None = None
) -> list[LoadRow]:
    """One row for each layer and expert: what is behind `plots.plot_load`."""
    counts = load(indices, experts, valid)
    ratios = utilisation(counts)
    numbers = range(len(counts)) if layers is None else layers
    return [
        LoadRow(number, e, int(counts[i, e]), float(ratios[i, e]))
        for i, number in enumerate(numbers)
        for e in range(experts)
    ]


def to_csv(rows: Iterable[Any], kind: Any, path: str | Path | None = None) -> str:
    """Rows of one kind (`PickRow`, `LoadRow`, `SummaryRow`) as CSV with a header line; also written to `path`, in
    UTF-8, if there is one."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(kind._fields)
    writer.writerows(rows)
    if path is not None:
        Path(path).write_text(out.getvalue(), "utf-8", newline="")
    return out.getvalue()
