"""The pages of docs/ keep their word: code runs and prints what stands there, links lead somewhere, nothing is missing.

Every ```python block of a page is executed, in order, in one namespace per page. A ```text block right under it is its
output: the same words and whole numbers, other numbers of the same size. Blocks that cannot run everywhere are ```py
(shown only). A ```console block with `(Pdb)` prompts is a debugger session on the page's `walk.py`, and is typed in.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FOLDERS = ("*.md", "derivations/*.md", "teaching/*.md")
PAGES = sorted(p for folder in FOLDERS for p in DOCS.glob(folder) if p.name not in ("taps.md", "LOG.md"))
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?")


class Block(NamedTuple):
    language: str
    line: int  # of its first line of text, from 1
    text: str
    is_next: bool  # nothing but blank lines between the block before and this one


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    language, start, gap = None, 0, True
    lines = page.read_text("utf-8").split("\n")
    for number, line in enumerate(lines):
        if language is None and line.startswith("```"):
            language, start = line[3:].strip(), number + 1
        elif line.startswith("```"):
            found.append(Block(str(language), start + 1, "\n".join(lines[start:number]) + "\n", not gap))
            language, gap = None, False
        elif language is None and line.strip():
            gap = True
    assert language is None, f"{page_name(page)}: the block opened at line {start} is never closed"
    return found


def differs(printed: str, wanted: str) -> str | None:
    """What differs but for white space; numbers with a point or exponent may be off by a factor of 5: rounding."""
    words = [NUMBER.sub("#", text).split() for text in (printed, wanted)]
    if words[0] != words[1]:
        return f"printed {printed!r}"
    for found, given in zip(*([m[0] for m in NUMBER.finditer(text)] for text in (printed, wanted)), strict=True):
        rounded = "." in given or "e" in given
        if found != given and not (rounded and abs(float(given)) / 5 <= abs(float(found)) <= abs(float(given)) * 5):
            return f"printed {found} for {given}"
    return None


def run_python(page: Path, block: Block, namespace: dict, capsys: pytest.CaptureFixture) -> str:
    """Run a block so that an error's traceback points at the line of the page. Returns what it printed."""
    capsys.readouterr()
    exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
    return capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "page"}
    printed = None
    with threadpool_limits(1):
        for block in blocks(page):
            if block.language == "python":
                printed = run_python(page, block, namespace, capsys)
            elif block.language == "text" and block.is_next and printed is not None:
                assert differs(printed, block.text) is None, f"{page_name(page)}:{block.line}"
                printed = None
            else:
                printed = None


def test_debugger_session(tmp_path):
    """The commands of docs/debugging.md, typed into pdb, show the values that the page shows."""
    session = next(b for b in blocks(DOCS / "debugging.md") if "(Pdb)" in b.text)
    script = next(b for b in blocks(DOCS / "debugging.md") if "walk.py" in b.text and b.language == "python")
    (tmp_path / "walk.py").write_text(script.text, "utf-8")
    lines = session.text.splitlines()
    commands = [line.removeprefix("(Pdb) ") for line in lines if line.startswith("(Pdb) ")]
    run = subprocess.run(
        [sys.executable, "-m", "pdb", "walk.py"],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "HOME": str(tmp_path)},  # no .pdbrc
        timeout=60,
    )
    shown = [_place(line) for line in lines[1:] if not line.startswith(("(Pdb)", "--Return--"))]
    assert len(shown) > 8
    seen = [_place(line) for line in run.stdout.replace("(Pdb) ", "").splitlines()]
    for line in shown:
        assert any(differs(found, line) is None for found in seen), f"{line!r} not in:\n{run.stdout}"


def _place(line: str) -> str:
    """A line of pdb without the folders in front of the file's name."""
    return re.sub(r"(> |at )\S*/", r"\1", line).partition("->(")[0]


# -- links -------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page_name(page)}: {target} leads nowhere"
        if anchor and goal.suffix == ".md":
            assert anchor in anchors(goal), f"{page_name(page)}: no heading {anchor!r} in {goal.name}"


# -- figures and numbers -------------------------------------------------------------------------------------------

PICTURE = re.compile(r"!\[([^\]]*)\]\(|<img\b[^>]*>")


def pictures_without_text(text: str) -> list[str]:
    """Markdown and HTML images whose alternative text says nothing."""
    found = []
    for picture in PICTURE.finditer(re.sub(r"```.*?```", "", text, flags=re.S)):
        tag = picture.group()
        alt = re.search(r'alt="([^"]*)"', tag) if tag.startswith("<") else picture
        if alt is None or len(alt.group(1).split()) < 2:
            found.append(tag)
    return found


