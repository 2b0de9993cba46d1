"""Training text and batches: text found on every machine, a held-out split, and packed rows.

1. Documents: the standard library's source (code), its `pydoc` topics and docstrings (prose); user files.
2. Held-out text: frozen in the repository, and kept out of training under any Python version.
3. Corpus: the documents as one token stream per domain.
4. Mixture: `batch(step)`, a pure function of (seed, step), so that resuming needs no state.
"""

import ast
import hashlib
import json
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from minglm.train.tasks import Task, make_train

Encode = Callable[[str], list[int]]

IGNORE = -100  # a target that has no loss
PADDING = -1  # the segment of a position that holds no document


class Document(NamedTuple):
    """One text. `sha256` is that of its UTF-8 bytes, with newlines as \\n on every system."""

    domain: str
    name: str
    text: str
    sha256: str


class FileRecord(TypedDict):
    """What a training run notes about one document."""

    name: str
    domain: str
    bytes: int
    sha256: str


def make_document(domain: str, name: str, text: str) -> Document:
    """A Document with its hash."""
    return Document(domain, name, text, hashlib.sha256(text.encode()).hexdigest())


# ---- 1. documents: the standard library

MIN_DOCSTRING = 200  # characters; shorter docstrings are labels rather than prose

SKIPPED_FOLDERS = frozenset(
    "test tests idle_test site-packages dist-packages encodings pydoc_data lib-dynload _bundled".split()
)
SKIPPED_FILES = frozenset(
    # Tables, most of them generated: little to learn and much to memorise.
    "html/entities.py locale.py stringprep.py _opcode_metadata.py".split()
)
SKIPPED_PREFIXES = (
    "_sysconfigdata",
    "_sysconfig_vars",
    "config-",
)  # made by the build, different on every machine


def standard_library() -> Path:
    """The folder of this Python's standard library source."""
    return Path(sysconfig.get_path("stdlib"))


def corpus_files(root: Path | None = None) -> list[str]:
    """Names of the standard library's source files to train on: relative to `root`, sorted, with `/`."""
    folder = root or standard_library()
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    return sorted(name for name in names if _is_wanted(name))


def _is_wanted(name: str) -> bool:
    folders = name.split("/")[:-1]
    return name not in SKIPPED_FILES and not name.startswith(SKIPPED_PREFIXES) and SKIPPED_FOLDERS.isdisjoint(folders)


def documents(root: Path | None = None) -> Iterator[Document]:
    """Training documents of the standard library at `root` (default: this Python's), without held-out text.

    Each source file is a code document; its longer module and class docstrings make a prose document of the
    same name; each `pydoc` topic is a prose document. Nothing is imported: files are only read.
    """
    heldout = heldout_documents()
    names = {document.name for document in heldout}
    lines = HeldoutLines.of(heldout)
    for document in _all_documents(root or standard_library()):
        if document.name not in names and not lines.overlap(document.text):
            yield document


def _all_documents(root: Path) -> Iterator[Document]:
    for name in corpus_files(root):
        if source := _read_source(root / name):
            yield make_document("code", name, source)
            if prose := docstrings(source):
                yield make_document("prose", name, prose)
    for topic, text in sorted(_pydoc_topics(root).items()):
        yield make_document("prose", f"topic:{topic}", text)


