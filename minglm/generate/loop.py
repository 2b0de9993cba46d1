"""Generation: feed the prompt once, then one token at a time, with a key/value cache."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minglm.generate.sampling import Sampling, draw, probabilities
from minglm.model.kvcache import KVCache
from minglm.model.ops import Array, Tap, no_tap
from minglm.model.transformer import head, transformer

if TYPE_CHECKING:
    from minglm.api import Model


class Step(NamedTuple):
    """One generated token."""

    id: int
    logits: Array  # [V] the scores that it was chosen from
    stop_reason: str | None  # "end token", "length", or None to go on
    seconds: float  # to compute the logits; the first step's are the whole prompt's


class Stats(NamedTuple):
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the tokens after the first, which the prefill gives."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else float("nan")


class Result(NamedTuple):
    """What `Model.generate` returns: the new tokens only. The end token is among `ids` and not in `text`."""

    ids: list[int]
    text: str | None  # None without a tokenizer
    stop_reason: str
    stats: Stats


def steps(
    model: "Model",
    prompt: Sequence[int],
    max_new_tokens: int,
    how: Sampling,
    end_ids: frozenset[int],
    seed: int = 0,
    tap: Tap = no_tap,
) -> Iterator[Step]:
    """Yield tokens until an end token or the length limit. Equal seeds give equal tokens."""
    config, params = model.config, model.params
    rng = np.random.default_rng(seed)
    cache = KVCache(config, capacity=len(prompt) + max_new_tokens, dtype=model.compute_dtype)
    ids = np.asarray([prompt], dtype=np.int64)
    for count in range(1, max_new_tokens + 1):
        start = time.perf_counter()
        hidden, _ = transformer(ids, params, config, cache, tap=tap)
        scores = head(hidden[:, -1:], params, tap)[0, 0]  # -> [V]
        seconds = time.perf_counter() - start
        # rows of the head beyond the tokenizer stand for no token; `scores` is left as the tap saw it
        logits = np.where(np.arange(len(scores)) < model.usable_tokens, scores, -np.inf).astype(scores.dtype)
        if not np.isfinite(logits.max()):
            raise ValueError(f"new token {count} cannot be chosen: the logits are NaN or infinite; look at the weights")
        next_id = draw(probabilities(logits, how), rng.random())
        reason = "end token" if next_id in end_ids else "length" if count == max_new_tokens else None
        yield Step(next_id, logits, reason, seconds)
        if reason:
            return
        ids = np.array([[next_id]])


def check_room(prompt: int, new: int, context: int) -> None:
    """Raises ValueError when prompt and new tokens do not fit into the model's context."""
    if prompt < 1:
        raise ValueError("the prompt is empty; give at least one token to continue")
    if not isinstance(new, int | np.integer) or new < 1:
        raise ValueError(f"max_new_tokens = {new!r} must be a whole number, 1 or more")
    if prompt + new > context:
        raise ValueError(
            f"{prompt} prompt tokens + {new} new ones > context of {context}; "
            f"shorten the prompt or ask for at most {max(context - prompt, 0)} new tokens"
        )
