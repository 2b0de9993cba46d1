"""The tables behind the plots: rows that `routing.to_csv` writes. Those of load and picks are in `routing`.

Arguments are those of the plots; `layers` are the layers' numbers, one for each entry of the layer axis.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minglm.look.routing import load, score_entropy, utilisation
from minglm.look.specialisation import (
    bias_effect,
    capacity,
    coactivation,
    coactivation_lift,
    domain_control,
    domain_shares,
    mutual_information,
    numbered,
    overlap,
    pair_counts,
    paths,
    permuted_within,
    picks_by,
    saturation,
    shuffled,
    unbiased_picks,
    vocabulary_specialisation,
    would_drop,
)
from minglm.model.ops import Array

Numbers = Sequence[int] | None


def _numbers(layers: Numbers, count: int) -> Sequence[int]:
    return range(count) if layers is None else layers


# -- the router --------------------------------------------------------------------------------------------------


class SelectionRow(NamedTuple):
    """One expert, as one token's router saw it."""

    expert: int
    score: float
    biased: float  # −∞: its group was closed
    rank: int | None  # 0 … K − 1, or not picked
    picked_without_bias: bool


def selection_rows(scores: Array, biased_scores: Array, K: int, layer: int = 0, token: int = 0) -> list[SelectionRow]:
    """A row for each expert. Raises ValueError for shapes, places or a K that do not fit."""
    _check_scores(scores, biased_scores, K)
    T, count, E = np.shape(scores)
    if not (0 <= token < T and 0 <= layer < count):
        raise ValueError(f"token = {token}, layer = {layer}: scores {list(np.shape(scores))} hold no such choice")
    score, biased = np.asarray(scores)[token, layer], np.asarray(biased_scores)[token, layer]
    ranks = {int(e): rank for rank, e in enumerate(picks_by(biased, K))}
    without = set(unbiased_picks(score, biased, K).tolist())
    return [SelectionRow(e, float(score[e]), float(biased[e]), ranks.get(e), e in without) for e in range(E)]


