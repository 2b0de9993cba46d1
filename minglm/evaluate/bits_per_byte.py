"""Bits per byte: how well a model predicts text that it has never seen, whatever its tokenizer."""

import math
from itertools import islice
from typing import TYPE_CHECKING

from minglm.data.batches import IGNORE, Corpus, stream_batches
from minglm.data.heldout import Document
from minglm.model.ops import cross_entropy
from minglm.model.transformer import head, transformer

if TYPE_CHECKING:
    from minglm.api import Model


def bits_per_byte(
    model: "Model", documents: list[Document], sequence_length: int = 256, most_batches: int | None = None
) -> float:
    """Total −log₂ probability of the documents' tokens over their bytes, in windows of `sequence_length` [B, T].

    The end token after each document counts as a token to predict but adds no byte. A document's first token is
    given, not predicted, and its bytes are not counted. `most_batches` looks at a part only. Needs a tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("bits per byte need a tokenizer, and this model has none")
    stream = next(iter(Corpus.build(documents, tokenizer.encode, tokenizer.end_ids[0]).streams.values()))
    nats, size = 0.0, 0
    for batch in islice(stream_batches(stream, sequence_length, 8), most_batches):
        hidden, _ = transformer(batch.ids, model.params, model.config, segments=batch.segments)
        scored = batch.targets[batch.targets != IGNORE]
        loss, _ = cross_entropy(head(hidden, model.params), batch.targets)
        nats += float(loss) * scored.size
        size += sum(len(tokenizer.token_bytes(i)) for i in scored.tolist() if i not in tokenizer.end_ids)
    if not size:
        raise ValueError("bits per byte need text of two tokens or more")
    return nats / math.log(2) / size
