"""Text that training never sees: frozen in the repository, and recognised under any Python version."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict


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


HELDOUT_FOLDER = Path(__file__).parent / "frozen"
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
    """The frozen held-out documents ("code", "prose" or all), from minglm/data/frozen.

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
