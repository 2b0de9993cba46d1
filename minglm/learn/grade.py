"""Grading a folder of submissions, each function in a process of its own, and what a class got wrong most often."""

import csv
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import minglm
from minglm.formats.files import write_text
from minglm.learn import child
from minglm.learn.check import Report, Stopped, exercise, judge
from minglm.learn.exercise import Exercise

SECONDS = 20.0  # that one call may take
LARGEST = 1_000_000  # bytes of a file
START = 30.0  # that Python and the student's file may take to begin
COLUMNS = ("student", "exercise", "points", "of", "seconds", "mistakes", "says")


class Grade(NamedTuple):
    """One row of the table."""

    student: str
    exercise: str
    points: int
    of: int
    seconds: float
    mistakes: tuple[str, ...]  # ids
    says: str


class Submission:
    """A student's function in a child process, to be called as if it were here.

    Raises Stopped where the function raised, took longer than `seconds` or its process ended.
    """

    def __init__(self, file: Path, name: str, seconds: float = SECONDS):
        self.seconds, self.over = seconds, ""
        self.place = tempfile.TemporaryDirectory(prefix="minglm-grade-")
        command = [sys.executable, "-X", "utf8", "-I", "-B", child.__file__, str(file.resolve()), name, _PACKAGE]
        variables = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PATH": "", "HOME": self.place.name}
        kept = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=self.place.name, env={**kept, **variables}, start_new_session=True,
        )  # fmt: skip
        try:
            self._answer(START)
        except Stopped as reason:
            self.over = str(reason)

    def __call__(self, *inputs: Any) -> Any:
        if self.over:
            raise Stopped(self.over)
        functions: list[Callable[..., Any]] = []
        self._tell(inputs, functions)
        return self._answer(self.seconds, functions)

    def _tell(self, value: Any, functions: list[Callable[..., Any]] | None = None) -> None:
        try:
            assert self.process.stdin is not None
            child.send(self.process.stdin, value, functions)  # type: ignore[arg-type]
        except OSError:
            pass  # the answer will say why nobody listens

    def _answer(self, seconds: float, functions: Sequence[Callable[..., Any]] = ()) -> Any:
        late = threading.Timer(seconds, self._kill)
        late.start()
        begun = time.monotonic()
        try:
            assert self.process.stdout is not None
            kind, *rest = child.receive(self.process.stdout)  # type: ignore[arg-type]
            while kind == "call":
                self._tell(_called(functions[rest[0]], rest[1]))
                kind, *rest = child.receive(self.process.stdout)  # type: ignore[arg-type]
            if kind not in ("ready", "answer", "error") or (kind != "ready" and len(rest) != 1):
                raise ValueError("no frame of ours")
        except Exception:  # no frame, half of one, or something that is none
            self._kill()
            slow = time.monotonic() - begun >= seconds
            why = f"it ran for more than {seconds:g} seconds and was stopped" if slow else "its process ended"
            self.over = f"No answer: {why}."
            raise Stopped(self.over) from None
        finally:
            late.cancel()
        if kind == "error":
            raise Stopped(child.shortened(str(rest[0])) or "No answer.")
        return rest[0] if rest else None

    def _kill(self) -> None:
        """End the process and those it may have started, which would hold the pipe open."""
        with suppress(AttributeError, OSError):  # Windows; ended already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()

    def close(self) -> None:
        """End the process and remove its folder."""
        self._kill()
        self.process.communicate()
        self.place.cleanup()


def _called(function: Callable[..., Any], given: tuple[Any, ...]) -> tuple[str, Any]:
    """What a function that was handed to the student gave, or why it did not."""
    try:
        return "answer", function(*given)
    except Exception as error:
        return "error", str(error)


_PACKAGE = str(Path(minglm.__file__).resolve().parent)


def grade_file(file: Path, task: Exercise, draw: int = 0, seconds: float = SECONDS) -> Report:
    """Judge the function of this name in the file, in a child process."""
    submission = Submission(file, task.name, seconds)
    try:
        return judge(task, submission, draw)
    finally:
        submission.close()


