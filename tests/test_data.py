"""Training data: what is read, what is held out, and batches that never cross a document."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.data import heldout as data
from minglm.data import libraries
from minglm.data.batches import IGNORE, PADDING, Batch, Corpus, TokenStream, stream_batches, windows
from minglm.data.documents import (
    compare_file_lists,
    corpus_files,
    documents,
    file_list,
    file_list_text,
    hold_out_tails,
    load_text_files,
    read_file_list,
    standard_library_documents,
)
from minglm.data.heldout import Document, heldout_documents, make_document
from minglm.data.libraries import NearDuplicates, Package, find_packages, is_data, is_permissive, origins
from minglm.data.python_source import docstrings

END = 256  # after the bytes


def test_tails_are_held_out_at_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    kept, held_out = hold_out_tails([make_document("text", "a", text), make_document("text", "b", "one line")])
    assert [d.text for d in kept] == [text[: len(kept[0].text)], "one line"]
    assert [d.name for d in held_out] == ["a"]
    assert kept[0].text + held_out[0].text == text
    assert kept[0].text.endswith("\n")
    assert 0.04 < len(held_out[0].text) / len(text) < 0.08


def encode(text: str) -> list[int]:
    """One token per byte."""
    return list(text.encode())


@pytest.fixture(scope="module")
def training() -> list[Document]:
    """The real training documents of the Python that runs the tests, with some of the real packages, for speed."""
    return list(documents(packages=find_packages(["jinja2", "packaging", "threadpoolctl"])))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library."""
    long_docstring = "This paragraph is long enough to count as prose. " * 6
    files = {
        "b.py": f'"""{long_docstring}"""\n\nclass C:\n    """Short."""\n',
        "a.py": "x = 1\n",
        "pack/c.py": "y = 2\r\n",
        "test/test_a.py": "no = 0\n",
        "pack/tests/test_c.py": "no = 0\n",
        "idlelib/idle_test/test_x.py": "no = 0\n",
        "site-packages/numpy/__init__.py": "no = 0\n",
        "encodings/cp1252.py": "no = 0\n",
        "html/entities.py": "no = 0\n",
        "_sysconfigdata__linux.py": "no = 0\n",
        "pydoc_data/topics.py": "topics = {'assert': 'The assert statement.\\n', 'pass': 'Nothing.\\n'}\n",
        "broken.py": "def f(:\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    return tmp_path


# ---- documents


def test_corpus_files_are_sorted_and_skip_tests_tables_and_packages(library: Path) -> None:
    assert corpus_files(library) == ["a.py", "b.py", "broken.py", "latin.py", "pack/c.py"]


def test_documents_of_a_small_library(library: Path) -> None:
    found = {(document.domain, document.name): document.text for document in standard_library_documents(library)}
    assert set(found) == {
        ("code", "a.py"),
        ("code", "b.py"),
        ("code", "broken.py"),  # another version's syntax is still text
        ("code", "pack/c.py"),
        ("prose", "b.py"),
        ("prose", "topic:assert"),
        ("prose", "topic:pass"),
    }
    assert found["code", "pack/c.py"] == "y = 2\n"
    assert found["prose", "b.py"].startswith("This paragraph")
    assert "Short" not in found["prose", "b.py"]


def test_docstrings_of_nested_classes_without_their_indentation() -> None:
    text = "First line.\n\n    " + "word " * 50 + "\nLast line."
    source = f'class A:\n    class B:\n        """{text.replace(chr(10), chr(10) + "        ")}"""\n'
    assert docstrings(source).startswith("First line.\n\n    word word")
    assert docstrings("x = 1") == ""


def test_docstrings_of_functions_only_when_asked_for() -> None:
    source = f'def f():\n    "{"short " * 50}."\n\nclass A:\n    async def g(self):\n        "{"long " * 80}."\n'
    assert docstrings(source) == ""
    assert docstrings(source, of_functions=400) == "long " * 80 + ".\n"
    assert docstrings(source, of_functions=10).startswith("short")


def test_file_lists_are_compared_in_one_sentence() -> None:
    recorded = file_list([make_document("code", name, name) for name in ("a.py", "b.py", "c.py")])
    found = file_list([make_document("code", *pair) for pair in (("a.py", "a.py"), ("b.py", "!"), ("d.py", "d"))])
    assert recorded[0]["bytes"] == 4
    assert compare_file_lists(recorded, recorded) is None
    assert compare_file_lists(recorded, found) == (
        "The training files differ from the 3 recorded ones: 1 missing (code c.py), 1 new (code d.py), "
        "1 changed (code b.py)."
    )


def test_file_lists_are_written_in_one_line_per_document() -> None:
    docs = [make_document("code", f"folder/{i}.py", f"é{i}") for i in range(9)]
    package = Package("thing", "1.2", "MIT", Path(), ["folder/3.py", "folder/4.py"])
    text = file_list_text(file_list(docs), origins(docs, [package]))
    files, table = read_file_list(text)
    assert compare_file_lists(files, file_list(docs)) is None
    assert "1 changed (code folder/0.py)" in str(
        compare_file_lists(files, file_list([make_document("code", "folder/0.py", "è0"), *docs[1:]]))
    )
    assert [(f["name"], f["domain"], f["bytes"]) for f in files[:1]] == [("folder/0.py", "code", 3)]
    assert sum("folder/" in line for line in text.splitlines()) == 9
    assert [(o.name, o.documents, o.code, o.prose) for o in table] == [
        ("Python standard library", 7, 21, 0),
        ("thing", 2, 6, 0),
    ]
    assert table[1][1:3] == ("1.2", "MIT")
    assert read_file_list(json.dumps(file_list(docs))) == (file_list(docs), [])  # the older form


# ---- packages


def code(name: str, lines: int = 40) -> str:
    """Source that no other name has."""
    return "".join(f"value_of_{name}_number_{i} = compute_something(previous_{name})\n" for i in range(lines))


def install(site: Path, name: str, files: dict[str, str], metadata: str = "License-Expression: MIT") -> None:
    """A package in a folder like site-packages, as pip leaves it."""
    info = site / f"{name}-1.0.dist-info"
    listed = [f"../{name}-script.py", *files]
    for path, text in {
        f"{info.name}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}\n\n",
        f"{info.name}/RECORD": "".join(f"{path},,\n" for path in listed),
        **files,
    }.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(text.encode())


def names_of(packages: list[Package], root: Path, domain: str = "code") -> list[str]:
    """The documents of these packages beside an empty standard library."""
    return [d.name for d in documents(root / "no library", packages) if d.domain == domain]


def test_packages_are_read_without_tests_tables_and_copies(tmp_path: Path) -> None:
    prose = "Words of a docstring that is long enough to be read as prose. " * 8
    files = {
        "pack/a.py": code("a"),
        "pack/deep/b.py": f'def f():\n    """{prose}"""\n' + code("b"),
        "pack/tests/test_b.py": code("c"),
        "pack/test_d.py": code("d"),
        "pack/_vendor/other/e.py": code("e"),
        "pack/__init__.py": "from pack import a\n",
        "pack/big.py": code("big", 4000),
        "pack/table.py": "".join(f"{i / 7:.9f}, {i / 11:.9f},\n" for i in range(99)),
        "pack/line.py": f"data = '{'abcdefgh ' * 200}'\n",
        "pack/made.py": "# This file is generated by setup.py\n" + code("made"),
        "pack/notes.txt": code("notes"),
        "pack/gone.py": code("gone"),
    }
    install(tmp_path, "pack", files)
    (tmp_path / "pack" / "gone.py").unlink()
    (tmp_path.parent / "pack-script.py").write_text(code("script"), "utf-8")
    packages = find_packages(["pack"], [str(tmp_path)])
    assert sorted(names_of(packages, tmp_path)) == ["pack/a.py", "pack/deep/b.py"]
    assert names_of(packages, tmp_path, "prose") == ["pack/deep/b.py"]
    assert packages[0][:3] == ("pack", "1.0", "MIT")


def test_packages_that_are_missing_or_not_permissive_are_left_out_and_named(tmp_path: Path) -> None:
    install(tmp_path, "free", {"free.py": code("free")}, "Classifier: License :: OSI Approved :: BSD License")
    install(tmp_path, "half", {"half.py": code("half")}, "License: MPL-2.0 AND MIT")
    install(tmp_path, "silent", {"silent.py": code("silent")}, "License: " + "All rights reserved. " * 9)
    install(tmp_path, "binary", {"binary.so": ""})
    said: list[str] = []
    packages = find_packages(["free", "half", "silent", "binary", "absent"], [str(tmp_path)], said.append)
    assert names_of(packages, tmp_path) == ["free.py"]
    assert said == [
        "not in the training text: half (licence: MPL-2.0 AND MIT), silent (no licence in its metadata), "
        "binary (its metadata lists no Python files), absent (not installed)"
    ]
    assert find_packages(["free"], [str(tmp_path)], said.append) == packages
    assert len(said) == 1  # nothing is left out, nothing is said


@pytest.mark.parametrize(
    ("terms", "permissive"),
    [
        ("BSD-3-Clause", True),
        ("(MIT OR Apache-2.0) AND BSD-2-Clause", True),
        ("BSD-2-Clause AND Apache-2.0 WITH LLVM-exception", True),
        ("Historical Permission Notice and Disclaimer (HPND)", True),
        ("MIT OR GPL-3.0-only", False),
        ("MIT License AND Mozilla Public License 2.0 (MPL 2.0)", False),
        ("", False),
    ],
)
def test_licences(terms: str, permissive: bool) -> None:
    assert is_permissive(terms) is permissive


def test_a_package_has_a_limit_and_its_order_does_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"pack/{letter}.py": code(letter) for letter in "abcdefghijkl"}
    install(tmp_path, "pack", files)
    (package,) = find_packages(["pack"], [str(tmp_path)])
    everything = names_of([package], tmp_path)
    assert sorted(everything) == sorted(files) != everything  # not sorted: a limit takes some of each folder
    assert names_of([package._replace(files=list(reversed(package.files)))], tmp_path) == everything
    monkeypatch.setattr(libraries, "MOST_CODE", 5 * len(files["pack/a.py"]))
    assert names_of([package], tmp_path) == everything[:5]