def test_every_picture_has_a_text():
    written = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("weights/*/README.md"), *ROOT.glob("notebooks/*.md")]
    texts = {page: page.read_text("utf-8") for page in written if "docs/api/" not in page.as_posix()}
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        texts[notebook] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert sum(len(PICTURE.findall(text)) for text in texts.values()) > 10
    assert {page_name(p): bare for p, text in texts.items() if (bare := pictures_without_text(text))} == {}
    bad = '![](a.png) ![plot](b.png) <img src="c.png"> <img src="d.png" alt=""> '
    assert len(pictures_without_text(bad + '![load by expert](e.png) <img alt="load by expert" src="f.png">')) == 4


def test_what_the_authors_page_says_was_measured_stands_on_the_pages_it_names():
    """Differences with their errors are the ablations' own, to the digit."""
    ablations = (DOCS / "ablations.md").read_text("utf-8")
    said = re.findall(r"[-+]\d+\.\d+ ± \d+\.\d+", (DOCS / "authors.md").read_text("utf-8"))
    assert len(said) > 10
    assert [figure for figure in said if figure not in ablations] == []


# -- completeness ------------------------------------------------------------------------------------------------


def test_every_file_and_backward_of_the_book_has_a_derivation():
    text = "".join(page.read_text("utf-8") for page in DOCS.glob("derivations/*.md"))
    files = [p for p in (ROOT / "minglm" / "model").glob("*.py") if p.name != "__init__.py"]
    assert [p.name for p in files if p.name not in text] == []
    backwards = {name for p in files for name in re.findall(r"^def (\w+_bwd)\b", p.read_text("utf-8"), re.M)}
    assert len(backwards) > 15
    assert sorted(name for name in backwards if f"`{name}`" not in text) == []


def test_pages_are_short_and_listed():
    index = (DOCS / "index.md").read_text("utf-8")
    for page in PAGES:
        written = re.sub(r"(<!-- glossary.toml: .*?-->).*?<!-- end -->", r"\1", page.read_text("utf-8"), flags=re.S)
        assert len(written.splitlines()) <= 165, page_name(page)
        if page.parent == DOCS and page.name != "index.md":
            assert f"({page.name})" in index, page_name(page)
    for front in (DOCS / "derivations" / "README.md", DOCS / "teaching" / "index.md"):
        listing = front.read_text("utf-8")
        assert [p.name for p in front.parent.glob("*.md") if f"({p.name})" not in listing] == [front.name]


def api_row(path: Path) -> str:
    """What docs/api.md has for a file: its link, and the first line of its docstring."""
    place = path.relative_to(ROOT).as_posix()
    first = str(ast.get_docstring(ast.parse(path.read_text("utf-8")))).split("\n")[0].rstrip(".")
    return f"| [{place.removesuffix('.py').replace('/', '.')}](../{place}) | {first} |"


def test_the_api_reference_has_every_file_of_these_rooms_and_what_it_says_of_itself():
    listed = re.findall(r"^\| \[minglm\..*$", (DOCS / "api.md").read_text("utf-8"), re.M)
    named = [ROOT / path for row in listed for path in re.findall(r"\]\(\.\./([\w/]+\.py)\)", row)]
    files = [path for room in ("model", "look", "generate", "text") for path in (ROOT / "minglm" / room).rglob("*.py")]
    wanted = {api_row(path) for path in [*named, *files] if path.exists() and path.stem != "__init__"}
    assert sorted(wanted - set(listed)) == [], "rows to add to docs/api.md"
    assert sorted(set(listed) - wanted) == [], "rows to take out"


def test_decisions_are_listed():
    listing = (DOCS / "decisions" / "README.md").read_text("utf-8")
    for page in DOCS.glob("decisions/0*.md"):
        title = page.read_text("utf-8").splitlines()[0].removeprefix("# ")
        assert f"[{title}]({page.name})" in listing, page.name


def test_binder_installs_what_the_notebooks_need_and_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (ROOT / "binder" / "requirements.txt").read_text("utf-8").splitlines()
    wanted = project["dependencies"] + project["optional-dependencies"]["notebooks"]
    assert [line for line in lines if not line.startswith("#")] == wanted
    assert not any(line.startswith(("torch", "transformers")) for line in wanted)
    post_build = ROOT / "binder" / "postBuild"
    assert post_build.read_text("utf-8").startswith("#!")
    assert os.name == "nt" or os.access(post_build, os.X_OK)
    version = (ROOT / "binder" / "runtime.txt").read_text("utf-8").strip().removeprefix("python-")
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
