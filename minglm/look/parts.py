"""What each step of the forward pass reads besides arrays: tensors and config fields; and which of them differ between
two models."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minglm.formats.smallfloats import SmallFloats
from minglm.formats.storage import as_storage, cast
from minglm.model.ops import Array
from minglm.model.params import Params, map_arrays, walk

if TYPE_CHECKING:
    from minglm.api import Model

_NORM, _ROPE = ("rms_norm_eps",), ("rope_theta", "partial_rotary_factor", "rope_scaling")
_LAYER: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # tap -> (tensors, config fields), all of one layer
    "input_layernorm": (("input_layernorm.weight",), _NORM),
    "self_attn.q": (("self_attn.q_proj.weight", "self_attn.q_proj.bias"), ("attention_bias",)),
    "self_attn.k": (("self_attn.k_proj.weight", "self_attn.k_proj.bias"), ("attention_bias",)),
    "self_attn.v": (("self_attn.v_proj.weight", "self_attn.v_proj.bias"), ("attention_bias",)),
    "self_attn.q_norm": (("self_attn.q_norm.weight",), (*_NORM, "use_qk_norm")),
    "self_attn.k_norm": (("self_attn.k_norm.weight",), (*_NORM, "use_qk_norm")),
    "self_attn.q_rope": ((), _ROPE),
    "self_attn.k_rope": ((), _ROPE),
    "self_attn.scores": ((), ()),
    "self_attn.probs": ((), ()),
    "self_attn.heads": ((), ()),
    "self_attn.o": (("self_attn.o_proj.weight",), ()),
    "middle": ((), ()),
    "post_attention_layernorm": (("post_attention_layernorm.weight",), _NORM),
    "mlp.gate": (("mlp.gate_proj.weight",), ()),
    "mlp.up": (("mlp.up_proj.weight",), ()),
    "mlp.hidden": ((), ()),
    "mlp.router_logits": (("mlp.gate.weight",), ()),
    "mlp.router_scores": ((), ()),
    "mlp.biased_scores": (("mlp.gate.e_score_correction_bias",), ("n_group", "topk_group")),
    "mlp.expert_indices": ((), ()),
    "mlp.expert_weights": ((), ("norm_topk_prob", "routed_scaling_factor")),
    "mlp.experts.{e}.gate": (("mlp.experts.{e}.gate_proj.weight",), ()),
    "mlp.experts.{e}.up": (("mlp.experts.{e}.up_proj.weight",), ()),
    "mlp.experts.{e}.hidden": ((), ()),
    "mlp.experts.{e}.out": (("mlp.experts.{e}.down_proj.weight",), ()),
    "mlp.routed": ((), ()),
    "mlp.shared_experts.gate": (("mlp.shared_experts.gate_proj.weight",), ("n_shared_experts",)),
    "mlp.shared_experts.up": (("mlp.shared_experts.up_proj.weight",), ("n_shared_experts",)),
    "mlp.shared_experts.hidden": ((), ("n_shared_experts",)),
    "mlp.shared": (("mlp.shared_experts.down_proj.weight",), ("n_shared_experts",)),
    "mlp.out": (("mlp.down_proj.weight",), ("n_shared_experts",)),  # of a dense layer; else a sum of two taps
    "out": ((), ()),
}
_ENDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "embed_tokens": (("model.embed_tokens.weight",), ()),
    "norm": (("model.norm.weight",), _NORM),
    "logits": (("lm_head.weight", "model.embed_tokens.weight"), ("tie_word_embeddings",)),
}
_IDLE = ("initializer_range", "eos_token_id", "pad_token_id", "bos_token_id", "max_position_embeddings", "extra")


def reads(name: str, tied: bool = False) -> tuple[list[str], list[str]]:
    """The tensors (Hugging Face names) and the config fields that the step of this tap reads.

    `tied`: the head is the embedding.
    """
    if name in _ENDS:
        tensors, used = _ENDS[name]
        return list(tensors if name != "logits" else tensors[1:] if tied else tensors[:1]), list(used)
    m = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    assert m is not None, name
    e = re.search(r"experts\.(\d+)\.", m[2])
    tensors, used = _LAYER[re.sub(r"experts\.\d+\.", "experts.{e}.", m[2])]
    number = e[1] if e else ""
    return [f"model.layers.{m[1]}.{t.format(e=number)}" for t in tensors], list(used)


class Field(NamedTuple):
    """A config field that differs."""

    name: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.name} {self.a} against {self.b}"


class Tensor(NamedTuple):
    """A tensor that differs."""

    name: str
    error: float | None  # max |a − b| / max |a|; None: not in both with one shape
    what: str

    def __str__(self) -> str:
        return f"{self.name} ({self.what})"


def differing_fields(a: "Model", b: "Model") -> list[Field]:
    """Config fields that the computation reads and that differ."""
    pairs = [(f.name, getattr(a.config, f.name), getattr(b.config, f.name)) for f in fields(a.config)]
    return [Field(*pair) for pair in pairs if pair[0] not in _IDLE and pair[1] != pair[2]]


def differing_tensors(a: Params, b: Params) -> list[Tensor]:
    """Tensors that are not equal in every number, MTP layers included, in the order of a's."""
    ours, theirs = dict(walk(a)), dict(walk(b))
    return [
        Tensor(name, *found)
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if (found := _apart(ours.get(name), theirs.get(name))) is not None
    ]


