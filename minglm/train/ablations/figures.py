"""What is measured of every model, always on the same held-out tokens: code, prose and tasks in equal parts."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from minglm.api import Model
from minglm.data.batches import IGNORE, Batch, Corpus, TokenStream, stream_batches
from minglm.data.heldout import heldout_documents
from minglm.data.tasks import TASKS, heldout_items, plain
from minglm.model.attention import AttentionSaved
from minglm.model.mtp import mtp_chain, mtp_head_weight
from minglm.model.ops import Array, Ops, visible_keys
from minglm.model.router import expert_load
from minglm.model.transformer import TransformerSaved, head, transformer
from minglm.text.tokenizer import Tokenizer
from minglm.train.ablations.claims import LENGTH

ROWS = 48  # of each kind
ITEMS = 60  # held-out items of each task, one in two with its thinking
AT_ONCE = 16  # rows


class HeldOut(NamedTuple):
    batches: dict[str, list[Batch]]  # "code", "prose", "tasks"
    end_ids: tuple[int, ...]


def held_out(tokenizer: Tokenizer, rows: int = ROWS) -> HeldOut:
    """The first `rows` rows of each kind."""
    streams = Corpus.build(heldout_documents(), tokenizer.encode, tokenizer.end_ids[0]).streams
    streams["tasks"] = _task_stream(tokenizer)
    at_once = min(rows, AT_ONCE)
    return HeldOut(
        {kind: list(islice(stream_batches(s, LENGTH, at_once), rows // at_once)) for kind, s in streams.items()},
        tokenizer.end_ids,
    )


def _task_stream(tokenizer: Tokenizer) -> TokenStream:
    """One document of an item of every task after the other, as in training: prompt and answer are encoded apart."""
    names = [name for name in TASKS if name != "calculator"]  # it needs a tool
    items = [heldout_items(TASKS[name], ITEMS, seed=0) for name in names]
    pieces: list[list[int]] = []
    for n, together in enumerate(zip(*items, strict=True)):
        texts = (plain(item, thinking=(n + k) % 2 == 0) for k, item in enumerate(together))
        ids = [i for prompt, answer in texts for i in tokenizer.encode(prompt) + tokenizer.encode(answer)]
        pieces.append([*ids, tokenizer.end_ids[0]])
    starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    return TokenStream(np.concatenate(pieces).astype(np.uint16), starts)


# -- measuring ---------------------------------------------------------------------------------------------------


def figures(model: Model, given: HeldOut, ops: Ops) -> dict[str, float]:
    """`loss`, the mean of the three kinds' losses, in nats per token; MaxVio over all of the text, of the worst trunk
    layer, and the most experts of a layer without a token; the largest attention logit; draft agreement."""
    found, load = {}, dict[int, Array]()
    agreed = drafted = 0
    largest = 0.0
    for kind, batches in given.batches.items():
        nats = scored = 0.0
        for number, batch in enumerate(batches):
            hidden, saved = transformer(
                batch.ids, model.params, model.config, segments=batch.segments, ops=ops, save=True
            )
            logits = head(hidden, model.params, ops=ops)
            count = int((batch.targets != IGNORE).sum())
            nats += float(ops.cross_entropy(logits, batch.targets)[0]) * count
            scored += count
            for layer, counts in _loads(saved, model.config.n_routed_experts):
                load[layer] = load.get(layer, 0) + counts
            if number == 0:
                largest = max(largest, *(_largest_logit(layer.attention) for layer in saved.layers))
            hits, places = _drafts(hidden, logits, batch, saved, model, given.end_ids, ops)
            agreed, drafted = agreed + hits, drafted + places
        found[f"{kind}_loss"] = nats / scored
    return {
        "loss": sum(found.values()) / len(found),
        **found,
        "max_violation": max(float(counts.max() / counts.mean() - 1) for counts in load.values()),
        "dead_experts": max(int((counts == 0).sum()) for counts in load.values()),
        "attention_logit": largest,
        "draft_agreement": agreed / max(drafted, 1),
    }


def _loads(saved: TransformerSaved, experts: int) -> Iterator[tuple[int, Array]]:
    """Picks per expert of each MoE layer, padding left out."""
    valid = saved.layout.sight.segments >= 0
    for i, layer in enumerate(saved.layers):
        if hasattr(layer.mlp, "router"):
            yield i, expert_load(layer.mlp.router.routing.indices, experts, valid)


def _largest_logit(saved: AttentionSaved) -> float:
    """max |q·k/√d| over the visible pairs, queries and keys normed and turned as they are compared."""
    q, k = saved.attend.q, saved.attend.k  # [B, T, H, d], [B, T, G, d]
    visible = visible_keys(saved.layout.sight)
    groups = q.shape[2] // k.shape[2]
    most = 0.0
    for h in range(q.shape[2]):
        logits = q[:, :, h] @ k[:, :, h // groups].swapaxes(1, 2)  # -> [B, T, T]
        most = max(most, float(np.abs(logits[visible]).max()))
    return most / q.shape[-1] ** 0.5


def _drafts(
    hidden: Array,
    logits: Array,
    batch: Batch,
    saved: TransformerSaved,
    model: Model,
    end_ids: tuple[int, ...],
    ops: Ops,
) -> tuple[int, int]:
    """Where the MTP layer's best guess for the token after next is what the trunk says there; and all such places,
    without those where the trunk says that the document ends."""
    if not model.params.mtp:
        return 0, 0
    depth = mtp_chain(hidden, batch.ids, saved.layout, model.params, model.config, 1, ops=ops)[0]
    drafts = ops.linear(depth.normed, mtp_head_weight(model.params, model.params.mtp[0])).argmax(axis=-1)
    trunk = logits.argmax(axis=-1)[:, 1:]
    counts = depth.valid & ~np.isin(trunk, end_ids)
    return int((drafts == trunk)[counts].sum()), int(counts.sum())
