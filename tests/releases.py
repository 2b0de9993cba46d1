"""Folders as the releases of GLM-4.5, Air, 4.6, 4.7 and their FP8 variants have them, at other sizes.

Names, dtypes, shards and config keys follow the releases; the numbers are random, or (`sparse`) holes in the files.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from minglm.config import PRESETS, Config
from minglm.formats.smallfloats import SmallFloats, is_small
from minglm.model.params import shapes, walk

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
}


class Release:
    """What tells one release from another."""

    def __init__(self, preset: str, mtp_ends: bool, fp8: bool = False, extra: dict | None = None):
        self.preset, self.mtp_ends, self.fp8, self.extra = preset, mtp_ends, fp8, extra or {}

    def config(self, **sizes) -> Config:
        return PRESETS[self.preset].replace(**{"eos_token_id": (1, 2, 3), "pad_token_id": 1, **sizes})

    def config_json(self, config: Config) -> dict:
        """As the releases write it: Hugging Face's keys, and some that no code needs."""
        values = config.to_dict()
        values |= {"architectures": ["Glm4MoeForCausalLM"], "dtype": "bfloat16", "transformers_version": "4.54.0"}
        values |= {"attention_dropout": 0.0, "use_cache": True, **self.extra}
        if self.fp8:
            ignored = [f"model.layers.{i}.mlp.gate" for i in range(1, 4)] + ["lm_head", "model.embed_tokens"]
            weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
            inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
            group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
            values["quantization_config"] = {
                "quant_method": "compressed-tensors", "format": "float-quantized",
                "quantization_status": "compressed", "config_groups": {"group_0": group}, "ignore": ignored,
            }  # fmt: skip
        return values

    def tensors(self, config: Config):
        """(name, dtype as in a header, shape) in the order of the layers."""
        for name, array in walk(shapes(config, self.mtp_ends)):
            head = name.endswith("shared_head.head.weight")  # absent from the FP8 releases' list of what is not
            if self.fp8 and (is_small(name, "fp8") or head):
                yield name, "F8_E4M3", array.shape
                yield name.replace("weight", "weight_scale"), "F32", (array.shape[0], 1)
            else:
                yield name, "F32" if name.endswith("correction_bias") else "BF16", array.shape


FROM_47 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_router_dtype": "float32"}
RELEASES = {
    "GLM-4.5": Release("GLM-4.5", mtp_ends=True),
    "GLM-4.5-Air": Release("GLM-4.5-Air", mtp_ends=True),
    "GLM-4.6": Release("GLM-4.6", mtp_ends=False),
    "GLM-4.7": Release("GLM-4.7", mtp_ends=False, extra=FROM_47),
    "GLM-4.5-FP8": Release("GLM-4.5", mtp_ends=True, fp8=True),
    "GLM-4.5-Air-FP8": Release("GLM-4.5-Air", mtp_ends=True, fp8=True),
    "GLM-4.6-FP8": Release("GLM-4.6", mtp_ends=False, fp8=True),
    "GLM-4.7-FP8": Release("GLM-4.7", mtp_ends=False, fp8=True, extra=FROM_47),
}
ITEM = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}


def write_release(
    folder: Path, release: Release, shards: int = 3, seed: int = 0, sparse: bool = False, **sizes
) -> Config:
    """Write the folder; returns its config. `sparse`: files of the right length that hold no numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = release.config(**sizes)
    (folder / "config.json").write_text(json.dumps(release.config_json(config), indent=2))
    tensors, rng = list(release.tensors(config)), np.random.default_rng(seed)
    weight_map, total = {}, 0
    scales: dict[str, np.ndarray] = {}
    for number, part in enumerate(np.array_split(np.arange(len(tensors)), shards), start=1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        entries, at = {}, 0
        for tensor, kind, shape in (tensors[i] for i in part):
            size = int(np.prod(shape)) * ITEM[kind]
            entries[tensor] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
            weight_map[tensor], at = name, at + size
        total += at
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / name, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            if sparse:
                file.truncate(8 + len(header) + at)
            else:
                for tensor, kind, shape in (tensors[i] for i in part):
                    file.write(_content(tensor, kind, shape, rng, scales))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


def _content(name, kind, shape, rng, scales) -> bytes:
    if name.endswith("weight_scale"):
        return scales.pop(name).tobytes()
    noise = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("norm.weight"):
        noise = 1 + 0.3 * noise
    elif name.endswith("correction_bias"):
        noise *= 0.02  # trained ones lie close together; larger ones would send every token to the same experts
    elif len(shape) == 2 and "embed" not in name:
        noise /= shape[1] ** 0.5
    if kind == "F8_E4M3":
        small = SmallFloats.of("fp8", noise)
        scales[name.replace("weight", "weight_scale")] = small.scales
        return small.codes.tobytes()
    return noise.astype(ml_dtypes.bfloat16 if kind == "BF16" else np.float32).tobytes()
