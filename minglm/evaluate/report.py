"""One table for a checkpoint: held-out bits per byte, tasks, draft agreement, balance."""

import lzma
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.std import tqdm

from minglm.data.batches import Corpus, stream_batches
from minglm.data.documents import standard_library_documents
from minglm.data.heldout import heldout_documents
from minglm.data.tasks import TASKS, TWO_DIGIT_ADDITION, heldout_items
from minglm.evaluate.accuracy import accuracy
from minglm.evaluate.bits_per_byte import bits_per_byte
from minglm.evaluate.ngram import ngram_bits_per_byte
from minglm.model.router import expert_load
from minglm.model.transformer import transformer

if TYPE_CHECKING:
    from minglm.api import Model

Row = dict[str, Any]  # "measure", "value", and "beside": what to compare it with


def report(model: "Model", items: int = 200, with_ngram: bool = True) -> list[Row]:
    """Measure a checkpoint on frozen held-out text and on task items that training never sees.

    `items` per task, drawn from the same 802 for any number of them (there are no more held-out two-digit additions).
    `with_ngram` fits the trigram model on this machine's standard library, which takes a few seconds.
    """
    rows: list[Row] = []
    for domain in ("code", "prose"):
        bits = bits_per_byte(model, heldout_documents(domain))
        rows.append({"measure": f"{domain}, bits per byte", "value": bits, "beside": _yardsticks(domain, with_ngram)})
    for task in tqdm([TWO_DIGIT_ADDITION, *TASKS.values()], desc="tasks", unit="task", disable=None):
        pool = heldout_items(task, 802, seed=1)
        asked = [pool[i] for i in np.random.default_rng(1).permutation(len(pool))[:items]]
        score = accuracy(model, task, asked)
        name = "addition of two-digit numbers" if task is TWO_DIGIT_ADDITION else task.name
        rows.append({"measure": f"{name}, exact", "value": score.share, "beside": f"{score.right} of {score.asked}"})
    rows += _mtp_rows(model) + _balance_rows(model)
    return rows


def _yardsticks(domain: str, with_ngram: bool) -> str:
    text = "".join(d.text for d in heldout_documents(domain)).encode()
    sizes = {"zlib -9": len(zlib.compress(text, 9)), "xz": len(lzma.compress(text, preset=9))}
    beside = [f"{name} {8 * size / len(text):.2f}" for name, size in sizes.items()]
    if with_ngram:
        training = "".join(d.text for d in standard_library_documents() if d.domain == domain).encode()
        beside.append(f"byte trigram {ngram_bits_per_byte(training, text):.2f}")
    return ", ".join(beside)


def _mtp_rows(model: "Model") -> list[Row]:
    """How often the MTP layer's best guess for the token after next is what the trunk itself would say there."""
    if not model.params.mtp:
        return []
    rows = []
    for domain in ("code", "prose"):
        agree, seen = 0, 0
        for batch in _sample(model, domain):
            trunk = model.forward(batch.ids, segments=batch.segments).logits
            drafts = model.mtp(batch.ids, segments=batch.segments).argmax(axis=-1)
            assert trunk is not None
            same_document = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] >= 0)
            agree += int((drafts == trunk[:, 1:].argmax(axis=-1))[same_document].sum())
            seen += int(same_document.sum())
        rows.append({"measure": f"{domain}, MTP agrees with trunk", "value": agree / seen, "beside": f"{seen} places"})
    return rows


def _balance_rows(model: "Model") -> list[Row]:
    """MaxVio = (largest load − mean load) / mean load over a held-out sample of both domains, per MoE layer."""
    E = model.config.n_routed_experts
    load: dict[int, np.ndarray] = {}
    for domain in ("code", "prose"):
        for batch in _sample(model, domain):
            valid = (batch.segments >= 0).reshape(-1)

            def count(name: str, array: np.ndarray, valid: np.ndarray = valid) -> np.ndarray:
                if name.endswith("expert_indices"):
                    layer = int(name.split(".")[1])
                    load[layer] = load.get(layer, np.zeros(E, int)) + expert_load(array, E, valid)
                return array

            transformer(batch.ids, model.params, model.config, segments=batch.segments, tap=count)
    return [
        {
            "measure": f"layer {layer}, MaxVio",
            "value": float(counts.max() / counts.mean() - 1),
            "beside": f"{int((counts == 0).sum())} of {E} experts without a token",
        }
        for layer, counts in load.items()
    ]


def _sample(model: "Model", domain: str, batches: int = 4) -> list[Any]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("an evaluation needs a tokenizer, and this model has none")
    stream = Corpus.build(heldout_documents(domain), tokenizer.encode, tokenizer.end_ids[0]).streams[domain]
    return [batch for batch, _ in zip(stream_batches(stream, 256, 8), range(batches), strict=False)]
