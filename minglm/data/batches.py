"""Training batches: pieces of text, of generated tasks and of conversations, laid into rows.

`batch(step)` is a pure function of (seed, step), so resuming needs no state.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from minglm.data.heldout import Document
from minglm.model.ops import IGNORE

Encode = Callable[[str], list[int]]

PADDING = -1  # the segment of a position that holds no document


class Batch(NamedTuple):
    """Rows for one training step, all int64 [B, T].

    `targets[b, t]` is the token that follows `ids[b, t]` in its document, -100 where none does or where it does not
    count. `segments` numbers the documents inside a row from 0: attention and positions do not cross them. -1 is
    padding.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    segments: NDArray[np.int64]


# -- streams -----------------------------------------------------------------------------------------------------


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


def stream_batches(stream: TokenStream, sequence_length: int, batch_size: int) -> Iterator[Batch]:
    """The whole stream once, in order, as rows side by side: for evaluation. The last row is padded.

    Every token but the first of each document is a target exactly once; a row's first tokens have little
    context.
    """
    first = np.arange(0, len(stream.tokens), sequence_length)
    for start in range(0, len(first), batch_size):
        yield windows(stream, first[start : start + batch_size], sequence_length)


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


# -- pieces ------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A document, or part of one. It takes n − 1 places of a row: its last token is only predicted."""

    ids: NDArray[np.int64]  # [n]
    counts: NDArray[np.bool_]  # [n]: whether predicting this token counts

    def cut(self, most: int) -> "Piece":
        return Piece(self.ids[:most], self.counts[:most])

    @property
    def places(self) -> int:
        return len(self.ids) - 1


def whole(ids: Sequence[int] | NDArray[Any]) -> Piece:
    """A piece of which every token counts."""
    return Piece(np.asarray(ids, np.int64), np.ones(len(ids), bool))


class Source(Protocol):
    """Where one kind of piece comes from."""

    def piece(self, rng: Generator, most: int) -> Piece:
        """The next one, at most `most` tokens where the kind can be cut at all."""
        ...


class TextSource(NamedTuple):
    """Parts of a stream's documents: from a random place to the document's end, which is random truncation; or, with
    `aligned`, the document's own chunks of `most` tokens, so that one that fits comes whole."""

    stream: TokenStream
    aligned: bool = False

    def piece(self, rng: Generator, most: int) -> Piece:
        tokens, starts = self.stream
        at = int(rng.integers(len(tokens)))
        document = int(np.searchsorted(starts, at, side="right"))
        begin, end = int(starts[document - 1]), int(starts[document]) if document < len(starts) else len(tokens)
        at = begin + (at - begin) // most * most if self.aligned else min(at, end - 2)
        return whole(tokens[max(min(at, end - 2), begin) : min(at + most, end)])


# -- rows --------------------------------------------------------------------------------------------------------


def lay_out(rows: Sequence[Sequence[Piece]], sequence_length: int, padding_id: int) -> Batch:
    """Each row's pieces one after the other, a segment each; what does not fit is cut off, what is left is padding."""
    shape = len(rows), sequence_length
    batch = Batch(np.full(shape, padding_id, np.int64), np.full(shape, IGNORE), np.full(shape, PADDING))
    for b, pieces in enumerate(rows):
        at = 0
        for number, piece in enumerate(pieces):
            ids, counts = piece.cut(sequence_length - at + 1)
            end = at + len(ids) - 1
            batch.ids[b, at:end] = ids[:-1]
            batch.targets[b, at:end] = np.where(counts[1:], ids[1:], IGNORE)
            batch.segments[b, at:end] = number
            at = end
    return batch


def best_fit(pieces: Iterable[Piece], rows: int, sequence_length: int) -> list[list[Piece]]:
    """Best-fit packing (arXiv 2404.10830): the longest piece first, each into the row with the least room that holds
    it. A piece that no row holds is left out."""
    filled: list[list[Piece]] = [[] for _ in range(rows)]
    room = np.full(rows, sequence_length)
    for piece in sorted(pieces, key=lambda piece: -piece.places):
        fits = np.flatnonzero(room >= piece.places)
        if len(fits):
            row = int(fits[room[fits].argmin()])
            filled[row].append(piece)
            room[row] -= piece.places
    return filled


