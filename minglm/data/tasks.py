"""Generated tasks: sums, differences, reversals, number words, each with a checker and a held-out split.

A line is `prompt + answer + "\\n"`: `17+25=42`, `reverse:4821->1284`, `words:42->forty-two`. The formats are
short and regular so that a one-million-parameter model whose digits are single tokens learns them quickly: no
spaces, one sign that ends the prompt, and letters in capitals, which a small vocabulary rarely merges.
"""

import hashlib
import re
from collections.abc import Callable
from typing import NamedTuple

from numpy.random import Generator, default_rng

HELDOUT_ONE_IN = 10
MAX_TRIES_PER_ITEM = 100_000  # finds the last rare item; a task with too few must not loop for ever

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Item(NamedTuple):
    """One question: `prompt` is given to the model, which must write `answer` before the next newline."""

    task: str
    prompt: str
    answer: str


def check(item: Item, text: str) -> bool:
    """True if `text`, a continuation of the prompt, is the answer up to its first newline or its end."""
    return text.partition("\n")[0].strip() == item.answer


class Task(NamedTuple):
    """A generator of items (held-out ones included: see `make_train`, `heldout_items`) and their checker."""

    name: str
    make: Callable[[Generator], Item]
    check: Callable[[Item, str], bool] = check


# ---- the tasks


def _two_digit_pair(rng: Generator) -> tuple[int, int]:
    first, second = rng.integers(10, 100, size=2).tolist()
    return first, second


def _operands(rng: Generator) -> tuple[int, int]:
    """Two operands: 70 % of pairs from 10..99, 15 % from 0..99, 15 % with at least one of three digits."""
    kind = rng.random()
    if kind < 0.70:
        return _two_digit_pair(rng)
    if kind < 0.85:
        first, second = rng.integers(0, 100, size=2).tolist()
        return first, second
    # One operand has three digits, the other any size up to that; either may come first.
    long, short = int(rng.integers(100, 1000)), int(rng.integers(0, 10 ** int(rng.integers(1, 4))))
    return (long, short) if rng.random() < 0.5 else (short, long)


def _sum(first: int, second: int) -> Item:
    return Item("addition", f"{first}+{second}=", str(first + second))


def _make_addition(rng: Generator) -> Item:
    return _sum(*_operands(rng))


def _make_two_digit_addition(rng: Generator) -> Item:
    return _sum(*_two_digit_pair(rng))


def _make_subtraction(rng: Generator) -> Item:
    """A difference; one in five is put so that its result is negative (or zero)."""
    small, large = sorted(_operands(rng))
    first, second = (small, large) if rng.random() < 0.2 else (large, small)
    return Item("subtraction", f"{first}-{second}=", str(first - second))


def _make_reversal(rng: Generator) -> Item:
    """Two to six digits, or two to five capital letters, written backwards."""
    if rng.random() < 0.5:
        text = "".join(map(str, rng.integers(0, 10, size=rng.integers(2, 7)).tolist()))
    else:
        text = "".join(LETTERS[i] for i in rng.integers(0, 26, size=rng.integers(2, 6)).tolist())
    return Item("reversal", f"reverse:{text}->", text[::-1])


def number_to_words(number: int) -> str:
    """English for 0..9999, as in "four thousand two hundred thirteen" and "forty-two"."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return TENS[tens] + (f"-{UNITS[unit]}" if unit else "")
    power, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, power)
    return f"{UNITS[count]} {name}" + (f" {number_to_words(rest)}" if rest else "")


def words_to_number(words: str) -> int:
    """The inverse of `number_to_words`."""
    values = {word: value for value, word in enumerate(UNITS)} | {word: 10 * value for value, word in enumerate(TENS)}
    total = 0
    for word in words.replace("-", " ").split():
        if word in ("hundred", "thousand"):
            # Only the units just read are multiplied: "two thousand three hundred" is 2000 + 3 * 100.
            thousands, units = divmod(total, 1000)
            total = thousands * 1000 + units * (100 if word == "hundred" else 1000)
        else:
            total += values[word]
    return total


def _make_number_words(rng: Generator) -> Item:
    """Digits to words or back; every length from one to four digits is equally frequent."""
    number = int(rng.integers(0, 10 ** int(rng.integers(1, 5))))
    if rng.random() < 0.5:
        return Item("number_words", f"words:{number}->", number_to_words(number))
    return Item("number_words", f"number:{number_to_words(number)}->", str(number))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("addition", _make_addition),
        Task("subtraction", _make_subtraction),
        Task("reversal", _make_reversal),
        Task("number_words", _make_number_words),
    )
}
"""The tasks of the training mixture, by name."""

TWO_DIGIT_ADDITION = Task("addition", _make_two_digit_addition)
"""Addition with both operands in 10..99, for evaluation: `addition` contains it, so `TASKS` does not."""


# ---- the held-out split


def canonical(prompt: str) -> str:
    """One key for all prompts that give each other's answer away, so that "unseen" is honest.

    `27+58=` and `58+27=` share a key; so do `27-58=` and `58-27=`, a string and its reversal, and a number
    asked in words and in digits.
    """
    if arithmetic := re.fullmatch(r"(\d+)([+-])(\d+)=", prompt):
        small, large = sorted((int(arithmetic[1]), int(arithmetic[3])))
        return f"{small}{arithmetic[2]}{large}"
    name, _, argument = prompt.removesuffix("->").partition(":")
    if name == "reverse":
        return "reverse:" + min(argument, argument[::-1])
    if name == "number":
        return f"words:{words_to_number(argument)}"
    return f"{name}:{argument}"


def is_heldout(prompt: str) -> bool:
    """True for the tenth of all prompts that training never sees: a stable hash of the canonical prompt.

    Python's own `hash` of a string is salted per process, so it cannot serve here.
    """
    digest = hashlib.blake2b(canonical(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELDOUT_ONE_IN == 0


def make_train(task: Task, rng: Generator) -> Item:
    """The next item that is not held out."""
    return _make_until(task, rng, lambda item: not is_heldout(item.prompt))


def heldout_items(task: Task, count: int, seed: int) -> list[Item]:
    """`count` different held-out items, the same for the same seed. ValueError if the task has too few."""
    rng = default_rng(seed)
    found: dict[str, Item] = {}
    while len(found) < count:
        item = _make_until(task, rng, lambda item: is_heldout(item.prompt) and item.prompt not in found)
        found[item.prompt] = item
    return list(found.values())


def _make_until(task: Task, rng: Generator, wanted: Callable[[Item], bool]) -> Item:
    for _ in range(MAX_TRIES_PER_ITEM):
        item = task.make(rng)
        if wanted(item):
            return item
    raise ValueError(f"task {task.name!r}: no further item found in {MAX_TRIES_PER_ITEM} tries; ask for fewer")
