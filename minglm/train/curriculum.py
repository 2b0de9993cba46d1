"""From a recipe to its batches: which source stands behind each name in a stage's weights."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from minglm.data.batches import Batch, Corpus, Encode, Mixture, Piece, Source, TextSource, TokenStream, whole
from minglm.data.chats import ChatSource
from minglm.data.heldout import Document
from minglm.data.tasks import TASKS, Task, make_train, plain
from minglm.text.chat import ChatTemplate
from minglm.text.tokenizer import Tokenizer
from minglm.train.recipe import Recipe, Stage

DOCUMENT = 64  # tokens that a document of task items has at least


class TaskSource(NamedTuple):
    """Documents of items of one task, end to end, direct and worked ones in the shares that `thinking` says."""

    task: Task
    encode: Encode
    end_id: int
    thinking: float

    def piece(self, rng: Generator, most: int) -> Piece:
        """Prompt and answer are encoded apart, as when the model is asked: no token can span the two."""
        ids: list[int] = []
        while len(ids) < DOCUMENT:
            prompt, completion = plain(make_train(self.task, rng), bool(rng.random() < self.thinking))
            ids += self.encode(prompt) + self.encode(completion)
        return whole([*ids, self.end_id])


class Curriculum:
    """The batches of all stages of a recipe, one after the other: a pure function of the step."""

    def __init__(self, recipe: Recipe, documents: Iterable[Document], tokenizer: Tokenizer, template: ChatTemplate):
        self.recipe = recipe
        corpus = Corpus.build(documents, tokenizer.encode, tokenizer.end_ids[0])
        encode = lru_cache(2**16)(tokenizer.encode)  # short prompts and answers recur: half the time of a batch
        self.mixtures = [
            _mixture(stage, number, recipe.seed, corpus, tokenizer, template, encode)
            for number, stage in enumerate(recipe.stages)
        ]

    def batch(self, step: int) -> Batch:
        now = self.recipe.at(step)
        return self.mixtures[now.number].batch(now.step, now.batch_size)


def _mixture(
    stage: Stage,
    number: int,
    seed: int,
    corpus: Corpus,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    encode: Encode,
) -> Mixture:
    sources: dict[str, Source] = {}
    for domain, stream in corpus.streams.items():
        if domain in TASKS or domain == "turns":
            raise ValueError(f"{domain} names a domain and a task: rename the domain")
        if stage.weights.get(domain, 0) > 0:
            _check_length(domain, stream, stage.sequence_length)
        sources[domain] = (
            TextSource(stream, aligned=stage.packing == "best-fit")
            if stage.format == "text"
            else ChatSource(domain, template, tokenizer, encode, stream=stream)
        )
    if stage.format == "text":
        tasks = [task for task in TASKS.values() if task.name != "calculator"]  # it needs a tool
        sources |= {task.name: TaskSource(task, encode, tokenizer.end_ids[0], stage.thinking) for task in tasks}
    else:
        sources |= {name: ChatSource(name, template, tokenizer, encode, stage.thinking) for name in (*TASKS, "turns")}
    return Mixture(
        sources,
        stage.weights,
        stage.sequence_length,
        int(np.random.SeedSequence([seed, number]).generate_state(1)[0]),
        tokenizer.end_ids[0],
        stage.packing,
        stage.switch,
    )


def _check_length(name: str, stream: TokenStream, sequence_length: int) -> None:
    if len(stream.tokens) <= sequence_length:
        raise ValueError(
            f"domain {name!r} has {len(stream.tokens)} tokens, a row needs {sequence_length + 1} "
            "(its targets are one ahead): add text or shorten the sequence"
        )