class Mixture:
    """Training batches from several sources, in given shares.

    "truncate": a row holds one text domain, or tasks. A kind with share w gets floor(B·w) or ceil(B·w) of the B rows,
    B·w on average, so that a small batch, too, holds every kind. `switch` of the rows change midway to what another
    row begins with, in one segment. "best-fit": pieces of every kind until its share of the tokens is reached, packed
    whole; a row holds several kinds.

    ValueError for weights that name an unknown source, are negative or all zero.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        sequence_length: int,
        seed: int,
        padding_id: int,
        packing: str = "truncate",
        switch: float = 0.0,
    ) -> None:
        _check_weights(weights, sources)
        self.sources = [sources[name] for name, weight in weights.items() if weight > 0]
        shares = np.array([weight for weight in weights.values() if weight > 0], np.float64)
        self.shares = shares / shares.sum()
        self.sequence_length, self.seed, self.padding_id = sequence_length, seed, padding_id
        self.packing, self.switch = packing, switch

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of this step, [B, T]: a pure function of (seed, step)."""
        rng = default_rng([self.seed, step])
        rows = self._whole_pieces(rng, batch_size) if self.packing == "best-fit" else self._cut_rows(rng, batch_size)
        batch = lay_out(rows, self.sequence_length, self.padding_id)
        order = rng.permutation(batch_size)  # so that a slice of the batch is a mixture too
        return _switched(Batch(*(array[order] for array in batch)), round(self.switch * batch_size))

    def _cut_rows(self, rng: Generator, batch_size: int) -> list[list[Piece]]:
        # B evenly spaced points on the shares laid end to end
        points = (np.arange(batch_size) + rng.random()) / batch_size
        kinds = np.searchsorted(np.cumsum(self.shares)[:-1], points, side="right")
        return [self._cut_row(self.sources[kind], rng) for kind in kinds]

    def _cut_row(self, source: Source, rng: Generator) -> list[Piece]:
        pieces, room = [], self.sequence_length
        while room > 0:
            piece = source.piece(rng, room + 1).cut(room + 1)
            pieces.append(piece)
            room -= piece.places
        return pieces

    def _whole_pieces(self, rng: Generator, batch_size: int) -> list[list[Piece]]:
        pieces = []
        for source, share in zip(self.sources, self.shares, strict=True):
            wanted = share * batch_size * self.sequence_length
            while wanted > 0:
                piece = source.piece(rng, self.sequence_length + 1)
                # the last one is taken by chance, so that a share of less than a piece gets its due on average
                if piece.places <= wanted or rng.random() * piece.places < wanted:
                    pieces.append(piece)
                wanted -= piece.places
        return best_fit(pieces, batch_size, self.sequence_length)


def _switched(batch: Batch, count: int) -> Batch:
    """The first `count` rows go on, from the middle, with what the next `count` rows begin with: in the same segment,
    unless there is padding in between."""
    if not count or len(batch.ids) < 2 * count:
        return batch
    middle, rest = batch.ids.shape[1] // 2, (batch.ids.shape[1] + 1) // 2
    other = Batch(*(array[count : 2 * count, :rest] for array in batch))
    batch.ids[:count, middle:] = other.ids
    batch.targets[:count, middle:] = other.targets
    batch.targets[:count, middle - 1] = IGNORE  # nobody could know
    before = batch.segments[:count, :middle]
    last = before.max(axis=1, keepdims=True) + (before[:, -1:] == PADDING)
    batch.segments[:count, middle:] = np.where(other.segments == PADDING, PADDING, other.segments + last)
    return batch


def _check_weights(weights: Mapping[str, float], sources: Mapping[str, Source]) -> None:
    if unknown := [name for name in weights if name not in sources]:
        raise ValueError(f"weights name {', '.join(unknown)}: wanted some of {', '.join(sources)}")
    if not all(0 <= weight < np.inf for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights {dict(weights)}: wanted finite numbers from 0 up, at least one of them above 0")
