"""Do experts specialise, and would chance look the same? Measures on plain arrays, each beside its control.

As in `routing`: `indices` int [T, layer, K] in the order of choice, scores [T, layer, E]; `layer` counts along the
layer axis. I_t is the set of K experts of token t, c_e how many tokens picked e, N_ij how many picked both i and j.
Definitions of co-activation, saturation, domain and vocabulary specialisation: OLMoE, arXiv 2409.02060, section 5.

A router that follows the token's text alone, or nothing at all, also gives figures that look like specialisation.
`shuffled` makes such routers, with the same load, out of the one that is measured.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator, default_rng

from minglm.look.routing import load
from minglm.model.ops import Array

SHUFFLES = 20  # of a control
PERMUTATIONS = 100  # of the control of `information`, and draws of its bootstrap


# -- the control -------------------------------------------------------------------------------------------------


def shuffled(indices: Array, rng: Generator, within: Any = None) -> Array:  # int [T, layer, K] -> the same
    """The choices dealt out anew among the tokens, each layer on its own: the load stays, what caused it is gone.

    `within`: T labels, such as the tokens' texts; choices then move only among tokens of the same label, and all that
    the label explains stays too. Raises ValueError if it has another length.
    """
    indices = np.asarray(indices)
    T = len(indices)
    groups = np.zeros(T, np.int64) if within is None else numbered(within, T, "within")[1]
    places = np.argsort(groups, kind="stable")
    found = np.empty_like(indices)
    for i in range(indices.shape[1]):
        found[places, i] = indices[np.lexsort((rng.random(T), groups)), i]
    return found


def numbered(labels: Any, T: int, what: str) -> tuple[list[str], Array]:
    """T labels, texts or numbers, as the sorted list of the different ones and int [T] into it. Raises ValueError for
    another number of them."""
    if len(labels) != T:
        raise ValueError(f"{what} holds {len(labels)} labels, indices {T} tokens; wanted one for each")
    found, at = np.unique(np.asarray(labels), return_inverse=True)
    return [str(label) for label in found], at.reshape(-1)


class Control(NamedTuple):
    """A measure over shuffled choices: what it gives without the cause that is claimed."""

    mean: Array
    sd: Array


def top1(indices: Array, experts: int, layer: int = 0) -> Array:  # int [T, layer, K] -> int [T]
    """Each token's first choice in one layer, checked. Raises ValueError as `routing.load`, and for no such layer."""
    return one_layer(indices, experts, layer)[:, 0]


def one_layer(indices: Array, experts: int, layer: int = 0) -> Array:  # int [T, layer, K] -> int [T, K]
    """One layer's choices. Raises ValueError as `routing.load` does, and for a layer that is not there."""
    indices = np.asarray(indices)
    load(indices, experts)
    if not 0 <= layer < indices.shape[1] or not indices.size:
        raise ValueError(
            f"layer = {layer} counts along the layer axis of indices {list(indices.shape)}, from 0; no choice there"
        )
    return indices[:, layer].astype(np.int64)


# -- who is picked together --------------------------------------------------------------------------------------


def pair_counts(indices: Array, experts: int, layer: int = 0) -> Array:  # int [T, layer, K] -> int [E, E]
    """N_ij: tokens that picked both i and j, for all pairs of ranks; N_ii = c_i."""
    picked = np.zeros((len(indices), experts), np.int64)
    np.put_along_axis(picked, one_layer(indices, experts, layer), 1, axis=1)
    return (picked.T.astype(np.float64) @ picked).astype(np.int64)  # exact below 2⁵³; BLAS knows no whole numbers


def coactivation(indices: Array, experts: int, layer: int = 0) -> Array:  # int [T, layer, K] -> [E, E]
    """P(j | i) = N_ij / N_i: the share of the tokens at i that also went to j. Row i is NaN if nobody picked i.

    A row sums to K with its diagonal, which is 1. Random routing gives (K − 1)/(E − 1) off the diagonal. All pairs of
    ranks count; OLMoE's published script counts neighbouring ranks only, which is about four times less for K = 8.
    """
    pairs = pair_counts(indices, experts, layer)
    with np.errstate(invalid="ignore"):
        return pairs / np.diag(pairs)[:, None]