def test_near_duplicates_are_dropped_across_packages_and_do_not_use_up_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "one", {"one/a.py": code("a")})
    install(tmp_path, "two", {"two/copy.py": code("a") + code("little", 9), "two/part.py": code("a", 9) + code("two")})
    monkeypatch.setattr(libraries, "MOST_CODE", 4000)
    packages = find_packages(["one", "two"], [str(tmp_path)])
    assert names_of(packages, tmp_path) == ["one/a.py", "two/part.py"]
    assert "two/copy.py" in names_of(packages[1:], tmp_path)  # it was left out as a copy
    (tmp_path / "no library").mkdir()
    (tmp_path / "no library" / "a.py").write_text(code("a"), "utf-8")
    assert names_of(packages, tmp_path) == ["a.py", "two/part.py"]


def test_near_duplicates_by_hand() -> None:
    before = NearDuplicates()
    lines = [f"this line number {i} is long enough to count\n" for i in range(10)]
    assert not before.repeats(make_document("code", "a", "".join(lines[:5])))
    assert not before.repeats(make_document("prose", "a", "".join(lines[:5])))  # each domain for itself
    assert not before.repeats(make_document("code", "b", "".join(lines)))  # half of it is new
    assert before.repeats(make_document("code", "c", "".join(lines[3:8])))
    assert not before.repeats(make_document("code", "d", "short\n"))
    assert before.repeats(make_document("code", "e", "short\n"))  # the same text has no long lines to compare


