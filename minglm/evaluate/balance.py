"""How evenly the routers load their experts on a held-out mixture."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minglm.evaluate.confidence import bootstrap
from minglm.evaluate.domains import Sample
from minglm.evaluate.passes import moe_layers, operations, picks, slices
from minglm.look.routing import load, max_violation, min_violation
from minglm.model.ops import Array

if TYPE_CHECKING:
    from minglm.api import Model


class BalanceRow(NamedTuple):
    """One layer's load over all tokens of the sample: MaxVio_global, not the mean over batches."""

    layer: int
    tokens: int
    max_vio: float  # (largest load − mean load) / mean load; at most E/K − 1
    low: float  # 95 %: bootstrap over rows. A maximum over noisy loads is biased upwards, and so is this interval
    high: float
    min_vio: float  # −1 where an expert got nothing
    dead: int  # experts without a token
    experts: int


def balance_rows(model: "Model", sample: Sample) -> list[BalanceRow]:
    """A row for each layer with experts."""
    layers, E = moe_layers(model), model.config.n_routed_experts
    with operations(model) as ops:
        indices = np.concatenate([picks(model, batch, ops) for batch in slices(sample.batch)])  # [B, T, layer, K]
    return load_rows(np.stack([load(row, E) for row in indices]), layers, sample.domains.size)


def load_rows(counts: Array, layers: list[int], tokens: int) -> list[BalanceRow]:  # int [B, layer, E]
    """The same from the picks that each of B rows of text gave to each expert."""
    total = counts.sum(axis=0)
    low, high = bootstrap(counts, max_violation)
    most, least, dead = max_violation(total), min_violation(total), (total == 0).sum(axis=1)
    return [
        BalanceRow(
            layer=layer,
            tokens=tokens,
            max_vio=float(most[i]),
            low=float(low[i]),
            high=float(high[i]),
            min_vio=float(least[i]),
            dead=int(dead[i]),
            experts=total.shape[1],
        )
        for i, layer in enumerate(layers)
    ]
