"""The models that are timed, and their random weights."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.config import Config
from minglm.formats.checkpoint import save_checkpoint
from minglm.formats.storage import as_dtype, stored_dtype
from minglm.model.ops import Array
from minglm.model.params import Params, build, is_norm


class Work(NamedTuple):
    """One thing to time on a shape. A unit is a token (decode, growth), a prompt (prefill) or a step (train)."""

    name: str  # decode, prefill, train or growth
    dtype: str
    prompt: int  # tokens before the timed ones; for prefill and train: tokens of a row
    units: int  # timed ones, at most
    rows: int = 1  # of a training batch
    contexts: tuple[int, ...] = ()  # growth: the numbers of keys

    @property
    def tokens(self) -> int:
        """Tokens of one unit."""
        return self.prompt * self.rows if self.name in ("prefill", "train") else 1

    def __str__(self) -> str:
        size = {"prefill": f" {self.prompt}", "train": f" {self.rows} × {self.prompt}"}.get(self.name, "")
        return f"{self.name}{size} {self.dtype}"


class Shape(NamedTuple):
    name: str
    config: Config
    works: tuple[Work, ...]


_S = Config(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=704,
    moe_intermediate_size=128,
    n_routed_experts=16,
    num_experts_per_tok=4,
    use_qk_norm=True,
    attention_bias=True,
    num_nextn_predict_layers=0,
    max_position_embeddings=16384,
)
_M = _S.replace(
    vocab_size=32000,
    hidden_size=1024,
    num_hidden_layers=12,
    num_attention_heads=16,
    head_dim=64,
    intermediate_size=2816,
    moe_intermediate_size=352,
    n_routed_experts=64,
    num_experts_per_tok=8,
)
_AIR = _S.replace(  # three of GLM-4.5-Air's layers, and a small vocabulary
    vocab_size=8192,
    hidden_size=4096,
    num_hidden_layers=3,
    num_attention_heads=96,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=128,
    num_experts_per_tok=8,
    use_qk_norm=False,
)

SHAPES = {
    "S": Shape(
        "S",
        _S,
        (
            Work("decode", "float32", 64, 256),
            Work("decode", "bfloat16", 64, 256),
            Work("prefill", "float32", 512, 20),
            Work("train", "float32", 256, 8, rows=16),
            Work("growth", "float32", 0, 32, contexts=(64, 1024, 2048, 4096, 8192)),
        ),
    ),
    "M": Shape(
        "M",
        _M,
        (
            Work("decode", "float32", 64, 64),
            Work("decode", "bfloat16", 64, 64),
            Work("prefill", "float32", 512, 5),
            Work("train", "float32", 256, 3, rows=2),
        ),
    ),
    "air": Shape("air", _AIR, (Work("decode", "bfloat16", 64, 32),)),
}


# -- bytes and operations ----------------------------------------------------------------------------------------


def weight_bytes(config: Config, dtype: str) -> int:
    return config.count_parameters().total * as_dtype(dtype).itemsize


def unit_bytes(config: Config, work: Work, keys: int = 0) -> int:
    """Bytes that one unit must read at least: each weight that takes part once, and the keys and values before it,
    which are float32. For a long prompt or a batch, that is every weight but the embedding."""
    counts, number = config.count_parameters(), as_dtype(work.dtype).itemsize
    if work.name in ("decode", "growth"):
        return counts.active * number + keys * config.kv_bytes_per_token(4)
    weights = counts.trunk + config.vocab_size * config.hidden_size
    return weights * number * (4 if work.name == "train" else 1)  # train: read twice; write gradients, read them


def unit_operations(config: Config, work: Work) -> int:
    """Floating-point operations of one unit: matrix products and attention; for training three times the forward's."""
    if work.name in ("decode", "growth"):
        return config.flops_per_token(work.prompt)
    each = config.flops_per_token(work.prompt // 2)
    if work.name == "train":
        return 3 * each * work.tokens
    head = 2 * config.vocab_size * config.hidden_size  # only the last token's logits are wanted
    return (each - head) * work.tokens + head


# -- weights -----------------------------------------------------------------------------------------------------

POOL = 1 << 22  # random numbers; a tensor is made of windows of them


def quick_params(config: Config, dtype: Any = "float32", seed: int = 0) -> Params:
    """Random weights of standard deviation 0.02 at the speed of copying, for timing. Biases are random too, and norm
    weights near one, so that a wrong name or a left out tensor shows in the logits."""
    kind, rng = as_dtype(dtype), np.random.default_rng(seed)
    pool = (np.float32(0.02) * rng.standard_normal(POOL, np.float32)).astype(kind)

    def make(name: str, shape: tuple[int, ...]) -> Array:
        out = np.empty(shape, stored_dtype(name, kind))
        flat, at = out.reshape(-1), 0
        while at < flat.size:
            start = int(rng.integers(POOL // 2))
            piece = pool[start : start + flat.size - at]
            flat[at : at + len(piece)] = piece
            at += len(piece)
        return (1 + out.astype(np.float32)).astype(out.dtype) if is_norm(name) else out

    return build(config, make)


def write_weights(folder: Path, config: Config, dtype: str) -> None:
    """A checkpoint of `quick_params`: the same numbers for every dtype, rounded. Raises OSError if the disk is full."""
    save_checkpoint(folder, config, quick_params(config, dtype), dtype, max_shard_bytes=10**9)
