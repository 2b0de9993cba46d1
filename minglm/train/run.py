"""From a recipe to a finished checkpoint: tokenizer, data, training, held-out results, card."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minglm.api import Model, load
from minglm.data.chats import spans, task_chat, tool_chat
from minglm.data.documents import (
    CHAT,
    compare_file_lists,
    documents,
    file_list,
    file_list_text,
    hold_out_tails,
    load_text_files,
    read_file_list,
)
from minglm.data.heldout import Document, heldout_documents
from minglm.data.libraries import Origin, find_packages, origins
from minglm.data.tasks import TASKS, heldout_items, make_train, plain
from minglm.evaluate.accuracy import accuracy
from minglm.evaluate.bits_per_byte import bits_per_byte
from minglm.evaluate.golden import golden_texts
from minglm.evaluate.report import PLAIN_SECTIONS, SECTIONS, as_json, as_markdown, report
from minglm.fast.team import thread_count
from minglm.formats.files import write_text
from minglm.formats.tensors import write_tensors
from minglm.model.params import init_params, walk_stacked
from minglm.text.template import ChatTemplate
from minglm.text.tokenizer import Tokenizer, train_tokenizer
from minglm.train.card import card
from minglm.train.curriculum import Curriculum
from minglm.train.folder import newest_checkpoint, remove_it, same_recipe, steps_of
from minglm.train.loop import train
from minglm.train.observe import observer, routing_over_time
from minglm.train.recipe import Recipe

Say = Callable[[str], None]


def fresh_model(recipe: Recipe, docs: list[Document]) -> Model:
    """A model with the recipe's preset and seed, and a tokenizer learnt from the documents and the tasks."""
    config = recipe.model_config()
    tokenizer = learn_tokenizer(docs, config.vocab_size)
    config = config.replace(eos_token_id=tokenizer.end_ids, pad_token_id=tokenizer.end_ids[0])
    params = init_params(config, np.random.default_rng(recipe.seed))
    return Model(config, params, tokenizer, ChatTemplate(), recipe.preset)


TOKENIZER_BYTES = 2_000_000  # of each domain, so that the largest does not decide alone
TOKENIZER_ITEMS = 2000  # of each task


def learn_tokenizer(docs: list[Document], vocab_size: int) -> Tokenizer:
    """Merges learnt from the documents, the tasks' plain text, and conversations."""
    texts, used = [], dict.fromkeys((d.domain for d in docs), 0)
    for document in docs:
        if used[document.domain] < TOKENIZER_BYTES:
            texts.append(document.text)
            used[document.domain] += len(document.text.encode())
    return train_tokenizer([*texts, *_task_texts()], vocab_size)


def _task_texts() -> Iterator[str]:
    rng, template = np.random.default_rng(0), ChatTemplate()
    for task in TASKS.values():
        items = [make_train(task, rng) for _ in range(TOKENIZER_ITEMS)]
        yield "".join("".join(plain(item, thinking)) for item in items for thinking in (True, False))
        chats = [(tool_chat if task.name == "calculator" else task_chat)(item, True) for item in items[:20]]
        yield "".join(text for chat in chats for text, _ in spans(chat, template))


def quick_look(model: Model) -> dict[str, float]:
    """Held-out numbers cheap enough to be taken during training."""
    found = {
        f"{d}_bits_per_byte": bits_per_byte(model, heldout_documents(d), most_batches=6) for d in ("code", "prose")
    }
    for name, size in (("addition", 3), ("sums", 10), ("multiplication", 4)):
        items = heldout_items(TASKS[name], 50, seed=0, size=size)
        for thinking in (False, True):
            share = accuracy(model, items, thinking, chat=False, max_new_tokens=200).share
            found[f"{name}_{'thinking' if thinking else 'direct'}"] = share
    return found


def _newest_model(run: Path) -> Model | None:
    newest = newest_checkpoint(run)
    if newest is None:
        return None
    try:
        return load(newest)
    except ValueError as error:
        raise ValueError(f"{error}. {remove_it(newest)}") from error


def _check_start(model: Model, recipe: Recipe) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer, so it cannot be trained on text")
    context, longest = model.config.max_position_embeddings, max(stage.sequence_length for stage in recipe.stages)
    if longest > context:
        raise ValueError(f"the recipe has sequences of {longest} tokens, {model.name} has a context of {context}")
    return model.tokenizer


def _beginning(start: Model | None) -> str:
    """What tells which weights a run began with."""
    if start is None:
        return "fresh weights"
    digest = hashlib.sha256()
    for _, array in walk_stacked(start.params):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _check_run(run: Path, recipe: Recipe, own: list[Document], beginning: str) -> None:
    """Before anything is read or written: ValueError if the folder holds another run."""
    if newest_checkpoint(run) is None:
        return  # nobody has trained here yet
    same_recipe(run, recipe)
    rest = "give another --run-folder or remove it"
    path = run / "began_with.txt"
    if path.exists() and path.read_text("utf-8").strip() != beginning:
        raise ValueError(f"{run} holds a run that began with other weights; {rest}")
    if own and (difference := _difference(run, own)):
        raise ValueError(f"{run} holds a run on other data; {rest}. {difference}")


def _note_run(run: Path, docs: list[Document], origins: list[Origin], beginning: str, say: Say) -> None:
    """Record which weights a run began with, and which files the text came from; say so when a resumed run finds
    others."""
    if newest_checkpoint(run) is None:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "began_with.txt", f"{beginning}\n")
        write_text(run / "training_files.json", file_list_text(file_list(docs), origins))
    elif difference := _difference(run, docs):
        say(f"careful: {difference}")


