"""`check("router", my_router)`: runs the cases of an exercise and says what went wrong, by its name where there is one.

The order: callable, shapes, dtype, inputs unchanged, properties, values. For values a mistake is named on evidence
only: the answer equals that variant on every case, it can be told from the truth on three at least, and no other
variant equals it, too. Then two mistakes at once are tried. Where nothing fits, the difference is described. A right
function that does more than it must passes, and is told how much: counted, not timed.
"""

import json
import traceback
from bdb import BdbQuit
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.learn.child import EMPTY, kind_of, sentence
from minglm.learn.describe import describe
from minglm.learn.exercise import Case, Exercise, Inputs, Mistake, Outputs, apart
from minglm.learn.exercises import EXERCISES
from minglm.learn.variants import variant
from minglm.look.tables import html_table, table
from minglm.model.ops import Array

EVIDENCE = 1000  # tolerances by which a variant must differ from the truth to count
CASES = 3  # on so many cases at least
SINGLE = 1e-5  # what float32 may lose of a right answer, as a distance
DTYPE = "dtype in = dtype out"  # the point that every exercise has besides those of its cases
LOOSE = 1e-2  # the same where all inputs are float32
_PACKAGE = Path(__file__).parents[1]


class Point(NamedTuple):
    """One of the points of an exercise."""

    name: str
    passed: bool


class Report(NamedTuple):
    """What `check` found."""

    exercise: str
    points: tuple[Point, ...]
    says: tuple[str, ...]  # sentences, the first the most important
    mistakes: tuple[str, ...]  # ids of those that were recognised: one, or two at once

    @property
    def passed(self) -> bool:
        """Whether every public check was passed."""
        return all(point.passed for point in self.points)

    @property
    def earned(self) -> int:
        """Points that were passed."""
        return sum(point.passed for point in self.points)

    @property
    def headline(self) -> str:
        return f"{self.exercise}: public checks passed, {self.earned} of {len(self.points)} points"

    @property
    def lines(self) -> tuple[str, ...]:
        """What stands below the points: the sentences, and a line to paste for who is stuck."""
        if all(point.passed for point in self.points[:-1]):  # the dtype's sentence says all, and no hint is about it
            return self.says
        known = f", {json.dumps(self.mistakes)}" if self.mistakes else ""  # double quotes, as in the rest
        return (*self.says, f'Stuck? hint("{self.exercise}", 1{known})')

    def __repr__(self) -> str:
        rows = [(point.name, "passed" if point.passed else "not yet") for point in self.points]
        return "\n".join([self.headline, table(rows, ("point", "")), *self.lines])

    def _repr_html_(self) -> str:
        from html import escape

        rows = [(point.name, "passed" if point.passed else "not yet") for point in self.points]
        return html_table(rows, ("point", ""), self.headline) + "".join(f"<p>{escape(line)}</p>" for line in self.lines)


class Stopped(Exception):
    """Raised by a function that runs elsewhere: the message is the whole sentence for the student."""


class _Answer(NamedTuple):
    case: Case
    outputs: Outputs | None  # None if `trouble`
    trouble: str | None


def exercise(name: str) -> Exercise:
    """Raises ValueError with the names that there are."""
    if name not in EXERCISES:
        raise ValueError(f"no exercise {name!r}; there are {', '.join(EXERCISES)}")
    return EXERCISES[name]


def case(name: str, number: int) -> Inputs:
    """The inputs of a case, to call your function with in a debugger: `my_router(*case("router", 7))`."""
    cases = exercise(name).cases(0)
    if not 0 <= number < len(cases):
        raise ValueError(f"{name} has the cases 0 … {len(cases) - 1}, not {number}")
    return cases[number].inputs


def replay(name: str, number: int, function: Callable[..., Any]) -> Any:
    """Call a function as `check` does for one case, and return what it returned; where a case is several calls (a
    cache), all of them. A breakpoint in the function stops here, too."""
    return exercise(name).run(function, _protected(case(name, number)))


def check(name: str, function: Callable[..., Any], term: str | None = None) -> Report:
    """Try a function on every case. With a term: as the hand-out of that term asks for it (`minglm.learn.variants`).

    Raises ValueError for an unknown exercise; whatever the function does becomes part of the report.
    """
    task = exercise(name)
    return judge(task if term is None else variant(task, term), function)


