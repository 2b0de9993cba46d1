"""What a model is, in one table: sizes, parameters, and what a token costs."""

from typing import TYPE_CHECKING

from minglm.config import Config
from minglm.formats.memory import in_bytes
from minglm.look.tables import html_table, table
from minglm.model.params import walk_stacked

if TYPE_CHECKING:
    from minglm.api import Model

__all__ = ["architecture", "costs", "describe", "describe_html", "in_bytes", "parameters", "table"]

_ARCHITECTURE = ("size", "letter", "value")
_COSTS = ("cost", "value")


def describe(model: "Model") -> str:
    """A summary for the terminal: the architecture with its axis letters, parameters, and costs per token."""
    return f"{model.name}\n\n{table(architecture(model.config), _ARCHITECTURE)}\n\n{table(costs(model), _COSTS)}"


def describe_html(model: "Model") -> str:
    """The same for a notebook."""
    return html_table(architecture(model.config), _ARCHITECTURE, repr(model)) + html_table(costs(model), _COSTS)


def architecture(config: Config) -> list[tuple[str, str, str]]:
    """Rows (size, axis letter, value)."""
    c, dense, L = config, config.first_k_dense_replace, config.num_hidden_layers
    layers = ", ".join(_span(*part) for part in ((0, dense, "dense"), (dense, L, "with experts")) if part[0] < part[1])
    groups = f", from the best {c.topk_group} of {c.n_group} groups" if c.n_group > 1 else ""
    biases = " and ".join(
        name for name, on in (("biases on q, k, v", c.attention_bias), ("q/k norm", c.use_qk_norm)) if on
    )
    return [
        ("vocabulary", "V", f"{c.vocab_size:,}" + (" (embedding and head tied)" if c.tie_word_embeddings else "")),
        ("context", "", f"{c.max_position_embeddings:,} tokens"),
        ("hidden size", "D", f"{c.hidden_size:,}"),
        ("layers", "L", f"{L} ({layers})"),
        ("multi-token-prediction layers", "", _mtp_layers(c)),
        ("query heads", "H", f"{c.num_attention_heads}"),
        ("key/value heads", "G", f"{c.num_key_value_heads}"),
        ("size of a head", "d", f"{c.head_dim}"),
        ("rotated entries of a head", "", f"{c.rotary_dim}, theta = {c.rope_theta:g}"),
        ("attention", "", biases or "neither biases nor q/k norm"),
        ("hidden size of a dense layer's MLP", "I", f"{c.intermediate_size:,}"),
        ("hidden size of an expert", "F", f"{c.moe_intermediate_size:,}"),
        ("routed experts", "E", f"{c.n_routed_experts}"),
        ("picked per token", "K", f"{c.num_experts_per_tok}{groups}"),
        ("shared experts", "", f"{c.n_shared_experts}"),
    ]


def _span(first: int, end: int, kind: str) -> str:
    return f"{first} {kind}" if end == first + 1 else f"{first} … {end - 1} {kind}"


def _mtp_layers(config: Config) -> str:
    count, L = config.num_nextn_predict_layers, config.num_hidden_layers
    return f"{count} (layer {_span(L, L + count, 'with experts')})" if count else "0"


def costs(model: "Model") -> list[tuple[str, str]]:
    """Rows (cost, value): parameters, bytes, floating-point operations."""
    config = model.config
    stored = sum(array.nbytes for _, array in walk_stacked(model.params))
    compute = "float64" if model.params.norm.weight.dtype.itemsize == 8 else "float32"
    itemsize = 8 if compute == "float64" else 4
    context = config.max_position_embeddings
    return [
        *parameters(config),
        ("weights in memory", f"{in_bytes(stored)} ({model.storage})"),
        ("key/value cache per token", f"{in_bytes(config.kv_bytes_per_token(itemsize))} ({compute})"),
        ("floating-point operations, first token", f"{config.flops_per_token(1):,}"),
        (f"floating-point operations, token {context:,}", f"{config.flops_per_token(context):,}"),
    ]


def parameters(config: Config) -> list[tuple[str, str]]:
    """Rows (what, number). Reports leave some of these out: GLM-4.5's embedding and head, others MTP layers."""
    counts = config.count_parameters()
    return [
        ("parameters, total", f"{counts.total:,}"),
        ("  of these, embedding and head", f"{counts.embedding + counts.head:,}"),
        ("  of these, multi-token prediction", f"{counts.mtp:,}"),
        ("parameters, active for one token", f"{counts.active:,} ({counts.active / counts.total:.1%})"),
    ]
