"""Token streams and training batches: `batch(step)` is a pure function of (seed, step), so resuming needs no state."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from minglm.data.heldout import Document
from minglm.data.tasks import Task, make_train
from minglm.model.ops import IGNORE

Encode = Callable[[str], list[int]]

PADDING = -1  # the segment of a position that holds no document


class TokenStream(NamedTuple):
    """Documents end to end: tokens [n] (int32 for vocabularies beyond uint16), and where each starts."""

    tokens: NDArray[np.uint16] | NDArray[np.int32]
    starts: NDArray[np.int64]


class Corpus(NamedTuple):
    """The token stream of every domain."""

    streams: dict[str, TokenStream]

    @classmethod
    def build(cls, documents: Iterable[Document], encode: Encode, end_id: int) -> "Corpus":
        """Tokenise the documents, each ended by `end_id` (<|endoftext|>), into one stream per domain."""
        encoded: dict[str, list[NDArray[np.int64]]] = {}
        for document in documents:
            ids = np.array([*encode(document.text), end_id], np.int64)
            encoded.setdefault(document.domain, []).append(ids)
        return cls({domain: _stream(pieces) for domain, pieces in encoded.items()})


def _stream(pieces: Sequence[NDArray[np.int64]]) -> TokenStream:
    tokens = np.concatenate(pieces)
    starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    small = tokens.astype(np.uint16) if tokens.max() < 2**16 else tokens.astype(np.int32)
    return TokenStream(small, starts)


# -- batches --


class Batch(NamedTuple):
    """Rows for one training step, all int64 [B, T].

    `targets[b, t]` is the token that follows `ids[b, t]` in its document, -100 where none does. `segments`
    numbers the documents inside a row from 0: attention and positions do not cross them. -1 is padding.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    segments: NDArray[np.int64]


def windows(stream: TokenStream, first: NDArray[np.int64], sequence_length: int) -> Batch:
    """Rows of T tokens from the token indices `first` [B] of a stream; padding beyond the stream's end."""
    index = first[:, None] + np.arange(sequence_length + 1)  # [B] -> [B, T+1]: a row and the token after it
    inside = index < len(stream.tokens)
    tokens = stream.tokens[np.where(inside, index, 0)].astype(np.int64)
    document = np.searchsorted(stream.starts, index, side="right")
    follows = inside[:, 1:] & (document[:, 1:] == document[:, :-1])
    return Batch(
        ids=np.where(inside, tokens, stream.tokens[-1])[:, :-1],  # padding holds the end token, unseen and unscored
        targets=np.where(follows, tokens[:, 1:], IGNORE),
        segments=np.where(inside, document - document[:, :1], PADDING)[:, :-1],
    )


def stream_batches(stream: TokenStream, sequence_length: int, batch_size: int) -> Iterator[Batch]:
    """The whole stream once, in order, as rows side by side: for evaluation. The last row is padded.

    Every token but the first of each document is a target exactly once; a row's first tokens have little
    context.
    """
    first = np.arange(0, len(stream.tokens), sequence_length)
    for start in range(0, len(first), batch_size):
        yield windows(stream, first[start : start + batch_size], sequence_length)