def test_heldout_text_in_a_package_is_dropped(tmp_path: Path) -> None:
    csv, heapq = (d.text for d in heldout_documents("code") if d.name in ("csv.py", "heapq.py"))
    files = {
        "pack/backport.py": csv,
        "pack/quotes.py": code("quotes", 300) + heapq[:1500],
        "pack/mine.py": code("mine"),
        "graphlib.py": code("under_a_heldout_name"),
    }
    install(tmp_path, "pack", files)
    packages = find_packages(["pack"], [str(tmp_path)])
    assert names_of(packages, tmp_path) == ["pack/mine.py"]
    assert names_of(packages, tmp_path, "prose") == []  # the docstrings of csv.py are held out too


def test_tables_of_numbers_are_data() -> None:
    assert is_data("x = [0.123, 0.456, 0.789]\n" * 9)
    assert not is_data(code("a"))
    assert not is_data("x" * 1000)
    assert is_data("x" * 1001)


@pytest.mark.slow
def test_all_of_this_machines_training_text() -> None:
    """About ten seconds: sizes, and no held-out passage in any package."""
    packages = find_packages()
    found = list(documents(packages=packages))
    rows = origins(found, packages)
    assert {"numpy", "scipy", "matplotlib", "numba"} <= {row.name for row in rows}
    assert 12e6 < sum(row.code for row in rows) < 30e6
    assert 3e6 < sum(row.prose for row in rows) < 9e6
    assert all(row.code <= libraries.MOST_CODE and row.prose <= libraries.MOST_PROSE for row in rows[1:])
    assert len({(document.domain, document.name) for document in found}) == len(found)
    assert len(file_list_text(file_list(found), rows)) < 250_000
    check_no_heldout_passage(found)


