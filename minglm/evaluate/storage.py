"""What a checkpoint loses when its weights have fewer bits: `python -m minglm.evaluate.storage`.

Size, held-out bits per byte, routing, tasks and decoding speed of one model in every way to keep it; the error of
each kind of tensor; and for FP8 what rounding the *inputs* of each product costs too, with a scale for each token as it
comes (dynamic, as GLM-4.5's FP8 releases do) or one for each matrix, taken beforehand from training text (static).
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from minglm.api import Model, load
from minglm.data.documents import standard_library_documents
from minglm.data.heldout import heldout_documents
from minglm.data.tasks import TASKS, heldout_items
from minglm.evaluate.accuracy import accuracy, answer_limit
from minglm.evaluate.bits_per_byte import document_bits
from minglm.evaluate.domains import changing_rows, heldout_streams
from minglm.evaluate.passes import operations, picks, slices
from minglm.formats.smallfloats import FP8, KINDS, LARGEST_FP8, SmallFloats, is_small
from minglm.look.tables import markdown_table, table
from minglm.model import ops as numpy_ops
from minglm.model.ops import Array, Tap, no_tap, swiglu
from minglm.model.params import map_arrays, walk, walk_stacked

BATCHES = 4  # of 8 × 256 tokens of each domain
ITEMS = 50  # of each task
ASKED = (("addition", 5), ("sums", 10), ("multiplication", 5))


class StorageRow(NamedTuple):
    """One way to keep the weights. Bits per byte on the first held-out batches; `routing`: share of the picks that are
    float32's; tasks: share of exact answers with thinking."""

    kept: str
    megabytes: float
    code: float
    prose: float
    worse: float  # in percent of float32's bits per byte, both domains together
    routing: float
    tasks: float | None
    tokens_per_second: float | None


def storage_rows(model: Model, batches: int = BATCHES, items: int = ITEMS) -> Iterator[StorageRow]:
    """`model` in float32, then rounded in every way."""
    sample = changing_rows(heldout_streams(model, 4096), 4096)
    base: dict[str, Any] = {}
    for kept in ("float32", "bfloat16", *KINDS):
        small = model.astype(kept)
        with operations(small) as ops:
            found = np.concatenate([picks(small, batch, ops) for batch in slices(sample.batch)])
        bits = _bits(small, batches)
        base = base or {"picks": found, "bits": bits}
        size = sum(array.nbytes for _, array in walk_stacked(small.params)) / 1e6
        speed = max(small.generate("import os\n", 64, end_ids=()).stats.tokens_per_second for _ in range(5))
        yield StorageRow(
            kept, size, *bits, _worse(bits, base["bits"]), _same(found, base["picks"]), _tasks(small, items), speed
        )
    wide = _as_numbers(model.astype("fp8"))
    size = sum(array.nbytes for _, array in walk_stacked(model.astype("fp8").params)) / 1e6
    scales = calibrated(wide, batches)
    for said, given in (("fp8, inputs too, dynamic", None), ("fp8, inputs too, static", scales)):
        bits = _bits(wide, batches, fp8_inputs(wide, given))
        found = np.concatenate([picks(wide, b, fp8_inputs(wide, given)) for b in slices(sample.batch)])
        yield StorageRow(said, size, *bits, _worse(bits, base["bits"]), _same(found, base["picks"]), None, None)


def _bits(model: Model, batches: int, ops: Any = None) -> tuple[float, float]:
    found = [document_bits(model, heldout_documents(d), 256, batches, ops).sum(axis=0) for d in ("code", "prose")]
    code, prose = (float(bits / size) for bits, size in found)
    return code, prose


def _worse(bits: tuple[float, float], base: tuple[float, float]) -> float:
    return 100 * (sum(bits) / sum(base) - 1)


def _same(found: Array, wanted: Array) -> float:  # int [B, T, layer, K]
    return float((found[..., None] == wanted[..., None, :]).any(axis=-1).mean())


def _tasks(model: Model, items: int) -> float:
    asked = [heldout_items(TASKS[name], items, seed=5, size=size) for name, size in ASKED]
    scores = [accuracy(model, each, True, max_new_tokens=answer_limit(model, each, True)) for each in asked]
    return sum(score.right for score in scores) / sum(score.asked for score in scores)


def _as_numbers(model: Model) -> Model:
    params = map_arrays(lambda name, array: array.astype(np.float32), model.params)
    return Model(model.config, params, model.tokenizer, model.chat_template, model.name)


# -- inputs of 8 bits --------------------------------------------------------------------------------------------


