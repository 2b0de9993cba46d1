"""Measures of expert load: picks counted, the busiest against the fair share, how uneven, how spread."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Inputs, Mistake, Outputs, several
from minglm.model.ops import Array


def reference(
    indices: Array,  # int [N, K]
    weights: Array,  # [N, K]
    valid: Array,  # bool [N], False for padding
    E: int,
    *,
    counts: str = "picks",  # or "weights", "with padding", "first picks", "shares"
    share: str = "mean",  # or "N / E", "with padding", "of those with tokens", "median"
    violation: str = "largest",  # or "absolute", "ratio", "picks", "range"
    spread: str = "population",  # or "sample", "variance", "picks"
    entropy: str = "nats",  # or "bits", "negative", "of N shares", "of softmax", "relative", "without guard"
) -> tuple[Array, Any, Any, Any]:  # load int [E], max_vio, cv, entropy
    """All flags at their defaults: `load`, `max_violation`, `coefficient_of_variation` and `load_entropy` of
    `minglm.look.routing`."""
    K = indices.shape[1]
    seen = indices if counts == "with padding" else indices[valid]
    seen = seen[:, :1] if counts == "first picks" else seen
    load = np.bincount(seen.reshape(-1), minlength=E)
    if counts == "weights":
        load = np.bincount(seen.reshape(-1), weights[valid].reshape(-1), minlength=E)
    if counts == "shares":
        load = load / load.sum()
    N = int(valid.sum())
    fair = {
        "N / E": N / E, "with padding": len(indices) * K / E, "of those with tokens": load[load > 0].mean(),
        "median": np.median(load),
    }.get(share, load.mean())  # fmt: skip
    above = load - fair
    max_vio = {
        "absolute": abs(above).max() / fair, "ratio": load.max() / fair, "picks": above.max(),
        "range": (load.max() - load.min()) / fair,
    }.get(violation, above.max() / fair)  # fmt: skip
    cv = {"sample": load.std(ddof=1) / fair, "variance": (load.std() / fair) ** 2, "picks": load.std()}.get(
        spread, load.std() / fair
    )
    return load, max_vio, cv, _entropy(load, N, entropy)


def _entropy(load: Array, N: int, kind: str) -> Any:
    p = np.exp(load - load.max()) if kind == "of softmax" else load
    p = p / (N if kind == "of N shares" else p.sum())
    logs = np.log(p) if kind == "without guard" else np.log(np.where(p == 0, 1, p))
    total = (p * logs).sum()
    return {"bits": -total / np.log(2), "negative": total, "relative": -total / np.log(len(p))}.get(kind, -total)


def measures(inputs: Inputs, returned: Any) -> Outputs:
    """Numbers made from counts have no float dtype of their own: all take that of the weights."""
    found = several("load", "max_vio", "cv", "entropy")(inputs, returned)
    return {name: each.astype(inputs[1].dtype) if each.dtype.kind in "iuf" else each for name, each in found.items()}


def cases(draw: int = 0) -> Sequence[Case]:
    """Padding, uneven weights; loads whose emptiest expert is further from the mean than the busiest; none or some
    experts without a token."""
    rng = default_rng([8, draw])

    def inputs(loads: Sequence[int], padding: int) -> tuple[Any, ...]:
        left, rows = rng.permutation(loads), []
        for _ in range(sum(loads) // 3):
            best = np.argsort(-left, kind="stable")[:3]
            left[best] -= 1
            rows.append(rng.permutation(best))
        valid = np.repeat([True, False], [len(rows), padding])
        order = rng.permutation(len(valid))
        indices = np.concatenate([np.array(rows), np.tile([[0, 1, 2]], (padding, 1))])[order]
        return indices, rng.dirichlet(np.ones(3), len(order)) * 2.5, valid[order], len(loads)

    return [
        *(Case("values", inputs([7, 7, 6, 6, 7, 1, 8, 6], 0)) for _ in range(3)),
        *(Case("padding", inputs([8, 6, 6, 14, 5, 4, 2, 3], padding)) for padding in (4, 5, 7)),
        *(Case("experts without tokens", inputs([9, 8, 8, 7, 7, 9, 0, 0], padding)) for padding in (0, 3, 2)),
    ]


EXERCISE = Exercise(
    name="load",
    minutes=20,
    brief="load(indices int [N, K], weights [N, K], valid bool [N], E) -> load [E], max_vio, cv, entropy. load "
    "counts the picks of tokens that are no padding; max_vio = (largest load − mean load) / mean load; cv = standard "
    "deviation of all E loads / mean load; entropy = −Σ p·ln p of the shares p = load / Σ load, where 0·ln 0 is 0. "
    "Notebook 08a; arXiv 2408.15664, equation 4.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("weights_not_counts", {"counts": "weights"}, "weights are added up, where picks are counted"),
        Mistake("padding", {"counts": "with padding"}, "padding is counted"),
        Mistake("top1", {"counts": "first picks"}, "only first picks are counted"),
        Mistake("share_vs_count", {"counts": "shares"}, "load is a share of all picks; it is a number of picks"),
        Mistake("N_over_E", {"share": "N / E"}, "the fair share is N/E, but N · K picks are shared out"),
        Mistake("padding_in_mean", {"share": "with padding"}, "the mean is that of all N rows, padding among them"),
        Mistake(
            "alive_mean",
            {"share": "of those with tokens"},
            "the mean leaves out experts without tokens; it is over all E",
        ),
        Mistake("median", {"share": "median"}, "the median of the loads stands where their mean belongs"),
        Mistake("abs_max_vio", {"violation": "absolute"}, "max_vio is the largest distance from the mean, up or down"),
        Mistake("ratio", {"violation": "ratio"}, "max_vio is the largest load / mean load, without the − 1"),
        Mistake("not_divided", {"violation": "picks"}, "max_vio is not divided by the mean load"),
        Mistake("range", {"violation": "range"}, "max_vio takes the smallest load off, not the mean"),
        Mistake("sample_std", {"spread": "sample"}, "cv divides by E − 1: the standard deviation of a sample"),
        Mistake("variance", {"spread": "variance"}, "cv is squared: a variance"),
        Mistake("std_in_picks", {"spread": "picks"}, "cv is not divided by the mean load"),
        Mistake("bits", {"entropy": "bits"}, "the entropy is in bits: log₂, not ln"),
        Mistake("entropy_sign", {"entropy": "negative"}, "the entropy's minus is missing"),
        Mistake("entropy_over_N", {"entropy": "of N shares"}, "the shares are load / N, and add up to K"),
        Mistake("entropy_softmax", {"entropy": "of softmax"}, "the shares are a softmax of the loads"),
        Mistake("entropy_relative", {"entropy": "relative"}, "the entropy is divided by ln E"),
        Mistake("zero_log_zero", {"entropy": "without guard"}, "0 · ln 0 is NaN in NumPy; here it counts as 0"),
    ),
    designs=(
        Design("bits", {"entropy": "bits"}, "The entropy is in bits."),
        Design("abs_max_vio", {"violation": "absolute"}, "max_vio is the largest distance from the mean, up or down."),
        Design(
            "sample_std", {"spread": "sample"}, "cv takes the standard deviation of a sample: E − 1 below the line."
        ),
    ),
    axes={"load": "E", "max_vio": "", "cv": "", "entropy": ""},
    outputs=measures,
)
