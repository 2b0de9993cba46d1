"""Held-out tokens of five domains, as many of each: what balance and experts are measured on."""

from collections.abc import Iterator
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.random import Generator, default_rng

from minglm.data.batches import Batch, Corpus, TokenStream, windows
from minglm.data.chats import PHRASES, encode_chat, task_chat, tool_chat
from minglm.data.heldout import heldout_documents
from minglm.data.tasks import TASKS, Item, Task, is_heldout, plain
from minglm.evaluate.passes import tokenizer_of
from minglm.model.loss import shift_targets
from minglm.model.ops import Array
from minglm.text.template import ChatTemplate

if TYPE_CHECKING:
    from minglm.api import Model

DOMAINS = ("code", "prose", "direct", "worked", "conversations")
DOCUMENT = 64  # tokens that a document of task items has at least, as in training
POOL = 200  # held-out items of each task; beyond that they come again


class Sample(NamedTuple):
    batch: Batch  # no padding
    domains: Array  # int [B, T]: an index into DOMAINS


def some_heldout(task: Task, count: int, seed: int, size: int | None = None, tries: int = 20_000) -> list[Item]:
    """Up to `count` different held-out items: fewer where the task has few. The same for the same seed."""
    rng = default_rng(seed)
    found: dict[str, Item] = {}
    for _ in range(tries):
        item = task.make(rng, size)
        if is_heldout(item.task, item.question):
            found.setdefault(item.question, item)
            if len(found) == count:
                break
    return list(found.values())


# -- streams -----------------------------------------------------------------------------------------------------


def heldout_streams(model: "Model", tokens: int, seed: int = 0) -> dict[str, TokenStream]:
    """Tokens of each domain, all held out: frozen code and prose; task items as plain text, direct and worked, in
    documents of one task; conversations about them, with and without thinking, one in twenty with a tool call. At
    least so many of the generated ones; the frozen text is what it is."""
    tokenizer = tokenizer_of(model)
    streams = Corpus.build(heldout_documents(), tokenizer.encode, tokenizer.end_ids[0]).streams
    pools = {name: some_heldout(task, POOL, seed) for name, task in TASKS.items()}
    made = {
        "direct": _task_documents(model, pools, thinking=False),
        "worked": _task_documents(model, pools, thinking=True),
        "conversations": _conversations(model, pools, default_rng(seed)),
    }
    return streams | {domain: _stream(documents, tokens) for domain, documents in made.items()}


def _stream(documents: Iterator[list[int]], tokens: int) -> TokenStream:
    ids: list[int] = []
    starts: list[int] = []
    while len(ids) <= tokens:
        starts.append(len(ids))
        ids += next(documents)
    return TokenStream(np.array(ids, np.int32), np.array(starts))


def _task_documents(model: "Model", pools: dict[str, list[Item]], thinking: bool) -> Iterator[list[int]]:
    tokenizer = tokenizer_of(model)
    endless = {name: cycle(items) for name, items in pools.items() if name != "calculator"}  # that needs a tool
    for name in cycle(endless):
        ids: list[int] = []
        while len(ids) < DOCUMENT:
            prompt, completion = plain(next(endless[name]), thinking)
            ids += tokenizer.encode(prompt) + tokenizer.encode(completion)
        yield [*ids, tokenizer.end_ids[0]]


def _conversations(model: "Model", pools: dict[str, list[Item]], rng: Generator) -> Iterator[list[int]]:
    template, encode = model.chat_template or ChatTemplate(), tokenizer_of(model).encode
    endless = {name: cycle(items) for name, items in pools.items()}
    others = cycle(name for name in endless if name != "calculator")
    for number in cycle(range(20)):
        name = "calculator" if number == 19 else next(others)
        make = tool_chat if name == "calculator" else task_chat
        chat = make(next(endless[name]), bool(rng.random() < 0.5), PHRASES[int(rng.integers(len(PHRASES)))])
        yield encode_chat(chat, template, encode).ids.tolist()


# -- rows --------------------------------------------------------------------------------------------------------


def one_domain_rows(streams: dict[str, TokenStream], tokens: int, sequence_length: int = 256) -> Sample:
    """Rows of one domain each, as many of each domain: at most `tokens` of each, evenly spread over its stream,
    documents as segments."""
    count = _pieces(streams, tokens, sequence_length)
    batches = [windows(stream, _spread(stream, count), sequence_length) for stream in _in_order(streams)]
    batch = Batch(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    return Sample(batch, np.repeat(np.arange(len(DOMAINS)), count)[:, None].repeat(sequence_length, axis=1))


def changing_rows(streams: dict[str, TokenStream], tokens: int, piece: int = 64, seed: int = 0) -> Sample:
    """Rows that hold a piece of every domain, in random order and in one segment: what comes before a token says
    little about its domain. At most `tokens` of each."""
    rng, count = default_rng(seed), _pieces(streams, tokens, piece)
    pieces = np.stack([windows(stream, _spread(stream, count), piece).ids for stream in _in_order(streams)])
    order = rng.permuted(np.tile(np.arange(len(DOMAINS)), (count, 1)), axis=1)  # [count, domain]
    ids = pieces[order, np.arange(count)[:, None]].reshape(count, -1)  # -> [count, domains · piece]
    return Sample(Batch(ids, shift_targets(ids), np.zeros_like(ids)), order.repeat(piece, axis=1))


def _in_order(streams: dict[str, TokenStream]) -> list[TokenStream]:
    return [streams[domain] for domain in DOMAINS]


def _pieces(streams: dict[str, TokenStream], tokens: int, length: int) -> int:
    """How many pieces of this length each domain can give."""
    shortest = min(len(stream.tokens) - 1 for stream in _in_order(streams))
    return max(min(tokens, shortest) // length, 1)


def _spread(stream: TokenStream, count: int) -> Array:
    """Where `count` pieces begin, evenly spread."""
    return np.arange(count) * ((len(stream.tokens) - 1) // count)


def some_of_each(rows: Sample, count: int) -> Iterator[tuple[str, Batch]]:
    """For each domain up to `count` of its rows of `one_domain_rows`, evenly spread."""
    for number, domain in enumerate(DOMAINS):
        own = np.flatnonzero(rows.domains[:, 0] == number)
        some = own[np.arange(min(count, len(own))) * len(own) // min(count, len(own))]
        yield domain, Batch(*(array[some] for array in rows.batch))
