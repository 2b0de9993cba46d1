"""The input of the multi-token-prediction layer: the next token's embedding beside the state that has not seen it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Mistake, several
from minglm.model.ops import IGNORE, Array, rms_norm


def reference(
    stream: Array,  # [T, D] after the last decoder layer, before the final norm
    ids: Array,  # int [T]
    embedding: Array,  # [V, D]
    norm: Array,  # [D] weight of the final norm
    enorm: Array,  # [D] weight of the embedding's norm
    hnorm: Array,  # [D] weight of the state's norm
    eh_proj: Array,  # [D, 2·D]
    eps: float,
    *,
    token: int = 1,  # row i is given token i + 1; or 0, −1, 2
    state: int = 0,  # row i starts from state i; or 1
    target: int = 2,  # row i predicts token i + 2; or 1, 3
    order: str = "token first",  # or "state first"
    final: bool = True,  # whether the state has been through the final norm
    norms: str = "own",  # or "swapped", "none", "state only", "token only"
    first: str = "as it is",  # the embedding of row 0, or "zero"
    rows: str = "T - 1",  # or "T": the last row is given token 0
) -> tuple[Array, Array]:  # -> x [T − 1, D], targets int [T − 1], IGNORE where there is none
    """All flags at their defaults: what `minglm.model.mtp.mtp_layer` gives its decoder layer, and the targets of
    `mtp_chain_loss`."""
    T = len(ids)
    row = np.arange(T if rows == "T" else T - 1)
    words = embedding[ids[(row + token) % T]]
    if first == "zero":
        words[:1] = 0
    states = (rms_norm(stream, norm, eps) if final else stream)[(row + state) % T]
    of_words, of_states = (hnorm, enorm) if norms == "swapped" else (enorm, hnorm)
    words = words if norms in ("none", "state only") else rms_norm(words, of_words, eps)
    states = states if norms in ("none", "token only") else rms_norm(states, of_states, eps)
    both = (states, words) if order == "state first" else (words, states)
    known = row + target < T
    targets = np.where(known, ids[(row + target) % T], IGNORE)
    return np.concatenate(both, axis=-1) @ eh_proj.T, targets


def cases(draw: int = 0) -> Sequence[Case]:
    """Tokens that do not repeat themselves; weights of all three norms far from 1 and from each other."""
    rng = default_rng([14, draw])

    def inputs(T: int, D: int = 6, V: int = 11) -> tuple[Any, ...]:
        while True:
            ids = rng.integers(0, V, T)
            neighbours = np.concatenate([ids[1:] - ids[:-1], ids[2:] - ids[:-2], ids[3:] - ids[:-3]])
            if (neighbours != 0).all():
                break
        weights = (1 + rng.uniform(-0.8, 0.8, D) for _ in range(3))
        return (
            2 * rng.standard_normal((T, D)) + 0.5, ids, rng.standard_normal((V, D)), *weights,
            rng.standard_normal((D, 2 * D)), 1e-5,
        )  # fmt: skip

    return [
        *(Case("values", inputs(6)) for _ in range(3)),
        Case("a longer text", inputs(12)),
        Case("two tokens: one row, and nothing to predict", inputs(2)),
    ]


EXERCISE = Exercise(
    name="mtp_input",
    minutes=25,
    brief="mtp_input(stream [T, D], ids int [T], embedding [V, D], norm [D], enorm [D], hnorm [D], eh_proj [D, 2·D], "
    f"eps) -> x [T − 1, D], targets int [T − 1]. stream is what the last decoder layer left. Row i joins "
    "the embedding of token i + 1, after a norm with enorm, and state i, after the final norm and a norm with hnorm, "
    f"and multiplies by eh_proj; it is to predict token i + 2, or {IGNORE} if that is not known. Notebook 09; arXiv "
    "2412.19437, section 2.2.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("no_shift", {"token": 0}, "row i is given token i, which its state already knows"),
        Mistake("shift_back", {"token": -1}, "row i is given token i − 1"),
        Mistake("shift_two", {"token": 2}, "row i is given token i + 2, which it is to predict"),
        Mistake("hidden_shifted", {"state": 1}, "the states are shifted, too: row i starts from state i + 1"),
        Mistake("wrong_target", {"target": 1}, "row i is to predict token i + 1, which it was given"),
        Mistake("double_shift", {"target": 3}, "row i is to predict token i + 3: the targets were shifted twice"),
        Mistake("concat_swapped", {"order": "state first"}, "the state comes first in what eh_proj reads"),
        Mistake("pre_norm_hidden", {"final": False}, "the state has not been through the final norm"),
        Mistake("norms_swapped", {"norms": "swapped"}, "the weights of the two norms are swapped"),
        Mistake("no_norms", {"norms": "none"}, "enorm and hnorm are not used"),
        Mistake("no_enorm", {"norms": "state only"}, "the embedding is not normed"),
        Mistake("no_hnorm", {"norms": "token only"}, "the state is not normed with hnorm"),
        Mistake("pos0_zeroed", {"first": "zero"}, "row 0 is given zeros instead of token 1"),
        Mistake("wrap_around", {"rows": "T"}, "there are T rows; the last one is given token 0"),
    ),
    designs=(
        Design("concat_swapped", {"order": "state first"}, "The state comes first, the embedding second."),
        Design("pre_norm_hidden", {"final": False}, "The state is taken before the final norm."),
        Design("no_enorm", {"norms": "state only"}, "Only the state is normed; the embedding is joined as it is."),
        Design("pos0_zeroed", {"first": "zero"}, "Row 0 is given an embedding of zeros, as some engines do."),
    ),
    axes={"x": "T−1 D", "targets": "T−1"},
    outputs=several("x", "targets"),
)
