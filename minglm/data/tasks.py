"""Generated tasks with and without written-out thinking, and a held-out split.

An item is a question, the steps that lead to its answer, and the answer. As plain text it stands in two forms,

    4821+937=5758               direct: the answer at once

    4821+937:                   worked: the thinking first
    1+7+0=08 2+3+0=05 8+9+0=17 4+0+1=05
    =5758

The formats are regular, and every step copies what it uses, so that a model of a few million parameters whose digits
are single tokens learns each step by itself. They are described where they are made: `arithmetic.py`, `words.py`,
`puzzles.py`, `expressions.py`.
"""

import hashlib
import re
from collections.abc import Callable

from numpy.random import Generator, default_rng

from minglm.data.arithmetic import ARITHMETIC
from minglm.data.expressions import EXPRESSIONS
from minglm.data.items import Item, Task
from minglm.data.puzzles import PUZZLES
from minglm.data.words import NUMBER_WORDS, asked_number

HELDOUT_ONE_IN = 10
MAX_TRIES_PER_ITEM = 30_000  # finds the last rare item; a task with too few must not loop for ever

TASKS: dict[str, Task] = {task.name: task for task in (*ARITHMETIC, NUMBER_WORDS, *PUZZLES, *EXPRESSIONS)}
"""Every task, by name."""


def check(item: Item, text: str) -> bool:
    """True if the first line of `text`, what a model writes where the answer should stand, is the answer."""
    return text.partition("\n")[0].strip() == item.answer


def check_steps(item: Item, text: str) -> bool:
    """True if a written-out thinking is right in every line."""
    return text.strip() == item.steps


def plain(item: Item, thinking: bool) -> tuple[str, str]:
    """(prompt, completion) as plain text, direct or worked."""
    if thinking:
        return f"{item.question}:\n", f"{item.steps}\n={item.answer}\n"
    return f"{item.question}=", f"{item.answer}\n"


# -- the held-out split --


def canonical(task: str, question: str) -> str:
    """One key for all questions that give each other's answer away, so that "unseen" is honest.

    - Sums and products of two numbers share it with their mirror image, and with the differences that they
      answer (27+58, 58+27, 85-58, 85-27, and the negative 58-85), whichever task asks.
    - A number shares it in digits, in English and in Chinese.
    - In all other tasks questions of the same characters share it: a sum, a list or a map in any order, a
      string and its reversal. That puts some together that have nothing to do with each other, which is harmless.
    """
    if pair := re.fullmatch(r"(\d+)([+*-])(\d+)", question, re.ASCII):
        small, large = sorted((int(pair[1]), int(pair[3])))
        if pair[2] == "-":
            small, large = sorted((small, large - small))
        return f"{small}{'*' if pair[2] == '*' else '+'}{large}"
    if task == "number_words":
        return f"number_words:{asked_number(question)}"
    return f"{task}:{''.join(sorted(question))}"


def is_heldout(task: str, question: str) -> bool:
    """True for the tenth of all questions that training never sees: a stable hash of the canonical question.

    Python's own `hash` of a string is salted per process, so it cannot serve here.
    """
    digest = hashlib.blake2b(canonical(task, question).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELDOUT_ONE_IN == 0


_LONG_PAIR = re.compile(r"(?<!\d)(?=(\d\d+[+*-]\d+|\d[+*-]\d\d+))", re.ASCII)


def gives_away(item: Item) -> bool:
    """True if the thinking answers a held-out question on its way: `478*23` says what 478*3 is.

    Facts of two single digits are exempt: they are what every longer thinking is made of.
    """
    if item.task == "python":
        *lines, _ = item.steps.split("\n")  # the last is a value
        if any(is_heldout("python", line) for line in lines):
            return True
    elif item.task != "multiplication":
        return False
    pairs = _LONG_PAIR.findall(f"{item.question}\n{item.steps}")
    return any(is_heldout(item.task, pair) for pair in pairs)


def make_train(task: Task, rng: Generator, size: int | None = None) -> Item:
    """The next item that neither is held out nor gives a held-out one away."""
    item = _make_until(task, rng, size, lambda item: not is_heldout(item.task, item.question) and not gives_away(item))
    if item is None:
        raise ValueError(f"task {task.name!r}: no item for training found in {MAX_TRIES_PER_ITEM} tries")
    return item


def heldout_items(task: Task, count: int, seed: int, size: int | None = None) -> list[Item]:
    """`count` different held-out items, the same for the same seed. ValueError if there are fewer."""
    rng = default_rng(seed)
    found: dict[str, Item] = {}
    while len(found) < count:
        item = _make_until(
            task, rng, size, lambda item: item.question not in found and is_heldout(item.task, item.question)
        )
        if item is None:
            which = f"task {task.name!r}" + ("" if size is None else f" of size {size}")
            hint = f"only {len(found)} held-out questions: ask for at most {len(found)}" if found else "none held out"
            raise ValueError(f"{which} has {hint}")
        found[item.question] = item
    return list(found.values())


def _make_until(task: Task, rng: Generator, size: int | None, wanted: Callable[[Item], bool]) -> Item | None:
    for _ in range(MAX_TRIES_PER_ITEM):
        item = task.make(rng, size)
        if wanted(item):
            return item
    return None
