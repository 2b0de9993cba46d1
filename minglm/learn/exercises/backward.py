"""Backward passes: linear, RMSNorm, SwiGLU, and cross-entropy."""

from collections.abc import Sequence

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Mistake, one, several
from minglm.model.ops import Array, sigmoid, softmax

# -- linear ------------------------------------------------------------------------------------------------------


def linear_bwd(
    dy: Array,  # [N, out]
    x: Array,  # [N, in]
    weight: Array,  # [out, in]
    *,
    transposed: bool = False,  # dy · Wᵀ, which fits where W is square
    over: str = "sum",  # tokens, or "mean"
    swapped: bool = False,  # dW = xᵀ dy
) -> tuple[Array, Array, Array]:
    """All flags at their defaults: `minglm.model.linear_bwd`, with a bias."""
    dx = dy @ (weight.T if transposed else weight)
    dweight = (x.T @ dy if swapped else dy.T @ x) / (len(x) if over == "mean" else 1)
    return dx, dweight, dy.sum(axis=0) / (len(x) if over == "mean" else 1)


def _linear_cases(draw: int = 0) -> Sequence[Case]:
    rng = default_rng([4, draw])
    square = [
        Case("values", (rng.standard_normal((5, 4)), rng.standard_normal((5, 4)), rng.standard_normal((4, 4))))
        for _ in range(3)
    ]
    return [
        *square,
        Case("not square", (rng.standard_normal((7, 3)), rng.standard_normal((7, 4)), rng.standard_normal((3, 4)))),
    ]


LINEAR = Exercise(
    name="linear_bwd",
    minutes=15,
    brief="linear_bwd(dy [N, out], x [N, in], weight [out, in]) -> dx [N, in], dweight [out, in], dbias [out], for "
    "y = x · weightᵀ + bias. Notebook 10a.",
    reference=linear_bwd,
    cases=_linear_cases,
    mistakes=(
        Mistake(
            "transposed",
            {"transposed": True},
            "dx uses the transpose of the weight, which fits only where it is square",
        ),
        Mistake("mean", {"over": "mean"}, "the gradients of weight and bias are averaged over the tokens, not summed"),
        Mistake("swapped", {"swapped": True}, "dweight is xᵀ · dy, its own transpose"),
    ),
    designs=(Design("mean", {"over": "mean"}, "The gradients of weight and bias are averaged over the tokens."),),
    axes={"dx": "N in", "dweight": "out in", "dbias": "out"},
    outputs=several("dx", "dweight", "dbias"),
)

# -- RMSNorm -----------------------------------------------------------------------------------------------------


def rms_norm_bwd(
    dy: Array,  # [N, D]
    x: Array,  # [N, D]
    weight: Array,  # [D]
    eps: float,
    *,
    along: str = "minus",  # the term along x, or "none", "plus"
    mean: str = "mean",  # of g · x, or "sum"
    upstream: str = "g",  # g = dy · weight in that term, or "dy"
    power: int = 3,  # of the size below it
    centred: bool = False,  # LayerNorm's further term
    rows: str = "sum",  # of dweight, or "mean"
    dweight_over: str = "size",  # or "nothing"
    weigh: str = "plain",  # or "one plus"
) -> tuple[Array, Array]:
    """All flags at their defaults: `minglm.model.rms_norm_bwd`. With r the root mean square and g = dy · weight:
    dx = g / r − x · mean(g · x) / r³, dweight = Σ dy · x / r."""
    r = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    g = dy * (1 + weight if weigh == "one plus" else weight)
    inner = ((g if upstream == "g" else dy) * x).sum(axis=-1, keepdims=True) / (x.shape[-1] if mean == "mean" else 1)
    dx = g / r - {"minus": 1, "none": 0, "plus": -1}[along] * x * inner / r**power
    dx = dx - dx.mean(axis=-1, keepdims=True) if centred else dx
    dweight = (dy * x / (r if dweight_over == "size" else 1)).sum(axis=0)
    return dx, dweight / (len(x) if rows == "mean" else 1)


def _norm_cases(draw: int = 0) -> Sequence[Case]:
    rng = default_rng([5, draw])
    sizes = np.array([0.1, 1, 3, 0.5])[:, None]
    return [
        Case(
            "values",
            (
                rng.standard_normal((4, D)),
                sizes * (0.5 + rng.standard_normal((4, D))),
                1.5 + rng.standard_normal(D),
                1e-3,
            ),
        )
        for D in (6, 8, 12)
    ]


