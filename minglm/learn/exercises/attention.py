"""Causal grouped-query attention: query head h reads key/value head h // R; key s is allowed iff s ≤ t + S − T."""

from collections.abc import Sequence

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Mistake, one
from minglm.model.ops import Array, softmax


def reference(
    q: Array,  # [T, H, d]
    k: Array,  # [S, G, d]
    v: Array,  # [S, G, d]
    *,
    share: str = "neighbours",  # or "every G-th", "first", "mean"
    allowed: str = "past",  # or "strict", "peek", "top left", "all", "future"
    hide: str = "-inf",  # or "zero score", "zero weight"
    scale: str = "root d",  # or "none", "d", "root H·d", "times root d"
    axis: int = -1,
    merge: str = "heads last",  # or "heads first"
) -> Array:  # -> [T, H·d]
    """All flags at their defaults: `minglm.model.ops.attend` of one row, heads side by side."""
    (T, H, d), (S, G, _) = q.shape, k.shape
    reads = {"neighbours": np.arange(H) // (H // G), "every G-th": np.arange(H) % G, "first": np.zeros(H, int)}
    if share == "mean":
        k, v = (np.repeat(a.mean(axis=1, keepdims=True), H, axis=1) for a in (k, v))
    else:
        k, v = k[:, reads[share]], v[:, reads[share]]  # -> [S, H, d]
    divide = {"root d": d**0.5, "none": 1, "d": d, "root H·d": (H * d) ** 0.5, "times root d": d**-0.5}[scale]
    scores = np.einsum("thd,shd->hts", q, k) / divide
    ahead = np.arange(S)[None, :] - np.arange(T)[:, None] - (0 if allowed == "top left" else S - T)  # [T, S]
    hidden = {"strict": ahead >= 0, "peek": ahead > 1, "all": ahead > S + T, "future": ahead < 0}.get(
        allowed, ahead > 0
    )
    if hide == "zero weight":
        probs = np.where(hidden, 0, softmax(scores))
    else:
        scores = np.where(hidden, 0 if hide == "zero score" else -np.inf, scores)
        probs = np.moveaxis(softmax(np.moveaxis(scores, axis, -1)), -1, axis)
    mixed = np.einsum("hts,shd->htd", probs, v)
    return (mixed if merge == "heads first" else mixed.transpose(1, 0, 2)).reshape(T, H * d)


def cases(draw: int = 0) -> Sequence[Case]:
    """Six heads on two, and more keys than queries: with H = G, or T = S, most mistakes are invisible."""
    rng = default_rng([3, draw])

    def inputs(T: int, S: int, H: int = 6, G: int = 2, d: int = 4) -> tuple[Array, ...]:
        return rng.standard_normal((T, H, d)) * 2, rng.standard_normal((S, G, d)), rng.standard_normal((S, G, d))

    made = [Case("values", inputs(3, 5)) for _ in range(3)]
    return [
        *made,
        Case("whole text", inputs(6, 6)),
        Case("one query", inputs(1, 4)),
        Case("a key head each", inputs(3, 4, 2, 2)),
    ]


EXERCISE = Exercise(
    name="attend",
    minutes=30,
    brief="attend(q [T, H, d], k [S, G, d], v [S, G, d]) -> [T, H·d]. The T queries are the last of S positions. "
    "Scores over √d, nobody sees the future, heads side by side. Notebook 04; arXiv 2305.13245.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("tile", {"share": "every G-th"}, "query head h reads key/value head h mod G, not h // R"),
        Mistake("first_kv", {"share": "first"}, "all query heads read key/value head 0"),
        Mistake("mean_kv", {"share": "mean"}, "all query heads read the mean of the key/value heads"),
        Mistake("strict", {"allowed": "strict"}, "a token may not look at itself"),
        Mistake("peek", {"allowed": "peek"}, "a token sees the one after it"),
        Mistake("top_left", {"allowed": "top left"}, "the mask begins at key 0, though query 0 is the S − T th token"),
        Mistake("no_mask", {"allowed": "all"}, "nothing is hidden"),
        Mistake("future", {"allowed": "future"}, "the past is hidden, not the future"),
        Mistake("mask_zero", {"hide": "zero score"}, "hidden scores are 0, and e⁰ is 1"),
        Mistake(
            "mask_after", {"hide": "zero weight"}, "weights are set to zero after the softmax, and no row sums to 1"
        ),
        Mistake("no_scale", {"scale": "none"}, "the scores are not divided by √d"),
        Mistake("scale_d", {"scale": "d"}, "the scores are divided by d"),
        Mistake("scale_hidden", {"scale": "root H·d"}, "the scores are divided by the root of the hidden size"),
        Mistake("scale_times", {"scale": "times root d"}, "the scores are multiplied by √d"),
        Mistake("softmax_axis", {"axis": -2}, "the softmax runs over the queries"),
        Mistake("bad_merge", {"merge": "heads first"}, "the heads are still the first axis when they are flattened"),
    ),
    designs=(
        Design("tile", {"share": "every G-th"}, "Query head h reads key/value head h mod G."),
        Design("scale_d", {"scale": "d"}, "Scores are divided by d instead of √d, as in μP."),
        Design("peek", {"allowed": "peek"}, "A token also sees the one after it, where there is one."),
    ),
    axes={"y": "T H·d"},
    outputs=one("y"),
)