def judge(task: Exercise, function: Callable[..., Any], draw: int = 0) -> Report:
    """The same for an exercise that is none of the list, or on other numbers: another `draw`."""
    name, cases = task.name, task.cases(draw)
    names = task.points()
    if not callable(function):
        said = f"this is {type(function).__name__}, not a function: give it without brackets, check({name!r}, f)"
        return Report(name, tuple(Point(point, False) for point in (*names, DTYPE)), (said,), ())
    answers = [_run(task, function, each) for each in cases]
    right = [each.trouble is None and _off(task, each) <= task.tolerance for each in answers]
    detour = None if all(right) else _detour(task, answers)
    coarse = None if all(right) or detour else _coarse(task, answers)
    right = [True] * len(cases) if detour or coarse else right
    points = tuple(
        Point(point, all(ok for ok, each in zip(right, cases, strict=True) if each.point == point)) for point in names
    )
    if not all(right):
        return Report(name, (*points, Point(DTYPE, False)), *_wrong(task, function, answers, right))
    narrow = coarse or _narrow(task, function, cases[0], detour)
    points = (*points, Point(DTYPE, narrow is None))
    costs = [f"Right, and {detour.says}."] if detour else _bills(task, function, cases)
    return Report(name, points, (narrow,) if narrow else tuple(costs), ())


