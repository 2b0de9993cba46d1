"""`minglm bench --shape …`: minglm beside torch, llama.cpp and the machine's own limits, in one run.

Figures of different days or machines cannot be compared; ratios within a run can, if nobody is favoured by the moment:
subjects take turns (A B C, A B C, …), each in a process of its own, with one set of weights resident at a time.
"""

import json
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.bench import goals, machine
from minglm.bench.goals import HEADER, Row
from minglm.bench.job import Job
from minglm.bench.processes import OPPONENTS, Subject, WorkerError, clock, measure, measure_start, subjects
from minglm.bench.shapes import SHAPES, Shape, Work, unit_bytes, unit_operations, weight_bytes, write_weights
from minglm.fast.team import cores
from minglm.formats.checkpoint import load_checkpoint
from minglm.formats.files import write_text
from minglm.formats.gguf_file import save_gguf
from minglm.look.tables import table

WORKS = ("decode", "prefill", "train", "growth", "start")
MINUTES = {"S": 8, "M": 20, "air": 15}  # rough, for three rounds against everybody
MEMORY = {"decode": 1.8, "growth": 1.8, "prefill": 1.9, "train": 5.2}  # of the weights' size; the rest is LEAST
LEAST = 1.5e9  # bytes that a worker takes besides
LEFT_OUT = {  # pairs that make no sense, or that no goal asks for
    ("train", "llama.cpp"),
    ("growth", "llama.cpp"),
    ("train", "bandwidth"),
    ("prefill", "bandwidth"),
}
BUSY = 0.7  # processes that want a processor while we have not begun
SAME = 1e-3  # scores in float32 that differ by more, of the largest, are another model's


class Result(NamedTuple):
    """Everything that was measured."""

    machine: dict[str, Any]
    works: list[dict[str, Any]]  # shape, work, answers per subject and round, agreement of the scores
    rows: list[Row]
    notes: list[str]  # what was left out, and why


class Settings(NamedTuple):
    shapes: list[Shape]
    works: list[str]
    against: list[str]
    rounds: int = 3
    llama_python: str = sys.executable
    folder: str | None = None  # for the weights; None: the system's folder for temporary files

    @classmethod
    def read(
        cls, shape: str, against: str, only: str, rounds: int, llama_python: str, folder: str | None
    ) -> "Settings":
        """From the command line. Raises ValueError naming what is not there."""
        if rounds < 1:
            raise ValueError(f"--rounds {rounds} must be 1 or more; medians want 3")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"--folder {folder}: no such folder; make it first")
        shapes = [SHAPES[name] for name in _chosen("--shape", shape, SHAPES)]
        works, opponents = _chosen("--only", only, WORKS), _chosen("--against", against, OPPONENTS)
        return cls(shapes, works, opponents, rounds, llama_python, folder)


def _chosen(option: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in "a,b", or all of them for "all", or none for "none"."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return []
    if names == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name}: not there; take {', '.join(known)}, several with commas, or all")
    if not names:
        raise ValueError(f"{option} is empty; take {', '.join(known)}, several with commas, or all")
    return names


# -- the run -----------------------------------------------------------------------------------------------------


def compare(settings: Settings, show: Callable[[str], None] = print) -> Result:
    """Measure and print the table; lines about what is left out come first."""
    minutes = sum(MINUTES.get(shape.name, 1) for shape in settings.shapes) * settings.rounds / 3
    show(f"about {minutes:.0f} minutes with all subjects and works; close what else runs, it falsifies the timings")
    everybody = subjects(settings.against, settings.llama_python)
    notes = [*_busy(machine.load()), *(f"{s.name} left out: {s.missing}" for s in everybody if s.missing)]
    result = Result(_machine(), [], [], notes)
    for line in (*_machine_lines(result.machine), *notes):
        show(line)
    present = [s for s in everybody if not s.missing]
    try:
        for shape in settings.shapes:
            with tempfile.TemporaryDirectory(prefix="minglm-bench-", dir=settings.folder) as folder:
                _Shape(shape, Path(folder), present, settings.rounds, result, show).run(settings.works)
        if "start" in settings.works:
            _measure_start(settings.rounds, result)
    except KeyboardInterrupt:
        notes.append("interrupted: the works after that are left out")
        show(notes[-1])
    if result.rows:
        show("\n" + table([row.cells() for row in result.rows], HEADER))
    return result