RMS_NORM = Exercise(
    name="rms_norm_bwd",
    minutes=25,
    brief="rms_norm_bwd(dy [N, D], x [N, D], weight [D], eps) -> dx [N, D], dweight [D]. Notebook 10a, "
    "docs/derivations/rms-norm.md.",
    reference=rms_norm_bwd,
    cases=_norm_cases,
    mistakes=(
        Mistake("constant_size", {"along": "none"}, "the size r is treated as a constant, though it depends on x"),
        Mistake("sum_for_mean", {"mean": "sum"}, "the second term has the sum over the row where its mean belongs"),
        Mistake("dy_for_g", {"upstream": "dy"}, "the second term uses dy without the weight"),
        Mistake("power_2", {"power": 2}, "the second term is divided by r² instead of r³"),
        Mistake("plus", {"along": "plus"}, "the second term is added"),
        Mistake("layer_norm", {"centred": True}, "the mean is taken off, as LayerNorm's backward does"),
        Mistake("averaged", {"rows": "mean"}, "dweight is averaged over the rows, not summed"),
        Mistake("no_size", {"dweight_over": "nothing"}, "dweight lacks the division by r"),
    ),
    designs=(
        Design("one_plus_w", {"weigh": "one plus"}, "The forward multiplies by 1 + weight, as Gemma's does."),
        Design("averaged", {"rows": "mean"}, "dweight is averaged over the rows."),
    ),
    axes={"dx": "N D", "dweight": "D"},
    outputs=several("dx", "dweight"),
)

# -- SwiGLU ------------------------------------------------------------------------------------------------------


def swiglu_bwd(
    dy: Array,  # [N, F]
    gate: Array,  # [N, F]
    up: Array,  # [N, F]
    *,
    slope: str = "silu",  # of the gate, or "sigmoid", "first half", "second half", "no gate", "silu · (1 − silu)", …
    to_up: str = "silu",  # or "sigmoid", "gate"
    times_up: bool = True,  # in dgate
    roles: str = "silu of the gate",  # or "silu of up"
    upstream: bool = True,
    swapped: bool = False,
) -> tuple[Array, Array]:
    """All flags at their defaults: `minglm.model.swiglu_bwd`. y = gate · σ(gate) · up."""
    if roles == "silu of up":
        gate, up = up, gate
    s = sigmoid(gate)
    silu, again = gate * s, sigmoid(gate * s)
    slopes = {
        "silu": s * (1 + gate * (1 - s)), "sigmoid": s * (1 - s), "first half": s, "second half": silu * (1 - s),
        "no gate": s + s * (1 - s), "silu · (1 − silu)": silu * (1 - silu), "none": np.ones_like(s),
        "sigmoid of silu": again * (1 + gate * (1 - again)),
    }  # fmt: skip
    dy = dy if upstream else np.ones_like(dy)
    dgate = dy * (up if times_up else 1) * slopes[slope]
    dup = dy * {"silu": silu, "sigmoid": s, "gate": gate}[to_up]
    return (dup, dgate) if swapped != (roles == "silu of up") else (dgate, dup)


def _swiglu_cases(draw: int = 0) -> Sequence[Case]:
    rng = default_rng([6, draw])
    return [Case("values", tuple(2 * rng.standard_normal((4, 6)) for _ in range(3))) for _ in range(3)]


SWIGLU = Exercise(
    name="swiglu_bwd",
    minutes=15,
    brief="swiglu_bwd(dy [N, F], gate [N, F], up [N, F]) -> dgate, dup [N, F], for y = gate · sigmoid(gate) · up. "
    "Notebook 10c.",
    reference=swiglu_bwd,
    cases=_swiglu_cases,
    mistakes=(
        Mistake(
            "sigmoid_slope", {"slope": "sigmoid"}, "dgate has the slope of a sigmoid, but y has gate · sigmoid(gate)"
        ),
        Mistake(
            "sigma_only", {"slope": "first half"}, "of the product rule only the first half is there, sigmoid(gate)"
        ),
        Mistake("second_only", {"slope": "second half"}, "of the product rule only the second half is there"),
        Mistake("lost_gate", {"slope": "no gate"}, "the second half of the product rule lacks its factor gate"),
        Mistake(
            "silu_1_silu", {"slope": "silu · (1 − silu)"}, "the slope is silu · (1 − silu): a trick of the sigmoid's"
        ),
        Mistake(
            "sigma_of_silu", {"slope": "sigmoid of silu"}, "the slope's sigmoid is taken of silu(gate), not of gate"
        ),
        Mistake("no_slope", {"slope": "none"}, "the slope of the gate is missing"),
        Mistake("forgot_up", {"times_up": False}, "dgate lacks the factor up"),
        Mistake("up_sigmoid", {"to_up": "sigmoid"}, "dup has sigmoid(gate) where gate · sigmoid(gate) belongs"),
        Mistake("up_gate", {"to_up": "gate"}, "dup has the bare gate where gate · sigmoid(gate) belongs"),
        Mistake("swapped", {"swapped": True}, "the two gradients are returned in the other order"),
        Mistake("roles", {"roles": "silu of up"}, "SiLU is taken of up instead of the gate"),
        Mistake("no_dy", {"upstream": False}, "dy is not used"),
    ),
    designs=(
        Design(
            "glu",
            {"slope": "sigmoid", "to_up": "sigmoid"},
            "The forward is y = sigmoid(gate) · up, the first of all gated units.",
        ),
        Design("bilinear", {"slope": "none", "to_up": "gate"}, "The forward is y = gate · up."),
        Design(
            "roles",
            {"roles": "silu of up"},
            "The forward puts the function on up, not on the gate; everything else stays.",
        ),
    ),
    axes={"dgate": "N F", "dup": "N F"},
    outputs=several("dgate", "dup"),
)

