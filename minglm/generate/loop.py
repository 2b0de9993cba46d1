"""Generation: feed the prompt once, then one token at a time, with a key/value cache."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

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
    engine: str  # what computed them


class Engine(Protocol):
    """What computes the logits: the book (`NumpyEngine`) or the kernels (`minglm.fast.engine.FastEngine`)."""

    name: str  # for people: which engine it is and how it runs

    def feed(self, ids: Sequence[int]) -> Array:  # -> [V]
        """Continue the sequence by these tokens; logits after the last one."""


class Stats(NamedTuple):
    engine: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the tokens after the first, which the prefill gives."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else float("nan")

    def __str__(self) -> str:
        speed = f"{self.tokens_per_second:,.0f} tokens/s" if self.decode_seconds else "one token"
        return f"{self.new_tokens} tokens, {speed}, {self.engine}"

    @classmethod
    def of(cls, prompt_tokens: int, done: "list[Step]") -> "Stats":
        return cls(done[0].engine, prompt_tokens, len(done), done[0].seconds, sum(step.seconds for step in done[1:]))


class Result(NamedTuple):
    """What `Model.generate` returns: the new tokens only. The end token is among `ids` and not in `text`."""

    ids: list[int]
    text: str | None  # None without a tokenizer
    stop_reason: str
    stats: Stats


class NumpyEngine:
    """The functions of `minglm.model`, and a tap that may watch them."""

    def __init__(self, model: "Model", capacity: int, tap: Tap = no_tap):
        self.name = "NumPy engine"
        self._model, self._tap = model, tap
        self._cache = KVCache(model.config, capacity=capacity, dtype=model.compute_dtype)

    def feed(self, ids: Sequence[int]) -> Array:
        params, config = self._model.params, self._model.config
        hidden, _ = transformer(np.array([ids], np.int64), params, config, self._cache, tap=self._tap)
        return head(hidden[:, -1:], params, self._tap)[0, 0]


def steps(
    engine: Engine,
    prompt: Sequence[int],
    max_new_tokens: int,
    how: Sampling,
    end_ids: frozenset[int],
    usable_tokens: int,
    seed: int = 0,
) -> Iterator[Step]:
    """Yield tokens until an end token or the length limit. Equal seeds give equal tokens."""
    rng = np.random.default_rng(seed)
    ids = prompt
    for count in range(1, max_new_tokens + 1):
        start = time.perf_counter()
        scores = engine.feed(ids)
        seconds = time.perf_counter() - start
        logits = scores.copy()  # the engine, or a tap, may use the array again
        logits[usable_tokens:] = -np.inf  # rows of the head beyond the tokenizer stand for no token
        best = logits.max()
        if not np.isfinite(best):
            raise ValueError(f"new token {count} cannot be chosen: the logits are NaN or infinite; look at the weights")
        next_id = int(logits.argmax()) if how.temperature == 0 else draw(probabilities(logits, how), rng.random())
        reason = "end token" if next_id in end_ids else "length" if count == max_new_tokens else None
        yield Step(next_id, logits, reason, seconds, engine.name)
        if reason:
            return
        ids = [next_id]


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
