"""Exact-match accuracy on generated tasks, answered greedily."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minglm.data.tasks import Item, Task
from minglm.model.kvcache import KVCache
from minglm.model.transformer import head, transformer

if TYPE_CHECKING:
    from minglm.api import Model


class Score(NamedTuple):
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


def accuracy(model: "Model", task: Task, items: list[Item], max_new_tokens: int = 24) -> Score:
    """How many of the items the model answers exactly, with nothing before the prompt."""
    answers = answer_all(model, [item.prompt for item in items], max_new_tokens)
    return Score(sum(task.check(item, text) for item, text in zip(items, answers, strict=True)), len(items))


def answer_all(model: "Model", prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy continuations of many prompts at once, up to a newline or an end token; padded on the left."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("tasks need a tokenizer, and this model has none")
    encoded = [tokenizer.encode(p) for p in prompts]
    width = max(map(len, encoded))
    ids = np.array([[0] * (width - len(e)) + e for e in encoded])
    segments = np.array([[-1] * (width - len(e)) + [0] * len(e) for e in encoded])
    cache = KVCache(model.config, len(prompts), width + max_new_tokens, model.compute_dtype)
    texts = [""] * len(prompts)
    going = np.ones(len(prompts), bool)
    for _ in range(max_new_tokens):
        hidden, _ = transformer(ids, model.params, model.config, cache, segments=segments)
        logits = head(hidden[:, -1:], model.params)[:, 0, : model.usable_tokens]
        ids, segments = logits.argmax(axis=-1)[:, None], np.zeros((len(prompts), 1), np.int64)
        for row in np.flatnonzero(going):
            token = int(ids[row, 0])
            if token in tokenizer.end_ids:
                going[row] = False
                continue
            texts[row] += tokenizer.decode([token])
            going[row] = "\n" not in texts[row]
        if not going.any():
            break
    return texts