def _read_source(path: Path) -> str:
    """The file's text with \\n newlines; empty if it is not UTF-8."""
    try:
        return _unix_newlines(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        return ""


def _unix_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def docstrings(source: str) -> str:
    """The module and class docstrings of at least `MIN_DOCSTRING` characters, a blank line between them."""
    found = [text for node in _module_and_classes(source) if (text := ast.get_docstring(node))]
    long = [text for text in found if len(text) >= MIN_DOCSTRING]
    return "\n\n".join(long) + "\n" if long else ""


def _module_and_classes(source: str) -> list[ast.Module | ast.ClassDef]:
    """The module and its classes, nested ones too; none inside functions or conditions, for speed."""
    tree = _parse(source)
    nodes: list[ast.Module | ast.ClassDef] = [tree] if tree else []
    for node in nodes:  # grows while it is walked
        nodes += [child for child in node.body if isinstance(child, ast.ClassDef)]
    return nodes


def _parse(source: str) -> ast.Module | None:
    """The syntax tree; None for source that this Python cannot read (a template, another version's)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings are not our user's business
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _pydoc_topics(root: Path) -> dict[str, str]:
    """Topic -> text, from the dictionary literal in `pydoc_data/topics.py`; empty if not installed."""
    path = root / "pydoc_data" / "topics.py"
    tree = _parse(_read_source(path)) if path.exists() else None
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return dict(ast.literal_eval(node.value))
    return {}


def file_list(documents: Iterable[Document]) -> list[FileRecord]:
    """One record per document, to be kept with a checkpoint."""
    return [
        {"name": name, "domain": domain, "bytes": len(text.encode()), "sha256": sha256}
        for domain, name, text, sha256 in documents
    ]


def compare_file_lists(recorded: Iterable[FileRecord], found: Iterable[FileRecord]) -> str | None:
    """One sentence that says how the training files differ from the recorded ones; None if they do not."""
    before = {(record["domain"], record["name"]): record["sha256"] for record in recorded}
    now = {(record["domain"], record["name"]): record["sha256"] for record in found}
    groups = {
        "missing": before.keys() - now.keys(),
        "new": now.keys() - before.keys(),
        "changed": {key for key in before.keys() & now.keys() if before[key] != now[key]},
    }
    parts = [f"{len(keys)} {word} ({_some_names(keys)})" for word, keys in groups.items() if keys]
    if not parts:
        return None
    return f"The training files differ from the {len(before)} recorded ones: {', '.join(parts)}."


def _some_names(keys: Iterable[tuple[str, str]], shown: int = 3) -> str:
    names = sorted(f"{domain} {name}" for domain, name in keys)
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


# ---- 1. documents: the user's files


def load_text_files(paths: Iterable[str | Path], domain: str = "text") -> list[Document]:
    """Documents from the user's files: UTF-8 text, or JSON lines (`.jsonl`) with a "text" field each.

    Blank lines and empty texts of a JSONL file are skipped. ValueError, with the path and what to do, for a
    file that is missing, empty, binary or not UTF-8, and for a JSONL line that has no text.
    """
    return [document for path in paths for document in _load_text_file(Path(path), domain)]


def _load_text_file(path: Path, domain: str) -> list[Document]:
    text = _read_user_text(path)
    if path.suffix.lower() != ".jsonl":
        return [make_document(domain, path.as_posix(), text)]
    texts = [
        (number, _json_text(path, number, line))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    found = [make_document(domain, f"{path.as_posix()}:{number}", text) for number, text in texts if text]
    if not found:
        raise ValueError(f'{path}: every "text" is empty; remove the file or put text in it')
    return found


def _read_user_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path (a folder is not a file: name its files)")
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path}: the file is empty; remove it from --data or put text in it")
    if b"\0" in data:
        raise ValueError(f"{path}: binary file (it has a NUL byte); wanted UTF-8 text or JSONL, so extract its text")
    try:
        return _unix_newlines(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it to UTF-8 and try again") from error


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); wanted one object per line") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{path}, line {number}: no "text" string; wanted {{"text": "…"}} on every line')
    return text


# ---- 2. held-out text

HELDOUT_FOLDER = Path(__file__).parents[1] / "evaluate" / "heldout"
HELDOUT_MODULES = (
    "asyncio/queues.py cmd.py csv.py graphlib.py heapq.py http/cookies.py shlex.py textwrap.py "
    "unittest/suite.py urllib/robotparser.py wsgiref/handlers.py"
).split()
HELDOUT_TOPICS = "assignment augassign binary calls formatstrings import subscriptions truth typesmapping".split()

LONG_LINE = 30  # characters: shorter lines ("return self", "import os") recur everywhere and prove nothing
MAX_SHARED_LINES = 0.2  # of a document's distinct long lines
RUN_LINE, RUN = 50, 3  # so many successive lines of at least 50 characters are a copied passage


class HeldoutLines(NamedTuple):
    """The held-out text as sets of its long lines and of its runs of long lines."""

    lines: frozenset[str]
    runs: frozenset[tuple[str, ...]]

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "HeldoutLines":
        """The lines and runs of these documents."""
        texts = [document.text for document in documents]
        return cls(
            frozenset(line for text in texts for line in long_lines(text, LONG_LINE)),
            frozenset(run for text in texts for run in _runs(text)),
        )

    def overlap(self, text: str) -> bool:
        """True if the text is a near duplicate of held-out text, or quotes a passage of it.

        The share of lines finds another Python version's copy under a new name; the runs find a passage that
        is quoted in a long document, where the share stays small.
        """
        distinct = set(long_lines(text, LONG_LINE))
        near_duplicate = len(distinct & self.lines) > MAX_SHARED_LINES * len(distinct)
        return near_duplicate or not self.runs.isdisjoint(_runs(text))


def long_lines(text: str, at_least: int) -> list[str]:
    """The text's lines of at least so many characters, in order, without the white space around them."""
    return [line for raw in text.split("\n") if len(line := raw.strip()) >= at_least]


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    lines = long_lines(text, RUN_LINE)
    return zip(*(lines[offset:] for offset in range(RUN)), strict=False)


def heldout_documents(domain: str | None = None) -> list[Document]:
    """The frozen held-out documents ("code", "prose" or all), from minglm/evaluate/heldout.

    ValueError if the text is not what its list of hashes says.
    """
    records: list[FileRecord] = json.loads((HELDOUT_FOLDER / "files.json").read_text(encoding="utf-8"))
    found = [document for name in ("code", "prose") for document in _read_heldout(name, records)]
    return [document for document in found if domain in (None, document.domain)]


def _read_heldout(domain: str, records: Iterable[FileRecord]) -> Iterator[Document]:
    path = HELDOUT_FOLDER / f"{domain}.txt"
    data, start = path.read_bytes(), 0
    for record in records:
        if record["domain"] == domain:
            text = data[start : start + record["bytes"]].decode(errors="replace")
            document = make_document(domain, record["name"], text)
            if document.sha256 != record["sha256"]:
                raise ValueError(
                    f"{path}: {record['name']} is not the frozen text; restore the file from the repository"
                )
            yield document
            start += record["bytes"]


def freeze_heldout() -> None:
    """Write the held-out text again, with its list of hashes and Python's licence.

    Command: python -c "from minglm.train.data import freeze_heldout; freeze_heldout()"

    Code: whole modules. Prose: their docstrings and some `pydoc` topics. ValueError on any Python but 3.11,
    from which the frozen text is taken.
    """
    if sys.version_info[:2] != (3, 11):
        raise ValueError(f"held-out text is taken from Python 3.11, this is {sys.version.split()[0]}: run it with 3.11")
    wanted = {*HELDOUT_MODULES, *(f"topic:{topic}" for topic in HELDOUT_TOPICS)}
    chosen = [document for document in _all_documents(standard_library()) if document.name in wanted]
    for domain in ("code", "prose"):
        text = "".join(document.text for document in chosen if document.domain == domain)
        (HELDOUT_FOLDER / f"{domain}.txt").write_bytes(text.encode())
    listing = json.dumps(file_list(chosen), indent=1) + "\n"
    (HELDOUT_FOLDER / "files.json").write_text(listing, encoding="utf-8", newline="\n")
    shutil.copyfile(standard_library() / "LICENSE.txt", HELDOUT_FOLDER / "LICENSE.txt")


# ---- 3. corpus


class TokenStream(NamedTuple):
    """Documents end to end: tokens [n] (int32 for vocabularies beyond uint16), and where each starts."""

    tokens: NDArray[np.uint16] | NDArray[np.int32]
    starts: NDArray[np.int64]


class Corpus(NamedTuple):
    """The token stream of every domain."""

    streams: dict[str, TokenStream]

    @classmethod
    def build(cls, documents: Iterable[Document], encode: Encode, end_id: int) -> "Corpus":
        """Tokenise the documents, each ended by `end_id` (<|endoftext|>), into one stream per domain."""
        encoded: dict[str, list[NDArray[np.int64]]] = {}
        for document in documents:
            ids = np.array([*encode(document.text), end_id], np.int64)
            encoded.setdefault(document.domain, []).append(ids)
        return cls({domain: _stream(pieces) for domain, pieces in encoded.items()})


def _stream(pieces: Sequence[NDArray[np.int64]]) -> TokenStream:
    tokens = np.concatenate(pieces)
    starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    small = tokens.astype(np.uint16) if tokens.max() < 2**16 else tokens.astype(np.int32)
    return TokenStream(small, starts)


# ---- 4. batches


class Batch(NamedTuple):
    """Rows for one training step, all int64 [B, T].

    `targets[b, t]` is the token that follows `ids[b, t]` in its document, -100 where none does. `segments`
    numbers the documents inside a row from 0: attention and positions do not cross them. -1 is padding.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    segments: NDArray[np.int64]


def windows(stream: TokenStream, first: NDArray[np.int64], sequence_length: int) -> Batch:
    """Rows of T tokens from the token indices `first` [B] of a stream; padding beyond the stream's end."""
    index = first[:, None] + np.arange(sequence_length + 1)  # [B] -> [B, T+1]: a row and the token after it
    inside = index < len(stream.tokens)
    tokens = stream.tokens[np.where(inside, index, 0)].astype(np.int64)
    document = np.searchsorted(stream.starts, index, side="right")
    follows = inside[:, 1:] & (document[:, 1:] == document[:, :-1])
    return Batch(
        ids=np.where(inside, tokens, stream.tokens[-1])[:, :-1],  # padding holds the end token, unseen and unscored
        targets=np.where(follows, tokens[:, 1:], IGNORE),
        segments=np.where(inside, document - document[:, :1], PADDING)[:, :-1],
    )


def stream_batches(stream: TokenStream, sequence_length: int, batch_size: int) -> Iterator[Batch]:
    """The whole stream once, in order, as rows side by side: for evaluation. The last row is padded.

    Every token but the first of each document is a target exactly once; a row's first tokens have little
    context.
    """
    first = np.arange(0, len(stream.tokens), sequence_length)
    for start in range(0, len(first), batch_size):
        yield windows(stream, first[start : start + batch_size], sequence_length)


class Mixture:
    """Training batches from a corpus and generated tasks, in given proportions.

    `weights` maps domains of the corpus and names of tasks to shares of the rows; only ratios matter. A row
    holds one text domain, or tasks: all tasks share the task rows, and `weights` says how often each is drawn
    there. So a small batch, too, holds every domain: a domain with share w gets floor(B·w) or ceil(B·w) of
    the B rows, B·w on average.

    Text rows are windows at random places (random truncation). Task rows are documents of one to six lines of
    one task, end to end; the last is cut by the row's end. Task items are drawn anew for every batch, never a
    held-out one.

    ValueError for a T or B below 1, weights that are unknown, negative or all zero, or a domain shorter than
    a row.
    """

    def __init__(
        self,
        corpus: Corpus,
        tasks: Iterable[Task],
        weights: Mapping[str, float],
        sequence_length: int,
        batch_size: int,
        seed: int,
        encode: Encode,
        end_id: int,
    ) -> None:
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.encode = lru_cache(2**15)(encode)  # short prompts and answers recur: half the time of a batch
        self.end_id = end_id
        by_name = {task.name: task for task in tasks}
        _check_sizes(sequence_length, batch_size)
        _check_weights(weights, corpus, by_name)
        used = {name: weight for name, weight in weights.items() if weight > 0}
        self.streams = {name: corpus.streams[name] for name in used if name in corpus.streams}
        _check_lengths(self.streams, sequence_length)
        self.tasks = [by_name[name] for name in used if name in by_name]
        self.task_ends = _ends([used[task.name] for task in self.tasks])
        in_tasks = sum(used[task.name] for task in self.tasks)
        self.row_ends = _ends([*(used[name] for name in self.streams), in_tasks])

    def batch(self, step: int) -> Batch:
        """The batch of this step, [B, T]: a pure function of (seed, step)."""
        rng = default_rng([self.seed, step])
        rows = self._rows_per_kind(rng)
        parts = [
            self._text_rows(stream, count, rng) for stream, count in zip(self.streams.values(), rows[:-1], strict=True)
        ]
        parts.append(self._task_rows(rows[-1], rng))
        order = rng.permutation(self.batch_size)  # so that a slice of the batch is a mixture too
        ids, targets, segments = (np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True))
        return Batch(ids, targets, segments)

    def _rows_per_kind(self, rng: Generator) -> list[int]:
        """Rows for each text domain, then for tasks: B evenly spaced points on the shares laid end to end."""
        points = (np.arange(self.batch_size) + rng.random()) / self.batch_size
        return np.bincount(np.searchsorted(self.row_ends, points), minlength=len(self.row_ends)).tolist()

    def _text_rows(self, stream: TokenStream, count: int, rng: Generator) -> Batch:
        first = rng.integers(0, len(stream.tokens) - self.sequence_length, size=count)
        return windows(stream, first, self.sequence_length)

    def _task_rows(self, count: int, rng: Generator) -> Batch:
        """Rows of task documents: each row starts with a new one and has at least one token after it."""
        pieces: list[NDArray[np.int64]] = []
        first: list[int] = []
        total = 0
        for _ in range(count):
            first.append(total)
            while total <= first[-1] + self.sequence_length:
                pieces.append(np.array(self._task_document(rng), np.int64))
                total += len(pieces[-1])
        stream = _stream(pieces or [np.array([self.end_id], np.int64)])
        return windows(stream, np.array(first, np.int64), self.sequence_length)

    def _task_document(self, rng: Generator) -> list[int]:
        """One to six lines of one task, and the end token.

        Prompt and answer are encoded apart, as when the model is asked: no token can span the two.
        """
        task = self.tasks[int(np.searchsorted(self.task_ends, rng.random()))]
        ids: list[int] = []
        for _ in range(rng.integers(1, 7)):
            item = make_train(task, rng)
            ids += self.encode(item.prompt) + self.encode(item.answer + "\n")
        return [*ids, self.end_id]