def _check_scores(scores: Array, biased_scores: Array, K: int) -> None:
    shapes = [list(np.shape(a)) for a in (scores, biased_scores)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 3 or not 1 <= K <= shapes[0][2] or 0 in shapes[0]:
        raise ValueError(
            f"scores {shapes[0]} and biased_scores {shapes[1]} must both be [T, layer, E], K = {K} in 1 … E"
        )


def confidence(scores: Array, biased_scores: Array, K: int) -> tuple[Array, Array]:
    """ln E − H of the scores, and the margin of the choice: [T, layer] each. Margins are ∞ where no other expert was
    open. Raises ValueError for shapes or a K that do not fit."""
    _check_scores(scores, biased_scores, K)
    E = np.shape(scores)[-1]
    gaps = np.maximum(np.log(E) - score_entropy(scores), 0)  # not −0.0 by rounding
    if K == E:
        return gaps, np.full(gaps.shape, np.inf)
    ranked = -np.sort(-np.asarray(biased_scores), axis=-1)
    return gaps, ranked[..., K - 1] - ranked[..., K]


class ConfidenceRow(NamedTuple):
    token: int
    layer: int
    gap: float  # ln E − H, nats
    margin: float


def confidence_rows(scores: Array, biased_scores: Array, K: int, layers: Numbers = None) -> list[ConfidenceRow]:
    gaps, margins = confidence(scores, biased_scores, K)
    numbers = _numbers(layers, gaps.shape[1])
    return [ConfidenceRow(t, numbers[i], float(gaps[t, i]), float(margins[t, i])) for t, i in np.ndindex(*gaps.shape)]


class BiasRow(NamedTuple):
    layer: int
    changed: float  # share of the picks that a selection bias of zero would change


def bias_rows(scores: Array, biased_scores: Array, K: int, layers: Numbers = None) -> list[BiasRow]:
    changed = bias_effect(scores, biased_scores, K)
    return [BiasRow(i, float(c)) for i, c in zip(_numbers(layers, len(changed)), changed, strict=True)]


# -- load --------------------------------------------------------------------------------------------------------


class LoadHistoryRow(NamedTuple):
    step: int
    layer: int
    expert: int
    picks: int
    ratio: float  # to the fair share


def load_history_rows(
    history: Array, experts: int, steps: Sequence[int] | None = None, layers: Numbers = None
) -> list[LoadHistoryRow]:
    found = []
    for step, moment in zip(_numbers(steps, len(history)), history, strict=True):
        counts = load(moment, experts)
        ratios, numbers = utilisation(counts), _numbers(layers, len(counts))
        for i, e in np.ndindex(*counts.shape):
            found.append(LoadHistoryRow(step, numbers[i], e, int(counts[i, e]), float(ratios[i, e])))
    return found


class DropRow(NamedTuple):
    layer: int
    factor: float
    capacity: int  # picks that an expert may take
    dropped: float  # share of the picks


def drop_rows(
    indices: Array, experts: int, factors: Sequence[float] = (1, 1.25, 1.5, 2, 3), layers: Numbers = None
) -> list[DropRow]:
    dropped = would_drop(indices, experts, factors)
    T, count, K = np.shape(indices)
    return [
        DropRow(number, factor, capacity(T, experts, K, factor), float(dropped[f, i]))
        for i, number in enumerate(_numbers(layers, count))
        for f, factor in enumerate(factors)
    ]


class SaturationRow(NamedTuple):
    step: int
    layer: int
    overlap: float  # with the final routing
    chance: float  # K/E


def saturation_rows(
    history: Array, experts: int, steps: Sequence[int] | None = None, final: Array | None = None, layers: Numbers = None
) -> list[SaturationRow]:
    found, chance = saturation(history, final), np.shape(history)[-1] / experts
    moments, numbers = _numbers(steps, len(found)), _numbers(layers, found.shape[1])
    return [SaturationRow(moments[m], numbers[i], float(found[m, i]), chance) for m, i in np.ndindex(*found.shape)]


# -- pairs -------------------------------------------------------------------------------------------------------


class CoactivationRow(NamedTuple):
    layer: int
    i: int
    j: int
    both: int  # tokens
    share: float  # P(j | i)
    lift: float


def coactivation_rows(indices: Array, experts: int, layers: Numbers = None) -> list[CoactivationRow]:
    """All pairs of different experts, in every layer."""
    found = []
    for n, number in enumerate(_numbers(layers, np.shape(indices)[1])):
        both, share = pair_counts(indices, experts, n), coactivation(indices, experts, n)
        lift = coactivation_lift(indices, experts, n)
        found += [
            CoactivationRow(number, i, j, int(both[i, j]), float(share[i, j]), float(lift[i, j]))
            for i, j in np.ndindex(*both.shape)
            if i != j
        ]
    return found


class Flow(NamedTuple):
    source: int | None  # expert; None: all those with a small share together
    target: int | None
    tokens: int


class Flows(NamedTuple):
    boxes: list[dict[int | None, int]]  # of each layer: expert -> tokens, small ones last as None
    flows: list[list[Flow]]  # between each layer and the next of those chosen
    cut: bool  # whether a large expert is among the others


def flows(indices: Array, experts: int, layers: Sequence[int], least: float = 1.5, most: int = 12) -> Flows:
    """First choices in some layers (places along the layer axis). Experts that get less than `least` times the uniform
    share of the tokens are put together, and so are those beyond the `most` largest of a layer."""
    load(indices, experts)
    found = paths(indices, layers)
    boxes: list[dict[int | None, int]] = []
    cut = False
    for column in found.paths.T:
        counts = np.bincount(column, weights=found.counts, minlength=experts).astype(int)
        large = np.flatnonzero(counts >= max(least * counts.sum() / experts, 1))
        kept = np.sort(large[np.argsort(-counts[large], kind="stable")[:most]])
        other = int(counts.sum() - counts[kept].sum())
        boxes.append({int(e): int(counts[e]) for e in kept} | ({None: other} if other else {}))
        cut |= len(kept) < len(large)
    between = [
        _between(found.paths[:, place : place + 2].tolist(), found.counts.tolist(), *boxes[place : place + 2])
        for place in range(len(boxes) - 1)
    ]
    return Flows(boxes, between, cut)


def _between(
    pairs: list[list[int]], counts: list[int], left: dict[int | None, int], right: dict[int | None, int]
) -> list[Flow]:
    """The tokens from each box on the left to each on the right, in the order of the boxes."""
    tokens: dict[tuple[int | None, int | None], int] = {}
    for (a, b), count in zip(pairs, counts, strict=True):
        pair = (a if a in left else None, b if b in right else None)
        tokens[pair] = tokens.get(pair, 0) + count
    return [Flow(a, b, tokens[a, b]) for a in left for b in right if (a, b) in tokens]


class FlowRow(NamedTuple):
    layer: int
    expert: int  # first choice there
    next_layer: int
    next_expert: int
    tokens: int


def flow_rows(indices: Array, layers: Numbers = None, through: Sequence[int] | None = None) -> list[FlowRow]:
    """Nothing put together; `through` as in `plot_paths`."""
    found, numbers = paths(indices, through), _numbers(layers, np.shape(indices)[1])
    rows = []
    for place in range(len(found.layers) - 1):
        pairs, at = np.unique(found.paths[:, place : place + 2], axis=0, return_inverse=True)
        tokens = np.bincount(at.reshape(-1), weights=found.counts).astype(int)
        here, there = (numbers[found.layers[p]] for p in (place, place + 1))
        rows += [FlowRow(here, int(a), there, int(b), int(n)) for (a, b), n in zip(pairs.tolist(), tokens, strict=True)]
    return rows


class OverlapRow(NamedTuple):
    layer: int
    overlap: float
    chance: float  # K/E
    shuffled: float  # one of the two shuffled among the tokens, mean: what the loads alone give
    renumbered: float  # the experts of one of the two renumbered at random, mean
    renumbered_sd: float


def overlap_rows(
    indices_a: Array, indices_b: Array, experts: int, layers: Numbers = None, seed: int = 0, draws: int = 50
) -> list[OverlapRow]:
    """A row for each layer of two routings of the same tokens, [T, layer, K] or [T, K] each; one may have a single
    layer. If their experts are not the same ones, only an overlap that renumbering does not reach says something."""
    overlap(indices_a, indices_b)  # this checks the shapes
    a, b = (each if each.ndim == 3 else each[:, None] for each in (np.asarray(indices_a), np.asarray(indices_b)))
    for each in (a, b):
        load(each, experts)
    rng = np.random.default_rng(seed)
    mixed = np.mean([overlap(shuffled(a, rng), b) for _ in range(draws)], axis=0)
    other = np.array([overlap(rng.permutation(experts)[a], b) for _ in range(draws)])  # [draw, layer]
    found, chance = overlap(a, b), a.shape[-1] / experts
    return [
        OverlapRow(
            layer=number,
            overlap=float(found[i]),
            chance=chance,
            shuffled=float(mixed[i]),
            renumbered=float(other[:, i].mean()),
            renumbered_sd=float(other[:, i].std()),
        )
        for i, number in enumerate(_numbers(layers, len(found)))
    ]


# -- specialisation ----------------------------------------------------------------------------------------------


class DomainRow(NamedTuple):
    layer: int
    domain: str
    tokens: int
    expert: int
    share: float  # of the domain's tokens that went there
    uniform: float  # K/E
    control: float  # the same with shuffled choices, mean
    control_sd: float


def domain_rows(
    indices: Array, domains: Any, experts: int, tokens: Any = None, layers: Numbers = None, seed: int = 0
) -> list[DomainRow]:
    """A row for each layer, domain and expert. The control is that of `domain_control`."""
    names, shares = domain_shares(indices, domains, experts)
    control = domain_control(indices, domains, experts, tokens, seed)
    counts = np.bincount(numbered(domains, len(indices), "domains")[1])
    numbers, uniform = _numbers(layers, shares.shape[1]), np.shape(indices)[2] / experts
    return [
        DomainRow(
            layer=numbers[i],
            domain=names[d],
            tokens=int(counts[d]),
            expert=e,
            share=float(shares[d, i, e]),
            uniform=uniform,
            control=float(control.mean[d, i, e]),
            control_sd=float(control.sd[d, i, e]),
        )
        for i, d, e in np.ndindex(shares.shape[1], shares.shape[0], experts)
    ]


class InformationRow(NamedTuple):
    layer: int
    tokens: int
    bits: float  # I(domain; expert)
    control: float  # domains permuted among the occurrences of the same token
    control_sd: float
    above: float  # bits − control: what the token itself does not explain
    shuffled: float  # domains permuted freely: the noise of finite counts


def information_rows(
    indices: Array, domains: Any, tokens: Any, layers: Numbers = None, permutations: int = 100, seed: int = 0
) -> list[InformationRow]:
    """I(domain; expert) of every layer, from T domains and T token texts, or ids."""
    T, rng = len(indices), np.random.default_rng(seed)
    at, ids = numbered(domains, T, "domains")[1], numbered(tokens, T, "tokens")[1]
    bits = mutual_information(indices, at)
    control = np.array([mutual_information(indices, permuted_within(ids, at, rng)) for _ in range(permutations)])
    plain = np.array([mutual_information(indices, rng.permuted(at)) for _ in range(max(permutations // 10, 1))])
    return [
        InformationRow(
            layer=number,
            tokens=T,
            bits=float(bits[i]),
            control=float(control[:, i].mean()),
            control_sd=float(control[:, i].std()),
            above=float(bits[i] - control[:, i].mean()),
            shuffled=float(plain[:, i].mean()),
        )
        for i, number in enumerate(_numbers(layers, len(bits)))
    ]


class VocabularyShareRow(NamedTuple):
    layer: int
    tokens: int  # different ones that are frequent enough
    share: float  # mean of their largest share
    control: float  # the same with shuffled choices, mean
    control_sd: float


def vocabulary_share_rows(
    indices: Array, tokens: Sequence[Any], experts: int, min_count: int = 10, layers: Numbers = None, seed: int = 0
) -> list[VocabularyShareRow]:
    found = vocabulary_specialisation(indices, tokens, experts, min_count, seed)
    return [
        VocabularyShareRow(number, found.tokens, float(share), float(control), float(sd))
        for number, share, control, sd in zip(
            _numbers(layers, len(found.share)), found.share, found.control, found.control_sd, strict=True
        )
    ]


# -- drafts and removal ------------------------------------------------------------------------------------------


class AcceptanceRow(NamedTuple):
    text: str
    depth: int  # 1: the token after the next
    accepted: int
    drafted: int
    low: float | None = None  # 95 % of accepted / drafted, if it is known
    high: float | None = None


class RemovedRow(NamedTuple):
    layer: int
    expert: int
    domain: str
    load: float  # share of the slots
    cost: float  # bits per token more without it
    error: float | None = None  # standard error of the cost, if it is known


def removed_rows(
    costs: Array, names: Sequence[str], loads: Array, layer: int = 0, errors: Array | None = None
) -> list[RemovedRow]:  # [E, domain], [E] or [E, domain], [E, domain]
    costs = np.asarray(costs)
    loads = np.broadcast_to(np.asarray(loads).reshape(len(costs), -1), costs.shape)
    return [
        RemovedRow(
            layer=layer,
            expert=e,
            domain=names[d],
            load=float(loads[e, d]),
            cost=float(costs[e, d]),
            error=None if errors is None else float(errors[e, d]),
        )
        for e, d in np.ndindex(*costs.shape)
    ]