def _machine() -> dict[str, Any]:
    """Facts, and the limits that everything else is held against."""
    rates = {"bandwidths": machine.bandwidths(machine.matrix_megabytes()), "product_rate": machine.product_rate()}
    return {"time": clock(), **machine.facts(), **rates}


def _busy(load: float | None) -> list[str]:
    """A warning if others compute here: threads that wait for each other lose most, so even ratios are wrong then."""
    if load is None or load < BUSY:
        return []
    return [f"this machine is busy (load {load:.1f} in the last minute): these timings and ratios are worth nothing"]


def _machine_lines(found: dict[str, Any]) -> list[str]:
    reading = ", ".join(f"{rate / 1e9:.0f} GB/s ({how})" for how, rate in found["bandwidths"].items())
    return [
        f"{found['processor']}, {found['cores']} cores",
        f"reads {reading}; NumPy products {found['product_rate'] / 1e9:,.0f} GFLOP/s",
    ]


def _measure_start(rounds: int, result: Result) -> None:
    try:
        answers = [{"": measure_start()} for _ in range(rounds)]
    except WorkerError as error:
        result.notes.append(f"start left out: {error}")
        return
    result.works.append({"shape": "glm-nano", "work": "start", "answers": {"minglm": answers}})
    result.rows.extend(goals.start_rows(goals.median_of_rounds(answers)[""]))


