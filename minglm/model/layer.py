"""One decoder layer: attention, then a dense MLP or a mixture of experts, each added to the residual stream."""

from typing import Any, NamedTuple

from minglm.config import Config
from minglm.model import ops as numpy_ops
from minglm.model.attention import AttentionSaved, Layout, attention, attention_bwd
from minglm.model.experts import mlp, mlp_bwd, moe, moe_bwd
from minglm.model.kvcache import KVCache
from minglm.model.ops import Array, Ops, Tap, no_tap, scoped
from minglm.model.params import Layer, Mlp, Moe, Weight


class LayerSaved(NamedTuple):
    x: Array  # [B, T, D] the residual stream as it came in
    middle: Array  # [B, T, D] after attention
    attention: AttentionSaved
    mlp: Any  # MoeSaved, or what a dense MLP saved


def layer(
    x: Array,
    params: Layer,
    config: Config,
    layout: Layout,
    cache: KVCache | None = None,
    index: int = 0,
    tap: Tap = no_tap,
    ops: Ops = numpy_ops,
) -> tuple[Array, LayerSaved]:  # [B, T, D] -> [B, T, D]
    """x + attention(norm(x)), then that + mlp(norm(that)). `index` is the layer's number in the cache."""
    eps = config.rms_norm_eps
    # 1. attention
    attention_in = tap("input_layernorm", ops.rms_norm(x, params.input_layernorm.weight, eps))
    attention_out, saved_attention = attention(
        attention_in, params.self_attn, config, layout, cache, index, scoped(tap, "self_attn."), ops
    )
    middle = tap("middle", ops.add(x, attention_out))
    # 2. MLP or experts
    mlp_in = tap("post_attention_layernorm", ops.rms_norm(middle, params.post_attention_layernorm.weight, eps))
    if isinstance(params.mlp, Moe):
        mlp_out, saved_mlp = moe(mlp_in, params.mlp, config, scoped(tap, "mlp."), ops)
    else:
        mlp_out, saved_mlp = mlp(mlp_in, params.mlp, scoped(tap, "mlp."), ops)
    out = tap("out", ops.add(middle, tap("mlp.out", mlp_out)))
    return out, LayerSaved(x, middle, saved_attention, saved_mlp)


def layer_bwd(
    dout: Array, saved: LayerSaved, params: Layer, config: Config, dscores: Array | None = None, ops: Ops = numpy_ops
) -> tuple[Array, Layer]:  # [B, T, D] -> [B, T, D], the record
    """Each residual addition passes its gradient on unchanged and sends a copy through the branch.

    `dscores` [N, E]: the balance loss's gradient at this layer's router.
    """
    x, middle, saved_attention, saved_mlp = saved
    eps = config.rms_norm_eps
    # 2. out = middle + mlp(norm(middle))
    dmlp: Mlp | Moe
    if isinstance(params.mlp, Moe):
        dmlp_in, dmlp = moe_bwd(dout, saved_mlp, params.mlp, config, dscores, ops)
    else:
        dmlp_in, dmlp = mlp_bwd(dout, saved_mlp, params.mlp, ops)
    dmiddle_branch, dpost_norm = ops.rms_norm_bwd(dmlp_in, middle, params.post_attention_layernorm.weight, eps)
    dmiddle = ops.add(dout, dmiddle_branch)
    # 1. middle = x + attention(norm(x))
    dattention_in, dattention = attention_bwd(dmiddle, saved_attention, params.self_attn, config, ops)
    dx_branch, dinput_norm = ops.rms_norm_bwd(dattention_in, x, params.input_layernorm.weight, eps)
    return ops.add(dmiddle, dx_branch), Layer(Weight(dinput_norm), dattention, Weight(dpost_norm), dmlp)
