"""The steps of a forward pass by name: the published table of taps.

`python -m minglm.look.taps` prints it as the page docs/taps.md.
"""

import sys
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from minglm.config import Config

# -- the table of taps -------------------------------------------------------------------------------------------

AXES = {
    "B": "batch",
    "T": "query positions; in an MTP layer of depth k there are k fewer",
    "S": "key positions; without a cache, T",
    "N": "B·T tokens, flattened",
    "n": "tokens that were sent to this expert",
    "D": "hidden size",
    "H": "query heads",
    "G": "key/value heads",
    "d": "size of a head",
    "E": "routed experts",
    "K": "experts picked per token",
    "F": "expert hidden size (moe_intermediate_size)",
    "I": "hidden size of the dense MLP (intermediate_size)",
    "J": "hidden size of the shared expert (F · n_shared_experts)",
    "V": "vocabulary",
}

WHERE = {
    "once": "outside the layers",
    "every": "every layer",
    "dense": "layers with a dense MLP",
    "moe": "layers with experts",
    "shared": "layers with experts, if n_shared_experts > 0",
    "mtp": "multi-token-prediction layers",
}


class TapSpec(NamedTuple):
    """One published tap. In names {i} is a layer, {m} an MTP layer (L, L + 1, …) and {e} an expert."""

    name: str
    axes: str  # letters of AXES
    dtype: str  # 'compute': that of the computation; 'int': int64
    where: str  # a key of WHERE
    what: str


_START = (TapSpec("embed_tokens", "B T D", "compute", "once", "the rows of the embedding table: the residual stream"),)

_LAYER = tuple(
    TapSpec("layers.{i}." + name, *rest)
    for name, *rest in (
        ("input_layernorm", "B T D", "compute", "every", "the stream, normed: what attention reads"),
        ("self_attn.q", "B T H d", "compute", "every", "queries, as projected"),
        ("self_attn.k", "B T G d", "compute", "every", "keys, as projected"),
        ("self_attn.v", "B T G d", "compute", "every", "values"),
        ("self_attn.q_norm", "B T H d", "compute", "every", "queries after the norm (unchanged without use_qk_norm)"),
        ("self_attn.k_norm", "B T G d", "compute", "every", "keys after the norm (unchanged without use_qk_norm)"),
        ("self_attn.q_rope", "B T H d", "compute", "every", "queries, turned by their positions"),
        ("self_attn.k_rope", "B T G d", "compute", "every", "keys, turned: what the cache stores"),
        ("self_attn.scores", "B H T S", "compute", "every", "q·k / √d; −∞ where a key is hidden"),
        ("self_attn.probs", "B H T S", "compute", "every", "their softmax; each row sums to 1"),
        ("self_attn.heads", "B T H d", "compute", "every", "each head's mix of values"),
        ("self_attn.o", "B T D", "compute", "every", "all heads projected back"),
        ("middle", "B T D", "compute", "every", "the stream after attention was added"),
        ("post_attention_layernorm", "B T D", "compute", "every", "the stream, normed: what the MLP or experts read"),
        ("mlp.gate", "B T I", "compute", "dense", "gate projection"),
        ("mlp.up", "B T I", "compute", "dense", "up projection"),
        ("mlp.hidden", "B T I", "compute", "dense", "silu(gate) · up"),
        ("mlp.router_logits", "N E", "compute", "moe", "one number for each token and expert"),
        ("mlp.router_scores", "N E", "compute", "moe", "their sigmoid"),
        ("mlp.biased_scores", "N E", "compute", "moe", "scores + selection bias; −∞ in closed groups: decides who"),
        ("mlp.expert_indices", "N K", "int", "moe", "the experts picked, in the order of their biased scores"),
        ("mlp.expert_weights", "N K", "compute", "moe", "unbiased scores, normalised and scaled: decides how loud"),
        ("mlp.experts.{e}.tokens", "n", "int", "moe", "the tokens that picked this expert (rows of N)"),
        ("mlp.experts.{e}.gate", "n F", "compute", "moe", "the expert's gate projection"),
        ("mlp.experts.{e}.up", "n F", "compute", "moe", "its up projection"),
        ("mlp.experts.{e}.hidden", "n F", "compute", "moe", "silu(gate) · up"),
        ("mlp.experts.{e}.out", "n D", "compute", "moe", "its answers, not yet weighted"),
        ("mlp.routed", "N D", "compute", "moe", "the weighted sum of the experts' answers"),
        ("mlp.shared_experts.gate", "N J", "compute", "shared", "the shared expert's gate projection"),
        ("mlp.shared_experts.up", "N J", "compute", "shared", "its up projection"),
        ("mlp.shared_experts.hidden", "N J", "compute", "shared", "silu(gate) · up"),
        ("mlp.shared", "N D", "compute", "shared", "the shared expert's answer"),
        ("mlp.out", "B T D", "compute", "every", "what the MLP, or routed and shared experts, add"),
        ("out", "B T D", "compute", "every", "the stream as it leaves the layer"),
    )
)

_END = (
    TapSpec("norm", "B T D", "compute", "once", "the stream after the final norm: hidden states"),
    TapSpec("logits", "B T V", "compute", "once", "one score for each token of the vocabulary"),
)

_MTP_START = (
    TapSpec("layers.{m}.embed_tokens", "B T D", "compute", "mtp", "the embedding of the next token"),
    TapSpec("layers.{m}.enorm", "B T D", "compute", "mtp", "that, normed"),
    TapSpec("layers.{m}.hnorm", "B T D", "compute", "mtp", "the hidden state, normed"),
    TapSpec("layers.{m}.eh_proj", "B T D", "compute", "mtp", "both joined and projected: the layer's input"),
)
_MTP_END = (
    TapSpec("layers.{m}.shared_head.norm", "B T D", "compute", "mtp", "what the head reads and the next depth gets"),
)

