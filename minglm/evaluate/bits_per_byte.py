"""Bits per byte: how well a model predicts text that it has never seen, whatever its tokenizer."""

import lzma
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minglm.data.batches import IGNORE, Batch, Corpus, stream_batches
from minglm.data.documents import standard_library_documents
from minglm.data.heldout import Document, heldout_documents
from minglm.evaluate.confidence import bootstrap
from minglm.evaluate.ngram import ngram_bits_per_byte
from minglm.evaluate.passes import logits_of, operations, token_bits, tokenizer_of
from minglm.model.ops import Ops

if TYPE_CHECKING:
    from minglm.api import Model


def bits_per_byte(
    model: "Model", documents: list[Document], sequence_length: int = 256, most_batches: int | None = None
) -> float:
    """Total −log₂ probability of the documents' tokens over their bytes, in windows of `sequence_length` [B, T].

    The end token after each document counts as a token to predict but adds no byte. A document's first token is
    given, not predicted, and its bytes are not counted. `most_batches` looks at a part only. Needs a tokenizer.
    """
    bits, size = document_bits(model, documents, sequence_length, most_batches).sum(axis=0)
    if not size:
        raise ValueError("bits per byte need text of two tokens or more")
    return float(bits / size)


def document_bits(
    model: "Model",
    documents: list[Document],
    sequence_length: int = 256,
    most_batches: int | None = None,
    ops: Ops | None = None,
) -> np.ndarray:  # -> [document, 2]
    """For each document the bits of its tokens and their bytes; see `bits_per_byte`. Zeros for one not looked at.
    `ops`: compute with these operations instead of the ones that suit the model."""
    tokenizer = tokenizer_of(model)
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(len(tokenizer))])
    sizes[list(tokenizer.end_ids)] = 0
    found = np.zeros((len(documents), 2))
    with nullcontext(ops) if ops else operations(model) as chosen:
        for batch, document in islice(_windows(model, documents, sequence_length), most_batches):
            bits = token_bits(logits_of(model, batch, chosen), batch.targets)
            scored = batch.targets != IGNORE
            np.add.at(found[:, 0], document[scored], bits[scored])
            np.add.at(found[:, 1], document[scored], sizes[batch.targets[scored]])
    return found


def _windows(model: "Model", documents: list[Document], sequence_length: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """The documents as batches, and which document each token is of."""
    tokenizer = tokenizer_of(model)
    as_one = [document._replace(domain="text") for document in documents]
    stream = Corpus.build(as_one, tokenizer.encode, tokenizer.end_ids[0]).streams["text"]
    start = 0
    for batch in stream_batches(stream, sequence_length, 8):
        index = start + np.arange(batch.ids.size).reshape(batch.ids.shape)
        yield batch, np.searchsorted(stream.starts, index, side="right") - 1
        start += batch.ids.size


# -- beside other compressors ------------------------------------------------------------------------------------

ORDER = 5  # of the byte model: it sees four bytes


class TextRow(NamedTuple):
    """Bits per byte of held-out text, and what others need for the same text."""

    domain: str
    documents: int
    bytes: int
    bits_per_byte: float
    low: float  # 95 %: bootstrap over documents
    high: float
    xz: float
    zlib: float
    ngram: float | None


def text_rows(model: "Model", with_ngram: bool = True) -> list[TextRow]:
    """The frozen held-out text, a row for each domain.

    zlib -9 and xz -9 see nothing but the text itself; the interpolated byte model of order 5 was fitted on this
    machine's standard library, in the same domain, without held-out text.
    """
    training = list(standard_library_documents()) if with_ngram else []
    return [_text_row(model, domain, training) for domain in ("code", "prose")]


def _text_row(model: "Model", domain: str, training: list[Document]) -> TextRow:
    documents = heldout_documents(domain)
    found = document_bits(model, documents)
    bits, size = found.sum(axis=0)
    low, high = bootstrap(found, lambda total: total[0] / total[1])
    text = "".join(document.text for document in documents).encode()
    fitted = "".join(document.text for document in training if document.domain == domain).encode()
    return TextRow(
        domain=domain,
        documents=len(documents),
        bytes=int(size),
        bits_per_byte=float(bits / size),
        low=float(low),
        high=float(high),
        xz=8 * len(lzma.compress(text, preset=9)) / len(text),
        zlib=8 * len(zlib.compress(text, 9)) / len(text),
        ngram=ngram_bits_per_byte(fitted, text, ORDER) if fitted else None,
    )
