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

from minglm.evaluate.domains import Sample
from minglm.evaluate.passes import moe_layers, operations, picks, slices
from minglm.look.specialisation import PERMUTATIONS, Information, information, mutual_information, permuted_within
from minglm.model.ops import Array

if TYPE_CHECKING:
    from minglm.api import Model

__all__ = [
    "PERMUTATIONS",
    "Information",
    "SpecialisationRow",
    "information",
    "mutual_information",
    "permuted_within",
    "specialisation_rows",
]


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
