"""Hints in three steps, as data: a question about what was seen, a piece of the formula, a case to do by hand.

They stand in hints.toml, in English and Chinese. Step 1 belongs to a mistake, step 2 to the piece of the formula that
it concerns (a flag of the reference), step 3 to the exercise. None prints the line of code.
"""

import functools
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from minglm.learn.check import exercise

LANGUAGES = ("en", "zh")

_TERM_S = ("as_glm45", "without_")  # mistakes that only a term's variant knows
_VERSION = {
    "en": "Read the sentence after “In this version” once more. Which part of the formula does it change?",
    "zh": "再读一遍题目里 “In this version” 之后的那句话：它改动了公式的哪一部分？",
}


class Hint(str):
    """A text that a prompt shows as it is: without quotes, and in lines."""

    __slots__ = ()
    __repr__ = str.__str__


@functools.cache
def hints() -> dict[str, Any]:
    """exercise -> {"first", "question": {mistake: …}, "piece": {flag: …}, "by_hand"}, each text {"en": …, "zh": …}."""
    return tomllib.loads(files("minglm.learn").joinpath("hints.toml").read_text("utf-8"))


def hint(name: str, step: int = 1, mistakes: Sequence[str] = (), language: str = "en") -> Hint:
    """One hint for an exercise: step 1, 2 or 3; with the ids of recognised mistakes (`report.mistakes`) about those.

    Raises ValueError for an exercise, step or language that there is not.
    """
    task = exercise(name)
    if step not in (1, 2, 3):
        raise ValueError(
            f"step = {step!r}; there are 1 (a question), 2 (a piece of the formula) and 3 (a case by hand)"
        )
    if language not in LANGUAGES:
        raise ValueError(f"language = {language!r}; there are {' and '.join(LANGUAGES)}")
    known = hints()[name]
    if step == 3:
        return Hint(known["by_hand"][language])
    if step == 1:
        questions = {**known["question"], **{each: _VERSION for each in mistakes if each.startswith(_TERM_S)}}
        texts = [questions[each][language] for each in mistakes if each in questions]
        return Hint("\n".join(texts) or known["first"][language])
    flags = [flag for each in task.mistakes if each.id in mistakes for flag in each.flags]
    pieces = [known["piece"][flag][language] for flag in dict.fromkeys(flags) if flag in known["piece"]]
    return Hint("\n".join(pieces or [piece[language] for piece in known["piece"].values()]))