def _ends(weights: Sequence[float]) -> NDArray[np.float64]:
    """Where each weight's share ends when all are laid end to end on [0, 1]; the last is exactly 1."""
    ends = np.cumsum(np.array(weights, np.float64))
    return ends / ends[-1] if len(ends) else ends


def _check_sizes(sequence_length: int, batch_size: int) -> None:
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: wanted at least 1")


def _check_weights(weights: Mapping[str, float], corpus: Corpus, tasks: Mapping[str, Task]) -> None:
    known = [*corpus.streams, *tasks]
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(f"weights name {', '.join(unknown)}: wanted some of {', '.join(known)}")
    if clash := [name for name in tasks if name in corpus.streams]:
        raise ValueError(f"{', '.join(clash)} names a domain and a task: rename the domain")
    if not all(0 <= weight < np.inf for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights {dict(weights)}: wanted finite numbers from 0 up, at least one of them above 0")


def _check_lengths(streams: Mapping[str, TokenStream], sequence_length: int) -> None:
    for name, stream in streams.items():
        if len(stream.tokens) <= sequence_length:
            raise ValueError(
                f"domain {name!r} has {len(stream.tokens)} tokens, a row needs {sequence_length + 1} "
                "(its targets are one ahead): add text or shorten the sequence"
            )
