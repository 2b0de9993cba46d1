"""The book: GLM-4.5's transformer in NumPy, forward and backward.

Reading order: ops, params, rope, kvcache, attention, router, experts, layer, transformer, mtp, loss. A file imports
only from files before it in this list.
"""

from minglm.model.attention import Layout, attention, attention_bwd, make_layout
from minglm.model.experts import mlp, mlp_bwd, moe, moe_bwd, routed_experts, routed_experts_bwd
from minglm.model.kvcache import KVCache
from minglm.model.layer import layer, layer_bwd
from minglm.model.loss import Loss, loss_and_grads, shift_targets
from minglm.model.mtp import mtp_chain, mtp_layer, mtp_layer_bwd, mtp_step
from minglm.model.ops import (
    IGNORE,
    attend,
    attend_bwd,
    cross_entropy,
    cross_entropy_bwd,
    embed,
    embed_bwd,
    expert_mlp,
    expert_mlp_bwd,
    linear,
    linear_bwd,
    rms_norm,
    rms_norm_bwd,
    rope,
    rope_bwd,
    sigmoid,
    softmax,
    softmax_bwd,
    swiglu,
    swiglu_bwd,
)
from minglm.model.params import Params, build, init_params, map_arrays, map_record, walk, walk_stacked
from minglm.model.rope import inverse_frequencies, rotation
from minglm.model.router import Routing, balance_loss, expert_load, router, router_bwd, update_bias
from minglm.model.transformer import head, head_bwd, transformer, transformer_bwd