def grade(
    folder: Path,
    tasks: Sequence[Exercise],
    draw: int,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = print,
) -> list[Grade]:
    """Grade `folder`/STUDENT/…/EXERCISE.py for every student and exercise, on the numbers of this draw; 0 is public.

    Raises ValueError if there are no students.
    """
    students = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not students:
        raise ValueError(f"{folder} has no folder of a student; wanted {folder}/NAME/{tasks[0].name}.py")
    grades = []
    for student in students:
        who = student.name.encode("utf-8", "replace").decode()  # unpacked archives may have names that are no text
        for task in tasks:
            name = task.name
            found = find(student, name)
            begun = time.monotonic()
            if isinstance(found, Path):
                report = grade_file(found, task, draw, seconds)
            else:
                report = judge(task, partial(_missing, found), draw)
            took = time.monotonic() - begun
            says = " ".join(line for line in report.says if not line.startswith("Look at it"))
            grades.append(Grade(who, name, report.earned, len(report.points), round(took, 1), report.mistakes, says))
            progress(f"{who}: {name} {report.earned} of {len(report.points)}")
    return grades


def find(student: Path, name: str) -> Path | str:
    """The file of an exercise in a student's folder, the one that lies least deep; or a sentence about why not."""
    inside = {path: path.relative_to(student).parts for path in sorted(student.rglob("*.py"))}
    files = [
        path for path, parts in inside.items()
        if path.is_file() and not path.is_symlink() and not any(part.startswith(".") for part in parts)
    ]  # fmt: skip
    named = [path for path in files if path.name == f"{name}.py"]
    if not named:
        others = ", ".join(sorted({path.name for path in files})[:6])
        return f"The file {name}.py is missing" + (f"; there are {others}." if files else ".")
    least = min(len(inside[path]) for path in named)
    first = [path for path in named if len(inside[path]) == least]
    if len(first) > 1:
        places = ", ".join("/".join(inside[path]) for path in first)
        return f"{len(first)} files have this name: {places}. Hand in one."
    if (size := first[0].stat().st_size) > LARGEST:
        return f"The file {name}.py has {size / 1e6:,.1f} MB, wanted at most {LARGEST / 1e6:g}."
    return first[0]


def _missing(why: str, *inputs: Any) -> Any:
    raise Stopped(child.shortened(why))


def write_csv(path: Path, grades: Sequence[Grade]) -> None:
    """A row for each student and exercise. What was there before stays until the new file is complete."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows((_plain(g.student), *g[1:5], ";".join(g.mistakes), _plain(g.says)) for g in grades)
    write_text(path, text.getvalue())


def _plain(text: str) -> str:
    """What a spreadsheet would take for a formula gets a quote in front."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _read(text: str) -> str:
    return text[1:] if text[:1] == "'" and text[1:].startswith(_FORMULA) else text


_FORMULA = ("=", "+", "-", "@")


def read_csv(path: Path) -> list[Grade]:
    """What `write_csv` wrote. Raises ValueError for another table."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{path}: wanted the columns {', '.join(COLUMNS)}, as `minglm course grade` writes them")
    return [
        Grade(
            _read(row["student"]), row["exercise"], int(row["points"]), int(row["of"]), float(row["seconds"]),
            tuple(filter(None, row["mistakes"].split(";"))), _read(row["says"]),
        )
        for row in rows
    ]  # fmt: skip


class Commonest(NamedTuple):
    """How often one thing was wrong."""

    exercise: str
    mistake: str  # the clause that names it
    students: int


def report(grades: Sequence[Grade]) -> list[Commonest]:
    """The class's mistakes by exercise, the commonest first; what was not recognised is counted together, and what was
    not written by itself."""
    counts: Counter[tuple[str, str]] = Counter()
    for each in grades:
        if each.points < each.of:
            counts.update((each.exercise, mistake) for mistake in each.mistakes or (_unnamed(each),))
    clauses = {(name, m.id): m.says for name in {g.exercise for g in grades} for m in exercise(name).mistakes}
    clauses |= {
        (name, f"without_{d.id}"): f"this was not heeded: {d.asks}"
        for name in {g.exercise for g in grades}
        for d in exercise(name).designs
    }
    clauses |= {(name, "as_glm45"): "this is GLM-4.5's own, not the variant" for name, _ in list(clauses)}
    rows = [Commonest(name, clauses.get((name, id), id), count) for (name, id), count in counts.items()]
    return sorted(rows, key=lambda row: (-row.students, row.exercise, row.mistake))


def _unnamed(wrong: Grade) -> str:
    empty = wrong.says.startswith((child.EMPTY, f"The file {wrong.exercise}.py is missing"))
    return "(nothing written)" if empty else "(not recognised)"
