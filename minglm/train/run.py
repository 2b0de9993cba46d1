"""From a recipe to a finished checkpoint: tokenizer, data, training, held-out results, card."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minglm.api import Model, load
from minglm.config import PRESETS
from minglm.data.batches import Corpus, Mixture
from minglm.data.documents import compare_file_lists, documents, file_list, hold_out_tails, load_text_files
from minglm.data.heldout import Document, heldout_documents
from minglm.data.tasks import TASKS, TWO_DIGIT_ADDITION, heldout_items
from minglm.evaluate.accuracy import accuracy
from minglm.evaluate.bits_per_byte import bits_per_byte
from minglm.evaluate.golden import golden_texts
from minglm.evaluate.report import report
from minglm.formats.files import write_text
from minglm.model.params import init_params
from minglm.text.chat import ChatTemplate
from minglm.text.tokenizer import Tokenizer, train_tokenizer
from minglm.train.card import card
from minglm.train.loop import newest_checkpoint, train
from minglm.train.recipe import Recipe

Say = Callable[[str], None]


def fresh_model(recipe: Recipe, docs: list[Document]) -> Model:
    """A model with the recipe's preset and seed, and a tokenizer learnt from the documents."""
    config = PRESETS[recipe.preset]
    tokenizer = learn_tokenizer(docs, config.vocab_size)
    config = config.replace(eos_token_id=tokenizer.end_ids, pad_token_id=tokenizer.end_ids[0])
    params = init_params(config, np.random.default_rng(recipe.seed))
    return Model(config, params, tokenizer, ChatTemplate(), recipe.preset)


def learn_tokenizer(docs: list[Document], vocab_size: int, bytes_per_domain: int = 2_000_000) -> Tokenizer:
    """Merges learnt from up to the same number of bytes of each domain, so that the largest does not decide alone."""
    texts, used = [], dict.fromkeys((d.domain for d in docs), 0)
    for document in docs:
        if used[document.domain] < bytes_per_domain:
            texts.append(document.text)
            used[document.domain] += len(document.text.encode())
    return train_tokenizer(texts, vocab_size)


def mixture(recipe: Recipe, docs: list[Document], model: Model) -> Mixture:
    """The batches of a recipe."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    end = tokenizer.end_ids[0]
    corpus = Corpus.build(docs, tokenizer.encode, end)
    return Mixture(
        corpus,
        TASKS.values(),
        recipe.weights,
        recipe.sequence_length,
        recipe.batch_size,
        recipe.seed,
        tokenizer.encode,
        end,
    )


def quick_look(model: Model) -> dict[str, float]:
    """Held-out numbers cheap enough to be taken during training."""
    items = heldout_items(TWO_DIGIT_ADDITION, 100, seed=0)
    return {
        "code_bits_per_byte": bits_per_byte(model, heldout_documents("code"), most_batches=6),
        "prose_bits_per_byte": bits_per_byte(model, heldout_documents("prose"), most_batches=6),
        "two_digit_addition": accuracy(model, TWO_DIGIT_ADDITION, items, max_new_tokens=5).share,
    }


def _newest_model(run: Path) -> Model | None:
    newest = newest_checkpoint(run)
    return None if newest is None else load(newest)


def _note_files(run: Path, docs: list[Document], say: Say) -> None:
    """Record which files the text came from; say so when a resumed run finds others."""
    path, found = run / "training_files.json", file_list(docs)
    if path.exists() and (difference := compare_file_lists(json.loads(path.read_text("utf-8")), found)):
        say(f"careful: {difference}")
    elif not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=0) + "\n")


def train_recipe(
    recipe: Recipe, run: Path, files: Sequence[Path] = (), say: Say = print, threads: int | None = None
) -> Model:
    """Train a recipe from nothing, or go on where `run` stopped.

    `files`: the user's own text instead of the standard library and the tasks. The tokenizer is learnt from both, so
    that a small text is enough; the ends of the files are held out.
    """
    own, tails = hold_out_tails(load_text_files(files))
    say("reading the training text …")
    docs = list(documents())
    if files:
        recipe = replace(recipe, weights={"text": 1.0})
    say(f"{len(own or docs)} documents, {sum(len(d.text.encode()) for d in own or docs) / 1e6:.1f} MB")
    model = _newest_model(run) or fresh_model(recipe, [*own, *docs])
    _note_files(run, own or docs, say)
    say("encoding …")
    batches = mixture(recipe, own or docs, model)
    say(f"{'fresh weights' if newest_checkpoint(run) is None else 'going on'}: {model}")
    say(
        f"{recipe.steps} steps of {recipe.batch_size} × {recipe.sequence_length} tokens, {recipe.engine} engine, into {run}"
    )
    look = (lambda m: {"text_bits_per_byte": bits_per_byte(m, tails)}) if tails else None if files else quick_look
    return train(model, recipe, batches, run, look, threads=threads)


def finish(model: Model, recipe: Recipe, run: Path, folder: Path, own_data: bool, say: Say = print) -> None:
    """Write the finished model in bfloat16 with its metrics and list of training files; for one of our recipes, not
    the user's own data, also held-out results, golden texts and a card."""
    model.save(folder, "bfloat16")
    shipped = load(folder)  # what readers will get: weights rounded to bfloat16
    for name in ("metrics.jsonl", "training_files.json", "recipe.json"):
        shutil.copyfile(run / name, folder / name)
    if own_data:
        last = (folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
        say(f"saved {folder}; its last metrics: {last[:160]}")
        return
    golden = golden_texts(shipped)
    lines = ",\n".join(json.dumps(g._asdict(), ensure_ascii=False) for g in golden)
    (folder / "golden.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    say("measuring …")
    rows = report(shipped, items=802)
    (folder / "README.md").write_text(card(shipped, recipe, folder, rows, golden), "utf-8")
    say(f"saved {folder}")
