"""The notebooks keep their form: in step with their sources, small, with times, asserts, questions and no leftovers.

That they run is seen by `python notebooks/build.py --execute`, which `.ci/run` and `make check-all` call.
"""

import ast
import base64
import importlib.util
import re
import statistics
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
_spec = importlib.util.spec_from_file_location("build", NOTEBOOKS / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)
SOURCES = build.sources()
every_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def read(source: Path):
    return nbformat.read(build.target(source), as_version=4)


def cells(notebook, kind: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@every_notebook
def test_in_step_with_its_source(source):
    assert build.in_step(source), f"{source.name} was changed: python notebooks/build.py {source.stem[:3]}"


def test_a_changed_source_is_noticed(tmp_path, monkeypatch):
    changed = tmp_path / SOURCES[0].name
    changed.write_text(SOURCES[0].read_text("utf-8") + "\n# %%\n1 + 1\n", "utf-8")
    assert not build.in_step(changed)


def test_no_notebook_is_without_source():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {source.stem for source in SOURCES}


# What is written in the first cell, and above the questions; a translation's name ends in its language.
TIMES = {"en": "*Reading {} minutes · running {} seconds · needs …*", "zh": "*阅读 {} 分钟 · 运行 {} 秒 · 需要 …*"}
QUESTIONS = {"en": "## Questions", "zh": "## 思考题"}


def language(source: Path) -> str:
    return "zh" if source.stem.endswith("-zh") else "en"


@every_notebook
def test_begins_with_times_and_ends_with_three_questions(source):
    prose = cells(read(source), "markdown")
    assert re.match(rf"# {re.match(r'[0-9]+[a-z]?', source.stem)[0]} · \S", prose[0])
    wanted = TIMES[language(source)]
    pattern = re.escape(wanted).replace(r"\{\}", r"(\d+)").replace("…", ".+")
    times = re.search(f"^{pattern}$", prose[0], re.M)
    assert times, f"wanted a line {wanted.format(20, 10)}"
    assert int(times[1]) <= 40
    assert int(times[2]) <= 60
    questions = prose[-1].split(QUESTIONS[language(source)])[-1]
    assert re.findall(r"^(\d)\. ", questions, re.M) == ["1", "2", "3"]


@every_notebook
def test_reads_as_a_lesson(source):
    notebook = read(source)
    code, prose = cells(notebook, "code"), cells(notebook, "markdown")
    paragraphs = sum(len(re.split(r"\n\s*\n", text.strip())) for text in prose)
    assert paragraphs >= 2 * len(code), "two paragraphs or more for each code cell"
    lengths = [len(text.split("\n")) for text in code]
    assert statistics.median(lengths) <= 8
    assert max(lengths) <= 16
    assert any(
        isinstance(node, ast.Assert) or "assert_" in ast.dump(node)
        for text in code
        for node in ast.walk(ast.parse(text))
    )


@every_notebook
def test_ran_and_left_nothing_behind(source):
    notebook = read(source)
    assert [output for output in outputs(notebook) if output.output_type == "error"] == []
    assert [output for output in outputs(notebook) if output.get("name") == "stderr"] == []
    assert "widgets" not in notebook.metadata
    text = build.target(source).read_text("utf-8")
    assert not re.search(r"/(home|root|Users|work|tmp)/\w", text), "a path of the machine it ran on"
    assert " at 0x" not in text, "an address"


@every_notebook
def test_is_small(source):
    assert build.target(source).stat().st_size <= 300_000
    pictures = [output.data["image/png"] for output in outputs(read(source)) if "image/png" in output.get("data", {})]
    assert all(len(base64.b64decode(picture)) <= 60_000 for picture in pictures)


@every_notebook
def test_pictures_have_words_for_them(source):
    for output in outputs(read(source)):
        if "image/png" in output.get("data", {}):
            assert len(output.metadata["image/png"]["alt"]) > 10


@every_notebook
def test_links_lead_somewhere(source):
    for text in cells(read(source), "markdown"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert link.startswith("http") or (NOTEBOOKS / link).exists(), link


@every_notebook
def test_the_tables_say_what_it_says(source):
    """notebooks/README.md has a row with its minutes and seconds, the README its minutes."""
    first = cells(read(source), "markdown")[0]
    reading, running = re.findall(r"\d+", re.search(r"^\*.*\*$", first, re.M)[0])[:2]
    listing = (NOTEBOOKS / "README.md").read_text("utf-8")
    row = re.search(rf"^\| \[{source.stem}\]\({source.stem}\.ipynb\).*$", listing, re.M)
    assert row
    assert row[0].endswith(f"| {reading} | {running} |"), row[0]
    front = (NOTEBOOKS.parent / "README.md").read_text("utf-8")
    row = next(line for line in front.split("\n") if f"({NOTEBOOKS.name}/{source.stem}.ipynb)" in line)
    names = [name for name in re.findall(r"\(notebooks/([\w-]+)\.ipynb\)", row) if not name.endswith("-zh")]
    minutes = re.findall(r"\d+", row.split("|")[-2])
    assert minutes[names.index(source.stem.removesuffix("-zh"))] == reading
