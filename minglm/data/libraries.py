"""Training text from minglm's own dependencies: their Python sources and the long docstrings in them.

What a package is, its files and its licence come from its metadata (`importlib.metadata`). Files are read,
never imported.
"""

import hashlib
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import Distribution
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from minglm.data.heldout import LONG_LINE, Document, long_lines, make_document
from minglm.data.python_source import docstrings, read_source

# The dependencies of pyproject.toml, and theirs that come with them. Where two have the same text, the first keeps it.
PACKAGES = (
    "numpy scipy matplotlib numba pillow fonttools llvmlite jinja2 packaging pyparsing python-dateutil six "
    "threadpoolctl contourpy tokenizers safetensors ml_dtypes markupsafe cycler kiwisolver tqdm"
).split()

# All terms of a licence must be among these: SPDX names, and the classifiers and words of older metadata.
PERMISSIVE = frozenset(
    "0BSD Apache-2.0 BSD BSD-2-Clause BSD-3-Clause CC0-1.0 HPND ISC LLVM-exception MIT MIT-CMU PSF-2.0 Zlib".split()
) | {
    "Apache Software License",
    "BSD License",
    "Historical Permission Notice and Disclaimer (HPND)",
    "MIT License",
    "Python Software Foundation License",
}

# So that no package decides alone what is learnt; in bytes.
MOST_CODE = 2_200_000
MOST_PROSE = 2_200_000
SMALLEST_FILE, LARGEST_FILE = 500, 200_000
MIN_FUNCTION_DOCSTRING = 400  # characters; a line and a list of parameters are shorter

SKIPPED_FOLDERS = frozenset(
    # Tests, and copies of other packages.
    "test tests testing _vendor _vendored extern externals array_api_compat array_api_extra cloudpickle".split()
)
GENERATED = re.compile(r"^#.*(generated|don't edit|do not edit)", re.IGNORECASE | re.MULTILINE)  # near the top
MOST_DIGITS = 0.1  # of a file's bytes; more is a table of numbers
LONGEST_LINE = 1000  # characters; more is data in one line
MAX_REPEATED_LINES = 0.5  # of a document's distinct long lines

Say = Callable[[str], object]


class Package(NamedTuple):
    """An installed package that may be trained on. `files`: its Python sources, relative to `folder`."""

    name: str
    version: str
    licence: str
    folder: Path
    files: list[str]


def find_packages(names: Iterable[str] = PACKAGES, path: list[str] | None = None, say: Say = print) -> list[Package]:
    """The installed packages of these names that have a permissive licence; `say` is told which are left out.

    `path`: folders to look in, like sys.path, which is the default.
    """
    found, left_out = [], []
    for name in names:
        package, why_not = _find_package(name, path)
        if package:
            found.append(package)
        else:
            left_out.append(f"{name} ({why_not})")
    if left_out:
        say(f"not in the training text: {', '.join(left_out)}")
    return found


def _find_package(name: str, path: list[str] | None) -> tuple[Package | None, str]:
    """The package, or None and the reason."""
    distribution = next(iter(Distribution.discover(name=name, path=sys.path if path is None else path)), None)
    if distribution is None:
        return None, "not installed"
    terms = licence(distribution)
    if not is_permissive(terms):
        return None, f"licence: {terms}" if terms else "no licence in its metadata"
    files = sorted(file.as_posix() for file in distribution.files or [] if _is_wanted(file))
    if not files:
        return None, "its metadata lists no Python files"
    return Package(name, distribution.version, terms, Path(str(distribution.locate_file(""))), files), ""


def licence(distribution: Distribution) -> str:
    """The licence that a package's metadata states: SPDX expression, else classifiers, else a short text."""
    prefix = "License :: OSI Approved :: "
    expression, text, classifiers = (
        distribution.metadata.get_all(field) or [] for field in ("License-Expression", "License", "Classifier")
    )
    names = [name.removeprefix(prefix) for name in classifiers if name.startswith(prefix)]
    short = [line for line in text if len(line) < 60]  # longer: the licence itself
    return " AND ".join(expression or names or short)


def is_permissive(terms: str) -> bool:
    """True if every licence of an expression is permissive, those that one may choose from too."""
    names = [name.strip() for name in re.split(r" (?:AND|OR|WITH) ", terms)]
    bare = [name if name in PERMISSIVE else name.strip("() ") for name in names]
    return PERMISSIVE.issuperset(bare)


def _is_wanted(file: PurePosixPath) -> bool:
    """True for a source file inside site-packages that is no test and in no copy of another package."""
    ours = file.suffix == ".py" and not file.is_absolute() and SKIPPED_FOLDERS.isdisjoint(file.parts)
    return ours and ".." not in file.parts and not file.name.startswith(("test_", "conftest"))


def package_documents(package: Package, is_new: Callable[[Document], bool]) -> Iterator[Document]:
    """The package's code and prose documents that `is_new` accepts, up to the limits above.

    Files come in the order of their names' hashes, so that a limit takes a sample of the whole package and
    the same one everywhere.
    """
    room = {"code": MOST_CODE, "prose": MOST_PROSE}
    for name in sorted(package.files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        source = _read_source(package.folder / name)
        for domain, text in (("code", source), ("prose", docstrings(source, MIN_FUNCTION_DOCSTRING))):
            size = len(text.encode())
            if 0 < size <= room[domain] and is_new(document := make_document(domain, name, text)):
                room[domain] -= size
                yield document


def _read_source(path: Path) -> str:
    """The file's text; empty if it is missing, not UTF-8, or not worth reading."""
    if not path.is_file() or not SMALLEST_FILE <= path.stat().st_size <= LARGEST_FILE:
        return ""
    source = read_source(path)
    return "" if is_data(source) or GENERATED.search(source[:1000]) else source


def is_data(source: str) -> bool:
    """True for a table of numbers, or data written in very long lines."""
    data = source.encode()
    digits = len(data) - len(data.translate(None, b"0123456789"))
    return digits > MOST_DIGITS * len(data) or max(map(len, source.split("\n"))) > LONGEST_LINE


class NearDuplicates:
    """Recognises a document that repeats documents before it, of the same domain, by its long lines."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}  # by domain: long lines, and hashes of whole texts

    def repeats(self, document: Document) -> bool:
        """True if the text, or more than half of its distinct long lines, came before; if not, they are noted."""
        seen = self._seen.setdefault(document.domain, set())
        lines = set(long_lines(document.text, LONG_LINE))
        if document.sha256 in seen or len(lines & seen) > MAX_REPEATED_LINES * len(lines):
            return True
        seen |= {document.sha256, *lines}
        return False


class Origin(NamedTuple):
    """A row of the table of what was trained on; `code` and `prose` in bytes."""

    name: str
    version: str
    licence: str
    documents: int
    code: int
    prose: int


def origins(documents: Iterable[Document], packages: list[Package]) -> list[Origin]:
    """A row per origin with its documents; those that are of no package are the standard library's."""
    names = [("Python standard library", platform.python_version(), "PSF-2.0"), *(p[:3] for p in packages)]
    owner = {file: package.name for package in packages for file in package.files}
    groups: dict[str, list[Document]] = {name: [] for name, *_ in names}
    for document in documents:
        groups[owner.get(document.name, "Python standard library")].append(document)
    return [Origin(*name, *_sizes(found)) for name in names if (found := groups[name[0]])]


def _sizes(documents: list[Document]) -> tuple[int, int, int]:
    """How many documents, bytes of code, bytes of prose."""
    code, prose = (sum(len(d.text.encode()) for d in documents if d.domain == domain) for domain in ("code", "prose"))
    return len(documents), code, prose
