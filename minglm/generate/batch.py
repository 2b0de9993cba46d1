"""Many greedy continuations at once: what evaluations ask for."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from minglm.model.kvcache import KVCache
from minglm.model.ops import Array
from minglm.model.transformer import head, transformer

if TYPE_CHECKING:
    from minglm.api import Model

ROWS = 64  # sequences that go through the model together
Done = Callable[[str], bool]


def continue_all(
    model: "Model",
    prompts: Sequence[str],
    max_new_tokens: int,
    done: Done | None = None,
    engine: str = "fast",
    threads: int | None = None,
) -> list[str]:
    """The greedy continuation of each prompt, up to an end token (left out), the limit, or `done(text so far)`.

    Prompts of similar length go together, padded on the left. Needs a tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("continuing texts needs a tokenizer, and this model has none")
    if engine not in ("fast", "numpy"):
        raise ValueError(f"engine is {engine!r}; wanted 'fast' or 'numpy'")
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        found = _together(model, [encoded[i] for i in rows], max_new_tokens, done, engine, threads)
        for i, text in zip(rows, found, strict=True):
            texts[i] = text
    return texts


def _together(
    model: "Model", prompts: list[list[int]], most: int, done: Done | None, engine: str, threads: int | None
) -> list[str]:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(p)) + p for p in prompts])
    segments = np.array([[-1] * (width - len(p)) + [0] * len(p) for p in prompts])
    cache = KVCache(model.config, len(prompts), width + most, model.compute_dtype)
    step = (_fast if engine == "fast" else _numpy)(model, cache, threads)
    texts, going, decoders = [""] * len(prompts), [True] * len(prompts), [tokenizer.stream() for _ in prompts]
    for _ in range(most):
        best = step(ids, segments)[:, : model.usable_tokens].argmax(axis=-1)
        ids, segments = best[:, None], np.zeros((len(prompts), 1), np.int64)
        for row, token in enumerate(best.tolist()):
            if not going[row]:
                continue
            if token in model.config.eos_token_id:
                going[row] = False
                continue
            texts[row] += decoders[row].feed(token)
            going[row] = not (done and done(texts[row]))
        if not any(going):
            break
    return texts


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