TAPS = _START + _LAYER + _END + _MTP_START + _MTP_END
SPECS = {tap.name: tap for tap in TAPS}


class ExpectedTap(NamedTuple):
    """A tap of one model and input size. `None` in a shape is open: the number of tokens sent to an expert."""

    name: str
    axes: str
    shape: tuple[int | None, ...]
    dtype: str  # 'compute' or 'int'


def expected_taps(config: Config, B: int, T: int, mtp_depth: int = 0) -> list[ExpectedTap]:
    """Every tap that a forward pass over ids [B, T] calls, in order; an expert that nobody picked stays silent.

    `mtp_depth`: also those of `model.mtp(ids, depth)`, which follow. Raises ValueError if there is no MTP layer.
    """
    L, layers = config.num_hidden_layers, config.num_nextn_predict_layers
    if mtp_depth and not layers:
        raise ValueError(f"mtp_depth = {mtp_depth}, but this model has no multi-token-prediction layer")
    taps = _placed(_START, config, B, T)
    for i in range(L):
        taps += _layer_taps(config, i, B, T)
    taps += _placed(_END, config, B, T)
    for depth in range(1, mtp_depth + 1):
        i = L + (depth - 1) % layers  # beyond the last MTP layer they are used again
        taps += _placed(_MTP_START, config, B, T - depth, i)
        taps += _layer_taps(config, i, B, T - depth)
        taps += _placed(_MTP_END, config, B, T - depth, i)
    return taps


def _layer_taps(config: Config, i: int, B: int, T: int) -> list[ExpectedTap]:
    kinds = {"every", "moe" if config.is_moe(i) else "dense"}
    if config.is_moe(i) and config.n_shared_experts:
        kinds.add("shared")
    taps = []
    present = [spec for spec in _LAYER if spec.where in kinds]
    for of_expert, specs in groupby(present, lambda spec: "{e}" in spec.name):
        block = list(specs)  # the experts take their turns: all taps of expert 0, then of expert 1, …
        for e in range(config.n_routed_experts if of_expert else 1):
            taps += _placed(block, config, B, T, i, e)
    return taps


def _placed(
    specs: Sequence[TapSpec], config: Config, B: int, T: int, i: int | None = None, e: int | None = None
) -> list[ExpectedTap]:
    """Specs with the numbers of a layer and an expert in their names and sizes in place of letters."""
    sizes = _sizes(config, B, T)
    return [
        ExpectedTap(
            spec.name.format(i=i, m=i, e=e), spec.axes, tuple(sizes[axis] for axis in spec.axes.split()), spec.dtype
        )
        for spec in specs
    ]


def _sizes(config: Config, B: int, T: int) -> dict[str, int | None]:
    return {
        "B": B,
        "T": T,
        "S": T,
        "N": B * T,
        "n": None,
        "D": config.hidden_size,
        "H": config.num_attention_heads,
        "G": config.num_key_value_heads,
        "d": config.head_dim,
        "E": config.n_routed_experts,
        "K": config.num_experts_per_tok,
        "F": config.moe_intermediate_size,
        "I": config.intermediate_size,
        "J": config.shared_intermediate_size,
        "V": config.vocab_size,
    }


def taps_markdown() -> str:
    """The text of docs/taps.md."""
    lines = [
        "# Taps",
        "",
        "<!-- Made by `python -m minglm.look.taps > docs/taps.md`; a test keeps it up to date. -->",
        "",
        "Every step of the forward pass hands its array to `tap(name, array)`. A tap may look at it, keep it, or",
        "return another array of the same shape, which the model then uses. The names are public and listed here in",
        "the order in which they are called; `{i}` is a layer, `{e}` an expert.",
        "",
        "```python",
        'trace = model.trace("2 + 2 =", keep="layers.1.mlp.*")  # patterns as in the shell, separated by commas',
        'trace["layers.1.mlp.expert_indices"]',
        'model.forward(ids, tap=lambda name, array: array * 0 if name == "layers.1.mlp.shared" else None)',
        "```",
        "",
        "dtype `compute` is float32, or float64 for a model with float64 weights; `int` is int64. An expert that no",
        "token picked calls none of its taps. With a cache, T counts the new tokens and S all of them; generation",
        "computes `logits` for the last token only.",
        "",
        "## The forward pass",
        "",
        *_markdown_rows(_START + _LAYER + _END),
        "",
        "## Multi-token prediction",
        "",
        "Called by `model.mtp(ids, depth, tap=…)`; a trace does not hold them. `{m}` counts on from the decoder",
        "layers: L is the first MTP layer. Between `eh_proj` and `shared_head.norm` come all taps of a layer with",
        "experts, as above, with `{m}` for `{i}`.",
        "",
        *_markdown_rows(_MTP_START + _MTP_END),
        "",
        "## Axes",
        "",
        "| letter | axis |",
        "|---|---|",
        *(f"| {letter} | {meaning} |" for letter, meaning in AXES.items()),
    ]
    return "\n".join(lines) + "\n"


def _markdown_rows(specs: Sequence[TapSpec]) -> list[str]:
    rows = (f"| `{s.name}` | [{', '.join(s.axes.split())}] | {s.dtype} | {WHERE[s.where]} | {s.what} |" for s in specs)
    return ["| name | axes | dtype | where | what |", "|---|---|---|---|---|", *rows]


if __name__ == "__main__":
    sys.stdout.buffer.write(taps_markdown().encode())  # UTF-8 and plain line ends on every system
