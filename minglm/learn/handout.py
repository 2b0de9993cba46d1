"""What a student gets: a file for each exercise with an empty function, and a notebook for the week that runs them.

`python -m minglm.learn.handout notebooks/exercises` writes those of the repository; `minglm course release` writes a
week's, with a term's variants.
"""

import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minglm.learn.exercise import Exercise
from minglm.learn.exercises import EXERCISES, WEEKS

_FILE = '''"""Exercise {name}, {minutes} minutes.

{brief}

{how}
"""

import numpy as np


def {name}({parameters}):
    raise NotImplementedError


if __name__ == "__main__":
    from minglm.learn import case, check, hint, replay

    print(check("{name}", {name}{term}))
'''


_HOW = (
    "Write the function; run this file to be told what is right and what went wrong. `python -i {name}.py` does the "
    "same and stays at a prompt, where the last lines of the report can be pasted: the case that failed, and a hint "
    "(1, then 2, then 3)."
)


def parameters(task: Exercise) -> list[str]:
    """Names of what the function is given."""
    all_of_them = inspect.signature(EXERCISES[task.name].reference).parameters.values()
    return [each.name for each in all_of_them if each.kind is not inspect.Parameter.KEYWORD_ONLY]


def stub(task: Exercise, term: str | None = None) -> str:
    """The file that a student fills in; with a term it is checked against that term's variant."""
    return _FILE.format(
        name=task.name,
        minutes=task.minutes,
        brief=textwrap.fill(task.brief, 115),
        parameters=", ".join(parameters(task)),
        term=_term(term),
        how=textwrap.fill(_HOW.format(name=task.name) + _note(term), 115),
    )


def notebook(title: str, tasks: Iterable[Exercise], term: str | None = None) -> dict[str, Any]:
    """A thin notebook: for each exercise its brief, and a cell that imports the student's file afresh and checks it.
    For nbgrader the cells are locked, and one that says nothing but the points earned is worth the exercise's points:
    a line on stderr in a graded cell, a warning, would cost all of them."""
    cells = [
        _prose(
            f"# {title}\n\nEach exercise is a Python file beside this notebook: write there, so that a debugger works, "
            "and run the cell here. `hint(name, 1)` asks a question, `hint(name, 2)` gives a piece of the formula, "
            "`hint(name, 3)` a case to do by hand." + _note(term)
        ),
        _code(
            "from importlib import import_module, reload\n\nfrom minglm.learn import case, check, hint, replay\n\n"
            "reports = {}",
            grade_id="begin",
        ),
    ]
    for task in tasks:
        cells.append(_prose(f"## {task.name}, {task.minutes} minutes: `{task.name}.py`\n\n{task.brief}"))
        name = task.name
        test = (
            f'{name} = reload(import_module("{name}")).{name}\n'
            f'reports["{name}"] = check("{name}", {name}{_term(term)})\n'
            f'print(reports["{name}"])'
        )
        cells.append(_code(test, grade_id=f"check_{name}"))
        earned = f'reports["{name}"].earned'  # nbgrader takes a number for the points
        cells.append(_code(earned, grade_id=name, points=len(task.points()) + 1))
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def write(folder: Path, title: str, tasks: list[Exercise], name: str, term: str | None = None) -> list[Path]:
    """Write the stubs and the notebook; files that are already there stay as they are, for they may hold work."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"{task.name}.py": stub(task, term) for task in tasks}
    texts[f"{name}.ipynb"] = json.dumps(notebook(title, tasks, term), indent=1, ensure_ascii=False) + "\n"
    written = []
    for file, text in texts.items():
        if not (folder / file).exists():
            (folder / file).write_text(text, "utf-8")
            written.append(folder / file)
    return written


def _term(term: str | None) -> str:
    return "" if term is None else f", term={term!r}"


def _note(term: str | None) -> str:
    return "" if term is None else " Hints speak of GLM-4.5, not of what this version changes."


def _prose(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": _id(text), "metadata": {}, "source": text.splitlines(keepends=True)}


def _code(text: str, grade_id: str = "", points: int = 0) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if grade_id:
        metadata["nbgrader"] = {
            "grade": points > 0, "grade_id": grade_id, "locked": True, "schema_version": 3, "solution": False,
            "task": False,
        } | ({"points": points} if points else {})  # fmt: skip
    source = text.splitlines(keepends=True)
    return {
        "cell_type": "code", "execution_count": None, "id": _id(text), "metadata": metadata, "outputs": [],
        "source": source,
    }  # fmt: skip


def _id(text: str) -> str:
    """Cells need ids; these do not change from run to run."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


if __name__ == "__main__":
    for week, names in WEEKS.items():
        made = write(
            Path(sys.argv[1]), f"Exercises of week {week}", [EXERCISES[name] for name in names], f"week-{week}"
        )
        print("\n".join(map(str, made)))