class _Shape:
    """All works of one shape, with its weights in a folder, of one dtype at a time."""

    def __init__(
        self,
        shape: Shape,
        folder: Path,
        present: list[Subject],
        rounds: int,
        result: Result,
        show: Callable[[str], None],
    ):
        self.shape, self.folder, self.present, self.rounds = shape, folder, present, rounds
        self.result, self.show = result, show

    def run(self, names: list[str]) -> None:
        works = [work for work in self.shape.works if work.name in names]
        for dtype in sorted({work.dtype for work in works}, reverse=True):  # float32 first
            of_this = [work for work in works if work.dtype == dtype and self._fits(work)]
            if of_this and self._room_on_disk(dtype):
                with self._weights(dtype):
                    for work in of_this:
                        self._measure(work)

    def _note(self, text: str) -> None:
        self.result.notes.append(f"{self.shape.name} {text}")
        self.show(self.result.notes[-1])

    def _fits(self, work: Work) -> bool:
        needed, free = memory_needed(self.shape, work), machine.free_memory()
        if free is None or needed <= free:
            return True
        self._note(f"{work} left out: it takes about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
        return False

    def _room_on_disk(self, dtype: str) -> bool:
        copies = 2 if self._has("llama.cpp") else 1
        needed, free = 1.05 * copies * weight_bytes(self.shape.config, dtype), shutil.disk_usage(self.folder).free
        if needed > free:
            self._note(
                f"{dtype} left out: its files take {needed / 1e9:.1f} GB, {self.folder.parent} has {free / 1e9:.1f} GB "
                "free; name another place with --folder"
            )
        return needed <= free

    def _has(self, subject: str) -> bool:
        return any(s.name == subject for s in self.present)

    @contextmanager
    def _weights(self, dtype: str) -> Iterator[None]:
        """The files of this dtype, as long as they are used. Other processes write them, to end with their memory."""
        _elsewhere(write_weights, self.folder / dtype, self.shape.config, dtype)
        if self._has("llama.cpp"):
            _elsewhere(_write_gguf, self.folder / dtype, self.folder / f"{dtype}.gguf", dtype)
        yield
        shutil.rmtree(self.folder / dtype)
        (self.folder / f"{dtype}.gguf").unlink(missing_ok=True)

    # -- one work ------------------------------------------------------------------------------------------------

    def _measure(self, work: Work) -> None:
        answers = self._rounds(work)
        found = {name: goals.median_of_rounds([a["seconds"] for a in given]) for name, given in answers.items()}
        rows = list(goals.rows(self.shape.name, self.shape.config, work, found))
        self.result.rows.extend(rows)
        for row in rows:
            self.show(f"{row.work}: {row.ours}, {row.against} {row.theirs}, ratio {row.ratio:.3g}")
        self.result.works.append(
            {
                "shape": self.shape.name,
                "work": str(work),
                "name": work.name,
                "operations": unit_operations(self.shape.config, work),
                "bytes": unit_bytes(self.shape.config, work, work.prompt),
                "answers": answers,
                "medians": found,
                "scores_differ": self._agreement(work, answers),
            }
        )

    def _rounds(self, work: Work) -> dict[str, list[dict[str, Any]]]:
        """Everybody in turn, so many times; who fails is not asked again."""
        from tqdm.std import tqdm

        limits = [Subject(name, sys.executable) for name in ("bandwidth", "products")]
        turn = [s for s in [*self.present, *limits] if takes_part(s.name, self.shape.name, work)]
        answers: dict[str, list[dict[str, Any]]] = {}
        with tqdm(total=self.rounds * len(turn), desc=f"{self.shape.name} {work}", leave=False, disable=None) as bar:
            for _ in range(self.rounds):
                for subject in list(turn):
                    bar.set_postfix_str(subject.name)
                    try:
                        answer = measure(subject, self._job(subject.name, work))
                    except WorkerError as error:
                        turn.remove(subject)
                        self._note(f"{work}, {subject.name} left out: {error}")
                    else:
                        answers.setdefault(subject.name, []).append(answer)
                    bar.update()
        for name, given in answers.items():
            for variant, why in given[0]["left_out"].items():
                self._note(f"{work}, {name} ({variant}) left out: {why}")
        return answers

    def _job(self, subject: str, work: Work) -> Job:
        file = f"{work.dtype}.gguf" if subject == "llama.cpp" else work.dtype
        return Job(
            subject, str(self.folder / file), work.name, work.dtype, work.prompt, work.units, work.rows, work.contexts,
            threads=cores(), logits=str(self._logits(subject)) if work.name == "decode" else "",
            vocab_size=self.shape.config.vocab_size,
        )  # fmt: skip

    def _logits(self, subject: str) -> Path:
        return self.folder / f"{subject}.npy"

    def _agreement(self, work: Work, answers: dict[str, Any]) -> dict[str, float]:
        """How far everybody's scores after the prompt are from ours: max|a − b| / max|b|. A note if that is no
        rounding: then the timings compare different models."""
        if work.name != "decode" or "minglm" not in answers:
            return {}
        ours, found = np.load(self._logits("minglm")), {}
        for subject in (name for name in answers if name in OPPONENTS):
            theirs = np.load(self._logits(subject))
            found[subject] = float(np.abs(theirs - ours).max() / np.abs(ours).max())
            if work.dtype == "float32" and found[subject] > SAME:
                self._note(f"{work}: {subject}'s scores differ from minglm's by {found[subject]:.1e} of the largest")
        return found


def takes_part(subject: str, shape: str, work: Work) -> bool:
    """Bare products and what takes long to compile have their own works; llama.cpp does not train."""
    if subject == "torch.compile":
        return subject in goals.GOALS.get((shape, work.name, work.dtype), {})
    if subject == "products":
        return work.name in ("prefill", "train")
    return (work.name, subject) not in LEFT_OUT


def memory_needed(shape: Shape, work: Work) -> float:
    """Bytes, roughly and generously, of the process that takes most."""
    return MEMORY[work.name] * weight_bytes(shape.config, work.dtype) + LEAST


def _elsewhere(function: Callable[..., object], *arguments: Any) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(function, *arguments).result()


def _write_gguf(folder: Path, file: Path, dtype: str) -> None:
    config, params = load_checkpoint(folder, dtype)
    save_gguf(file, config, params, dtype)


# -- keeping it --------------------------------------------------------------------------------------------------


def write_json(result: Result, path: str) -> None:
    """Everything, raw answers included."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    values = {**result._asdict(), "rows": [goals.as_json(row) for row in result.rows]}
    write_text(path, json.dumps(values, indent=1) + "\n")


def roofline_points(result: Result) -> list[tuple[str, str, float, float]]:
    """(work, subject, FLOP per byte, GFLOP/s) of each subject that computed a model."""
    points = []
    for work in result.works:
        if work.get("name") not in ("decode", "prefill", "train"):
            continue
        for subject, variants in work["medians"].items():
            if subject != "bandwidth" and variants:
                seconds = goals.best_variant(variants)[1]["unit"]
                name = f"{work['shape']} {work['work']}"
                points.append((name, subject, work["operations"] / work["bytes"], work["operations"] / seconds / 1e9))
    return points


def write_plot(result: Result, path: str) -> None:
    """A roofline: how near each work is to what the machine reads and multiplies at best."""
    from minglm.look.plots import plot_roofline

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    limits = result.machine["bandwidths"]
    fastest = max(limits.values()) / 1e9
    figure = plot_roofline(
        roofline_points(result), fastest, result.machine["product_rate"] / 1e9, result.machine["processor"]
    )
    figure.savefig(path, dpi=150)