def _wrong(
    task: Exercise, function: Callable[..., Any], answers: Sequence[_Answer], right: Sequence[bool]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is said of wrong answers, and the ids of the mistakes that were recognised."""
    for number, each in enumerate(answers):
        if each.trouble == EMPTY:
            return (EMPTY, f'Look at it: case("{task.name}", {number})'), ()
        if each.trouble:
            return (each.trouble, _place(task, number, function)), ()
    number = right.index(False)
    place = _place(task, number, function)
    found = _recognised(task, answers)
    if found:
        clauses = "; and: ".join(mistake.says for mistake in found)
        first = "It looks as if " + clauses if len(found) == 1 else "Two things: " + clauses
        return (first + ".", place), tuple(mistake.id for mistake in found)
    if not all(_again(task, function, answers[i]) for i in sorted({0, number})):
        unsteady = (
            "Called twice with the same inputs it gave two answers: does it draw random numbers, or keep something?"
        )
        return (unsteady, place), ()
    broken = [rule.says for rule in task.properties if not _holds(rule, answers)]
    wrong = answers[number]
    assert wrong.outputs is not None
    return (*broken, *describe(task, wrong.case.inputs, wrong.outputs), place), ()


# -- running -----------------------------------------------------------------------------------------------------


def _run(task: Exercise, function: Callable[..., Any], each: Case) -> _Answer:
    outputs = _outputs(task, function, each.inputs)
    if isinstance(outputs, str):
        return _Answer(each, None, outputs)
    with np.errstate(all="ignore"):
        truth = task.truth(each.inputs)
    trouble = next(filter(None, (_form(task, name, outputs[name], wanted) for name, wanted in truth.items())), None)
    return _Answer(each, None if trouble else outputs, trouble)


def _outputs(task: Exercise, function: Callable[..., Any], inputs: Inputs) -> Outputs | str:
    """What the function returned, by name; or a sentence about why there is no such thing."""
    with np.errstate(all="ignore"):
        try:
            returned = task.run(function, _protected(inputs))
        except BdbQuit:  # `q` in a debugger ends the check, and not this one call
            raise
        except (Exception, SystemExit) as error:  # whatever a student's function raises is an answer, too
            return _sentence(error)
        if returned is None:
            return "Your function returned None: does it end in a return?"
        try:
            return task.outputs(inputs, returned)
        except BdbQuit:
            raise
        except Exception as error:  # no array can be made of it
            return f"The result: {error}."


def _form(task: Exercise, name: str, found: Array, wanted: Array) -> str | None:
    """What is wrong with the type or the shape of an output."""
    if found.dtype.kind not in "fiub" or (wanted.dtype.kind in "iu") != (found.dtype.kind in "iu"):
        kind = found.dtype.name if found.ndim or found.dtype.kind in "fiubc" else kind_of(found.item())
        return f"{name} is {kind}, wanted {wanted.dtype.name} {list(wanted.shape)}."
    return _shapes(task, name, found.shape, wanted.shape) if found.shape != wanted.shape else None


def _protected(inputs: Inputs) -> Inputs:
    """Arrays that cannot be written to: a function that changes its inputs is told so."""
    kept = tuple(a.copy() if isinstance(a, np.ndarray) else a for a in inputs)
    for a in kept:
        if isinstance(a, np.ndarray):
            a.flags.writeable = False
    return kept


def _bills(task: Exercise, function: Callable[..., Any], cases: Sequence[Case]) -> list[str]:
    """What a right function did too much, in the first case that shows it."""
    if task.bill is None:
        return []
    for each in cases:
        try:
            said = task.bill(function, _protected(each.inputs))
        except Exception:  # it was right once; a bill is no place to fail
            return []
        if said:
            return [said]
    return []


def _place(task: Exercise, number: int, function: Callable[..., Any]) -> str:
    """A line to paste: with a breakpoint in the function it stops in this case."""
    own = getattr(function, "__name__", "")
    return f'Look at it: replay("{task.name}", {number}, {own if own.isidentifier() else "your_function"})'


def _sentence(error: BaseException) -> str:
    if isinstance(error, Stopped):
        return str(error)
    others = [step for step in traceback.extract_tb(error.__traceback__) if not _is_ours(step.filename)]
    own = [step for step in others if step.filename == others[0].filename]  # and not the insides of NumPy
    if not own and isinstance(error, ValueError):  # raised by what calls the function
        return f"The result: {error}."
    line = f' at line {own[-1].lineno}: "{own[-1].line}"' if own else ""
    return sentence(error, line)


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(_PACKAGE)


def _shapes(task: Exercise, name: str, found: Sequence[int], wanted: Sequence[int]) -> str:
    letters = task.axes[name].split()
    same = len(letters) == len(wanted)
    axes = f" [{', '.join(letters)}] =" if same and letters else ""
    return f"{name} has the shape {list(found)}, wanted{axes} {list(wanted)}."


def _off(task: Exercise, answer: _Answer, **flags: Any) -> float:
    """The distance of an answer from the truth, or from a variant."""
    assert answer.outputs is not None
    with np.errstate(all="ignore"):
        return apart(answer.outputs, task.truth(answer.case.inputs, **flags))


def _coarse(task: Exercise, answers: Sequence[_Answer]) -> str | None:
    """Whether the numbers are right to the digits of float32: then only the dtype's point is missing."""
    if any(answer.trouble for answer in answers):
        return None
    worst = max(_off(task, answer) for answer in answers)
    if worst > max(SINGLE, task.tolerance):
        return None
    return (
        f"Your numbers are right to {-np.log10(worst):.0f} digits, not to float64's: is something in your lines "
        "float32 (an astype, a buffer), or is a small number added that is not in the formula?"
    )


def _again(task: Exercise, function: Callable[..., Any], answer: _Answer) -> bool:
    """Whether the function gives this answer a second time."""
    second = _run(task, function, answer.case)
    return second.outputs is not None and answer.outputs is not None and apart(second.outputs, answer.outputs) == 0


def _narrow(task: Exercise, function: Callable[..., Any], each: Case, detour: Mistake | None) -> str | None:
    """The same in float32: what is wrong with the dtype of the result."""
    inputs = tuple(
        a.astype(np.float32) if isinstance(a, np.ndarray) and a.dtype == np.float64 else a for a in each.inputs
    )
    answer = _run(task, function, Case(each.point, inputs))
    if answer.outputs is None:
        return f"With float32 inputs: {answer.trouble}"
    for name, found in answer.outputs.items():
        if found.dtype == np.float64:
            return (
                f"Your numbers are right; with float32 inputs {name} is float64, wanted float32. What in your lines is "
                "not float32: np.zeros, np.eye or np.arange without a dtype, a list, a number of NumPy's (a sum of "
                "integers, np.sqrt(8))?"
            )
        if found.dtype.kind == "f" and found.dtype != np.float32:
            return f"Your numbers are right; with float32 inputs {name} is {found.dtype.name}, wanted float32."
    if _off(task, answer, **(detour.flags if detour else {})) > LOOSE:
        return "With float32 inputs the numbers are wrong: is there a dtype in your lines that is too small?"
    return None


# -- recognising -------------------------------------------------------------------------------------------------


def _recognised(task: Exercise, answers: Sequence[_Answer]) -> tuple[Mistake, ...]:
    """One mistake, or two at once, whose numbers the answers are; nothing if none or several fit."""
    single = [(mistake,) for mistake in task.mistakes]
    double = list(combinations(task.mistakes, 2)) if task.pairs else []
    for group in (single, double):
        fitting = [mistakes for mistakes in group if _fits(task, mistakes, answers)]
        if fitting:
            return fitting[0] if len({tuple(m.id for m in mistakes) for mistakes in fitting}) == 1 else ()
    return ()


def _detour(task: Exercise, answers: Sequence[_Answer]) -> Mistake | None:
    """Another way to a right result that the answers come from."""
    if any(answer.trouble for answer in answers):
        return None
    return next((each for each in task.detours if _fits(task, [each], answers)), None)


def _fits(task: Exercise, mistakes: Sequence[Mistake], answers: Sequence[_Answer]) -> bool:
    flags: dict[str, Any] = {}
    for mistake in mistakes:
        if flags.keys() & mistake.flags.keys():
            return False
        flags |= mistake.flags
    evidence = 0
    for answer in answers:
        assert answer.outputs is not None
        try:
            if _off(task, answer, **flags) > task.tolerance:
                return False
        except (ValueError, IndexError, FloatingPointError):
            return False
        speaks = any(np.isfinite(found).any() for found in answer.outputs.values())  # all NaN is like all NaN
        evidence += speaks and _off(task, answer) > EVIDENCE * task.tolerance
    return evidence >= CASES


def _holds(rule: Any, answers: Sequence[_Answer]) -> bool:
    return all(rule.holds(answer.case.inputs, answer.outputs) for answer in answers if answer.outputs is not None)
