"""The card of a checkpoint: what it is, how it was made, what it can do, where it ends."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from minglm.config import Config
from minglm.data.documents import read_file_list
from minglm.evaluate.golden import Golden
from minglm.evaluate.report import PLAIN_SECTIONS
from minglm.train.recipe import Recipe

if TYPE_CHECKING:
    from minglm.api import Model


TWINS = {
    name: f"""Its twin is [{twin}](../{twin}/README.md): the same seed, data and steps. What differs is the balancing,
both of it: the step of the selection bias (`bias_rate`) and the balance loss (`balance_weight`).

"""
    for name, twin in (("glm-tiny-balanced", "glm-tiny-unbalanced"), ("glm-tiny-unbalanced", "glm-tiny-balanced"))
}
MISREAD = "Questions in other words than the training's few phrases may be misread."


def card(model: "Model", recipe: Recipe, name: str, folder: Path, results: str, golden: list[Golden]) -> str:
    """The README.md of a shipped checkpoint, every number in it measured or read from the run. `name`: the recipe's;
    `results`: the tables of `minglm eval` in Markdown."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    examples = "\n".join(f"    {(g.prompt + g.text)!r}" for g in golden[:6])
    talks = any(stage.format == "chat" for stage in recipe.stages)
    return f"""# {name}

{_architecture(model.config)} Stored in bfloat16.

It is a toy, made to be traced, plotted and stepped through{", and to be asked for small sums" if talks else ""}. It is
not meant to be used as a language model.

## How it was made

    minglm train {name}

Seed {recipe.seed}, {recipe.tokens / 1e6:.1f} million tokens, {recipe.optimiser}, {recipe.engine} engine. Every setting
is in `recipe.toml`, the metrics of every {recipe.log_every} steps in `metrics.jsonl`, the routing of a fixed text over
the run in `routing.safetensors`, every training file with its hash in `training_files.json`. The same machine with the
same versions gives the same bits; another Python has other library files and says so.

{_stages(recipe)}

{TWINS.get(name, "")}## What it was trained on

Generated tasks with and without written-out thinking, and Python source and docstrings found on the machine:

{_origins(folder)}

## Training curve

The first batches of the held-out text, so other figures than the table's below; 50 unseen items of each task, asked as
plain text{", which fine-tuning unlearns: conversations are in the tables below" if talks else ""}.

{_curve(folder)}

![Losses, balance, selection bias and learning rate over the steps](training.png)

## Held-out results

`minglm eval {name}{"" if talks else " --only " + ",".join(PLAIN_SECTIONS)}`

{results}

## Limits

{_limits(model.config, recipe, talks)}

## Golden greedy text

What greedy decoding makes of some plain prompts, right or wrong: a test compares it word for word, so that no change of
the code changes it unseen.

{examples}

`model.safetensors`: sha256 {digest}
"""


def _limits(c: Config, recipe: Recipe, talks: bool) -> str:
    longest = max(stage.sequence_length for stage in recipe.stages)
    return f"""- Sequences in training had at most {longest} tokens; `max_position_embeddings` is
  {c.max_position_embeddings}, and nothing is promised beyond {longest}.
- It knows tasks as far as the figures above say, and Python; English otherwise hardly, Chinese but for numbers not at
  all.
- {MISREAD if talks else "It was never trained on conversations."}"""


def _architecture(c: Config) -> str:
    counts = c.count_parameters()
    return f"""A GLM-4.5 of {counts.total:,} parameters ({counts.active:,} active for a token): hidden size
{c.hidden_size}, {c.num_hidden_layers} layers, the first {c.first_k_dense_replace} dense, the others with
{c.n_routed_experts} experts of which {c.num_experts_per_tok} see a token and {c.n_shared_experts} shared one;
{c.num_attention_heads} query heads on {c.num_key_value_heads} key/value heads of {c.head_dim}; q/k norm, attention
bias, {c.num_nextn_predict_layers} multi-token-prediction layer; a vocabulary of {c.vocab_size:,}."""


def _stages(recipe: Recipe) -> str:
    header = (
        "| stage | steps | rows × tokens | packing | loss on | bias rate | balance weight | mixture |\n" + "|---" * 8
    )
    lines = []
    for stage in recipe.stages:
        first = f"{stage.first_batch_size}–" if stage.first_batch_size else ""
        total = sum(stage.weights.values())
        mixture = ", ".join(f"{name} {share / total:.0%}" for name, share in stage.weights.items())
        counts = "every token" if stage.format == "text" else "what the assistant says"
        rows = f"{first}{stage.batch_size} × {stage.sequence_length}"
        balance = f"{stage.bias_rate:g} | {stage.balance_weight:g}"
        lines.append(f"| {stage.name} | {stage.steps} | {rows} | {stage.packing} | {counts} | {balance} | {mixture} |")
    return header + "|\n" + "\n".join(lines)


def _origins(folder: Path) -> str:
    _, origins = read_file_list((folder / "training_files.json").read_text("utf-8"))
    header = "| origin | version | licence | documents | code, kB | prose, kB |\n|---|---|---|---|---|---|\n"
    return header + "\n".join(
        f"| {o.name} | {o.version} | {o.licence} | {o.documents} | {o.code / 1e3:,.0f} | {o.prose / 1e3:,.0f} |"
        for o in origins
    )


def _curve(folder: Path) -> str:
    """A table of the looks taken in training: a dozen at most, the last among them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    points = [line for line in lines if "code_bits_per_byte" in line]
    every = -(-len(points) // 12)
    names = [name for name in points[-1] if name != "step"]
    header = f"| step | {' | '.join(name.replace('_', ' ') for name in names)} |\n|{'---|' * (len(names) + 1)}\n"
    chosen = points[:-1][::every] + points[-1:]
    return header + "\n".join(f"| {p['step'] + 1} | {' | '.join(f'{p[name]:.3g}' for name in names)} |" for p in chosen)
