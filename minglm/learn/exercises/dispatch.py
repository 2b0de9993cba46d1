"""Dispatch and combine: each token's rows go to its K experts, their weighted answers come back."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.random import default_rng

from minglm.config import PRESETS
from minglm.learn.exercise import Case, Design, Exercise, Inputs, Mistake, one
from minglm.model.ops import Array, expert_mlp


class Expert:
    """rows [n, D] -> answers [n, D]: a gated MLP, in the dtype of the rows, that counts them."""

    def __init__(self, gate_proj: Array, up_proj: Array, down_proj: Array):
        self.matrices = gate_proj, up_proj, down_proj
        self.rows: list[int] = []  # of each call

    def __call__(self, rows: Any) -> Array:
        rows = np.asarray(rows)
        D = self.matrices[0].shape[1]
        if rows.ndim != 2 or rows.shape[1] != D:
            raise ValueError(f"an expert takes rows [n, {D}], not {list(rows.shape)}")
        self.rows.append(len(rows))
        gate_proj, up_proj, down_proj = (matrix.astype(rows.dtype) for matrix in self.matrices)
        return expert_mlp(rows, gate_proj, up_proj, down_proj)[0]


def reference(
    x: Array,  # [N, D]
    indices: Array,  # int [N, K]
    weights: Array,  # [N, K]
    experts: Sequence[Expert],  # E functions, rows [n, D] -> [n, D]
    shared: Expert,
    *,
    token: str = "slot // K",  # that a slot of the N·K picks belongs to, or "slot mod N"
    weigh: str = "by slot",  # or "unsorted", "input", "ones", "mean"
    picks: str = "all",  # or "first", "within capacity"
    numbers: str = "expert",  # of the slices, or "place among those picked"
    combine: str = "add",  # or "last expert stays", "last pick stays", "neighbours"
    add: str = "shared",  # or "nothing", "shared times scale", "mean with shared", "shared and x"
) -> Array:  # -> [N, D]
    """All flags at their defaults: `minglm.model.experts.routed_experts`, and the shared expert's answer."""
    (N, K), E = indices.shape, len(experts)
    slots = np.argsort(indices.reshape(-1), kind="stable")  # of the picks, expert by expert
    expert_of = indices.reshape(-1)[slots]
    tokens = slots % N if token == "slot mod N" else slots // K
    w = weights.reshape(-1) if weigh == "unsorted" else weights.reshape(-1)[slots]
    w = {"ones": np.ones_like(w), "mean": np.full_like(w, 1 / K)}.get(weigh, w)[:, None]
    rows = x[tokens] * w if weigh == "input" else x[tokens]
    answers = np.zeros_like(rows)
    for place, e in enumerate(np.unique(expert_of)):
        own = expert_of == e
        answers[own] = experts[place if numbers == "place among those picked" else e](rows[own])
    parts = answers if weigh == "input" else answers * w
    if picks == "first":
        parts = np.where((slots % K == 0)[:, None], parts, 0)
    if picks == "within capacity":
        queue = np.arange(N * K) - np.searchsorted(expert_of, expert_of)  # place among the expert's own
        parts = np.where((queue < N * K / E)[:, None], parts, 0)
    y = _combined(parts, tokens, slots, N, combine)
    if add == "nothing":
        return y
    extra = shared(x)
    if add == "shared times scale":
        extra = extra * weights.sum(axis=-1, keepdims=True)
    return (y + extra) / 2 if add == "mean with shared" else y + extra + (x if add == "shared and x" else 0)


def _combined(parts: Array, tokens: Array, slots: Array, N: int, combine: str) -> Array:
    y = np.zeros((N, parts.shape[1]), parts.dtype)
    if combine == "neighbours":
        return parts.reshape(N, -1, parts.shape[1]).sum(axis=1)
    if combine == "last pick stays":
        order = np.argsort(slots)
        y[tokens[order]] += parts[order]
    elif combine == "last expert stays":
        y[tokens] += parts  # NumPy reads all, adds, and writes all: a repeated index keeps the last
    else:
        np.add.at(y, tokens, parts)
    return y


