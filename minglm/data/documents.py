"""Training text found on every machine: the standard library's and the dependencies' source and prose; user files."""

import ast
import codecs
import json
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from minglm.data.heldout import HELDOUT_FOLDER, Document, FileRecord, HeldoutLines, heldout_documents, make_document
from minglm.data.libraries import NearDuplicates, Origin, Package, find_packages, package_documents
from minglm.data.python_source import docstrings, parse, read_source, unix_newlines

# -- the standard library ----------------------------------------------------------------------------------------

SKIPPED_FOLDERS = frozenset(
    "test tests idle_test site-packages dist-packages encodings pydoc_data lib-dynload _bundled".split()
)
SKIPPED_FILES = frozenset(
    # Tables, most of them generated: little to learn and much to memorise.
    "html/entities.py locale.py stringprep.py _opcode_metadata.py".split()
)
SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")  # made by the build, different on every machine


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


def standard_library_documents(root: Path | None = None) -> Iterator[Document]:
    """Training documents of the standard library at `root` (default: this Python's), without held-out text.

    Each source file is a code document; its longer module and class docstrings make a prose document of the
    same name; each `pydoc` topic is a prose document. Nothing is imported: files are only read.
    """
    is_heldout = _heldout_test()
    return (document for document in _all_documents(root or standard_library()) if not is_heldout(document))


def documents(root: Path | None = None, packages: Iterable[Package] | None = None) -> Iterator[Document]:
    """All training documents: the standard library's and the packages', without held-out text and near duplicates.

    `packages`: default `find_packages()`, minglm's own dependencies, which prints what it leaves out.
    """
    is_heldout, before = _heldout_test(), NearDuplicates()

    def is_new(document: Document) -> bool:
        return not is_heldout(document) and not before.repeats(document)

    yield from filter(is_new, _all_documents(root or standard_library()))
    for package in find_packages() if packages is None else packages:
        yield from package_documents(package, is_new)


def balanced_sample(documents: Iterable[Document], bytes_per_domain: int = 2_000_000) -> list[Document]:
    """Documents of each domain, drawn from all of it, until they pass so many bytes: what a tokenizer is learnt from.

    They are drawn in the order of their hashes: the same sample for the same documents in any order.
    """
    chosen, used = [], dict[str, int]()
    for document in sorted(documents, key=lambda document: document.sha256):
        if used.get(document.domain, 0) < bytes_per_domain:
            chosen.append(document)
            used[document.domain] = used.get(document.domain, 0) + len(document.text.encode())
    return chosen


def _heldout_test() -> Callable[[Document], bool]:
    """The question whether a document is held out, by its name or by its text."""
    heldout = heldout_documents()
    names = {document.name for document in heldout}
    lines = HeldoutLines.of(heldout)
    return lambda document: document.name in names or lines.overlap(document.text)


def _all_documents(root: Path) -> Iterator[Document]:
    for name in corpus_files(root):
        if source := read_source(root / name):
            yield make_document("code", name, source)
            if prose := docstrings(source):
                yield make_document("prose", name, prose)
    for topic, text in sorted(_pydoc_topics(root).items()):
        yield make_document("prose", f"topic:{topic}", text)


def _pydoc_topics(root: Path) -> dict[str, str]:
    """Topic -> text, from the dictionary literal in `pydoc_data/topics.py`; empty if not installed."""
    path = root / "pydoc_data" / "topics.py"
    tree = parse(read_source(path)) if path.exists() else None
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return dict(ast.literal_eval(node.value))
    return {}


# -- the list of training files ----------------------------------------------------------------------------------

SHORT_HASH = 16  # hex digits of the SHA-256 that a list of training files keeps


def file_list(documents: Iterable[Document]) -> list[FileRecord]:
    """One record per document."""
    return [
        {"name": name, "domain": domain, "bytes": len(text.encode()), "sha256": sha256}
        for domain, name, text, sha256 in documents
    ]


def file_list_text(records: Iterable[FileRecord], origins: Iterable[Origin] = ()) -> str:
    """The list that is kept with a checkpoint, as JSON: a row per origin, and a row per document with a short hash."""
    files = [[r["name"], r["domain"], r["bytes"], r["sha256"][:SHORT_HASH]] for r in records]
    return f'{{"origins": {_json_rows(origins)},\n"files": {_json_rows(files)}}}\n'


def _json_rows(rows: Iterable[Iterable[object]]) -> str:
    lines = (json.dumps(list(row), ensure_ascii=False, separators=(",", ":")) for row in rows)
    return "[\n" + ",\n".join(lines) + "\n]"


