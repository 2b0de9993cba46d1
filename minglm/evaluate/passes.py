"""Forward passes for measuring: with the compiled operations where they read the weights, a layer at a time."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from minglm.config import Config
from minglm.data.batches import Batch
from minglm.model import ops as numpy_ops
from minglm.model.attention import Layout
from minglm.model.layer import LayerSaved, layer
from minglm.model.ops import IGNORE, Array, Ops
from minglm.model.params import Moe, Params, compute_dtype, in_compute_dtype
from minglm.model.transformer import head, transformer
from minglm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minglm.api import Model

ROWS = 16  # that go through the model together


def tokenizer_of(model: "Model") -> Tokenizer:
    """ValueError if the model has none."""
    if model.tokenizer is None:
        raise ValueError("this evaluation needs a tokenizer, and this model has none")
    return model.tokenizer


def engine(model: "Model") -> str:
    """What `operations` takes: "fast" for float32 and bfloat16 weights; "numpy" for others, and without the JIT."""
    from minglm.fast.jit import DISABLE_JIT

    known = model.params.norm.weight.dtype.name in ("float32", "bfloat16")
    return "fast" if known and not DISABLE_JIT else "numpy"


@contextmanager
def operations(model: "Model") -> Iterator[Ops]:
    """The operations of `engine(model)`, in a session."""
    if engine(model) == "numpy":
        yield numpy_ops
        return
    from minglm.fast.ops import shared_ops
    from minglm.fast.team import thread_count

    ops = shared_ops(thread_count(None))
    with ops.session():
        yield ops


def slices(batch: Batch, rows: int = ROWS) -> Iterator[Batch]:
    """The batch, some rows at a time."""
    for start in range(0, len(batch.ids), rows):
        yield Batch(*(array[start : start + rows] for array in batch))


def logits_of(model: "Model", batch: Batch, ops: Ops) -> Array:  # [B, T] -> [B, T, V]
    hidden, _ = transformer(batch.ids, model.params, model.config, segments=batch.segments, ops=ops)
    return head(hidden, model.params, ops=ops)


def token_bits(logits: Array, targets: Array) -> Array:  # [B, T, V], [B, T] -> [B, T]
    """−log₂ softmax(logits)[target], 0 where there is no target."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    wanted = np.where(targets == IGNORE, 0, targets)[..., None]
    picked = np.take_along_axis(shifted, wanted, axis=-1)[..., 0]
    np.exp(shifted, out=shifted)
    nats = np.log(shifted.sum(axis=-1)) - picked
    return np.where(targets == IGNORE, 0, nats / math.log(2))


# -- layer by layer ----------------------------------------------------------------------------------------------


def run_layers(
    x: Array, first: int, params: Params, config: Config, layout: Layout, ops: Ops
) -> Iterator[tuple[int, Array, LayerSaved]]:  # [B, T, D]
    """Take the residual stream through the layers from `first` on: for each its number, what comes out of it, and
    what it saved."""
    dtype = compute_dtype(params)
    widen = getattr(ops, "in_compute_dtype", in_compute_dtype)
    for i in range(first, len(params.layers)):
        weights = widen(params.layers[i], params.norm.weight.dtype, dtype)
        x, saved = layer(x, weights, config, layout, ops=ops)
        yield i, x, saved


def picks(model: "Model", batch: Batch, ops: Ops) -> Array:  # -> int [B, T, layer, K]
    """The experts that every router picks, padding's too; the layer axis has an entry for each MoE layer."""
    x, start = transformer(batch.ids, model.params, model.config, segments=batch.segments, ops=ops, stop_at=0)
    steps = run_layers(x, 0, model.params, model.config, start.layout, ops)
    found = [saved.mlp.router.routing.indices for i, _, saved in steps if isinstance(model.params.layers[i].mlp, Moe)]
    return np.stack(found, axis=1).reshape(*batch.ids.shape, len(found), -1)


def moe_layers(model: "Model") -> list[int]:
    """Numbers of the layers that have experts. ValueError if none has."""
    found = [i for i, each in enumerate(model.params.layers) if isinstance(each.mlp, Moe)]
    if not found:
        raise ValueError("this model has no layer with experts, so there is no routing to measure")
    return found