def bill(function: Callable[..., Any], inputs: Inputs) -> str | None:
    """Rows that were given to experts which nobody asked, or calls that could have been one."""
    x, indices, weights, experts, shared = inputs
    counting = [Expert(*expert.matrices) for expert in experts]
    function(x, indices, weights, tuple(counting), shared)
    rows = [count for expert in counting for count in expert.rows]
    given, calls, picked = sum(rows), sum(map(bool, rows)), len(np.unique(indices))
    if given > indices.size:
        E, K = (getattr(PRESETS["GLM-4.5"], field) for field in ("n_routed_experts", "num_experts_per_tok"))
        return (
            f"Right, with a bill: the experts were given {given} rows for {indices.size} picks. Every expert for every "
            f"token is E/K = {len(experts) / indices.shape[1]:g} times the work; in GLM-4.5, {E}/{K} = {E / K:g} times."
        )
    if calls > picked:
        return (
            f"Right, with a bill: {calls} calls, where {picked} do, one for each expert that was picked: its weights "
            "are then read once for all of its tokens."
        )
    return None


def cases(draw: int = 0) -> Sequence[Case]:
    """Nine tokens, two of six experts; expert 2 gets nobody, expert 4 is busy; weights that add up to 2.5."""
    rng = default_rng([6, draw])

    def inputs(N: int, E: int, K: int, D: int = 4, F: int = 3) -> tuple[Any, ...]:
        def expert() -> Expert:
            return Expert(*(rng.standard_normal(shape) for shape in ((F, D), (F, D), (D, F))))

        liking = rng.standard_normal((N, E)) + np.where(np.arange(E) == 4, 1.5, 0) - np.where(np.arange(E) == 2, 99, 0)
        weights = rng.uniform(0.2, 1, (N, K))
        weights *= 2.5 / weights.sum(axis=-1, keepdims=True)
        indices = np.argsort(-liking, axis=-1)[:, :K]
        return 1.5 * rng.standard_normal((N, D)), indices, weights, tuple(expert() for _ in range(E)), expert()

    return [
        *(Case("values", inputs(9, 6, 2)) for _ in range(4)),
        Case("one pick each", inputs(5, 6, 1)),
        Case("all experts picked", inputs(3, 5, 5)),
        Case("one token", inputs(1, 6, 2)),
    ]


EXERCISE = Exercise(
    name="moe",
    minutes=30,
    brief="moe(x [N, D], indices int [N, K], weights [N, K], experts, shared) -> [N, D]. experts is E functions, "
    "shared is one, each rows [n, D] -> [n, D]. Token t gets Σ_k weights[t, k] · experts[indices[t, k]](x[t]) + "
    "shared(x[t]). Notebook 06; arXiv 2401.06066.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("fancy_add", {"combine": "last expert stays"}, "y[tokens] += parts keeps one part of a repeated token"),
        Mistake("fancy_add", {"combine": "last pick stays"}, "y[tokens] += parts keeps one part of a repeated token"),
        Mistake("weights_unsorted", {"weigh": "unsorted"}, "the picks are sorted by expert, and the weights are not"),
        Mistake("token_mod", {"token": "slot mod N"}, "slot s of the N·K picks is taken for token s mod N, not s // K"),
        Mistake(
            "no_unsort", {"combine": "neighbours"}, "the parts are added up in the experts' order, not the tokens'"
        ),
        Mistake(
            "shifted_experts",
            {"numbers": "place among those picked"},
            "an expert without tokens shifts all later ones: slice i goes to expert i",
        ),
        Mistake("weight_on_input", {"weigh": "input"}, "the weight multiplies the expert's input, not its answer"),
        Mistake("ones", {"weigh": "ones"}, "the weights are not used"),
        Mistake("mean", {"weigh": "mean"}, "the experts' answers are averaged; their weights are not used"),
        Mistake("top1", {"picks": "first"}, "only each token's first pick counts"),
        Mistake("capacity", {"picks": "within capacity"}, "an expert's picks beyond N·K/E are dropped"),
        Mistake("shared_scaled", {"add": "shared times scale"}, "the shared expert is multiplied by the weights' sum"),
        Mistake("no_shared", {"add": "nothing"}, "the shared expert is missing"),
        Mistake("shared_avg", {"add": "mean with shared"}, "routed and shared answers are averaged, not added"),
        Mistake("add_residual", {"add": "shared and x"}, "x is added, too: that is the layer's part"),
    ),
    designs=(
        Design("weight_on_input", {"weigh": "input"}, "The weight multiplies the expert's input, as in Llama 4."),
        Design(
            "capacity",
            {"picks": "within capacity"},
            "Each expert takes the first ⌈N·K/E⌉ of its picks, in the order of the tokens; further ones are dropped.",
        ),
        Design("shared_avg", {"add": "mean with shared"}, "The mean of the routed and the shared answer is returned."),
    ),
    axes={"y": "N D"},
    outputs=one("y"),
    bill=bill,
)
