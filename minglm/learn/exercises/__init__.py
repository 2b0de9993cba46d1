"""The exercises by name, in the order of the notebooks."""

from minglm.learn.exercise import Exercise
from minglm.learn.exercises import attention, backward, balance, norm, router

_ALL = (
    norm.EXERCISE, attention.EXERCISE, router.EXERCISE, backward.CROSS_ENTROPY, backward.LINEAR, backward.RMS_NORM,
    backward.SWIGLU, balance.EXERCISE,
)  # fmt: skip
EXERCISES: dict[str, Exercise] = {each.name: each for each in _ALL}
