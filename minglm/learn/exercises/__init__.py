"""The exercises by name, in the order of the teaching plan's weeks."""

from minglm.learn.exercise import Exercise
from minglm.learn.exercises import (
    attention,
    attention_backward,
    backward,
    balance,
    cache,
    dispatch,
    fp8,
    load,
    mtp,
    norm,
    orthogonal,
    rotation,
    router,
    router_backward,
    speculation,
)

_ALL = (
    norm.EXERCISE,
    rotation.EXERCISE,
    attention.EXERCISE,
    cache.EXERCISE,
    router.EXERCISE,
    dispatch.EXERCISE,
    load.EXERCISE,
    balance.EXERCISE,
    backward.CROSS_ENTROPY,
    backward.LINEAR,
    backward.RMS_NORM,
    attention_backward.EXERCISE,
    backward.SWIGLU,
    router_backward.EXERCISE,
    orthogonal.EXERCISE,
    mtp.EXERCISE,
    speculation.EXERCISE,
    fp8.EXERCISE,
)
WEEKS = {  # of the teaching plan, docs/teaching
    1: ("rms_norm",),
    2: ("rope", "attend", "kv_cache"),
    3: ("router", "moe"),
    4: ("load", "bias_update"),
    5: (
        "cross_entropy_bwd", "linear_bwd", "rms_norm_bwd", "attend_bwd", "swiglu_bwd", "router_bwd", "orthogonalise",
    ),
    6: ("mtp_input", "verify", "fp8_encode"),
}  # fmt: skip
EXERCISES: dict[str, Exercise] = {each.name: each for each in _ALL}
