"""A term: a week's hand-out with its own variants, and a file that freezes what it was made with."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import minglm
from minglm.learn import handout
from minglm.learn.exercise import Exercise
from minglm.learn.exercises import EXERCISES, WEEKS
from minglm.learn.variants import variant, variants

FILE = "term.json"


class Term(NamedTuple):
    """What was handed out. `seed` None: the public exercises as they stand."""

    week: int
    seed: str | None
    exercises: tuple[str, ...]
    version: str  # of minglm
    checks: str  # sha256 of the code that checks
    weights: dict[str, str]  # sha256 of each shipped checkpoint


def term(week: int, seed: str | None) -> Term:
    """Raises ValueError for a week that there is not."""
    if week not in WEEKS:
        raise ValueError(f"week = {week}; there are {min(WEEKS)} … {max(WEEKS)}")
    return Term(week, seed, WEEKS[week], minglm.__version__, checks_digest(), weight_digests())


def tasks(given: Term) -> list[Exercise]:
    """The exercises as this term asks for them. Those without designs stay as they are."""
    known = [EXERCISES[name] for name in given.exercises]
    return [variant(task, given.seed) if given.seed is not None and variants(task) else task for task in known]


def checks_digest() -> str:
    """sha256 of minglm/learn: whether a check is still the one that was handed out."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        digest.update(f"{path.relative_to(here).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def weight_digests() -> dict[str, str]:
    """sha256 of the weights of each shipped checkpoint."""
    folders = (minglm.api.find(name) for name in ("glm-nano", "glm-tiny", "glm-tiny-balanced", "glm-tiny-unbalanced"))
    return {folder.name: hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in folders}


def release(given: Term, folder: Path) -> list[Path]:
    """Write the hand-out: a stub for each exercise, a notebook that checks them, and the term's file. Files that are
    there stay. Returns what was written. Raises ValueError if the folder holds another week or term."""
    if (folder / FILE).exists() and (there := read_term(folder))[:2] != given[:2]:
        raise ValueError(
            f"{folder} holds week {there.week} of term {there.seed!r}, not week {given.week} of {given.seed!r}: its "
            "files would stay, and be graded as the other; choose a new folder with --to"
        )
    title = f"Week {given.week}" + (f", {given.seed}" if given.seed is not None else "")
    written = handout.write(folder, title, tasks(given), f"week-{given.week}", given.seed)
    (folder / FILE).write_text(json.dumps(given._asdict(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    return [*written, folder / FILE]


def read_term(folder: Path) -> Term:
    """The term's file in a folder. Raises ValueError if it is not there, or is none."""
    path = folder / FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        given = Term(**{**found, "exercises": tuple(found["exercises"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: wanted the file that `minglm course release` wrote; copy it from the hand-out beside the "
            f"students' folders ({error})"
        ) from error
    unknown = [name for name in given.exercises if name not in EXERCISES]
    if unknown:
        raise ValueError(f"{path}: no exercise {', '.join(unknown)}; there are {', '.join(EXERCISES)}")
    return given


def changed(given: Term) -> Sequence[str]:
    """Sentences about what is another now than when it was handed out."""
    said = []
    if given.checks != checks_digest():
        said.append(
            f"the checks have changed since this was handed out with minglm {given.version}: install that version, or "
            "the tag of the term, to grade as promised"
        )
    now = weight_digests()
    said += [f"{name} has other weights than then" for name, digest in given.weights.items() if now.get(name) != digest]
    return said