def fp8_inputs(model: Model, scales: dict[int, float] | None, seen: dict[int, float] | None = None) -> Any:
    """The book's operations, in which the input of each product with a matrix that FP8 releases quantise is rounded to
    e4m3fn: by a scale for each token, or by one for each matrix, address -> scale. `seen` notes instead the largest
    input of each matrix and rounds nothing."""
    small = {_address(array) for name, array in walk(model.params) if is_small(name, "fp8")}

    def rounded(x: Array, weight: Array) -> Array:
        at = _address(weight)
        if at not in small:
            return x
        if seen is not None:
            seen[at] = max(seen.get(at, 0.0), float(np.abs(x).max(initial=0)))
            return x
        if scales is not None and at not in scales:
            return x  # an expert that no calibration text has met
        largest = np.abs(x).max(axis=-1, keepdims=True, initial=0) if scales is None else scales[at]
        scale = np.maximum(largest / np.float32(LARGEST_FP8), np.float32(1e-12))
        return np.clip(x / scale, -LARGEST_FP8, LARGEST_FP8).astype(FP8).astype(np.float32) * scale

    def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
        return numpy_ops.linear(rounded(x, weight), weight, bias)

    def expert_mlp(x: Array, gate: Array, up: Array, down: Array, tap: Tap = no_tap) -> tuple[Array, None]:
        hidden = swiglu(linear(x, gate), linear(x, up))
        return linear(hidden, down), None

    return SimpleNamespace(**{**vars(numpy_ops), "linear": linear, "expert_mlp": expert_mlp})


def _address(array: Array) -> int:
    return int(array.ctypes.data)


def calibrated(model: Model, batches: int = BATCHES) -> dict[int, float]:
    """The largest input of each matrix on text that the model was trained on: address -> largest."""
    seen: dict[int, float] = {}
    documents = [d for d in standard_library_documents() if d.domain == "code"][:60]
    document_bits(model, documents, 256, batches, fp8_inputs(model, None, seen))
    return seen


# -- errors of tensors -------------------------------------------------------------------------------------------


class ErrorRow(NamedTuple):
    """Tensors of one role: √(Σ error² / Σ weight²), of all together and of the worst tensor."""

    kind: str
    role: str
    tensors: int
    error: float
    worst: float


def error_rows(model: Model, kinds: Sequence[str] = KINDS) -> Iterator[ErrorRow]:
    for kind in kinds:
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for name, array in walk(model.params):
            if is_small(name, kind):
                weight = array.astype(np.float32)
                error = SmallFloats.of(kind, weight).astype(np.float32) - weight
                found[_role(name)].append((float(np.square(error).sum()), float(np.square(weight).sum())))
        for role, squares in sorted(found.items()):
            errors, weights = np.array(squares).T
            worst = float(np.sqrt(errors / np.maximum(weights, 1e-30)).max())
            yield ErrorRow(kind, role, len(squares), float(np.sqrt(errors.sum() / weights.sum())), worst)


def _role(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split(".")[3:]).removesuffix(".weight")


# -- the command -------------------------------------------------------------------------------------------------

STORAGE = ("kept as", "MB", "code", "prose", "worse, %", "same experts, %", "tasks, %", "tokens/s")
ERRORS = ("kind", "tensors", "how many", "error, %", "worst, %")


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minglm.evaluate.storage", description=__doc__)
    parser.add_argument("--model", default="glm-tiny")
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"of held-out text (default {BATCHES})")
    parser.add_argument("--items", type=int, default=ITEMS, help=f"of each task (default {ITEMS})")
    parser.add_argument("--save", type=Path, help="the tables as Markdown")
    asked = parser.parse_args(given)
    try:
        model = load(asked.model)
        kept = []
        for row in storage_rows(model, asked.batches, asked.items):  # a minute each
            kept.append(_shown(row))
            print(
                ", ".join(f"{name} {value}" for name, value in zip(STORAGE, kept[-1], strict=True) if value), flush=True
            )
        print()
        errors = [(*row[:3], f"{100 * row.error:.2f}", f"{100 * row.worst:.2f}") for row in error_rows(model)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(kept, STORAGE))
    print("\n" + table(errors, ERRORS))
    if asked.save:
        asked.save.write_text(markdown_table(kept, STORAGE) + "\n" + markdown_table(errors, ERRORS), "utf-8")
    return 0


def _shown(row: StorageRow) -> tuple[str, ...]:
    tasks = "" if row.tasks is None else f"{100 * row.tasks:.1f}"
    speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
    return (row.kept, f"{row.megabytes:.1f}", f"{row.code:.4f}", f"{row.prose:.4f}", f"{row.worse:+.2f}",
            f"{100 * row.routing:.2f}", tasks, speed)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
