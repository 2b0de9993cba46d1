"""Other open models with experts, beside GLM-4.5: sizes counted by `Config`, corrected where the models differ.

Qwen3 has neither shared expert nor selection bias. gpt-oss has biases on o_proj and in the experts, an attention sink
for each head, and a window in every other layer; its router's bias takes the place of our selection bias. DeepSeek-V3
and Kimi K2 have latent attention (MLA): queries pass a bottleneck, and of keys and values one vector and a few rotated
entries are kept for all heads. None of them can be run here.
"""

from typing import Any, NamedTuple

from minglm.config import PRESETS, Config
from minglm.look.tables import table


class Latent(NamedTuple):
    """Sizes of MLA. Of a head's key `head_dim` entries are not rotated, and its value has `head_dim`."""

    query: int = 1536  # q_lora_rank
    kept: int = 512  # kv_lora_rank
    turned: int = 64  # qk_rope_head_dim


class Family(NamedTuple):
    """One model: its sizes and what its makers say of them."""

    config: Config
    source: str  # where `config` comes from
    reported: tuple[float, float]  # B parameters, all and active, as its makers or the GLM-4.5 report say
    latent: Latent | None = None
    window: int = 0  # tokens that every other layer sees; 0: all layers see all
    selection_bias: bool = True  # or another bias of E numbers on the router
    expert_biases: bool = False  # and on o_proj, and one attention sink a head

    @property
    def total(self) -> int:
        """Every parameter but those of MTP layers."""
        counts = self.config.count_parameters()
        return counts.total - counts.mtp + self.config.num_hidden_layers * self._beyond(self.config.n_routed_experts)

    @property
    def active(self) -> int:
        """Multiplied to decode one token: layers with K experts, and the head."""
        c = self.config
        return c.count_parameters().active + c.num_hidden_layers * self._beyond(c.num_experts_per_tok)

    @property
    def mtp(self) -> int:
        """Of one MTP layer as GLM-4.5 and DeepSeek-V3 have it, without embedding and head."""
        one = self.config.replace(num_nextn_predict_layers=1)
        return one.count_parameters().mtp + self._beyond(one.n_routed_experts)

    def flops_per_token(self, context: int) -> int:
        """To decode one token with `context` tokens before it: two per active weight, and two for each number that a
        head multiplies for scores and values. MLA multiplies the kept vectors themselves (weights absorbed)."""
        c, kept = self.config, self.latent
        of_key = 2 * kept.kept + kept.turned if kept else 2 * c.head_dim
        return 2 * self.active + 2 * c.num_attention_heads * of_key * self._keys(context)

    def cache_bytes(self, context: int, bytes_per_number: int = 2) -> int:
        """What `context` tokens leave in the cache, over all layers (bf16: 2 bytes a number)."""
        c, kept = self.config, self.latent
        numbers = kept.kept + kept.turned if kept else 2 * c.num_key_value_heads * c.head_dim
        return numbers * bytes_per_number * self._keys(context)

    def _keys(self, context: int) -> int:
        """Tokens in view, summed over the layers."""
        L = self.config.num_hidden_layers
        return L // 2 * (context + min(context, self.window)) if self.window else L * context

    def _beyond(self, experts: int) -> int:
        """Parameters of a layer that `Config` does not count, or counts too many; with so many of its experts."""
        c = self.config
        D, H, d = c.hidden_size, c.num_attention_heads, c.head_dim
        more = 0 if self.selection_bias else -c.n_routed_experts
        if self.expert_biases:
            more += D + H + experts * (2 * c.moe_intermediate_size + D)
        if self.latent:
            m = self.latent
            queries = D * m.query + m.query + m.query * H * (d + m.turned)  # down, norm, up
            keys_values = D * (m.kept + m.turned) + m.kept + m.kept * H * 2 * d  # down, norm, up
            more += queries + keys_values + H * d * D - D * d * (2 * H + 2 * c.num_key_value_heads)
        return more


_NAMES = (
    "vocab_size hidden_size num_hidden_layers intermediate_size num_attention_heads num_key_value_heads head_dim "
    "n_routed_experts num_experts_per_tok moe_intermediate_size n_shared_experts first_k_dense_replace"
).split()


def _config(*sizes: int, **switches: bool) -> Config:
    values: dict[str, Any] = {**dict(zip(_NAMES, sizes, strict=True)), **switches}
    return Config(**values, num_nextn_predict_layers=0)


