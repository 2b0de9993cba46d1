"""The sizes and switches of one glm4_moe model: read from and written to a Hugging Face config.json.

Field names are Hugging Face's. Two spellings are in the wild and both are read: rotary settings at the top level
(`rope_theta`, `rope_scaling`, `partial_rotary_factor`) or gathered under `rope_parameters`; and
`num_nextn_predict_layers` or `num_mtp_layers`. The first of each is written, as the released GLM-4.5 files do.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

ROPE_TYPES = ("linear", "yarn")  # ways to stretch; "default", no stretching, is rope_scaling = None


@dataclass(frozen=True)
class Config:
    """One model's sizes and switches. Making one checks every rule: a Config that exists is a valid one.

    Raises ValueError naming the field, its value and the rule it breaks.
    """

    vocab_size: int
    hidden_size: int  # D
    num_hidden_layers: int  # L, without the multi-token-prediction layers
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # d; H·d need not equal D
    intermediate_size: int  # hidden size of the dense layers' MLP
    moe_intermediate_size: int  # F, hidden size of one expert
    n_routed_experts: int  # E
    num_experts_per_tok: int  # K
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1  # this many first layers have a dense MLP
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    use_qk_norm: bool = False
    attention_bias: bool = False  # on q, k and v; o_proj never has one
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # rope_type, factor and, for yarn, more
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)  # unknown keys, kept for writing back

    # -- derived sizes ---------------------------------------------------------------------------------------

    @property
    def rotary_dim(self) -> int:
        """How many of a head's d entries are rotated (the first ones)."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def shared_intermediate_size(self) -> int:
        """Hidden size of the shared expert: one MLP as wide as all shared experts together."""
        return self.moe_intermediate_size * self.n_shared_experts

    def is_moe(self, layer: int) -> bool:
        """Whether this layer has experts. Multi-token-prediction layers (numbered from L on) always do."""
        return layer >= self.first_k_dense_replace

    # -- checks ----------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is bool:
                _require(isinstance(value, bool), f.name, value, "must be true or false")
            elif f.type is float:
                _require(_is_number(value) and value > 0, f.name, value, "must be a finite number above 0")
            elif f.type is int:
                least = 0 if f.name in _MAY_BE_ZERO else 1
                holds = _is_int(value) and least <= value < 2**31
                _require(holds, f.name, value, f"must be a whole number from {least} to 2³¹ − 1")
        self._check_attention()
        self._check_rope_scaling()
        self._check_experts()
        self._check_tokens()

    def _check_attention(self) -> None:
        heads, kv_heads, factor = self.num_attention_heads, self.num_key_value_heads, self.partial_rotary_factor
        rule = f"must be a multiple of num_key_value_heads = {kv_heads}"
        _require(heads % kv_heads == 0, "num_attention_heads", heads, rule)
        _require(factor <= 1, "partial_rotary_factor", factor, "must be in (0, 1]")
        rotated = self.rotary_dim
        rule = f"rotates {rotated} of head_dim = {self.head_dim} entries; must be an even number, 2 or more"
        _require(rotated > 0 and rotated % 2 == 0, "partial_rotary_factor", factor, rule)

    def _check_rope_scaling(self) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        _require(isinstance(scaling, Mapping), "rope_scaling", scaling, "must be an object or null")
        kind, factor = scaling.get("rope_type"), scaling.get("factor", 0)
        rule = f"must be one of {', '.join(ROPE_TYPES)} (or rope_scaling null, for default)"
        _require(kind in ROPE_TYPES, "rope_scaling.rope_type", kind, rule)
        _require(_is_number(factor) and factor > 0, "rope_scaling.factor", factor, "must be a finite number above 0")
        if kind == "yarn":
            _require(self.rope_theta > 1, "rope_theta", self.rope_theta, "must be above 1 for yarn")
            for name in _YARN_OPTIONS:
                value = scaling.get(name)  # null, and for all but attention_factor 0, stand for the usual value
                holds = value is None or (_is_number(value) and value >= 0 and (value or name != "attention_factor"))
                _require(holds, f"rope_scaling.{name}", value, "must be a finite number above 0, or null")
            whole = scaling.get("truncate", True)
            _require(isinstance(whole, bool), "rope_scaling.truncate", whole, "must be true or false")

    def _check_experts(self) -> None:
        E, K = self.n_routed_experts, self.num_experts_per_tok
        groups, kept = self.n_group, self.topk_group
        per_group = E // groups
        _require(E % groups == 0, "n_routed_experts", E, f"must be a multiple of n_group = {groups}")
        rule = f"gives {per_group} expert per group (n_group = {groups}); must be 2 or more, because a group is "
        _require(per_group >= 2, "n_routed_experts", E, rule + "judged by its two best experts")
        _require(kept <= groups, "topk_group", kept, f"must be at most n_group = {groups}")
        rule = f"must be at most topk_group · experts per group = {kept} · {per_group} = {kept * per_group}"
        _require(kept * per_group >= K, "num_experts_per_tok", K, rule)
        dense, layers = self.first_k_dense_replace, self.num_hidden_layers
        _require(dense <= layers, "first_k_dense_replace", dense, f"must be at most num_hidden_layers = {layers}")

    def _check_tokens(self) -> None:
        ends = self.eos_token_id
        _require(isinstance(ends, tuple), "eos_token_id", ends, "must be a tuple of token ids")
        optional = [(n, i) for n in ("pad_token_id", "bos_token_id") if (i := getattr(self, n)) is not None]
        rule = f"must be a token id below vocab_size = {self.vocab_size}"
        for name, value in [("eos_token_id", i) for i in ends] + optional:
            _require(_is_int(value) and 0 <= value < self.vocab_size, name, value, rule)

    # -- config.json -----------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Build from the contents of a config.json, either spelling. Raises ValueError for what does not fit."""
        values = dict(values)
        kind = values.pop("model_type", None)
        _require(kind == "glm4_moe", "model_type", kind, "must be 'glm4_moe'; other model families do not load here")
        for other, wanted in _ALIASES.items():
            if other in values:
                value = values.pop(other)
                same = values.setdefault(wanted, value)
                _require(same == value, other, value, f"must equal {wanted} = {same}")
        for name, allowed in _FIXED.items():
            _require(values.get(name, allowed) == allowed, name, values.get(name), f"must be {allowed!r}")
        values.pop("hidden_act", None)
        _gather_rope(values)
        values["eos_token_id"] = _as_tuple(values.get("eos_token_id"))
        if values.get("head_dim") is None:
            values["head_dim"] = _default_head_dim(values)

        known = {f.name: values.pop(f.name) for f in fields(cls) if f.name != "extra" and f.name in values}
        missing = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING and f.name not in known]
        if missing:
            raise ValueError(f"config: missing {', '.join(missing)}; add them to config.json")
        return cls(**known, extra=values)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that Hugging Face transformers, vLLM and SGLang read."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        values["eos_token_id"] = list(self.eos_token_id)
        values["rope_scaling"] = None if self.rope_scaling is None else dict(self.rope_scaling)
        architectures = {"architectures": ["Glm4MoeForCausalLM"]}
        return {"model_type": "glm4_moe", **architectures, **self.extra, **values, "hidden_act": "silu"}

    @classmethod
    def load(cls, path: str | Path) -> "Config":
        """Read a config.json, or the one in a folder. Raises ValueError with the path."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: cannot read the model's config: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: wanted a JSON object, got {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_json(self) -> str:
        """The text of a config.json."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    # -- counts ----------------------------------------------------------------------------------------------

    def count_parameters(self) -> "Counts":
        """Count by formula; see `Counts`. A test compares with the arrays of a real model."""
        D, H, G, d = self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        attention = D * d * (H + 2 * G) + H * d * D
        attention += self.attention_bias * d * (H + 2 * G) + self.use_qk_norm * 2 * d
        norms = 2 * D
        expert = 3 * D * self.moe_intermediate_size
        shared = 3 * D * self.shared_intermediate_size
        router = self.n_routed_experts * (D + 1)  # the gate and its selection bias
        dense_layer = norms + attention + 3 * D * self.intermediate_size
        moe_fixed = norms + attention + router + shared
        moe_layer = moe_fixed + self.n_routed_experts * expert
        moe_active = moe_fixed + self.num_experts_per_tok * expert

        dense = self.first_k_dense_replace
        sparse = self.num_hidden_layers - dense
        mtp_extra = 3 * D + 2 * D * D  # enorm, hnorm, shared_head.norm; eh_proj
        mtp_layers = self.num_nextn_predict_layers
        return Counts(
            embedding=self.vocab_size * D,
            head=0 if self.tie_word_embeddings else self.vocab_size * D,
            trunk=dense * dense_layer + sparse * moe_layer + D,
            trunk_active=dense * dense_layer + sparse * moe_active + D,
            mtp=mtp_layers * (moe_layer + mtp_extra),
            mtp_active=mtp_layers * (moe_active + mtp_extra),
        )

    def flops_per_token(self, context: int) -> int:
        """Multiply–adds ×2 to compute one token's logits with `context` keys in view: two per active weight of
        the trunk and the head, and 4·H·d per key and layer for scores and values (norms and softmax left out)."""
        counts = self.count_parameters()
        head = self.vocab_size * self.hidden_size
        per_key = 4 * self.num_attention_heads * self.head_dim * self.num_hidden_layers
        return 2 * (counts.trunk_active + head) + per_key * context

    def kv_bytes_per_token(self, bytes_per_number: int = 2) -> int:
        """Bytes of keys and values that one token leaves in the cache, over all layers (bf16: 2 a number)."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_number


class Counts(NamedTuple):
    """Numbers of parameters. `active` ones take part in computing one token."""

    embedding: int
    head: int
    trunk: int
    trunk_active: int
    mtp: int
    mtp_active: int

    @property
    def total(self) -> int:
        """Every parameter in the folder; copies of embedding and head that MTP layers may own are left out."""
        return self.embedding + self.head + self.trunk + self.mtp

    @property
    def active(self) -> int:
        """Used for one token of plain decoding: trunk and head (an embedding is looked up, not multiplied)."""
        return self.trunk_active + (self.head or self.embedding)

    @property
    def report_total(self) -> int:
        """As the GLM-4.5 report counts (arXiv 2508.06471, table 1): with the MTP layer, without embedding and head."""
        return self.trunk + self.mtp

    @property
    def report_active(self) -> int:
        """The active parameters by the same rule."""
        return self.trunk_active + self.mtp_active


# ---------------------------------------------------------------------------------------------------------------
# Reading Hugging Face's spellings

_MAY_BE_ZERO = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
_YARN_OPTIONS = (
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
_ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
_FIXED = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"config: {name} = {value!r} {rule}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """A number that a float can hold: not NaN, not infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _default_head_dim(values: Mapping[str, Any]) -> int:
    hidden, heads = values.get("hidden_size", 0), values.get("num_attention_heads", 1)
    divisible = _is_int(hidden) and _is_int(heads) and heads > 0 and hidden % heads == 0
    rule = f"is missing and hidden_size = {hidden!r} is no multiple of num_attention_heads = {heads!r}; set head_dim"
    _require(divisible, "head_dim", None, rule)
    return int(hidden // heads)


def _gather_rope(values: dict[str, Any]) -> None:
    """Bring both spellings of the rotary settings to `rope_theta`, `partial_rotary_factor` and `rope_scaling`."""
    new, old = values.pop("rope_parameters", None), values.pop("rope_scaling", None)
    for name, given in (("rope_parameters", new), ("rope_scaling", old)):
        _require(given is None or isinstance(given, Mapping), name, given, "must be an object or null")
    scaling = {**(old or {}), **(new or {})}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            values[name] = scaling.pop(name)
        elif values.get(name) is None:
            values.pop(name, None)
    old_kind, kind = scaling.pop("type", None), scaling.pop("rope_type", None)
    kind = old_kind if kind is None else kind
    values["rope_scaling"] = None if kind in (None, "default") else {"rope_type": kind, **scaling}


# ---------------------------------------------------------------------------------------------------------------
# Presets

_GLM_45 = Config(
    vocab_size=151552,
    hidden_size=5120,
    num_hidden_layers=92,
    num_attention_heads=96,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    routed_scaling_factor=2.5,
    use_qk_norm=True,
    attention_bias=True,
    rope_theta=1e6,
    max_position_embeddings=131072,
    eos_token_id=(151329, 151336, 151338),
    pad_token_id=151329,
)

PRESETS: dict[str, Config] = {
    "GLM-4.5": _GLM_45,
    "GLM-4.5-Air": _GLM_45.replace(
        hidden_size=4096,
        num_hidden_layers=46,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=128,
        first_k_dense_replace=1,
        routed_scaling_factor=1.0,
        use_qk_norm=False,
    ),
    "GLM-4.6": _GLM_45.replace(max_position_embeddings=202752),
    "GLM-4.7": _GLM_45.replace(max_position_embeddings=202752),
    # The checkpoints trained here, every feature on.
    "glm-tiny": Config(
        vocab_size=2048,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        moe_intermediate_size=96,
        n_routed_experts=16,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=True,
        rope_theta=10000.0,
        max_position_embeddings=1024,
    ),
    "glm-nano": Config(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=True,
        rope_theta=10000.0,
        max_position_embeddings=1024,
    ),
    # The smallest with every optional part: groups, shared experts, q/k norm, biases, two MTP layers. For tests,
    # derivations and the debugger.
    "micro": Config(
        vocab_size=61,
        hidden_size=20,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=28,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
        attention_bias=True,
        rope_theta=100.0,
        rms_norm_eps=1e-3,
        max_position_embeddings=64,
        num_nextn_predict_layers=2,
    ),
}