def coactivation_lift(indices: Array, experts: int, layer: int = 0) -> Array:  # int [T, layer, K] -> [E, E]
    """N_ij · T / (N_i · N_j): how much more often together than if the two were independent. Symmetric; NaN if nobody
    picked one of them.

    A token's K experts differ, so random routing gives less than 1: (K − 1)/(E − 1) · E/K, which is 0.53 for 2 of 16.
    """
    pairs = pair_counts(indices, experts, layer)
    alone = np.diag(pairs).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return pairs * len(indices) / (alone[:, None] * alone)


def random_coactivation(experts: int, K: int, lift: bool = False) -> float:
    """What `coactivation`, or its lift, is for a router that draws K of E experts at random."""
    share = (K - 1) / (experts - 1) if experts > 1 else 0.0
    return share * experts / K if lift else share


# -- by domain ---------------------------------------------------------------------------------------------------


def domain_shares(indices: Array, domains: Any, experts: int) -> tuple[list[str], Array]:
    """The domains' names in order, and [domain, layer, E]: the share of a domain's tokens that went to e.

    domains: T names or numbers. Each layer's row sums to K; K/E is uniform. Raises ValueError for another number of
    domains than tokens, and as `routing.load` does.
    """
    names, at = numbered(domains, len(indices), "domains")
    indices = np.asarray(indices)
    found = [load(indices, experts, at == d) / (at == d).sum() for d in range(len(names))]
    return names, np.array(found).reshape(len(names), indices.shape[1], experts)


def domain_control(
    indices: Array, domains: Any, experts: int, tokens: Any = None, seed: int = 0, shuffles: int = SHUFFLES
) -> Control:  # [domain, layer, E] each
    """`domain_shares` of shuffled choices: among all tokens, or, with `tokens`, among those of the same text, which
    leaves the differences that come from the domains' having different words."""
    rng = default_rng(seed)
    found = [domain_shares(shuffled(indices, rng, tokens), domains, experts)[1] for _ in range(shuffles)]
    return Control(np.mean(found, axis=0), np.std(found, axis=0))


def mutual_information(indices: Array, domains: Array) -> Array:  # int [.., layer, K], int [..] -> [layer]
    """I(domain; expert) = Σ p(d, e) log₂( p(d, e) / (p(d) p(e)) ) in bits, over all slots of each layer, K for each
    token; p(d, e) is the share of slots of domain d at expert e. From 0 to log₂ of the number of domains."""
    layers, E, D = indices.shape[-2], int(indices.max()) + 1, int(domains.max()) + 1
    cells = (np.arange(layers)[:, None] * D + domains[..., None, None]) * E + indices
    counts = np.bincount(cells.reshape(-1), minlength=layers * D * E).reshape(layers, D, E)
    joint = counts / counts.sum(axis=(1, 2), keepdims=True)
    apart = joint.sum(axis=2, keepdims=True) * joint.sum(axis=1, keepdims=True)
    ratio = np.where(joint > 0, joint / np.where(apart > 0, apart, 1), 1)  # 0 · log 0 counts as 0
    return (joint * np.log2(ratio)).sum(axis=(1, 2))


def permuted_within(ids: Array, domains: Array, rng: Generator) -> Array:
    """The labels, permuted among the places that have the same id."""
    flat_ids, labels = ids.reshape(-1), domains.reshape(-1)
    by_id = np.argsort(flat_ids, kind="stable")
    by_id_and_chance = np.lexsort((rng.random(ids.size), flat_ids))
    found = np.empty_like(labels)
    found[by_id] = labels[by_id_and_chance]
    return found.reshape(domains.shape)


class Information(NamedTuple):
    """I(domain; expert) and its controls in bits, [layer] each."""

    bits: Array
    control: Array
    control_sd: Array
    low: Array  # of bits − control
    high: Array
    shuffled: Array


