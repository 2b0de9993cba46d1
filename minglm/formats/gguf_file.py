"""GGUF: a model as one file for llama.cpp, its tokenizer and chat template inside. Written with the package `gguf`.

Names and keys are those that llama.cpp reads for the architecture `glm4moe`: the experts of a layer are one tensor, a
layer is `blk.3`, multi-token-prediction layers are further blocks with `nextn` tensors.
"""

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from minglm.config import Config
from minglm.formats.tensors import same_bits
from minglm.model.ops import Array
from minglm.model.params import Params, walk_stacked

if TYPE_CHECKING:
    from minglm.text.template import ChatTemplate
    from minglm.text.tokenizer import Tokenizer

GGUF_DTYPES = ("float32", "bfloat16", "q8_0")


class _Tensor(NamedTuple):
    name: str  # llama.cpp's
    kind: Any  # gguf.GGMLQuantizationType
    data: Array  # as it stands in the file: float32, or bytes


def save_gguf(
    file: str | Path,
    config: Config,
    params: Params,
    dtype: str = "bfloat16",
    tokenizer: "Tokenizer | None" = None,
    template: "ChatTemplate | None" = None,
) -> None:
    """Write a file, read it back, and put it in its place only if every tensor came back with the same bits.

    Matrices are kept in `dtype`: float32, bfloat16, or q8_0 (blocks of 32 numbers in 8 bits with a float16 scale; rows
    that are no multiple of 32 stay float16). Vectors and routers stay float32, as llama.cpp wants them. Without a
    tokenizer the file takes ids only.

    Raises ValueError for stretched rotary positions, for tokenizers that do not cut text as GLM's do, for other dtypes,
    and if the package gguf is not there.
    """
    file = Path(file)
    gguf = _package()
    if dtype not in GGUF_DTYPES:
        raise ValueError(f"dtype {dtype!r} cannot go into a GGUF file here; take one of {', '.join(GGUF_DTYPES)}")
    if config.rope_scaling:
        raise ValueError(f"{file}: rope_scaling {dict(config.rope_scaling)} has no place in GGUF files written here")
    if file.is_dir():
        raise ValueError(f"{file} is a folder; a GGUF file cannot take its place")
    unfinished = file.with_name(f"{file.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        writer = gguf.GGUFWriter(unfinished, "glm4moe")
        _describe(writer, gguf, config, file.stem, dtype)
        if tokenizer is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            _add_tokenizer(writer, gguf, tokenizer, config.vocab_size)
        if template is not None:
            writer.add_chat_template(template.source)
        for tensor in _tensors(gguf, config, params, dtype):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _verify(gguf, unfinished, _tensors(gguf, config, params, dtype))
        os.replace(unfinished, file)
    except OSError as error:  # NumPy's own, at a full disk, says neither
        raise OSError(error.errno, f"{file} could not be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the package gguf: pip install gguf") from None
    return gguf


# -- tensors -----------------------------------------------------------------------------------------------------


def _tensors(gguf: Any, config: Config, params: Params, dtype: str) -> Iterator[_Tensor]:
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, blocks)
    for name, array in walk_stacked(params):
        known = name.replace(".*.", ".").replace("e_score_correction_bias", "e_score_correction.bias")
        theirs = names.get_name(known, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"{name} has no name in this version of gguf; pip install --upgrade gguf")
        kind = _kind(gguf, theirs, array.shape, dtype)
        yield _Tensor(theirs, kind, _encoded(gguf, name, array, kind))


def _kind(gguf: Any, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """How llama.cpp's own converter would keep a tensor of this name."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1 or ".ffn_gate_inp." in name or dtype == "float32":
        return kinds.F32
    if dtype == "bfloat16":
        return kinds.BF16
    return kinds.Q8_0 if shape[-1] % 32 == 0 else kinds.F16


def _encoded(gguf: Any, name: str, array: Any, kind: Any) -> Array:
    kinds = gguf.GGMLQuantizationType
    wide = np.ascontiguousarray(array.astype(np.float32))
    if kind == kinds.F32:
        return wide
    # a block of q8_0 has a float16 scale, its largest number / 127; one that is NaN or infinite spoils all 32
    largest = {
        kinds.Q8_0: 127 * 65504.0,
        kinds.F16: 65504.0,
        kinds.BF16: float(ml_dtypes.finfo(ml_dtypes.bfloat16).max),
    }
    if not (np.abs(wide) <= largest[kind]).all():
        raise ValueError(
            f"{name} holds NaN, infinity, or numbers too large for {kind.name.lower()}; take dtype='float32'"
        )
    if kind == kinds.BF16:
        return wide.astype(ml_dtypes.bfloat16).view(np.uint8)
    return gguf.quants.quantize(wide, kind)


def _verify(gguf: Any, file: Path, wanted: Iterator[_Tensor]) -> None:
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for tensor in wanted:
        read = found.pop(tensor.name, None)
        if read is None or read.tensor_type != tensor.kind or not same_bits(read.data, tensor.data):
            raise ValueError(f"{file}: {tensor.name} did not come back as it was written; is the disk sound?")
    if found:
        raise ValueError(f"{file}: holds {', '.join(found)}, which nobody wrote")


# -- keys --------------------------------------------------------------------------------------------------------


def _describe(writer: Any, gguf: Any, c: Config, name: str, dtype: str) -> None:
    types = gguf.LlamaFileType
    writer.add_name(name)
    writer.add_file_type(
        {"float32": types.ALL_F32, "bfloat16": types.MOSTLY_BF16, "q8_0": types.MOSTLY_Q8_0}[dtype].value
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_vocab_size(c.vocab_size)
    writer.add_block_count(c.num_hidden_layers + c.num_nextn_predict_layers)
    writer.add_nextn_predict_layers(c.num_nextn_predict_layers)
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
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)


def _add_tokenizer(writer: Any, gguf: Any, tokenizer: "Tokenizer", rows: int) -> None:
    """Vocabulary and merges. llama.cpp knows ways to cut text by name only: `glm4` is GLM's, digits in threes.

    A tokenizer that cuts digits one by one has no merge between digits, so threes fall apart into the same ids.
    """
    content = json.loads(tokenizer.library.to_str())
    if tokenizer.digits not in (1, 3):
        raise ValueError(
            "the tokenizer does not cut text as GLM-4.5's does, so llama.cpp would give other ids; without one "
            "(model.tokenizer = None) the file can be written for ids"
        )
    types = gguf.TokenType
    tokens, kinds = [f"[unused {i}]" for i in range(rows)], [int(types.UNUSED)] * rows
    for token, i in content["model"]["vocab"].items():
        tokens[i], kinds[i] = token, int(types.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = int(types.CONTROL if added["special"] else types.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("glm4")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]])
    writer.add_add_bos_token(False)  # [gMASK]<sop> is in the chat template
    for add, token in (
        (writer.add_eos_token_id, "<|endoftext|>"),
        (writer.add_pad_token_id, "<|endoftext|>"),
        (writer.add_eot_token_id, "<|user|>"),
        (writer.add_eom_token_id, "<|observation|>"),
    ):
        if (i := tokenizer.library.token_to_id(token)) is not None:
            add(i)
