"""A checkpoint as a GGUF file, so that llama.cpp can be timed on the same weights. It has no tokenizer: ids go in."""

from pathlib import Path
from typing import Any

import numpy as np

from minglm.config import Config
from minglm.formats.checkpoint import load_checkpoint
from minglm.model.ops import Array
from minglm.model.params import walk_stacked


def write_gguf(folder: Path, file: Path, dtype: str) -> None:
    """Convert a folder. Needs the package gguf. Matrices are kept in `dtype` (float32 or bfloat16), vectors and routers
    in float32, as llama.cpp's own converter does.

    Raises ValueError for what this writes no place for: MTP layers and stretched rotary positions.
    """
    import gguf

    config, params = load_checkpoint(folder, dtype)
    if config.num_nextn_predict_layers or config.rope_scaling:
        raise ValueError(f"{folder}: GGUF files are written without MTP layers and rope_scaling only")
    writer = gguf.GGUFWriter(file, "glm4moe")
    _describe(writer, config, gguf.ExpertGatingFuncType.SIGMOID)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, config.num_hidden_layers)
    for name, array in walk_stacked(params):
        theirs = names.get_name(name.replace(".*.", "."), try_suffixes=(".weight", ".bias")) or _bias_name(name)
        _add(writer, theirs, array, gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bias_name(name: str) -> str:
    """The selection bias, which the table of names does not hold under Hugging Face's name."""
    if not name.endswith("e_score_correction_bias"):
        raise ValueError(f"{name} has no name in GGUF")
    return f"blk.{name.split('.')[2]}.exp_probs_b.bias"


def _add(writer: Any, name: str, array: Array, bf16: Any) -> None:
    if array.ndim == 1 or ".ffn_gate_inp." in name:
        writer.add_tensor(name, array.astype(np.float32))
    elif array.dtype == np.float32:
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, array.view(np.uint8), raw_dtype=bf16)


def _describe(writer: Any, c: Config, sigmoid: Any) -> None:
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.rotary_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_leading_dense_block_count(c.first_k_dense_replace)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_group_count(c.n_group)
    writer.add_expert_group_used_count(c.topk_group)
    writer.add_expert_gating_func(sigmoid)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(c.vocab_size)
