"""What each expert is worth: the cost of removing it, beside its load. The two are not the same."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm.std import tqdm

from minglm.config import Config
from minglm.data.batches import IGNORE, Batch
from minglm.evaluate.confidence import Z
from minglm.evaluate.domains import Sample, some_of_each
from minglm.evaluate.passes import moe_layers, operations, run_layers, token_bits
from minglm.model.attention import Layout
from minglm.model.ops import Array, Ops
from minglm.model.params import Layer, Moe, Params
from minglm.model.transformer import head, transformer

if TYPE_CHECKING:
    from minglm.api import Model

NEVER = -1e9  # a selection bias with which an expert is not picked while another one is open


class RemovalRow(NamedTuple):
    """One expert of one layer."""

    layer: int
    expert: int
    load: float  # share of all slots, equal tokens per domain; 1/E is fair
    worst: str  # the domain that its removal costs most
    cost: float  # bits per token that it costs there
    low: float  # 95 %: normal approximation over the tokens' differences
    high: float
    costs: dict[str, float]  # bits per token, each domain
    loads: dict[str, float]  # share of the domain's slots


class Cost(NamedTuple):
    bits: float
    error: float  # standard error
    load: float


def without_expert(params: Params, config: Config, layer: int, expert: int) -> Params:
    """The same weights with one expert that its router never picks: the next one in order takes its place. (Where
    experts stand in groups, it does not count for its group either, which may then be closed.)

    ValueError if too few would be left.
    """
    left = config.n_routed_experts // config.n_group * config.topk_group - 1
    if left < config.num_experts_per_tok:
        raise ValueError(f"without an expert {left} are open, and a token needs {config.num_experts_per_tok}")
    layers = list(params.layers)
    layers[layer] = _forbid(params.layers[layer], expert)
    return params._replace(layers=tuple(layers))


def _forbid(layer: Layer, expert: int) -> Layer:
    assert isinstance(layer.mlp, Moe)
    bias = layer.mlp.gate.e_score_correction_bias.copy()
    bias[expert] = NEVER
    gate = layer.mlp.gate._replace(e_score_correction_bias=bias)
    return layer._replace(mlp=layer.mlp._replace(gate=gate))


def removal_rows(model: "Model", sample: Sample, rows: int = 8) -> list[RemovalRow]:
    """Each expert of each layer removed in turn, on some rows of each domain of `one_domain_rows`.

    The layers before it compute what they did, so they run once.
    """
    found: dict[tuple[int, int], dict[str, Cost]] = {}
    total = len(moe_layers(model)) * model.config.n_routed_experts * 5
    with operations(model) as ops, tqdm(total=total, desc="removing experts", unit="run", disable=None) as bar:
        for domain, batch in some_of_each(sample, rows):
            for place, cost in removal_costs(model, batch, ops):
                found.setdefault(place, {})[domain] = cost
                bar.update()
    return [_row(*place, costs) for place, costs in found.items()]


def removal_costs(
    model: "Model", batch: Batch, ops: Ops, layers: Sequence[int] | None = None
) -> Iterator[tuple[tuple[int, int], Cost]]:
    """For each (layer, expert) the mean increase of −log₂ p(target) when it is removed; `layers`: by default all."""
    params, config = model.params, model.config
    x, start = transformer(batch.ids, params, config, segments=batch.segments, ops=ops, stop_at=0)
    scored = batch.targets != IGNORE
    into = {0: x}  # the stream that goes into each layer
    counts = {}
    for i, out, saved in run_layers(x, 0, params, config, start.layout, ops):
        into[i + 1] = out
        if isinstance(params.layers[i].mlp, Moe):
            counts[i] = np.bincount(saved.mlp.router.routing.indices.reshape(-1), minlength=config.n_routed_experts)
    before = _bits(into.pop(len(params.layers)), params, config, batch, ops)
    for i in moe_layers(model) if layers is None else layers:
        for e in range(config.n_routed_experts):
            share = float(counts[i][e] / counts[i].sum())
            if not share and config.n_group == 1:  # nobody picked it, so nobody misses it
                yield (i, e), Cost(0.0, 0.0, 0.0)
                continue
            lacking = without_expert(params, config, i, e)
            after = _through(into[i], i, lacking, config, start.layout, batch, ops)
            difference = (after - before)[scored]
            yield (i, e), Cost(float(difference.mean()), float(difference.std() / np.sqrt(difference.size)), share)


def _through(
    x: Array, first: int, params: Params, config: Config, layout: Layout, batch: Batch, ops: Ops
) -> Array:  # [B, T, D] -> [B, T]
    for _, out, _ in run_layers(x, first, params, config, layout, ops):
        x = out
    return _bits(x, params, config, batch, ops)


def _bits(x: Array, params: Params, config: Config, batch: Batch, ops: Ops) -> Array:  # [B, T, D] -> [B, T]
    hidden = ops.rms_norm(x, params.norm.weight.astype(x.dtype, copy=False), config.rms_norm_eps)
    return token_bits(head(hidden, params, ops=ops), batch.targets)


def _row(layer: int, expert: int, costs: dict[str, Cost]) -> RemovalRow:
    worst = max(costs, key=lambda domain: costs[domain].bits)
    bits, error, _ = costs[worst]
    return RemovalRow(
        layer=layer,
        expert=expert,
        load=float(np.mean([cost.load for cost in costs.values()])),
        worst=worst,
        cost=bits,
        low=bits - Z * error,
        high=bits + Z * error,
        costs={domain: cost.bits for domain, cost in costs.items()},
        loads={domain: cost.load for domain, cost in costs.items()},
    )
