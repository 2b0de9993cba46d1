"""From a recipe to its batches: which source stands behind each name in a stage's weights."""

import json
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from minglm.data.batches import Batch, Corpus, Encode, Mixture, Piece, Source, TextSource, TokenStream, whole
from minglm.data.chats import Chat, ChatSource, encode_chat
from minglm.data.documents import CHAT
from minglm.data.heldout import Document
from minglm.data.tasks import TASKS, Task, make_train, plain
from minglm.text.template import ChatTemplate
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


class GivenSource(NamedTuple):
    """The user's own conversations that fit into a row, each as likely as another."""

    pieces: list[Piece]

    def piece(self, rng: Generator, most: int) -> Piece:
        return self.pieces[int(rng.integers(len(self.pieces)))]


def read_chat(document: Document) -> Chat:
    """A conversation of the user's, as `load_text_files` kept it. Thinking is on if the answer has any."""
    record = json.loads(document.text)
    said = [message for message in record["messages"] if isinstance(message, dict)]
    thinking = any(message.get("reasoning_content") for message in said)
    return Chat(record["messages"], thinking, record.get("tools"))


def given_source(documents: list[Document], template: ChatTemplate, encode: Encode, length: int) -> GivenSource:
    """Those that fit into rows of `length` tokens; warns how many do not. ValueError if none does, and, naming file and
    line, for what is no conversation, and for one in which nobody answers."""
    pieces = []
    for document in documents:
        try:
            pieces.append(encode_chat(read_chat(document), template, encode))
        except ValueError as error:
            raise ValueError(f"{document.name}: {error}") from error
    fitting = [piece for piece in pieces if len(piece.ids) <= length + 1]
    if not fitting:
        raise ValueError(f"no conversation fits into a sequence of {length} tokens; lengthen the sequence")
    if left := len(pieces) - len(fitting):
        warnings.warn(f"{left} of {len(pieces)} conversations are longer than {length} tokens, left out", stacklevel=2)
    return GivenSource(fitting)


class Curriculum:
    """The batches of all stages of a recipe, one after the other: a pure function of the step. The documents may come
    already encoded, without conversations.

    Raises ValueError for weights that name nothing, a domain named like a task or shorter than a row, and a
    conversation that cannot be rendered.
    """

    def __init__(
        self, recipe: Recipe, documents: Iterable[Document] | Corpus, tokenizer: Tokenizer, template: ChatTemplate
    ):
        self.recipe, self.tokenizer, self.template = recipe, tokenizer, template
        given = [] if isinstance(documents, Corpus) else list(documents)
        self.chats = [document for document in given if document.domain == CHAT]
        texts = [document for document in given if document.domain != CHAT]
        ready = documents if isinstance(documents, Corpus) else None
        self.streams = (ready or Corpus.build(texts, tokenizer.encode, tokenizer.end_ids[0])).streams
        self.encode = lru_cache(2**16)(tokenizer.encode)  # short prompts and answers recur: half the time of a batch
        self.mixtures = [self._mixture(number, stage) for number, stage in enumerate(recipe.stages)]

    def batch(self, step: int) -> Batch:
        now = self.recipe.at(step)
        return self.mixtures[now.number].batch(now.step, now.batch_size)

    def _mixture(self, number: int, stage: Stage) -> Mixture:
        for domain, stream in self.streams.items():
            if domain in TASKS or domain == "turns":
                raise ValueError(f"{domain} names a domain and a task: rename the domain")
            if stage.weights.get(domain, 0) > 0:
                _check_length(domain, stream, stage.sequence_length)
        sources = self._text_sources(stage) if stage.format == "text" else self._chat_sources(stage)
        seed = int(np.random.SeedSequence([self.recipe.seed, number]).generate_state(1)[0])  # one for each stage
        padding = self.tokenizer.end_ids[0]
        return Mixture(sources, stage.weights, stage.sequence_length, seed, padding, stage.packing, stage.switch)

    def _text_sources(self, stage: Stage) -> dict[str, Source]:
        whole_documents, end = stage.packing == "best-fit", self.tokenizer.end_ids[0]
        tasks = [task for task in TASKS.values() if task.name != "calculator"]  # it needs a tool
        return {
            **{domain: TextSource(stream, whole_documents) for domain, stream in self.streams.items()},
            **{task.name: TaskSource(task, self.encode, end, stage.thinking) for task in tasks},
        }

    def _chat_sources(self, stage: Stage) -> dict[str, Source]:
        how = self.template, self.tokenizer, self.encode, stage.thinking
        sources: dict[str, Source] = {name: ChatSource(name, *how) for name in (*TASKS, "turns")}
        sources |= {domain: ChatSource(domain, *how, stream) for domain, stream in self.streams.items()}
        if self.chats:
            sources[CHAT] = given_source(self.chats, self.template, self.tokenizer.encode, stage.sequence_length)
        return sources


def _check_length(name: str, stream: TokenStream, sequence_length: int) -> None:
    if len(stream.tokens) <= sequence_length:
        raise ValueError(
            f"domain {name!r} has {len(stream.tokens)} tokens, a row needs {sequence_length + 1} "
            "(its targets are one ahead): add text or shorten the sequence"
        )