def test_this_machine_has_code_and_prose(training: list[Document]) -> None:
    sizes = {
        domain: sum(r["bytes"] for r in file_list(training) if r["domain"] == domain) for domain in ("code", "prose")
    }
    assert sizes["code"] > 5_000_000
    assert sizes["prose"] > 200_000
    assert len({(document.domain, document.name) for document in training}) == len(training)


# ---- held-out text


def test_heldout_text_is_frozen_and_listed() -> None:
    held = heldout_documents()
    assert sum(len(document.text.encode()) for document in held) <= 300_000
    assert {document.domain for document in held} == {"code", "prose"}
    assert heldout_documents("code") == [document for document in held if document.domain == "code"]
    for domain in ("code", "prose"):
        text = "".join(document.text for document in heldout_documents(domain))
        assert (data.HELDOUT_FOLDER / f"{domain}.txt").read_bytes() == text.encode()
    readme = (data.HELDOUT_FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(document.sha256 in readme for document in held)


def test_changed_heldout_text_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in data.HELDOUT_FOLDER.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / "prose.txt").read_bytes()
    (tmp_path / "prose.txt").write_bytes(text.replace(b"queue", b"QUEUE", 1))
    monkeypatch.setattr(data, "HELDOUT_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"prose.txt: asyncio/queues.py.*restore"):
        heldout_documents()


def _passages(text: str, count: int = 3, length: int = 50) -> Iterator[tuple[str, ...]]:
    """Every `count` successive lines among those of at least `length` characters."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if len(line) >= length]
    return (tuple(lines[i : i + count]) for i in range(len(lines) - count + 1))


def test_no_heldout_passage_is_in_the_training_text(training: list[Document]) -> None:
    assert "jinja2/lexer.py" in {document.name for document in training}
    check_no_heldout_passage(training)


def check_no_heldout_passage(training: list[Document]) -> None:
    held = {passage for document in heldout_documents() for passage in _passages(document.text)}
    assert len(held) > 500
    leaks = [document.name for document in training if not held.isdisjoint(_passages(document.text))]
    assert leaks == []
    assert not {document.name for document in training} & {document.name for document in heldout_documents()}


def test_near_duplicates_and_quotations_of_heldout_text_are_dropped(library: Path) -> None:
    csv, heapq = (d.text for d in heldout_documents("code") if d.name in ("csv.py", "heapq.py"))
    (library / "csv.py").write_text("new = 'a rewritten file under a held-out name'\n", "utf-8")
    (library / "moved.py").write_text("import abc\n" + csv.replace("csv", "CSV"), "utf-8")
    filler = "".join(f"a_long_line_of_other_code_number_{i} = {i}\n" for i in range(2000))
    (library / "quotes.py").write_text(filler + heapq[:1500], "utf-8")
    (library / "other.py").write_text(filler, "utf-8")
    kept = {document.name for document in standard_library_documents(library)}
    assert "other.py" in kept
    assert not {"csv.py", "moved.py", "quotes.py"} & kept


# ---- the user's files


def test_load_text_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffhé\r\nyou\n".encode())
    (tmp_path / "b.jsonl").write_text(
        '{"text": "one"}\n\n{"text": "", "id": 1}\n{"text": "two\u2028", "id": 2}\n', "utf-8"
    )
    found = load_text_files([tmp_path / "a.txt", str(tmp_path / "b.jsonl")])
    assert [document.text for document in found] == ["hé\nyou\n", "one", "two\u2028"]
    assert {document.domain for document in found} == {"text"}
    assert [document.name.rpartition("/")[2] for document in found] == ["a.txt", "b.jsonl:1", "b.jsonl:4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file"),
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n", "empty"),
        ("nul.txt", b"abc\0def", "binary"),
        ("latin.txt", b"caf\xe9 noir", "not UTF-8 at byte 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("list.jsonl", b"[1]", 'line 1: no "text"'),
        ("key.jsonl", b'{"text": "a"}\n{"txt": "a"}', 'line 2: no "text"'),
        ("number.jsonl", b'{"text": 3}', 'line 1: no "text"'),
        ("none.jsonl", b'{"text": ""}', 'every "text" is empty'),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_text_files([tmp_path / name])
    assert str(tmp_path / name) in str(error.value)


# ---- corpus and windows


def test_corpus_ends_every_document() -> None:
    docs = [make_document("code", "a", "xy"), make_document("prose", "b", "z"), make_document("code", "c", "é")]
    streams = Corpus.build(docs, encode, END).streams
    assert streams["code"].tokens.tolist() == [*b"xy", END, *"é".encode(), END]
    assert streams["code"].starts.tolist() == [0, 3]
    assert streams["prose"].tokens.tolist() == [*b"z", END]
    assert streams["code"].tokens.dtype == np.uint16
    big = Corpus.build(docs, encode, 2**16).streams["code"]
    assert big.tokens.dtype == np.int32
    assert big.tokens[2] == 2**16


def _stream(lengths: list[int]) -> tuple[TokenStream, list[tuple[int, int]]]:
    """Documents of the given lengths with distinct tokens, and (document, token) for every position."""
    tokens = np.arange(sum(lengths), dtype=np.int32)
    starts = np.cumsum([0, *lengths[:-1]])
    owners = [document for document, length in enumerate(lengths) for _ in range(length)]
    return TokenStream(tokens, starts), list(zip(owners, tokens.tolist(), strict=True))


def _check_rows(batch: Batch, first: list[int], flat: list[tuple[int, int]]) -> None:
    """Position by position, from the definition."""
    for row, start in enumerate(first):
        for t in range(batch.ids.shape[1]):
            here, after = (flat[at] if at < len(flat) else None for at in (start + t, start + t + 1))
            target = after[1] if here and after and here[0] == after[0] else IGNORE
            assert batch.targets[row, t] == target
            assert batch.segments[row, t] == (here[0] - flat[start][0] if here else PADDING)
            assert here is None or batch.ids[row, t] == here[1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12), st.data())
def test_windows_against_the_definition(lengths: list[int], sequence_length: int, draw: st.DataObject) -> None:
    stream, flat = _stream(lengths)
    first = draw.draw(st.lists(st.integers(0, len(flat) - 1), min_size=1, max_size=4))
    batch = windows(stream, np.array(first), sequence_length)
    assert all(array.shape == (len(first), sequence_length) and array.dtype == np.int64 for array in batch)
    _check_rows(batch, first, flat)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12), st.integers(1, 3))
def test_stream_batches_score_every_token_once(lengths: list[int], sequence_length: int, batch_size: int) -> None:
    stream, flat = _stream(lengths)
    batches = list(stream_batches(stream, sequence_length, batch_size))
    scored = [target for batch in batches for target in batch.targets.ravel().tolist() if target != IGNORE]
    assert scored == sorted(set(range(len(flat))) - set(stream.starts.tolist()))
    read = [i for b in batches for i, s in zip(b.ids.ravel(), b.segments.ravel(), strict=True) if s != PADDING]
    assert read == list(range(len(flat)))
