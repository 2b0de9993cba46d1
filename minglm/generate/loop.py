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


class Round(NamedTuple):
    """One round of speculative decoding (`minglm.generate.speculative`): some drafts, checked by the model at once."""

    drafted: int
    accepted: int
    draft_seconds: float
    verify_seconds: float
    picks: Array  # int [1 + drafted, layer, K] the experts of the tokens that were checked; −1 in dense layers

    @property
    def experts(self) -> int:
        """How many experts the check read, each counted once in its layer."""
        return sum(len(np.unique(layer[layer >= 0])) for layer in self.picks.swapaxes(0, 1))


class Step(NamedTuple):
    """One generated token."""

    id: int
    logits: Array  # [V] the scores that it was chosen from
    stop_reason: str | None  # "end token", "length", or None to go on
    seconds: float  # to compute the logits; the first step's are the whole prompt's, a round's are its first token's
    engine: str  # what computed them
    round: Round | None = None  # that this token begins


class Engine(Protocol):
    """What computes the logits: the book (`NumpyEngine`) or the kernels (`minglm.fast.engine.FastEngine`)."""

    name: str  # for people: which engine it is and how it runs
    hidden: Array  # [T, D] the states after the final norm of the tokens that were fed last

    def feed(self, ids: Sequence[int]) -> Array:  # -> [V]
        """Continue the sequence by these tokens; logits after the last one."""

    def feed_each(self, ids: Sequence[int]) -> Array:  # -> [T, V]
        """The same for a few tokens; logits after each."""

    def truncate(self, length: int) -> None:
        """Forget the tokens from this one on."""

    def picks(self) -> Array:  # -> int [T, layer, K]
        """The experts that the tokens fed last picked; −1 in dense layers."""


class Stats(NamedTuple):
    engine: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    rounds: tuple[Round, ...] = ()  # with drafts

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the tokens after the first, which the prefill gives."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else float("nan")

    def acceptance(self) -> list[tuple[int, int]]:
        """For each depth: how many drafts were accepted, and how many were made."""
        deepest = max((r.drafted for r in self.rounds), default=0)
        return [
            (sum(r.accepted >= k for r in self.rounds), sum(r.drafted >= k for r in self.rounds))
            for k in range(1, deepest + 1)
        ]

    def __str__(self) -> str:
        speed = f"{self.tokens_per_second:,.0f} tokens/s" if self.decode_seconds else "one token"
        parts = [f"{self.new_tokens} tokens", speed, self.engine]
        if self.rounds:
            shares = " ".join(f"{accepted}/{made}" for accepted, made in self.acceptance())
            tokens = sum(1 + r.accepted for r in self.rounds) / len(self.rounds)
            parts.append(f"{len(self.rounds)} rounds of {tokens:.2f} tokens, drafts accepted by depth: {shares}")
        return ", ".join(parts)

    @classmethod
    def of(cls, prompt_tokens: int, done: "list[Step]") -> "Stats":
        rounds = tuple(step.round for step in done if step.round)
        seconds = sum(step.seconds for step in done[1:])
        return cls(done[0].engine, prompt_tokens, len(done), done[0].seconds, seconds, rounds)


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
        self._fed, self._picks = 0, dict[int, Array]()

    def feed(self, ids: Sequence[int]) -> Array:
        return head(self._states(ids)[:, -1:], self._model.params, self._tap)[0, 0]

    def feed_each(self, ids: Sequence[int]) -> Array:
        return head(self._states(ids), self._model.params, self._tap)[0]

    def _states(self, ids: Sequence[int]) -> Array:  # -> [1, T, D]
        params, config = self._model.params, self._model.config
        self._fed = len(ids)
        hidden, _ = transformer(np.array([ids], np.int64), params, config, self._cache, tap=self._note_picks)
        self.hidden = hidden[0]
        return hidden

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)

    def picks(self) -> Array:
        c = self._model.config
        none = np.full((self._fed, c.num_experts_per_tok), -1)
        return np.stack([self._picks.get(i, none) for i in range(c.num_hidden_layers)], axis=1)

    def _note_picks(self, name: str, array: Array) -> Array:
        array = self._tap(name, array)
        if name.endswith(".expert_indices"):
            self._picks[int(name.split(".")[1])] = array
        return array


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
        logits = usable(scores, usable_tokens, f"new token {count}")
        next_id = choose(logits, how, rng)
        reason = stop_reason(next_id, end_ids, count == max_new_tokens)
        yield Step(next_id, logits, reason, seconds, engine.name)
        if reason:
            return
        ids = [next_id]


def usable(scores: Array, usable_tokens: int, what: str) -> Array:  # [.., V] -> [.., V]
    """A copy (the engine, or a tap, may use the array again) in which the rows of the head beyond the tokenizer, which
    stand for no token, are −∞. Raises ValueError when nothing can be chosen from it."""
    logits = scores.copy()
    logits[..., usable_tokens:] = -np.inf
    if not np.isfinite(logits.max(axis=-1)).all():
        raise ValueError(f"{what} cannot be chosen: the logits are NaN or infinite; look at the weights")
    return logits


def choose(logits: Array, how: Sampling, rng: np.random.Generator) -> int:  # [V]
    return int(logits.argmax()) if how.temperature == 0 else draw(probabilities(logits, how), rng.random())


def stop_reason(token: int, end_ids: frozenset[int], last: bool) -> str | None:
    return "end token" if token in end_ids else "length" if last else None


def check_room(prompt: int, new: int, context: int) -> None:
    """Raises ValueError when prompt and new tokens do not fit into the model's context."""
    if prompt < 1:
        raise ValueError("the prompt is empty; give at least one token to continue")
    if not isinstance(new, int | np.integer) or new < 1:
        raise ValueError(f"max_new_tokens = {new!r} must be a whole number, 1 or more")
    if prompt + new > context:
        fewer = f" or ask for at most {context - prompt} new tokens" if prompt < context else ""
        raise ValueError(f"{prompt} prompt tokens + {new} new ones > context of {context}; shorten the prompt{fewer}")