# -- cross-entropy -----------------------------------------------------------------------------------------------


def cross_entropy_bwd(
    dloss: float,
    logits: Array,  # [N, V]
    targets: Array,  # int [N], −100: no target
    *,
    value: str = "p − onehot",  # or "p", "only target", "by probability", "onehot − p", "log p"
    over: str = "valid",  # rows, or "all", "none"
    ignored: str = "zero",  # rows without target, or "leak"
    axis: int = -1,
    softmaxes: int = 1,
    shift: int = 0,
    upstream: bool = True,
    stable: bool = True,  # the largest logit is taken off before the exponential
) -> Array:
    """All flags at their defaults: the gradient of `minglm.model.cross_entropy`, the mean over rows with a target."""
    valid = targets >= 0
    targets = np.roll(targets, -shift)
    p = np.moveaxis(softmax(np.moveaxis(logits, axis, -1)), -1, axis)
    p = p if stable else np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    p = softmax(p) if softmaxes == 2 else p
    onehot = np.eye(logits.shape[-1], dtype=logits.dtype)[np.maximum(targets, 0)]
    made = {
        "p − onehot": p - onehot, "p": p, "only target": onehot * (p - 1), "by probability": -onehot / p,
        "onehot − p": onehot - p, "log p": np.log(p) - onehot,
    }[value]  # fmt: skip
    made = np.where(valid[:, None], made, p if ignored == "leak" else np.zeros_like(p))
    rows = {"valid": int(valid.sum()), "all": len(logits), "none": 1}[over]
    return made / rows * (dloss if upstream else 1)


def _loss_cases(draw: int = 0) -> Sequence[Case]:
    rng = default_rng([7, draw])
    made = []
    for _ in range(3):
        targets = rng.integers(0, 7, 6)
        targets[1] = -100
        made.append(Case("values", (0.3, 2 * rng.standard_normal((6, 7)), targets)))
    for _ in range(3):
        large = 2 * rng.standard_normal((4, 5))
        large[2] += 900
        made.append(Case("large logits", (1.0, large, rng.integers(0, 5, 4))))
    return made


CROSS_ENTROPY = Exercise(
    name="cross_entropy_bwd",
    minutes=20,
    brief="cross_entropy_bwd(dloss, logits [N, V], targets int [N], −100 where there is none) -> dlogits [N, V], of "
    "the mean of −log p over the rows that have a target. Notebook 10a.",
    reference=cross_entropy_bwd,
    cases=_loss_cases,
    mistakes=(
        Mistake("only_p", {"value": "p"}, "the one at the target is never subtracted"),
        Mistake("only_target", {"value": "only target"}, "only the target's entry gets a gradient"),
        Mistake("d_wrt_prob", {"value": "by probability"}, "this is the slope with respect to the probability, −1/p"),
        Mistake("sign", {"value": "onehot − p"}, "the sign is turned round"),
        Mistake("log_not_prob", {"value": "log p"}, "log p stands where p belongs"),
        Mistake("no_mean", {"over": "none"}, "the forward averaged over the rows, the backward does not divide"),
        Mistake("divides_by_N", {"over": "all"}, "it is divided by all rows, also those without a target"),
        Mistake("masked_rows_leak", {"ignored": "leak"}, "rows without a target get a gradient"),
        Mistake("softmax_axis", {"axis": 0}, "the softmax runs over the tokens"),
        Mistake("double_softmax", {"softmaxes": 2}, "the softmax is taken twice"),
        Mistake("double_shift", {"shift": 1}, "the targets are shifted once more, though they come aligned"),
        Mistake(
            "unstable_exp", {"stable": False}, "the exponential of large logits overflows: nothing is taken off first"
        ),
        Mistake("ignores_dloss", {"upstream": False}, "dloss, the weight of this loss, is not used"),
    ),
    designs=(
        Design("sum", {"over": "none"}, "The loss is the sum over the rows with a target, not their mean."),
        Design(
            "over_all",
            {"over": "all"},
            "The loss is the sum over the rows with a target, divided by the number of all rows.",
        ),
    ),
    axes={"dlogits": "N V"},
    outputs=one("dlogits"),
)
