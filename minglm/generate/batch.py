"""Many greedy continuations at once: what evaluations ask for."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minglm.generate.loop import check_room
from minglm.model.kvcache import KVCache
from minglm.model.ops import Array
from minglm.model.transformer import head, transformer

if TYPE_CHECKING:
    from minglm.api import Model

ROWS = 64  # sequences that go through the model together
Done = Callable[[str], bool]


class Continuation(NamedTuple):
    """What a model writes behind a prompt, without the end token."""

    prompt_ids: list[int]
    ids: list[int]
    text: str


def continue_all(
    model: "Model",
    prompts: Sequence[str],
    max_new_tokens: int,
    done: Done | None = None,
    engine: str = "fast",
    threads: int | None = None,
) -> list[Continuation]:
    """The greedy continuation of each prompt, up to an end token, the limit, the end of the model's context, or
    `done(text so far)`.

    Prompts of similar length go together, padded on the left. Needs a tokenizer. ValueError for a prompt that leaves
    no room in the context.
    """
    if model.tokenizer is None:
        raise ValueError("continuing texts needs a tokenizer, and this model has none")
    if engine not in ("fast", "numpy"):
        raise ValueError(f"engine is {engine!r}; wanted 'fast' or 'numpy'")
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    for prompt_ids in encoded:
        check_room(len(prompt_ids), 1, model.config.max_position_embeddings)
    found: dict[int, Continuation] = {}
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        written = _together(model, [encoded[i] for i in rows], max_new_tokens, done, engine, threads)
        found |= dict(zip(rows, written, strict=True))
    return [found[i] for i in range(len(prompts))]


def _together(
    model: "Model", prompts: list[list[int]], most: int, done: Done | None, engine: str, threads: int | None
) -> list[Continuation]:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    width = max(map(len, prompts))
    most = min(most, model.config.max_position_embeddings - width)
    ids = np.array([[0] * (width - len(p)) + p for p in prompts])
    segments = np.array([[-1] * (width - len(p)) + [0] * len(p) for p in prompts])
    cache = KVCache(model.config, len(prompts), width + most, model.compute_dtype)
    step = (_fast if engine == "fast" else _numpy)(model, cache, threads)
    texts, new_ids = [""] * len(prompts), [list[int]() for _ in prompts]
    going, decoders = [True] * len(prompts), [tokenizer.stream() for _ in prompts]
    for _ in range(most):
        best = step(ids, segments)[:, : model.usable_tokens].argmax(axis=-1)
        ids, segments = best[:, None], np.zeros((len(prompts), 1), np.int64)
        for row, token in enumerate(best.tolist()):
            if not going[row]:
                continue
            if token in model.config.eos_token_id:
                going[row] = False
                continue
            new_ids[row].append(token)
            texts[row] += decoders[row].feed(token)
            going[row] = not (done and done(texts[row]))
        if not any(going):
            break
    return [Continuation(*each) for each in zip(prompts, new_ids, texts, strict=True)]


Step = Callable[[Array, Array], Array]  # ids [B, T], segments [B, T] -> logits after the last [B, V]


def _numpy(model: "Model", cache: KVCache, threads: int | None) -> Step:
    def step(ids: Array, segments: Array) -> Array:
        hidden, _ = transformer(ids, model.params, model.config, cache, segments=segments)
        return head(hidden[:, -1:], model.params)[:, 0]

    return step


def _fast(model: "Model", cache: KVCache, threads: int | None) -> Step:
    from minglm.fast.engine import Decoder
    from minglm.fast.ops import shared_ops
    from minglm.fast.team import thread_count

    decoder = Decoder(model.params, model.config, cache.batch, thread_count(threads))
    ops = shared_ops(thread_count(threads))

    def step(ids: Array, segments: Array) -> Array:
        if ids.shape[1] > 1:  # the prompts: all but their last tokens through the book's functions
            with ops.session():
                transformer(ids[:, :-1], model.params, model.config, cache, segments=segments[:, :-1], ops=ops)
        return decoder.step(ids[:, -1:], cache, segments[:, -1:], last_only=True)[:, -1]

    return step