def _difference(run: Path, docs: list[Document]) -> str | None:
    """How these documents differ from those that a run began with."""
    path = run / "training_files.json"
    if not path.exists():
        return None
    try:
        return compare_file_lists(read_file_list(path.read_text("utf-8"))[0], file_list(docs))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what a run writes there ({error!r}); give another --run-folder") from error


def train_recipe(
    recipe: Recipe,
    run: Path,
    files: Sequence[Path] = (),
    start: Model | None = None,
    say: Say = print,
    threads: int | None = None,
    steps: int | None = None,
) -> Model:
    """Train a recipe from nothing, or go on where `run` stopped.

    `files`: the user's own text instead of our text and tasks; the ends of the files are held out. `start`: the model
    to fine-tune; without it the weights are fresh and the tokenizer is learnt, from the files and from our text, so
    that a small file is enough. `steps`: another number of steps than the recipe's.

    Raises ValueError for files that cannot be trained on, and for a run folder of another recipe, of other files of the
    user's, or that began with other weights.
    """
    own, tails = hold_out_tails(load_text_files(files))
    if files:
        recipe = with_own_data(recipe, {document.domain for document in own})
    else:
        _check_weights(recipe)
    if steps is not None:
        recipe = recipe.shortened(steps)
    thread_count(threads)
    beginning = _beginning(start)
    _check_run(run, recipe, own, beginning)
    say("reading the training text …")
    packages = [] if own else find_packages(say=say)
    docs = [] if own and start else list(documents(packages=packages))
    used = own or docs
    say(f"{len(used)} documents, {sum(len(d.text.encode()) for d in used) / 1e6:.1f} MB")
    model = _newest_model(run) or start or fresh_model(recipe, [*own, *docs])
    tokenizer = _check_start(model, recipe)
    say("encoding …")
    newest = newest_checkpoint(run)
    batches = Curriculum(recipe, used, tokenizer, model.chat_template or ChatTemplate())
    _note_run(run, used, [] if own else origins(docs, packages), beginning, say)
    say(f"{'fresh weights' if newest is None and start is None else 'going on'}: {model}")
    names = ", ".join(f"{stage.name} {stage.steps}" for stage in recipe.stages)
    say(f"steps: {names}; {recipe.tokens / 1e6:.1f} million tokens, {recipe.engine} engine, into {run}")
    if newest and steps_of(newest) >= recipe.steps:
        say("all of them were made before; nothing is left to train (another --run-folder begins anew)")
    look = (lambda m: {"text_bits_per_byte": bits_per_byte(m, tails)}) if tails else None if files else quick_look
    return train(model, recipe, batches, run, observer(run, recipe, look), threads=threads)


def _check_weights(recipe: Recipe) -> None:
    """Before anything is read: ValueError for a stage that does not name data of ours."""
    known = ("code", "prose", *TASKS, "turns")
    for stage in recipe.stages:
        unknown = sorted(stage.weights.keys() - set(known))
        if unknown or not any(stage.weights.values()):
            raise ValueError(
                f"stage {stage.name}: its weights name {', '.join(unknown) or 'nothing'}; wanted some of "
                f"{', '.join(known)}, or your own files with --data"
            )


def with_own_data(recipe: Recipe, domains: set[str]) -> Recipe:
    """The recipe on the user's data alone: its text stages on texts, or its last stage on conversations. Raises
    ValueError for both at once, and for texts where there is no text stage."""
    if domains == {CHAT}:
        last = recipe.stages[-1]
        rate = recipe.at(recipe.steps - 1).learning_rate if last.learning_rate is None else last.learning_rate
        chats = replace(last, format="chat", packing="best-fit", weights={CHAT: 1.0}, switch=0.0, learning_rate=rate)
        return replace(recipe, stages=(chats,))
    if CHAT in domains:
        raise ValueError("the files hold texts and conversations; train on one kind after the other, with --from")
    stages = [replace(stage, weights={"text": 1.0}) for stage in recipe.stages if stage.format == "text"]
    if not stages:
        raise ValueError("the recipe has no text stage, so it cannot be trained on texts; take another one")
    return replace(recipe, stages=tuple(stages))


def finish(model: Model, recipe: Recipe, run: Path, folder: Path, name: str | None = None, say: Say = print) -> None:
    """Write the finished model in bfloat16 with its metrics, plot, routing over time and list of training files. With
    the `name` of a recipe of ours that was run as it stands, also held-out results, golden texts and a card."""
    model.save(folder, "bfloat16")
    shipped = load(folder)  # what readers will get: weights rounded to bfloat16
    for file in ("metrics.jsonl", "training_files.json", "recipe.toml", "training.png"):
        shutil.copyfile(run / file, folder / file)
    moments = routing_over_time(run)
    write_tensors(folder / "routing.safetensors", moments)
    if name is None:
        say(f"saved {folder}; minglm chat --model {folder} talks to it, minglm eval {folder} measures it")
        return
    golden = golden_texts(shipped)
    lines = ",\n".join(json.dumps(g._asdict(), ensure_ascii=False) for g in golden)
    write_text(folder / "golden.json", f"[\n{lines}\n]\n")
    say("measuring …")
    talks = any(stage.format == "chat" for stage in recipe.stages)
    tables = report(shipped, SECTIONS if talks else PLAIN_SECTIONS)
    write_text(folder / "eval.json", as_json(tables, shipped))
    write_text(folder / "README.md", card(shipped, recipe, name, folder, as_markdown(tables, shipped), golden))
    say(f"saved {folder}")