def information(
    indices: Array, ids: Array, domains: Array, permutations: int = PERMUTATIONS, seed: int = 0
) -> Information:
    """Of picks int [B, T, layer, K], with token ids and domains int [B, T].

    Domains differ in their tokens, so a router that reads the token's id alone is far above 0. `control`: the domains
    permuted among the places of the same id, which keeps what the id explains; an id that occurs in one domain only
    counts as explained. `shuffled`: permuted among all places, the noise of finite counts. `low`, `high`: 95 % of the
    difference to the control, a bootstrap over rows, each draw with a permutation of its own.
    """
    rng, B = default_rng(seed), len(ids)
    control = [mutual_information(indices, permuted_within(ids, domains, rng)) for _ in range(permutations)]
    plain = [mutual_information(indices, rng.permuted(domains)) for _ in range(max(permutations // 10, 1))]
    above = []
    for _ in range(permutations):
        rows = rng.integers(B, size=B)
        drawn, ids_here, labels = indices[rows], ids[rows], domains[rows]
        above.append(
            mutual_information(drawn, labels) - mutual_information(drawn, permuted_within(ids_here, labels, rng))
        )
    low, high = np.percentile(above, [2.5, 97.5], axis=0)
    return Information(
        bits=mutual_information(indices, domains),
        control=np.mean(control, axis=0),
        control_sd=np.std(control, axis=0),
        low=low,
        high=high,
        shuffled=np.mean(plain, axis=0),
    )


# -- by token ----------------------------------------------------------------------------------------------------


class VocabularyRow(NamedTuple):
    token: str
    expert: int  # the most frequent first choice of this token; the lowest number of several
    share: float  # of its n occurrences
    n: int


def vocabulary_rows(
    indices: Array, tokens: Sequence[Any], experts: int, layer: int = 0, min_count: int = 10
) -> list[VocabularyRow]:
    """For each token text, or id, that occurs `min_count` times: the expert that is most often its first choice.
    Ordered by expert, then by share. Without a minimum, rare tokens would all seem pure: once seen is 100 %."""
    names, counts = _first_choices(indices, tokens, experts, layer)
    n = counts.sum(axis=1)
    rows = [
        VocabularyRow(names[x], int(counts[x].argmax()), float(counts[x].max() / n[x]), int(n[x]))
        for x in np.flatnonzero(n >= min_count)
    ]
    return sorted(rows, key=lambda row: (row.expert, -row.share, -row.n, row.token))


def _first_choices(indices: Array, tokens: Any, experts: int, layer: int) -> tuple[list[str], Array]:
    """The different tokens, and int [token, E]: how often each expert was their first choice."""
    first = top1(indices, experts, layer)
    names, at = numbered(tokens, len(first), "tokens")
    counts = np.bincount(at * experts + first, minlength=len(names) * experts)
    return names, counts.reshape(len(names), experts)


class VocabularySpecialisation(NamedTuple):
    share: Array  # [layer] mean over the tokens of `vocabulary_rows` of their largest share; NaN if there is none
    control: Array  # [layer] the same with shuffled choices, mean
    control_sd: Array  # [layer]
    tokens: int  # how many different ones were frequent enough


def vocabulary_specialisation(
    indices: Array, tokens: Sequence[Any], experts: int, min_count: int = 10, seed: int = 0, shuffles: int = SHUFFLES
) -> VocabularySpecialisation:
    """How far the token alone decides its first expert, in each layer. The control, not 1/E, is what chance gives: a
    largest share of few occurrences is never small."""
    rng = default_rng(seed)
    indices = np.asarray(indices)
    _, at = numbered(tokens, len(indices), "tokens")
    frequent = np.bincount(at) >= min_count

    def shares(routed: Array) -> Array:
        found = []
        for i in range(indices.shape[1]):
            counts = _first_choices(routed, at, experts, i)[1][frequent]
            found.append((counts.max(axis=1) / counts.sum(axis=1)).mean() if len(counts) else np.nan)
        return np.array(found)

    control = [shares(shuffled(indices, rng)) for _ in range(shuffles)]
    return VocabularySpecialisation(
        shares(indices), np.mean(control, axis=0), np.std(control, axis=0), int(frequent.sum())
    )


# -- two routings of the same tokens -----------------------------------------------------------------------------


def overlap(indices_a: Array, indices_b: Array) -> Array:  # int [T, layer, K] twice -> [layer]
    """Mean over the tokens of |A_t ∩ B_t| / K. From [T, K] twice one number; a layer axis of 1 stands beside any other.

    K/E by chance. Expert 3 of one layer and expert 3 of another have only their number in common: between layers a
    value near chance is what to expect. Raises ValueError for shapes that do not fit, and for no token.
    """
    a, b = np.asarray(indices_a), np.asarray(indices_b)
    fits = a.ndim == b.ndim and a.ndim in (2, 3) and len(a) == len(b) and a.shape[-1] == b.shape[-1] and a.size
    if not fits or (a.ndim == 3 and a.shape[1] != b.shape[1] and 1 not in (a.shape[1], b.shape[1])):
        raise ValueError(
            f"two routings of the same tokens are wanted, [T, layer, K] or [T, K]; got {list(a.shape)}, {list(b.shape)}"
        )
    return (a[..., :, None] == b[..., None, :]).any(axis=-1).mean(axis=-1).mean(axis=0)


def saturation(history: Array, final: Array | None = None) -> Array:
    """[moment, T, layer, K], [T, layer, K] -> [moment, layer]: mean of |I_t(moment) ∩ I_t(final)| / K, for the same
    text at moments of a training run; K/E by chance. `final`: by default the last moment, which is then 1."""
    history = np.asarray(history)
    if history.ndim != 4 or not len(history):
        raise ValueError(f"history must be [moment, T, layer, K], got {list(history.shape)}")
    last = history[-1] if final is None else final
    return np.array([overlap(moment, last) for moment in history])


def some_layers(count: int) -> tuple[int, ...]:
    """First, middle and last of so many, as places along the layer axis."""
    return tuple(dict.fromkeys((0, count // 2, count - 1)))


class Paths(NamedTuple):
    paths: Array  # int [path, place]: the first choices in these layers
    counts: Array  # int [path]: how many tokens took it; most first
    layers: tuple[int, ...]  # places along the layer axis


def paths(indices: Array, layers: Sequence[int] | None = None) -> Paths:
    """How many tokens went which way: first choices only, in some layers (places along the layer axis; by default
    first, middle, last). Ranks below the first have no natural partner in the next layer."""
    indices = np.asarray(indices)
    T, count, _ = indices.shape
    chosen = some_layers(count) if layers is None else tuple(layers)
    if not chosen or not T or min(chosen) < 0 or max(chosen) >= count:
        raise ValueError(f"layers = {chosen} of indices {list(indices.shape)}: wanted places 0 … {count - 1}")
    found, counts = np.unique(indices[:, list(chosen), 0].astype(np.int64), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return Paths(found[order], counts[order], chosen)


# -- capacity and bias -------------------------------------------------------------------------------------------


def capacity(tokens: int, experts: int, K: int, factor: float) -> int:
    """⌈factor · K·T/E⌉: the picks that an expert may take from T tokens."""
    return math.ceil(round(factor * K * tokens / experts, 9))  # 1.1 · 10 is 11.000000000000002


def would_drop(indices: Array, experts: int, factors: Sequence[float] = (1, 1.25, 2)) -> Array:  # -> [factor, layer]
    """The share of picks that would be lost if an expert took its first ⌈factor · K·T/E⌉ picks, in the order of the
    tokens, and no more. GLM-4.5 is dropless: nothing is lost. The order decides which picks fall, not how many."""
    counts = load(indices, experts)
    T, _, K = np.shape(indices)
    beyond = [np.maximum(counts - capacity(T, experts, K, factor), 0).sum(axis=-1) for factor in factors]
    with np.errstate(invalid="ignore"):
        return np.array(beyond) / np.float64(K * T)


def picks_by(scores: Array, K: int) -> Array:  # [.., E] -> int [.., K]
    """The K largest, in their order."""
    return np.argsort(-np.asarray(scores), axis=-1, kind="stable")[..., :K]


def unbiased_picks(scores: Array, biased_scores: Array, K: int) -> Array:  # [.., E] twice -> int [.., K]
    """Who would be picked with a selection bias of zero. Groups that were closed (−∞) stay closed."""
    return picks_by(np.where(np.isneginf(biased_scores), -np.inf, scores), K)


def bias_effect(scores: Array, biased_scores: Array, K: int) -> Array:  # [T, layer, E] twice -> [layer]
    """The share of picks that change when the selection bias is zeroed: how much of the balance is the bias's doing."""
    scores, biased_scores = np.asarray(scores), np.asarray(biased_scores)
    if scores.shape != biased_scores.shape or scores.ndim != 3 or not 1 <= K <= scores.shape[-1]:
        raise ValueError(
            f"scores {list(scores.shape)} and biased_scores {list(biased_scores.shape)} must both be [T, layer, E], "
            f"and K = {K} one of 1 … E"
        )
    return 1 - overlap(picks_by(biased_scores, K), unbiased_picks(scores, biased_scores, K))