class Mixture:
    """Training batches from a corpus and generated tasks, in given proportions.

    `weights` maps domains of the corpus and names of tasks to shares of the rows; only ratios matter. A row
    holds one text domain, or tasks: all tasks share the task rows, and `weights` says how often each is drawn
    there. So a small batch, too, holds every domain: a domain with share w gets floor(B·w) or ceil(B·w) of
    the B rows, B·w on average.

    Text rows are windows at random places (random truncation). Task rows are documents of one to six lines of
    one task, end to end; the last is cut by the row's end. Task items are drawn anew for every batch, never a
    held-out one.

    ValueError for a T or B below 1, weights that are unknown, negative or all zero, or a domain shorter than
    a row.
    """

    def __init__(
        self,
        corpus: Corpus,
        tasks: Iterable[Task],
        weights: Mapping[str, float],
        sequence_length: int,
        batch_size: int,
        seed: int,
        encode: Encode,
        end_id: int,
    ) -> None:
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.encode = lru_cache(2**15)(encode)  # short prompts and answers recur: half the time of a batch
        self.end_id = end_id
        by_name = {task.name: task for task in tasks}
        _check_sizes(sequence_length, batch_size)
        _check_weights(weights, corpus, by_name)
        used = {name: weight for name, weight in weights.items() if weight > 0}
        self.streams = {name: corpus.streams[name] for name in used if name in corpus.streams}
        _check_lengths(self.streams, sequence_length)
        self.tasks = [by_name[name] for name in used if name in by_name]
        self.task_ends = _ends([used[task.name] for task in self.tasks])
        in_tasks = sum(used[task.name] for task in self.tasks)
        self.row_ends = _ends([*(used[name] for name in self.streams), in_tasks])

    def batch(self, step: int) -> Batch:
        """The batch of this step, [B, T]: a pure function of (seed, step)."""
        rng = default_rng([self.seed, step])
        rows = self._rows_per_kind(rng)
        parts = [
            self._text_rows(stream, count, rng) for stream, count in zip(self.streams.values(), rows[:-1], strict=True)
        ]
        parts.append(self._task_rows(rows[-1], rng))
        order = rng.permutation(self.batch_size)  # so that a slice of the batch is a mixture too
        ids, targets, segments = (np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True))
        return Batch(ids, targets, segments)

    def _rows_per_kind(self, rng: Generator) -> list[int]:
        """Rows for each text domain, then for tasks: B evenly spaced points on the shares laid end to end."""
        points = (np.arange(self.batch_size) + rng.random()) / self.batch_size
        return np.bincount(np.searchsorted(self.row_ends, points), minlength=len(self.row_ends)).tolist()

    def _text_rows(self, stream: TokenStream, count: int, rng: Generator) -> Batch:
        first = rng.integers(0, len(stream.tokens) - self.sequence_length, size=count)
        return windows(stream, first, self.sequence_length)

    def _task_rows(self, count: int, rng: Generator) -> Batch:
        """Rows of task documents: each row starts with a new one and has at least one token after it."""
        pieces: list[NDArray[np.int64]] = []
        first: list[int] = []
        total = 0
        for _ in range(count):
            first.append(total)
            while total <= first[-1] + self.sequence_length:
                pieces.append(np.array(self._task_document(rng), np.int64))
                total += len(pieces[-1])
        stream = _stream(pieces or [np.array([self.end_id], np.int64)])
        return windows(stream, np.array(first, np.int64), self.sequence_length)

    def _task_document(self, rng: Generator) -> list[int]:
        """One to six lines of one task, and the end token.

        Prompt and answer are encoded apart, as when the model is asked: no token can span the two.
        """
        task = self.tasks[int(np.searchsorted(self.task_ends, rng.random()))]
        ids: list[int] = []
        for _ in range(rng.integers(1, 7)):
            item = make_train(task, rng)
            ids += self.encode(item.prompt) + self.encode(item.answer + "\n")
        return [*ids, self.end_id]


def _ends(weights: Sequence[float]) -> NDArray[np.float64]:
    """Where each weight's share ends when all are laid end to end on [0, 1]; the last is exactly 1."""
    ends = np.cumsum(np.array(weights, np.float64))
    return ends / ends[-1] if len(ends) else ends


def _check_sizes(sequence_length: int, batch_size: int) -> None:
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: wanted at least 1")


def _check_weights(weights: Mapping[str, float], corpus: Corpus, tasks: Mapping[str, Task]) -> None:
    known = [*corpus.streams, *tasks]
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(f"weights name {', '.join(unknown)}: wanted some of {', '.join(known)}")
    if clash := [name for name in tasks if name in corpus.streams]:
        raise ValueError(f"{', '.join(clash)} names a domain and a task: rename the domain")
    if not all(0 <= weight < np.inf for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights {dict(weights)}: wanted finite numbers from 0 up, at least one of them above 0")


def _check_lengths(streams: Mapping[str, TokenStream], sequence_length: int) -> None:
    for name, stream in streams.items():
        if len(stream.tokens) <= sequence_length:
            raise ValueError(
                f"domain {name!r} has {len(stream.tokens)} tokens, a row needs {sequence_length + 1} "
                "(its targets are one ahead): add text or shorten the sequence"
            )