_REPORT = "table 1 of the GLM-4.5 report"
FAMILIES: dict[str, Family] = {
    "GLM-4.5": Family(PRESETS["GLM-4.5"], _REPORT, (355, 32)),
    "GLM-4.6": Family(PRESETS["GLM-4.6"], "zai-org/GLM-4.6: copies of config.json", (355, 32)),
    "GLM-4.7": Family(PRESETS["GLM-4.7"], "zai-org/GLM-4.7-FP8: config.json", (355, 32)),
    "GLM-4.5-Air": Family(PRESETS["GLM-4.5-Air"], f"{_REPORT}; copies of config.json", (106, 12)),
    "DeepSeek-V3": Family(
        _config(129280, 7168, 61, 18432, 128, 128, 128, 256, 8, 2048, 1, 3),
        "deepseek-ai/DeepSeek-V3: the defaults of transformers' DeepseekV3Config",
        (671, 37),
        Latent(),
    ),
    "Kimi K2": Family(
        _config(163840, 7168, 61, 18432, 64, 64, 128, 384, 8, 2048, 1, 1),
        "moonshotai/Kimi-K2-Instruct: its README; copies of config.json for vocabulary, dense width and ranks",
        (1043, 32),
        Latent(),
    ),
    "Qwen3-235B-A22B": Family(
        _config(151936, 4096, 94, 12288, 64, 4, 128, 128, 8, 1536, 0, 0, use_qk_norm=True),
        "Qwen/Qwen3-235B-A22B: training scripts that name it, not its config.json",
        (235, 22),
        selection_bias=False,
    ),
    "gpt-oss-120b": Family(
        _config(201088, 2880, 36, 2880, 64, 8, 64, 128, 4, 2880, 0, 0, attention_bias=True),
        "openai/gpt-oss-120b: gpt_oss/torch/model.py of openai/gpt-oss",
        (117, 5.1),
        window=128,
        expert_biases=True,
    ),
}


# -- tables: docs/numbers.md ------------------------------------------------------------------------------------------


def parts(config: Config) -> dict[str, tuple[int, int]]:
    """Where a glm4_moe model's parameters are: part -> (all, those that one token multiplies). MTP layers left out."""
    c, n, L, dense = config, config.count_parameters(), config.num_hidden_layers, config.first_k_dense_replace
    D, H, G, d = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    biases = c.attention_bias * d * (H + 2 * G)
    attention = L * (D * d * (2 * H + 2 * G) + biases + c.use_qk_norm * 2 * d)
    experts = (L - dense) * 3 * D * c.moe_intermediate_size  # one in each layer
    return {
        "embedding": (n.embedding, 0),
        "head": (n.head, n.head or n.embedding),
        "attention": (attention, attention),
        "MLPs of the dense layers": (dense * 3 * D * c.intermediate_size,) * 2,
        "routed experts": (c.n_routed_experts * experts, c.num_experts_per_tok * experts),
        "shared experts": (c.n_shared_experts * experts,) * 2,
        "routers and norms": ((L - dense) * c.n_routed_experts * (D + 1) + (2 * L + 1) * D,) * 2,
    }


def parts_table(config: Config) -> str:
    """The same as a table in millions, with each part's share of the active."""
    active = config.count_parameters().active
    rows = [(part, *map(_millions, pair), _percent(pair[1] / active)) for part, pair in parts(config).items()]
    return table(rows, ("part", "M", "active M", "of the active"))


def sizes_table() -> str:
    """Every model of `FAMILIES`: parameters, depth and width."""
    rows = []
    for name, f in FAMILIES.items():
        c = f.config
        picks = f"{c.num_experts_per_tok} of {c.n_routed_experts}"
        sizes = (c.num_hidden_layers, c.hidden_size, c.num_attention_heads, picks, c.moe_intermediate_size)
        rows.append((name, _millions(f.total), _millions(f.active), _percent(f.active / f.total), *sizes))
    return table(rows, ("model", "total M", "active M", "share", "L", "D", "H", "experts", "F"))


def reported_table() -> str:
    """Our counts beside those reported, which are rounded and follow rules of their own."""
    rows = []
    for name, f in FAMILIES.items():
        pairs = [(given, mine / 1e9) for given, mine in zip(f.reported, (f.total, f.active), strict=True)]
        rows.append(
            (name, *(x for given, mine in pairs for x in (f"{given:6g}", f"{mine:7.2f}", f"{mine / given - 1:+.1%}")))
        )
    return table(rows, ("model", "reported B", "total B", "off by", "reported B", "active B", "off by"))


def cost_table(context: int) -> str:
    """What one token costs each model, alone and after `context` others; and the cache of so many."""
    rows = []
    for name, f in FAMILIES.items():
        flops = (f"{f.flops_per_token(n) / 1e9:5,.0f}" for n in (0, context))
        rows.append((name, *flops, f"{f.cache_bytes(1):7,}", f"{f.cache_bytes(context) / 2**30:3.0f}"))
    return table(rows, ("model", "GFLOP", f"GFLOP after {context:,}", "cache bytes", f"GiB at {context:,}"))


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:9,.0f}"


def _percent(share: float) -> str:
    return f"{share:5.0%}"
