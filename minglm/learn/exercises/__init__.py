"""The exercises by name, in the order of the notebooks."""

from minglm.learn.exercise import Exercise
from minglm.learn.exercises import norm, router

EXERCISES: dict[str, Exercise] = {each.EXERCISE.name: each.EXERCISE for each in (norm, router)}
