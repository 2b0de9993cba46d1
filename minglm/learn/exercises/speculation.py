"""Speculative decoding: which drafts are kept, and what is written instead of the first that is not."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import default_rng

from minglm.generate.sampling import draw as draw_token
from minglm.learn.exercise import Case, Design, Exercise, Inputs, Mistake, Outputs
from minglm.model.ops import Array

DRAFTS, VOCABULARY = 3, 4


def reference(
    drafts: Array,  # int [n] draft i was drawn from q[i]
    q: Array,  # [n, V]
    p: Array,  # [n + 1, V]
    u: Array,  # [n] uniform in [0, 1), for the decisions
    v: float,  # uniform, for the draw
    *,
    accept: str = "p / q",  # or "q / p", "p", "p ≥ q", "best", "drawn and equal", "drawn"
    decides: str = "own u",  # or "first u"
    draws: str = "v",  # or "u": the one that refused
    rest: str = "p - q",  # or "p", "without the draft", "|p - q|", "q - p", "q"
    row: int = 0,  # of p for the rest, beyond i; or 1
    refused: str = "replace and stop",  # or "replace and go on", "stop"
    bonus: str = "p",  # or "none", "q", "p before"
) -> list[int]:  # 1 … n + 1 tokens
    """All flags at their defaults: `minglm.generate.speculative.verify`."""
    n, kept = len(drafts), list[int]()
    for i, token in enumerate(drafts):
        chance = u[0] if decides == "first u" else u[i]
        if accept.startswith("drawn"):
            own = draw_token(p[i], chance)
            if accept == "drawn" and own != token:  # its own token stays
                return [*kept, own]
            ok = own == token
        else:
            ok = {
                "p / q": chance * q[i, token] < p[i, token],
                "q / p": chance * p[i, token] < q[i, token],
                "p": chance < p[i, token],
                "p ≥ q": p[i, token] >= q[i, token],
                "best": token == p[i].argmax(),
            }[accept]
        if ok:
            kept.append(int(token))
            continue
        if refused == "stop":
            return kept
        kept.append(draw_token(_rest(rest, p[i + row], p[i], q[i], token), chance if draws == "u" else v))
        if refused == "replace and stop":
            return kept
    if bonus == "none":
        return kept
    return [*kept, draw_token({"q": q[n - 1], "p before": p[n - 1]}.get(bonus, p[n]), u[-1] if draws == "u" else v)]


def _rest(kind: str, wanted: Array, p: Array, q: Array, token: int) -> Array:
    """What a token is drawn from after a refusal; need not add up to 1."""
    without = np.where(np.arange(len(p)) == token, 0, p)
    left = np.maximum(wanted - q, 0)
    known = {"p": p, "without the draft": without, "|p - q|": np.abs(p - q), "q - p": np.maximum(q - p, 0), "q": q}
    return known.get(kind, left)


def tokens(inputs: Inputs, returned: Any) -> Outputs:
    """How many, and which: [n + 1], −1 where there is none."""
    found = np.asarray(returned if returned is not None else [None])
    n = len(inputs[0])
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError("wanted a list of 1 … n + 1 tokens, whole numbers")
    padded = np.full(max(n + 1, len(found)), -1)
    padded[: len(found)] = found
    return {"count": np.array(len(found)), "tokens": padded}


def cases(draw: int = 0) -> Sequence[Case]:
    """Many small ones, each refused or accepted clearly: no uniform number is within 1e-6 of where the answer turns."""
    rng = default_rng([13, draw])
    points = ["the first draft is refused", "a later draft is refused", "all are accepted", "a single draft"]
    wanted = dict.fromkeys(points, 40)
    made = []
    while any(wanted.values()):
        n = 1 if rng.random() < 0.2 else DRAFTS
        q, p = rng.dirichlet(np.full(VOCABULARY, 0.8), n), rng.dirichlet(np.full(VOCABULARY, 0.8), n + 1)
        drafts = np.array([draw_token(row, rng.random()) for row in q])
        u, v = rng.random(n), float(rng.random())
        inputs = drafts, q, p, u, v
        each = np.arange(n)
        near = np.abs(u * q[each, drafts] - p[each, drafts]).min() < 1e-6
        known = reference(*inputs)
        at = next((i for i, token in enumerate(drafts) if i >= len(known) - 1 or known[i] != token), n)
        point = points[3] if n == 1 else points[2] if len(known) == n + 1 else points[0] if at == 0 else points[1]
        if not near and wanted[point]:
            wanted[point] -= 1
            made.append(Case(point, inputs))
    return sorted(made, key=lambda each: points.index(each.point))


EXERCISE = Exercise(
    name="verify",
    minutes=40,
    brief="verify(drafts int [n], q [n, V], p [n + 1, V], u [n], v) -> a list of 1 … n + 1 tokens. Draft i was drawn "
    "from q[i]; p[i] is the model's distribution there. Keep draft i if u[i] < p[i]/q[i] of its token; at the first "
    "one refused draw from max(p[i] − q[i], 0), made to add up to 1, and stop; if all are kept draw from p[n], too. "
    "To draw with v: the first token at which the sum of the probabilities so far passes v. Notebook 09; arXiv "
    "2211.17192.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("resample_p", {"rest": "p"}, "after a refusal the token is drawn from p, not from what p has more of"),
        Mistake(
            "exclude_rejected", {"rest": "without the draft"}, "after a refusal only the refused token is left out"
        ),
        Mistake("abs_residual", {"rest": "|p - q|"}, "after a refusal the token is drawn from |p − q|"),
        Mistake("reversed_residual", {"rest": "q - p"}, "after a refusal the token is drawn from max(q − p, 0)"),
        Mistake("resample_q", {"rest": "q"}, "after a refusal the token is drawn from q"),
        Mistake("next_index", {"row": 1}, "after a refusal the token is drawn with p[i + 1]"),
        Mistake("inverted", {"accept": "q / p"}, "a draft is kept with probability q/p"),
        Mistake("hard", {"accept": "p ≥ q"}, "a draft is kept if p ≥ q, whatever u is"),
        Mistake("accept_p", {"accept": "p"}, "a draft is kept with probability p, as if q were sure of it"),
        Mistake("greedy_match", {"accept": "best"}, "a draft is kept if it is p's best: the rule of temperature 0"),
        Mistake(
            "match_then_fresh",
            {"accept": "drawn and equal", "rest": "p"},
            "a token is drawn from p and, if it is not the draft, drawn a second time",
        ),
        Mistake("one_uniform", {"decides": "first u"}, "u[0] decides on every draft"),
        Mistake("reuse_u", {"draws": "u"}, "the token is drawn with the u that has just decided, not with v"),
        Mistake("continues", {"refused": "replace and go on"}, "after a refusal the next drafts are looked at, too"),
        Mistake("no_replacement", {"refused": "stop"}, "after a refusal nothing is written in its place"),
        Mistake("no_bonus", {"bonus": "none"}, "when all drafts are kept there is no token more"),
        Mistake("bonus_q", {"bonus": "q"}, "when all drafts are kept the last token is drawn from q"),
        Mistake(
            "bonus_last_p", {"bonus": "p before"}, "when all drafts are kept the last token is drawn from p[n − 1]"
        ),
    ),
    detours=(
        Mistake(
            "sampler_match",
            {"accept": "drawn"},
            "with a bill: you draw each token from p and keep going while it is the draft. The text has the same "
            "distribution, but a draft is kept with probability Σ p·q, where the rule keeps Σ min(p, q) of them",
        ),
    ),
    designs=(
        Design(
            "resample_p", {"rest": "p"}, "After a refusal the token is drawn from p[i] itself (this biases the text)."
        ),
        Design("no_bonus", {"bonus": "none"}, "When all drafts are kept nothing more is written."),
        Design("greedy_match", {"accept": "best"}, "A draft is kept if it is the best of p[i], whatever u is."),
    ),
    axes={"count": "", "tokens": "n+1"},
    outputs=tokens,
    pairs=False,  # the rules have so few outcomes that two mistakes are easily found where there is a third
)
