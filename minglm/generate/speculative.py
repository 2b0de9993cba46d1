"""Speculative decoding: a cheap draft of the next tokens, which the model checks all at once.

Reading the weights is most of a decoding step, and reading them once serves several tokens. So somebody guesses the
next n tokens, the model computes the logits after each of them in one step, and those up to the first wrong guess are
kept. The model's own choice in that place comes for free: a round gives at least one token, at most n + 1. The text
is what the model alone would have written (greedy), or has the same distribution (sampled): drafts decide about speed
only.

The drafts come from the multi-token-prediction layer (`MtpDrafter`) or a smaller model (`ModelDrafter`). The way of
accepting is that of Leviathan et al., arXiv 2211.17192.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from minglm.generate.loop import Engine, Round, Step, choose, stop_reason, usable
from minglm.generate.sampling import Sampling, draw, probabilities
from minglm.model.kvcache import KVCache
from minglm.model.mtp import mtp_step
from minglm.model.ops import Array, Tap, no_tap, scoped

if TYPE_CHECKING:
    from minglm.api import Model


class Guess(NamedTuple):
    """One drafted token."""

    id: int
    probs: Array | None  # [V] the distribution it was drawn from; None where the best was taken


Pick = Callable[[Array], Guess]  # from the drafter's logits [V]


class Drafter(Protocol):
    """Who guesses."""

    def begin(self, prompt: Sequence[int], hidden: Array) -> None:
        """Read the prompt. `hidden` [T, D]: the model's states, after the final norm, of its tokens."""

    def draft(self, ids: Sequence[int], hidden: Array, count: int, pick: Pick) -> list[Guess]:
        """Guess the `count` tokens after `ids`, of which the model has not read the last one. `hidden` [T, D]: the
        model's states, after the final norm, of the tokens before it that came since the last call."""


# -- the loop ----------------------------------------------------------------------------------------------------


def speculative_steps(
    engine: Engine,
    drafter: Drafter,
    prompt: Sequence[int],
    max_new_tokens: int,
    how: Sampling,
    end_ids: frozenset[int],
    usable_tokens: int,
    draft: int,
    seed: int = 0,
) -> Iterator[Step]:
    """`minglm.generate.loop.steps`, with up to `draft` tokens guessed in each round."""
    rng = np.random.default_rng(seed)

    def pick(scores: Array) -> Guess:
        logits = usable(scores, usable_tokens, "a draft")
        if how.temperature == 0:
            return Guess(int(logits.argmax()), None)
        probs = probabilities(logits, how)
        return Guess(draw(probs, rng.random()), probs)

    start = time.perf_counter()
    logits = usable(engine.feed(prompt), usable_tokens, "new token 1")
    if max_new_tokens > 1:
        drafter.begin(prompt, engine.hidden)
        engine.hidden = engine.hidden[-1:]
    seconds = time.perf_counter() - start
    ids = [*prompt, choose(logits, how, rng)]
    reason = stop_reason(ids[-1], end_ids, max_new_tokens == 1)
    yield Step(ids[-1], logits, reason, seconds, engine.name)
    while not reason:
        left = max_new_tokens - (len(ids) - len(prompt))
        # 1. guess: never more than there is room for, since the check itself gives a token
        start = time.perf_counter()
        guesses = drafter.draft(ids, engine.hidden, min(draft, left - 1), pick) if left > 1 else []
        middle = time.perf_counter()
        # 2. check them, all in one step
        scores = engine.feed_each([ids[-1], *(guess.id for guess in guesses)])
        rows = usable(scores, usable_tokens, f"new token {len(ids) - len(prompt) + 1}")
        new = accept(guesses, rows, how, rng)
        # 3. forget the wrong ones
        engine.truncate(len(ids) + len(new) - 1)
        engine.hidden = engine.hidden[: len(new)]
        end = time.perf_counter()
        this: Round | None = Round(len(guesses), len(new) - 1, middle - start, end - middle, engine.picks())
        seconds = end - start
        for token, logits in zip(new, rows, strict=False):
            ids.append(token)
            left -= 1
            reason = stop_reason(token, end_ids, left == 0)
            yield Step(token, logits, reason, seconds, engine.name, this)
            if reason:
                break
            seconds, this = 0.0, None


def accept(guesses: Sequence[Guess], logits: Array, how: Sampling, rng: np.random.Generator) -> list[int]:
    """The tokens that a round gives: the guesses up to the first one refused, and one of the model's own. `logits`
    [n + 1, V]: the model's, row i where guess i stands."""
    drafts = [guess.id for guess in guesses]
    if how.temperature == 0:
        best = [int(row.argmax()) for row in logits]
        same = [draft == own for draft, own in zip(drafts, best, strict=False)]
        return best[: (same.index(False) if False in same else len(same)) + 1]
    p = [probabilities(row, how) for row in logits]
    q = [_as_long(guess.probs, len(p[0])) for guess in guesses if guess.probs is not None]
    return verify(drafts, q, p, rng.random(len(drafts)), rng.random())


def _as_long(probs: Array, length: int) -> Array:
    """Of two models with one tokenizer one may have more rows that stand for no token; none of these was drawn."""
    return np.concatenate([probs[:length], np.zeros(max(0, length - len(probs)), probs.dtype)])