def _apart(a: Any, b: Any) -> tuple[float | None, str] | None:
    if a is None or b is None:
        return None, f"only in {'A' if b is None else 'B'}"
    if a.shape != b.shape:
        return None, f"{list(a.shape)} against {list(b.shape)}"
    x, y = (_numbers(array) for array in (a, b))
    unequal = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    if not unequal.any():
        return None
    error = float(np.abs(x - y).max() / (np.abs(x).max() or 1))
    return error, f"{np.count_nonzero(unequal):,} of {x.size:,} numbers, up to {error:.1e} of the largest"


def _numbers(array: Any) -> Array:
    return np.asarray(array.astype(np.float64))


# -- how weights are stored --------------------------------------------------------------------------------------

WIDE = ("float64", "float32")


def storage_of(params: Params) -> str:
    """How the weights are kept: a name that `minglm.load(dtype=)` takes."""
    kinds: set[str] = set()

    def note(name: str, array: Any) -> Any:
        one = array[0] if "*" in name else array
        if isinstance(one, SmallFloats):
            kinds.add(one.kind)
        return array

    map_arrays(note, params)
    return min(kinds) if kinds else str(params.norm.weight.dtype.name)


def rounded_alike(a: Params, b: Params) -> tuple[Params, Params] | None:
    """Both as the narrower of the two stores them, so that what is left between them is no rounding of storage. None
    for two different narrow storages: neither's numbers are the other's, rounded."""
    kinds = storage_of(a), storage_of(b)
    if kinds[0] == kinds[1]:
        return a, b
    if kinds[0] in WIDE and (kinds[1] not in WIDE or kinds[1] == "float32"):
        return stored_as(a, kinds[1]), b
    if kinds[1] in WIDE:
        return a, stored_as(b, kinds[0])
    return None


def stored_as(params: Params, kind: str) -> Params:
    """The same weights, rounded as this storage does."""
    storage = as_storage(kind)
    return map_arrays(lambda name, array: cast(name, array, storage), params)


def all_tensors_of(name: str, tensors: list[Tensor]) -> Iterator[Tensor]:
    """Those of the layer that this tap lies in, or of the embedding before it: what a fused layer reads."""
    m = re.match(r"layers\.(\d+)\.", name)
    prefix = f"model.layers.{m[1]}." if m else "no such"
    first = m is not None and m[1] == "0"
    for tensor in tensors:
        if tensor.name.startswith(prefix) or (first and tensor.name == "model.embed_tokens.weight"):
            yield tensor
