"""The records that hold a model's weights, and the ways to make, name and map them.

The path through the records is the tensor's Hugging Face name: `params.layers[3].self_attn.q_proj.weight` is
`model.layers.3.self_attn.q_proj.weight` in the file. A gradient record has the type of its parameter record.
Weights are [out, in]. The experts of a layer are stacked in memory and separate on disk; in a stacked name `*` stands
for the expert's number.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minglm.config import Config
from minglm.model.ops import Array


class Weight(NamedTuple):
    weight: Array


class Linear(NamedTuple):
    weight: Array  # [out, in]
    bias: Array | None  # [out]


class Attention(NamedTuple):
    q_proj: Linear  # [H·d, D]
    k_proj: Linear  # [G·d, D]
    v_proj: Linear  # [G·d, D]
    o_proj: Linear  # [D, H·d], never a bias
    q_norm: Weight | None  # [d], shared by all heads
    k_norm: Weight | None  # [d]


class Mlp(NamedTuple):
    gate_proj: Weight  # [F, D]
    up_proj: Weight  # [F, D]
    down_proj: Weight  # [D, F]


class Router(NamedTuple):
    weight: Array  # [E, D]
    e_score_correction_bias: Array  # [E], moves by the balancing rule, never by a gradient


class Experts(NamedTuple):
    gate_proj: Array  # [E, F, D]
    up_proj: Array  # [E, F, D]
    down_proj: Array  # [E, D, F]


class Moe(NamedTuple):
    gate: Router
    experts: Experts
    shared_experts: Mlp | None


class Layer(NamedTuple):
    input_layernorm: Weight  # [D]
    self_attn: Attention
    post_attention_layernorm: Weight  # [D]
    mlp: Mlp | Moe


class SharedHead(NamedTuple):
    norm: Weight  # [D]
    head: Weight | None  # [V, D]; None: the main head serves


class Mtp(NamedTuple):
    """A multi-token-prediction layer, numbered after the last decoder layer."""

    enorm: Weight  # [D], for the embedding of the next token
    hnorm: Weight  # [D], for the hidden state
    eh_proj: Weight  # [D, 2·D]
    block: Layer  # in the file its tensors stand beside enorm: "block" adds nothing to a name
    shared_head: SharedHead
    embed_tokens: Weight | None  # [V, D]; None: the main embedding serves


class Params(NamedTuple):
    embed_tokens: Weight  # [V, D]
    layers: tuple[Layer, ...]
    norm: Weight  # [D]
    lm_head: Weight | None  # [V, D]; None: tied to the embedding
    mtp: tuple[Mtp, ...]


def expert(params: Experts, e: int) -> tuple[Array, Array, Array]:
    """The three matrices of expert e: the one way to reach an expert."""
    return params.gate_proj[e], params.up_proj[e], params.down_proj[e]


# -- making ------------------------------------------------------------------------------------------------------

Make = Callable[[str, tuple[int, ...]], Array]


def build(config: Config, make: Make, mtp_own_ends: bool = False) -> Params:
    """Every tensor of a model, made by `make(stacked name, shape)`.

    `mtp_own_ends`: whether MTP layers have their own embedding and head (GLM-4.5's files do, GLM-4.6's do not).
    """
    return map_arrays(lambda name, empty: make(name, empty.shape), shapes(config, mtp_own_ends))


def shapes(config: Config, mtp_own_ends: bool = False) -> Params:
    """A model of zeros that take no memory: its records, names and shapes without its numbers."""
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    return Params(
        embed_tokens=_weight(V, D),
        layers=tuple(_layer(config, i) for i in range(L)),
        norm=_weight(D),
        lm_head=None if config.tie_word_embeddings else _weight(V, D),
        mtp=tuple(_mtp(config, L + i, mtp_own_ends) for i in range(config.num_nextn_predict_layers)),
    )


def _empty(*shape: int) -> Array:
    return np.broadcast_to(np.float32(0), shape)


def _weight(*shape: int) -> Weight:
    return Weight(_empty(*shape))


def _mtp(config: Config, index: int, own_ends: bool) -> Mtp:
    D, V = config.hidden_size, config.vocab_size
    return Mtp(
        enorm=_weight(D),
        hnorm=_weight(D),
        eh_proj=_weight(D, 2 * D),
        block=_layer(config, index),
        shared_head=SharedHead(_weight(D), _weight(V, D) if own_ends else None),
        embed_tokens=_weight(V, D) if own_ends else None,
    )


def _layer(config: Config, index: int) -> Layer:
    D = config.hidden_size
    mlp = _moe(config) if config.is_moe(index) else _mlp(D, config.intermediate_size)
    return Layer(_weight(D), _attention(config), _weight(D), mlp)


def _attention(config: Config) -> Attention:
    D, d = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * d, config.num_key_value_heads * d
    q, kv = (Linear(_empty(n, D), _empty(n) if config.attention_bias else None) for n in (q_size, kv_size))
    norm = _weight(d) if config.use_qk_norm else None
    return Attention(q_proj=q, k_proj=kv, v_proj=kv, o_proj=Linear(_empty(D, q_size), None), q_norm=norm, k_norm=norm)


def _mlp(D: int, F: int) -> Mlp:
    return Mlp(gate_proj=_weight(F, D), up_proj=_weight(F, D), down_proj=_weight(D, F))


def _moe(config: Config) -> Moe:
    D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    shared_F = config.shared_intermediate_size
    return Moe(
        gate=Router(_empty(E, D), _empty(E)),
        experts=Experts(gate_proj=_empty(E, F, D), up_proj=_empty(E, F, D), down_proj=_empty(E, D, F)),
        shared_experts=_mlp(D, shared_F) if shared_F else None,
    )


def init_params(config: Config, rng: np.random.Generator, dtype: Any = np.float32) -> Params:
    """Fresh weights: normal with standard deviation `initializer_range` (0.02), zero biases, norm weights of one.

    The projections that write into the residual stream (o_proj, down_proj) are scaled by 1/√(2·L), because 2·L of them
    add up there: GPT-2's rule, which GLM-4.5's authors named when asked (the report is silent).
    """
    std = config.initializer_range
    residual_std = std / (2 * config.num_hidden_layers) ** 0.5

    def make(name: str, shape: tuple[int, ...]) -> Array:
        if is_norm(name):
            return np.ones(shape, dtype)
        if name.endswith("bias"):
            return np.zeros(shape, dtype)
        writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        return (rng.standard_normal(shape) * (residual_std if writes_residual else std)).astype(dtype)

    return build(config, make)


def is_norm(name: str) -> bool:
    """Whether this is the name of an RMSNorm weight."""
    return name.endswith("norm.weight")


# -- naming and mapping ------------------------------------------------------------------------------------------


def walk(params: Params) -> Iterator[tuple[str, Array]]:
    """Every tensor as it stands on disk: (Hugging Face name, array), one per expert. Arrays are views, not copies."""
    for name, array in walk_stacked(params):
        if "*" in name:
            for e in range(len(array)):
                yield name.replace("*", str(e)), array[e]
        else:
            yield name, array


def walk_stacked(params: Params) -> list[tuple[str, Array]]:
    """Every array as it stands in memory: (stacked name, array)."""
    found: list[tuple[str, Array]] = []

    def note(name: str, array: Array) -> Array:
        found.append((name, array))
        return array

    map_arrays(note, params)
    return found


def map_arrays(f: Callable[[str, Array], Array], params: Params) -> Params:
    """The same records with `f(stacked name, array)` in place of each array, in the order of `walk_stacked`."""
    L = len(params.layers)
    return Params(
        embed_tokens=map_record(f, params.embed_tokens, "model.embed_tokens"),
        layers=tuple(map_record(f, layer, f"model.layers.{i}") for i, layer in enumerate(params.layers)),
        norm=map_record(f, params.norm, "model.norm"),
        lm_head=map_record(f, params.lm_head, "lm_head"),
        mtp=tuple(map_record(f, mtp, f"model.layers.{L + i}") for i, mtp in enumerate(params.mtp)),
    )


def map_record(f: Callable[[str, Array], Array], record: Any, name: str = "") -> Any:
    """`map_arrays` for one record whose name is known; None stays None."""
    if record is None:
        return None
    if isinstance(record, Experts):
        return Experts(*(f(f"{name}.*.{part}.weight", a) for part, a in record._asdict().items()))
    if isinstance(record, tuple):
        children = record._asdict().items()  # type: ignore[attr-defined]
        return type(record)(*(map_record(f, r, name if k == "block" else f"{name}.{k}") for k, r in children))
    return f(name, record)


def zeros_like(record: Any) -> Any:
    """The same record (or records) with zeros: where gradients and moments start."""
    if isinstance(record, Params):
        return map_arrays(lambda name, array: np.zeros_like(array), record)
    return map_record(lambda name, array: np.zeros_like(array), record)


def in_compute_dtype(record: Any, stored: Any, dtype: Any) -> Any:
    """The record in the dtype of the computation, given that its weights are `stored` in another: then they are
    widened here, one layer at a time, just before they are used."""
    if stored == dtype:
        return record
    return map_record(lambda name, array: array.astype(dtype, copy=False), record)


def compute_dtype(params: Params) -> Any:
    """float64 for float64 weights, float32 for all others."""
    return np.float64 if params.norm.weight.dtype == np.float64 else np.float32