def verify(drafts: Sequence[int], q: Sequence[Array], p: Sequence[Array], u: Array, v: float) -> list[int]:
    """Accept draft i, which was drawn from q[i] [V], with probability min(1, p[i] / q[i]); at the first refusal draw
    from what p has more of, max(p − q, 0), and stop; after the last draft draw from p[n]. So every token has the
    distribution p, whatever q is (arXiv 2211.17192, theorem 1 in its appendix).

    u [n], v: uniform numbers in [0, 1), for the n decisions and for the draw.
    """
    for i, token in enumerate(drafts):
        if u[i] * q[i][token] >= p[i][token]:
            rest = np.maximum(p[i] - q[i], 0)
            return [*drafts[:i], draw(rest if rest.any() else p[i], v)]  # nothing left: q is p but for rounding
    return [*drafts, draw(p[len(drafts)], v)]


# -- the multi-token-prediction layer drafts ---------------------------------------------------------------------


class MtpDrafter:
    """Row i of the MTP layer pairs state h_i with token t_{i+1} and guesses t_{i+2}; each further guess comes from the
    layer's own output, taken after shared_head.norm, in place of a state that nobody has computed yet.

    Its cache holds a row for each token before the last, made from true states: the whole prompt's too, or the drafts
    would look back at nothing. Rows made from guesses are cut off again. With several MTP layers guess k comes from
    layer k, and beyond the last from the first again.
    """

    def __init__(self, layers: Sequence["MtpLayer"]):
        self._layers = layers
        self._last: list[Array] = [np.zeros((0, 0))] * len(layers)  # [1, D] each layer's output in its last true row

    def begin(self, prompt: Sequence[int], hidden: Array) -> None:
        states = hidden
        for k, layer in enumerate(self._layers):
            states = states[: len(prompt) - 1 - k]
            if len(states):
                _, states = layer.feed(states, prompt[k + 1 :])
                self._last[k] = states[-1:]

    def draft(self, ids: Sequence[int], hidden: Array, count: int, pick: Pick) -> list[Guess]:
        tokens, guesses, states = list(ids), list[Guess](), hidden
        rows = len(ids) - 1  # as many states of the model there are
        last = states[:0]
        for k, layer in enumerate(self._layers[:count]):
            kept, true = layer.length, max(rows - k, 0)  # rows so far, and those whose token is no guess
            if len(states) < rows - kept:  # the layer before has begun one row later
                states = np.concatenate([last, states])
            logits, states = layer.feed(states, tokens[kept + k + 1 :])
            last = self._last[k]
            if true > kept:
                self._last[k] = states[true - 1 - kept : true - kept]
            guesses.append(pick(logits))
            tokens.append(guesses[-1].id)
            layer.truncate(true)
        for k in range(len(self._layers), count):
            layer = self._layers[k % len(self._layers)]
            logits, states = layer.feed(states[-1:], tokens[-1:])
            guesses.append(pick(logits))
            tokens.append(guesses[-1].id)
        for k, layer in enumerate(self._layers):
            if layer.length > max(rows - k, 0):
                layer.truncate(max(rows - k, 0))
        return guesses


class MtpLayer(Protocol):
    """One MTP layer with its cache."""

    @property
    def length(self) -> int:
        """Rows in the cache."""

    def feed(self, hidden: Array, next_ids: Sequence[int]) -> tuple[Array, Array]:  # [T, D] -> [V], [T, D]
        """Continue by these rows; logits after the last, and the outputs after shared_head.norm."""

    def truncate(self, length: int) -> None: ...


class NumpyMtpLayer:
    """`mtp_step` of the book."""

    def __init__(self, model: "Model", capacity: int, number: int = 0, tap: Tap = no_tap):
        self._model, self._number = model, number
        self._tap = scoped(tap, f"layers.{model.config.num_hidden_layers + number}.")
        self._cache = KVCache(model.config, capacity=capacity, dtype=model.compute_dtype, layers=1)

    @property
    def length(self) -> int:
        return int(self._cache.length[0])

    def feed(self, hidden: Array, next_ids: Sequence[int]) -> tuple[Array, Array]:
        ids = np.array([next_ids], np.int64)
        params, config = self._model.params, self._model.config
        logits, normed = mtp_step(hidden[None], ids, params, config, self._cache, self._number, tap=self._tap)
        return logits[0, -1], normed[0]

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)


# -- a smaller model drafts --------------------------------------------------------------------------------------


class ModelDrafter:
    """A model with the same tokenizer, and a cache of its own. What it has read of guesses that came true it keeps."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._read: list[int] = []

    def begin(self, prompt: Sequence[int], hidden: Array) -> None:
        if len(prompt) > 1:
            self._engine.feed(prompt[:-1])
            self._read = list(prompt[:-1])

    def draft(self, ids: Sequence[int], hidden: Array, count: int, pick: Pick) -> list[Guess]:
        same = next((i for i, pair in enumerate(zip(self._read, ids, strict=False)) if pair[0] != pair[1]), None)
        keep = min(len(self._read) if same is None else same, len(ids) - 1)  # the last one gives the logits
        self._engine.truncate(keep)
        self._read, tokens, guesses = list(ids[:keep]), list(ids[keep:]), list[Guess]()
        for _ in range(count):
            guesses.append(pick(self._engine.feed(tokens)))
            self._read += tokens
            tokens = [guesses[-1].id]
        return guesses