def read_file_list(text: str) -> tuple[list[FileRecord], list[Origin]]:
    """What `file_list_text` wrote; or records without origins, from the older form with an object per document."""
    content = json.loads(text)
    if isinstance(content, list):
        return content, []
    files: list[FileRecord] = [
        {"name": name, "domain": domain, "bytes": size, "sha256": sha256}
        for name, domain, size, sha256 in content["files"]
    ]
    return files, [Origin(*row) for row in content["origins"]]


def compare_file_lists(recorded: Iterable[FileRecord], found: Iterable[FileRecord]) -> str | None:
    """One sentence that says how the training files differ from the recorded ones; None if they do not."""
    before, now = (
        {(record["domain"], record["name"]): record["sha256"][:SHORT_HASH] for record in records}
        for records in (recorded, found)
    )
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


# -- the user's files --------------------------------------------------------------------------------------------


CHAT = "chat"  # the domain of documents that are conversations: JSON with "messages", and "tools" if there are any


def load_text_files(paths: Iterable[str | Path], domain: str = "text") -> list[Document]:
    """Documents from the user's files: UTF-8 text, or JSON lines (`.jsonl`) with "text" or "messages" each.

    Blank lines and empty texts of a JSONL file are skipped. ValueError, with the path and what to do, for a
    file that is missing, empty, binary or not UTF-8, and for a JSONL line that has no text.
    """
    return [document for path in paths for document in _load_text_file(Path(path), domain)]


def hold_out_tails(documents: Iterable[Document], share: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Each document's text up to a line near its end for training, and the rest, about `share` of it, held out.

    A document that is one line is for training whole; tails under 40 characters are dropped.
    """
    kept, held_out = [], []
    for document in documents:
        cut = document.text.rfind("\n", 0, int(len(document.text) * (1 - share))) + 1 or len(document.text)
        kept.append(make_document(document.domain, document.name, document.text[:cut]))
        tail = document.text[cut:]
        if len(tail) >= 40:  # shorter ones may be a single token, with nothing to predict
            held_out.append(make_document(document.domain, document.name, tail))
    return kept, held_out


def _load_text_file(path: Path, domain: str) -> list[Document]:
    text = _read_user_text(path)
    if path.suffix.lower() != ".jsonl":
        return [make_document(domain, path.as_posix(), text)]
    lines = enumerate(text.split("\n"), start=1)
    documents = [_json_document(path, number, line, domain) for number, line in lines if line.strip()]
    found = [document for document in documents if document.text]
    if not found:
        raise ValueError(f'{path}: every "text" is empty; remove the file or put text in it')
    return found


def _read_user_text(path: Path) -> str:
    if not path.exists() or path.is_dir():
        raise ValueError(f"{path}: no such file; check the path (a folder is not a file: name its files)")
    data = path.read_bytes()
    if not data.removeprefix(codecs.BOM_UTF8).strip():
        raise ValueError(f"{path}: the file is empty; remove it from --data or put text in it")
    if b"\0" in data:
        raise ValueError(f"{path}: binary file (it has a NUL byte); wanted UTF-8 text or JSONL, so extract its text")
    try:
        return unix_newlines(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it to UTF-8 and try again") from error


def _json_document(path: Path, number: int, line: str, domain: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}); wanted one object per line") from error
    if re.search(r"\\u[dD][89a-fA-F]", line) and _has_surrogates(record):
        raise ValueError(f"{path}, line {number}: half a character (a lone surrogate); write the file anew as UTF-8")
    record = record if isinstance(record, dict) else {}
    name = f"{path.as_posix()}:{number}"
    if isinstance(record.get("messages"), list):
        return make_document(CHAT, name, json.dumps(record, ensure_ascii=False))
    if not isinstance(record.get("text"), str):
        wanted = '{"text": "…"} or {"messages": [{"role": …, "content": …}, …]}'
        raise ValueError(
            f'{path}, line {number}: no "text" string and no "messages" list; wanted {wanted} on every line'
        )
    return make_document(domain, name, record["text"])


def _has_surrogates(record: object) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


# -- freezing ----------------------------------------------------------------------------------------------------

HELDOUT_MODULES = (
    "asyncio/queues.py cmd.py csv.py graphlib.py heapq.py http/cookies.py shlex.py textwrap.py "
    "unittest/suite.py urllib/robotparser.py wsgiref/handlers.py"
).split()
HELDOUT_TOPICS = "assignment augassign binary calls formatstrings import subscriptions truth typesmapping".split()


def freeze_heldout() -> None:
    """Write the held-out text again, with its list of hashes and Python's licence.

    Command: python -c "from minglm.data.documents import freeze_heldout; freeze_heldout()"

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
