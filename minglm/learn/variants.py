"""Graded work without secrets: the book holds every answer, so a term asks for the exercises with something changed.

`variant(exercise, "term 1")` flips one or two flags of the reference: other models' designs, or plausible ones. The
same seed always gives the same task; what is GLM-4.5's own becomes one of the mistakes that are named.
"""

import hashlib
import inspect
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from minglm.learn.exercise import Design, Exercise, Mistake


def variants(task: Exercise) -> list[tuple[Design, ...]]:
    """Every choice of one design, or of two that do not concern the same flag."""
    alone = [(design,) for design in task.designs]
    pairs = [pair for pair in combinations(task.designs, 2) if not pair[0].flags.keys() & pair[1].flags.keys()]
    return [*alone, *pairs]


def variant(task: Exercise, seed: str) -> Exercise:
    """The exercise as this seed asks for it. Raises ValueError if it has no designs."""
    choices = variants(task)
    if not choices:
        raise ValueError(f"the exercise {task.name} has no designs to vary")
    number = int.from_bytes(hashlib.sha256(f"{seed}/{task.name}".encode()).digest()[:8], "big")
    return with_designs(task, choices[number % len(choices)])


def with_designs(task: Exercise, designs: Sequence[Design]) -> Exercise:
    """The exercise with these flags flipped: a reference, a brief and mistakes of its own."""
    flags = {name: value for design in designs for name, value in design.flags.items()}
    usual = {name: p.default for name, p in inspect.signature(task.reference).parameters.items() if name in flags}

    def reference(*inputs: Any, **given: Any) -> Any:
        return task.reference(*inputs, **{**flags, **given})

    as_book = [Mistake("as_glm45", usual, "this is what GLM-4.5 does; the task asks for something else")]
    if len(designs) > 1:
        as_book += [
            Mistake(
                f"without_{design.id}",
                {name: usual[name] for name in design.flags},
                f"this was not heeded: {design.asks}",
            )
            for design in designs
        ]
    others = [mistake for mistake in task.mistakes if any(flags.get(n) != v for n, v in mistake.flags.items())]
    return task._replace(
        brief=f"{task.brief} In this version: {' '.join(design.asks for design in designs)}",
        reference=reference,
        mistakes=(*as_book, *others),
        designs=(),
        detours=(),  # what was right, too, need not be so now
    )
