"""The card of a checkpoint: what it is, how it was made, what it can do, where it ends."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minglm.evaluate.golden import Golden
from minglm.train.recipe import Recipe

if TYPE_CHECKING:
    from minglm.api import Model


def card(model: "Model", recipe: Recipe, folder: Path, rows: list[dict[str, Any]], golden: list[Golden]) -> str:
    """The README.md of a shipped checkpoint, every number in it measured or read from the run."""
    config, counts = model.config, model.config.count_parameters()
    tokens = recipe.steps * recipe.batch_size * recipe.sequence_length
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    results = "\n".join(f"| {r['measure']} | {r['value']:.3f} | {r['beside']} |" for r in rows)
    examples = "\n".join(f"    {(g.prompt + g.text)!r}" for g in golden[:4])
    return f"""# {folder.name}

A GLM-4.5 of {counts.total:,} parameters ({counts.active:,} active for a token): {config.num_hidden_layers} layers, the
first {config.first_k_dense_replace} dense, the others with {config.n_routed_experts} experts of which
{config.num_experts_per_tok} see a token and {config.n_shared_experts} shared one; q/k norm, attention bias,
{config.num_nextn_predict_layers} multi-token-prediction layer. Stored in bfloat16.

It is a toy: it has seen some {tokens / 1e6:.0f} million tokens of Python, manual pages and sums. It was made to be
traced, plotted and stepped through, not to be used as a language model.

## How it was made

    minglm train {folder.name}        (or: make train-nano)

Seed {recipe.seed}, {recipe.steps} steps of {recipe.batch_size} × {recipe.sequence_length} tokens, AdamW with peak rate
{recipe.learning_rate:g}, {recipe.engine} engine. Every setting is in `recipe.json`, every
tenth step in `metrics.jsonl`, every training file with its hash in `training_files.json`. The same machine gives the
same bits; another Python has other library files and says so.

Data: source, docstrings and `pydoc` topics of the Python standard library (PSF licence), and generated sums,
differences, reversals and number words. Rows: {", ".join(f"{k} {v:.0%}" for k, v in recipe.weights.items())}.

## Training curve (held-out text, first batches)

{_curve(folder)}

## Held-out results

`minglm eval {folder.name} --items 802`

| measure | value | beside it |
|---|---|---|
{results}

## Limits

- Trained on {recipe.sequence_length} tokens of context; `max_position_embeddings` is {config.max_position_embeddings},
  and nothing is promised beyond {recipe.sequence_length}.
- No chat training: the chat template is there, the manners are not.
- English and Python only; other text falls apart into bytes.

## Golden greedy text (tested)

{examples}

`model.safetensors`: sha256 {digest}
"""


def _curve(folder: Path) -> str:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    points = [line for line in lines if "code_bits_per_byte" in line]
    chosen = [p for i, p in enumerate(points) if i % 3 == 0 or p is points[-1]]
    header = "| step | code, bits per byte | prose, bits per byte | two-digit addition |\n|---|---|---|---|\n"
    return header + "\n".join(
        f"| {p['step'] + 1} | {p['code_bits_per_byte']:.3f} | {p['prose_bits_per_byte']:.3f} | "
        f"{p['two_digit_addition']:.2f} |"
        for p in chosen
    )
