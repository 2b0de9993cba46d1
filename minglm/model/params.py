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
    """The three matrices of expert e: the one way to reach an expert, stacked in memory or mapped from files."""
    return params.gate_proj[e], params.up_proj[e], params.down_proj[e]


# -- making ------------------------------------------------------------------------------------------------------

Make = Callable[[str, tuple[int, ...]], Array]


def build(config: Config, make: Make, mtp_own_ends: bool = False) -> Params:
    """Every tensor of a model, made by `make(stacked name, shape)` in the order of the forward pass.

    `mtp_own_ends`: whether MTP layers have their own embedding and head (GLM-4.5's files do, GLM-4.6's do not).
    """
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    return Params(
        embed_tokens=Weight(make("model.embed_tokens.weight", (V, D))),
        layers=tuple(_build_layer(config, make, i) for i in range(L)),
        norm=Weight(make("model.norm.weight", (D,))),
        lm_head=None if config.tie_word_embeddings else Weight(make("lm_head.weight", (V, D))),
        mtp=tuple(_build_mtp(config, make, L + i, mtp_own_ends) for i in range(config.num_nextn_predict_layers)),
    )


def _build_mtp(config: Config, make: Make, index: int, own_ends: bool) -> Mtp:
    D, V, at = config.hidden_size, config.vocab_size, f"model.layers.{index}"
    return Mtp(
        enorm=Weight(make(f"{at}.enorm.weight", (D,))),
        hnorm=Weight(make(f"{at}.hnorm.weight", (D,))),
        eh_proj=Weight(make(f"{at}.eh_proj.weight", (D, 2 * D))),
        block=_build_layer(config, make, index),
        shared_head=SharedHead(
            norm=Weight(make(f"{at}.shared_head.norm.weight", (D,))),
            head=Weight(make(f"{at}.shared_head.head.weight", (V, D))) if own_ends else None,
        ),
        embed_tokens=Weight(make(f"{at}.embed_tokens.weight", (V, D))) if own_ends else None,
    )


def _build_layer(config: Config, make: Make, index: int) -> Layer:
    D, at = config.hidden_size, f"model.layers.{index}"
    return Layer(
        input_layernorm=Weight(make(f"{at}.input_layernorm.weight", (D,))),
        self_attn=_build_attention(config, make, f"{at}.self_attn"),
        post_attention_layernorm=Weight(make(f"{at}.post_attention_layernorm.weight", (D,))),
        mlp=(
            _build_moe(config, make, f"{at}.mlp")
            if config.is_moe(index)
            else _build_mlp(D, config.intermediate_size, make, f"{at}.mlp")
        ),
    )


def _build_attention(config: Config, make: Make, at: str) -> Attention:
    D, d = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * d, config.num_key_value_heads * d

    def projection(name: str, rows: int) -> Linear:
        weight = make(f"{at}.{name}.weight", (rows, D))
        return Linear(weight, make(f"{at}.{name}.bias", (rows,)) if config.attention_bias else None)

    def norm(name: str) -> Weight | None:
        return Weight(make(f"{at}.{name}.weight", (d,))) if config.use_qk_norm else None

    return Attention(
        q_proj=projection("q_proj", q_size),
        k_proj=projection("k_proj", kv_size),
        v_proj=projection("v_proj", kv_size),
        o_proj=Linear(make(f"{at}.o_proj.weight", (D, q_size)), None),
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
    )


def _build_mlp(D: int, F: int, make: Make, at: str) -> Mlp:
    return Mlp(
        gate_proj=Weight(make(f"{at}.gate_proj.weight", (F, D))),
        up_proj=Weight(make(f"{at}.up_proj.weight", (F, D))),
        down_proj=Weight(make(f"{at}.down_proj.weight", (D, F))),
    )


def _build_moe(config: Config, make: Make, at: str) -> Moe:
    D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    shared_F = config.shared_intermediate_size
    return Moe(
        gate=Router(
            weight=make(f"{at}.gate.weight", (E, D)),
            e_score_correction_bias=make(f"{at}.gate.e_score_correction_bias", (E,)),
        ),
        experts=Experts(
            gate_proj=make(f"{at}.experts.*.gate_proj.weight", (E, F, D)),
            up_proj=make(f"{at}.experts.*.up_proj.weight", (E, F, D)),
            down_proj=make(f"{at}.experts.*.down_proj.weight", (E, D, F)),
        ),
        shared_experts=_build_mlp(D, shared_F, make, f"{at}.shared_experts") if shared_F else None,
    )


def init_params(config: Config, rng: np.random.Generator, dtype: Any = np.float32) -> Params:
    """Fresh weights as GLM-4.5's authors gave them: normal with standard deviation `initializer_range` (0.02), zero
    biases, norm weights of one; the projections that write into the residual stream (o_proj, down_proj) scaled by
    1/√(2·L), because 2·L of them add up there."""
    std, residual_std = (config.initializer_range, config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)

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


def walk_stacked(params: Params) -> Iterator[tuple[str, Array]]:
    """Every array as it stands in memory: (stacked name, array)."""
    found: list[tuple[str, Array]] = []

    def note(name: str, array: Array) -> Array:
        found.append((name, array))
        return array

    map_arrays(note, params)
    yield from found


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


def in_compute_dtype(record: Any, dtype: Any) -> Any:
    """The record in the dtype of the computation; arrays that have it already are passed on as they are.

    Weights stored in fewer bits are widened here, one layer at a time, just before they are used.
    """
    return map_record(lambda name, array: array.astype(dtype, copy=False), record)


def compute_dtype(params: Params) -> Any:
    """float64 for float64 weights, float32 for all others."""
    return np.float64 if params.norm.weight.dtype == np.float64 else np.float32
