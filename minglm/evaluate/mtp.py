"""How often the multi-token-prediction layer drafts what the trunk itself would say."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minglm.data.batches import PADDING, Batch, Piece, TokenStream, lay_out, windows
from minglm.data.tasks import TASKS
from minglm.evaluate.accuracy import answer_limit, chat_continuations
from minglm.evaluate.confidence import wilson
from minglm.evaluate.domains import some_heldout
from minglm.evaluate.passes import engine, operations, slices, tokenizer_of
from minglm.generate.batch import Continuation, continue_all
from minglm.model.mtp import mtp_chain, mtp_head_weight
from minglm.model.ops import IGNORE, Array, Ops
from minglm.model.transformer import head, transformer

if TYPE_CHECKING:
    from minglm.api import Model

DEPTHS = 3
POSITIONS = {"1-8": (1, 8), "9-32": (9, 32), "33-": (33, 1 << 31)}  # of a token in its text, counted from 1


class MtpRow(NamedTuple):
    """Greedy acceptance: the share of places where the draft is the trunk's own greedy choice."""

    text: str
    position: str  # "all", or a key of POSITIONS
    depth: int
    agree: int
    places: int
    share: float
    low: float  # 95 %: Wilson, as if places were independent, which in one text they are not quite
    high: float


def mtp_rows(model: "Model", streams: dict[str, TokenStream], items: int = 12, tokens: int = 8192) -> list[MtpRow]:
    """Rows for each text, position and depth; none for a model without an MTP layer.

    - "held-out code", "held-out prose": the true text is fed, whatever the model would have said.
    - "own code": the model's greedy continuations of held-out code, 64 tokens of it, then 128 new ones.
    - "own thinking", "own direct": its greedy answers to held-out task items in the chat format, `items` per task.
    """
    if not model.params.mtp:
        return []
    texts = {f"held-out {domain}": _held_out(streams[domain], tokens) for domain in ("code", "prose")}
    texts["own code"] = _laid_out(model, _own_code(model, streams["code"]))
    for name, thinking in (("own thinking", True), ("own direct", False)):
        texts[name] = _laid_out(model, _own_answers(model, items, thinking))
    rows = []
    for name, batch in texts.items():
        agree, places = agreement(model, batch)
        for position, depth in np.ndindex(places.shape):
            label = ("all", *POSITIONS)[position]
            rows.append(_row(name, label, depth + 1, int(agree[position, depth]), int(places[position, depth])))
    return [row for row in rows if row.places]


def _row(text: str, position: str, depth: int, agree: int, places: int) -> MtpRow:
    interval = wilson(agree, places) if places else (0.0, 1.0)
    return MtpRow(text, position, depth, agree, places, agree / max(places, 1), *interval)


# -- the measure -------------------------------------------------------------------------------------------------


def agreement(model: "Model", batch: Batch, depths: int = DEPTHS) -> tuple[Array, Array]:
    """Places where draft and trunk agree, and all places, int [1 + positions, depths] each.

    Depth k at row i reads h_i and the tokens t_{i+1} … t_{i+k} and drafts t_{i+k+1}. It agrees if its best token is
    the trunk's best at row i + k. Beyond the last MTP layer the layers are used again, on their own normed output. A
    place counts if t_{i+1} and t_{i+k+1} are targets of one segment and neither t_{i+k+1} nor the trunk's choice is an
    end token: a short answer's end is too easy. The position is that of t_{i+k+1} among its segment's targets.
    """
    agree, places = np.zeros((2, 1 + len(POSITIONS), depths), np.int64)
    with operations(model) as ops:
        for part in slices(batch):
            for k, (same, counts) in enumerate(_compare(model, part, depths, ops)):
                position = places_of_targets(part)[:, k + 1 :]
                for row, (low, high) in enumerate([(1, 1 << 31), *POSITIONS.values()]):
                    chosen = counts & (position >= low) & (position <= high)
                    agree[row, k] += (same & chosen).sum()
                    places[row, k] += chosen.sum()
    return agree, places


def _compare(model: "Model", batch: Batch, depths: int, ops: Ops) -> list[tuple[Array, Array]]:
    """For each depth, bool [B, T − depth] each: whether draft and trunk agree, and whether the place counts."""
    ids, targets, segments = batch
    params, config, ends = model.params, model.config, tokenizer_of(model).end_ids
    hidden, saved = transformer(ids, params, config, segments=segments, ops=ops)
    trunk = head(hidden, params, ops=ops).argmax(axis=-1)  # [B, T]: row j's choice for token j + 1
    scored = (targets != IGNORE) & ~np.isin(targets, ends) & ~np.isin(trunk, ends)
    found = []
    for k, depth in enumerate(mtp_chain(hidden, ids, saved.layout, params, config, depths, ops=ops), start=1):
        weight = mtp_head_weight(params, params.mtp[depth.number])
        drafts = ops.linear(depth.normed, weight.astype(hidden.dtype, copy=False)).argmax(axis=-1)  # [B, T − k]
        counts = depth.valid & scored[:, k:] & (targets[:, :-k] != IGNORE)
        found.append((drafts == trunk[:, k:], counts))
    return found


def places_of_targets(batch: Batch) -> Array:  # -> int [B, T]
    """How many targets the segment has up to this row, it included."""
    counts = np.cumsum(batch.targets != IGNORE, axis=1)
    starts = np.diff(batch.segments, axis=1, prepend=PADDING - 1) != 0
    before = np.where(starts, counts - (batch.targets != IGNORE), 0)
    return counts - np.maximum.accumulate(before, axis=1)


# -- the texts ---------------------------------------------------------------------------------------------------


def _held_out(stream: TokenStream, tokens: int, length: int = 256) -> Batch:
    return windows(stream, np.arange(0, min(tokens, len(stream.tokens) - 1), length), length)


def _own_code(
    model: "Model", code: TokenStream, count: int = 32, given: int = 64, new: int = 128
) -> list[Continuation]:
    """Continuations of pieces of code that begin with a line, evenly spread over the held-out text."""
    tokenizer = tokenizer_of(model)
    starts = np.arange(count) * (len(code.tokens) // count)
    texts = [tokenizer.decode(code.tokens[at : at + given].tolist(), skip_special=True) for at in starts]
    return continue_all(model, [text.partition("\n")[2] or text for text in texts], new, engine=engine(model))


def _own_answers(model: "Model", items: int, thinking: bool) -> list[Continuation]:
    found: list[Continuation] = []
    for name, task in TASKS.items():
        if name != "calculator":  # that needs a tool
            asked = some_heldout(task, items, seed=2)
            found += chat_continuations(model, asked, thinking, answer_limit(model, asked, thinking))
    return found


def _laid_out(model: "Model", written: Sequence[Continuation]) -> Batch:
    """A row for each continuation; what the model wrote counts, the prompt does not."""
    pieces = []
    for prompt, ids, _ in written:
        counts = np.repeat([False, True], [len(prompt), len(ids)])
        pieces.append([Piece(np.array([*prompt, *ids], np.int64), counts)])
    width = max(max(piece.places for (piece,) in pieces), DEPTHS + 1)
    return lay_out(pieces, width, tokenizer_of(model).end_ids[0])
