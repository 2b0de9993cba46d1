"""Do experts specialise by domain? Mutual information of domain and expert, beside what would be there anyway.

Over the slots of all tokens, N · K of them, with p(d, e) the share of slots of domain d at expert e,

    I(domain; expert) = Σ p(d, e) log₂( p(d, e) / (p(d) p(e)) )    in bits.

With as many tokens of each of D domains it lies between 0 and log₂ D. Domains differ in their tokens, and a router
that looks at nothing but the token's id is far above 0, even an untrained one. So it is held against a control: the
domain labels are permuted among the occurrences of the same id, which keeps everything that the id explains (and the
noise of finite counts) and destroys the rest. A token that occurs in one domain only counts as explained.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.random import default_rng

from minglm.evaluate.domains import Sample
from minglm.evaluate.passes import moe_layers, operations, picks, slices
from minglm.model.ops import Array

if TYPE_CHECKING:
    from minglm.api import Model


PERMUTATIONS = 100  # of the control, and draws of the bootstrap


class SpecialisationRow(NamedTuple):
    """Information of one layer, its excess over the control, and both in a model that was never trained."""

    layer: int
    tokens: int
    bits: float
    control: float  # mean over permutations among the occurrences of the same token
    control_sd: float
    above: float  # bits − control
    low: float  # 95 %: bootstrap over rows of the text, each draw with a permutation of its own
    high: float
    shuffled: float  # mean over plain permutations: the noise of finite counts alone
    untrained: float  # bits, in fresh weights of the same config
    untrained_above: float


def specialisation_rows(model: "Model", sample: Sample, seed: int = 0) -> list[SpecialisationRow]:
    """A row for each layer with experts, on a sample that changes its domain (`changing_rows`)."""
    import minglm

    ids, domains = sample.batch.ids, sample.domains
    ours = information(_all_picks(model, sample), ids, domains)
    theirs = information(_all_picks(minglm.new(model.config, seed=seed), sample), ids, domains)
    return [
        SpecialisationRow(
            layer=layer,
            tokens=ids.size,
            bits=float(ours.bits[i]),
            control=float(ours.control[i]),
            control_sd=float(ours.control_sd[i]),
            above=float(ours.bits[i] - ours.control[i]),
            low=float(ours.low[i]),
            high=float(ours.high[i]),
            shuffled=float(ours.shuffled[i]),
            untrained=float(theirs.bits[i]),
            untrained_above=float(theirs.bits[i] - theirs.control[i]),
        )
        for i, layer in enumerate(moe_layers(model))
    ]


def _all_picks(model: "Model", sample: Sample) -> Array:  # -> int [B, T, layer, K]
    with operations(model) as ops:
        return np.concatenate([picks(model, batch, ops) for batch in slices(sample.batch)])


# -- the measure -------------------------------------------------------------------------------------------------


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
    """Of picks int [B, T, layer, K], with token ids and domains int [B, T]."""
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


def mutual_information(indices: Array, domains: Array) -> Array:  # int [B, T, layer, K], int [B, T] -> [layer]
    """I(domain; expert) over the B · T · K slots of each layer, in bits."""
    layers, E, D = indices.shape[2], int(indices.max()) + 1, int(domains.max()) + 1
    cells = (np.arange(layers)[:, None] * D + domains[..., None, None]) * E + indices
    counts = np.bincount(cells.reshape(-1), minlength=layers * D * E).reshape(layers, D, E)
    joint = counts / counts.sum(axis=(1, 2), keepdims=True)
    apart = joint.sum(axis=2, keepdims=True) * joint.sum(axis=1, keepdims=True)
    ratio = np.where(joint > 0, joint / np.where(apart > 0, apart, 1), 1)  # 0 · log 0 counts as 0
    return (joint * np.log2(ratio)).sum(axis=(1, 2))


def permuted_within(ids: Array, domains: Array, rng: np.random.Generator) -> Array:
    """The labels, permuted among the places that have the same id."""
    flat_ids, labels = ids.reshape(-1), domains.reshape(-1)
    by_id = np.argsort(flat_ids, kind="stable")
    by_id_and_chance = np.lexsort((rng.random(ids.size), flat_ids))
    found = np.empty_like(labels)
    found[by_id] = labels[by_id_and_chance]
    return found.reshape(domains.shape)
