"""Attention backward: through the mix of values, the softmax, and the scores; shared keys and values collect."""

from collections.abc import Sequence

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Mistake, several
from minglm.model.ops import Array, softmax


def reference(
    dy: Array,  # [T, H, d]
    q: Array,  # [T, H, d]
    k: Array,  # [S, G, d]
    v: Array,  # [S, G, d]
    probs: Array,  # [H, T, S], 0 where a key is hidden
    *,
    taken_off: str = "weighted mean",  # from dP, or "nothing", "own share", "over queries", "sum", "mean of products"
    outer: bool = True,  # dS = P · ( … )
    dv_from: str = "probs transposed",  # or "probs", "scores"
    dk_from: str = "dS transposed, q",  # or "dS, q", "dS transposed, k"
    scale: str = "both",  # or "none", "twice", "q only"
    group: str = "sum",  # of the heads that share a key, or "mean", "first", "last"
    share: str = "neighbours",  # or "every G-th"
) -> tuple[Array, Array, Array]:  # dq [T, H, d], dk [S, G, d], dv [S, G, d]
    """All flags at their defaults: `minglm.model.ops.attend_bwd` of one row."""
    (_, H, d), G = q.shape, k.shape[1]
    reads = np.arange(H) // (H // G) if share == "neighbours" else np.arange(H) % G
    keys, values = k[:, reads], v[:, reads]  # -> [S, H, d]
    dprobs = np.einsum("thd,shd->hts", dy, values)
    off = {
        "weighted mean": (dprobs * probs).sum(-1, keepdims=True), "nothing": 0, "own share": dprobs * probs,
        "over queries": (dprobs * probs).sum(-2, keepdims=True), "sum": dprobs.sum(-1, keepdims=True),
        "mean of products": (dprobs * probs).mean(-1, keepdims=True),
    }[taken_off]  # fmt: skip
    dscores = (dprobs - off) * (probs if outer else 1)
    c = d**-0.5
    for_q, for_k = {"both": (c, c), "none": (1, 1), "twice": (c * c, c * c), "q only": (c, 1)}[scale]
    dq = np.einsum("hts,shd->thd", dscores, keys) * for_q
    if dk_from == "dS, q":
        dk = np.einsum("hst,thd->shd", dscores, q) * for_k
    else:
        dk = np.einsum("hts,thd->shd", dscores, q if dk_from == "dS transposed, q" else keys) * for_k
    mixes = np.einsum("thd,shd->hts", q, keys) * c if dv_from == "scores" else probs
    dv = np.einsum("hst,thd->shd" if dv_from == "probs" else "hts,thd->shd", mixes, dy)
    return dq, _collect(dk, group, share, G), _collect(dv, group, share, G)


def _collect(gradients: Array, group: str, share: str, G: int) -> Array:  # [S, H, d] -> [S, G, d]
    S, H, d = gradients.shape
    by_group = gradients.reshape(S, G, H // G, d)
    if share == "every G-th":
        by_group = gradients.reshape(S, H // G, G, d).swapaxes(1, 2)
    if group in ("first", "last"):
        return by_group[:, :, 0 if group == "first" else -1]
    return by_group.mean(axis=2) if group == "mean" else by_group.sum(axis=2)


def cases(draw: int = 0) -> Sequence[Case]:
    """As many keys as queries, so that a forgotten transpose keeps its shape; three query heads to a key head."""
    rng = default_rng([9, draw])

    def inputs(T: int, H: int, G: int, d: int) -> tuple[Array, ...]:
        dy, q = rng.standard_normal((T, H, d)), rng.standard_normal((T, H, d))
        k, v = rng.standard_normal((T, G, d)), rng.standard_normal((T, G, d))
        scores = np.einsum("thd,shd->hts", q, k[:, np.arange(H) // (H // G)]) / d**0.5
        hidden = np.triu(np.ones((T, T), bool), 1)
        return dy, q, k, v, softmax(np.where(hidden, -np.inf, scores))

    made = [Case("values", inputs(4, 6, 2, 5)) for _ in range(3)]
    return [*made, Case("a key head each", inputs(3, 2, 2, 4)), Case("one token", inputs(1, 4, 2, 3))]


EXERCISE = Exercise(
    name="attend_bwd",
    minutes=40,
    brief="attend_bwd(dy [T, H, d], q [T, H, d], k [S, G, d], v [S, G, d], probs [H, T, S]) -> dq, dk, dv, shaped as "
    "q, k, v, for y = probs · v, probs = softmax(q · k / √d), where query head h reads key/value head h // (H // G). "
    "Notebook 10b; docs/derivations/softmax-and-attention.md.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("no_rowsum", {"taken_off": "nothing"}, "dS is P · dP: nothing is taken off, as if weights were free"),
        Mistake("sigmoid_like", {"taken_off": "own share"}, "the softmax's slope is its diagonal only, P · (1 − P)"),
        Mistake("rowsum_axis", {"taken_off": "over queries"}, "what is taken off from dP is summed over the queries"),
        Mistake("rowsum_no_P", {"taken_off": "sum"}, "the plain sum of dP is taken off, not weighted by P"),
        Mistake("rowsum_mean", {"taken_off": "mean of products"}, "P · dP is averaged over the keys, not summed"),
        Mistake("no_outer_P", {"outer": False}, "dS lacks the factor P outside the brackets"),
        Mistake("PdO", {"dv_from": "probs"}, "dv is P · dy, where each key collects from its queries: Pᵀ · dy"),
        Mistake("dv_from_scores", {"dv_from": "scores"}, "dv uses the scores from before the softmax"),
        Mistake("dS_not_transposed", {"dk_from": "dS, q"}, "dk is dS · q without the transpose"),
        Mistake("dk_uses_k", {"dk_from": "dS transposed, k"}, "dk is made of the keys instead of the queries"),
        Mistake("no_scale", {"scale": "none"}, "dq and dk lack the division by √d"),
        Mistake("scale_twice", {"scale": "twice"}, "dq and dk are divided by √d twice"),
        Mistake("scale_q_only", {"scale": "q only"}, "only dq is divided by √d"),
        Mistake("mean_group", {"group": "mean"}, "dk and dv are averaged over the heads that share them, not summed"),
        Mistake("first_of_group", {"group": "first"}, "of the heads that share a key only the first one counts"),
        Mistake("last_of_group", {"group": "last"}, "of the heads that share a key only the last one counts"),
        Mistake("tile_group", {"share": "every G-th"}, "query head h is taken to read key/value head h mod G"),
    ),
    designs=(
        Design("tile", {"share": "every G-th"}, "Query head h reads key/value head h mod G."),
        Design("no_scale", {"scale": "none"}, "The forward does not divide the scores: probs = softmax(q · k)."),
        Design(
            "mean_group",
            {"group": "mean"},
            "For dk and dv return the mean over the heads that share them, not the sum.",
        ),
    ),
    axes={"dq": "T H d", "dk": "S G d", "dv": "S G d"},
    outputs=several("dq", "dk", "dv"),
)
