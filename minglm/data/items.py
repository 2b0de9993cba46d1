"""What a generated task is, and how its numbers and letters are drawn."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from numpy.random import Generator

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
T = TypeVar("T")


class Item(NamedTuple):
    """One question, with the thinking that leads to its answer."""

    task: str
    question: str  # without phrasing: "4821+937"
    steps: str  # the thinking written out: one or several lines, no newline at the end, never empty
    answer: str  # one line
    size: int  # how long, in the unit of the task: digits, steps, letters …
    chance: float  # about the probability that a blind guess among plausible answers is right


class Task(NamedTuple):
    """How to make items, and how to work out from a question alone what they should say.

    `make(rng, size)` draws the size too if it is None, and raises ValueError for one outside `sizes`.
    `solve(question)` gives (steps, answer) in a way of its own, so that each checks the other; it raises
    ValueError for text that is no question of this task.
    """

    name: str
    make: Callable[[Generator, int | None], Item]
    sizes: tuple[int, ...]
    solve: Callable[[str], tuple[str, str]]


# The draws go through `rng.random`: Generator.integers costs twenty times as much for a single number.


def below(rng: Generator, end: int) -> int:
    """A number from 0 to end - 1."""
    return int(rng.random() * end)


def below_each(rng: Generator, end: int, count: int) -> list[int]:
    """`count` numbers from 0 to end - 1."""
    return [int(x * end) for x in rng.random(count).tolist()]


def pick(rng: Generator, choices: Sequence[T]) -> T:
    """One of the choices."""
    return choices[int(rng.random() * len(choices))]


def shuffled(rng: Generator, things: Sequence[T]) -> list[T]:
    """The things in another order."""
    return [things[i] for i in rng.random(len(things)).argsort().tolist()]


def draw_number(rng: Generator, digits: int) -> int:
    """A number of so many digits; 0 has one."""
    low = 10 ** (digits - 1) if digits > 1 else 0
    return low + below(rng, 10**digits - low)


def draw_size(rng: Generator, size: int | None, sizes: Sequence[int], task: str) -> int:
    """`size`, or any of the task's sizes with equal chance. ValueError for a size that the task does not have."""
    if size is None:
        return pick(rng, sizes)
    if size not in sizes:
        raise ValueError(f"task {task!r} has no size {size}: wanted one of {', '.join(map(str, sizes))}")
    return size


def not_a_question(task: str, question: str, example: str) -> ValueError:
    """The error of a `solve` that cannot read its question."""
    return ValueError(f"{question!r} is no question of task {task!r}: wanted something like {example!r}")
