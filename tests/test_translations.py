"""A translation says which state of its source it was made from: the source's sha256 stands in it.

When a source has changed, carry the change over to its translation (`git log -p README.md` shows it), then

    python tests/test_translations.py README.zh.md

writes the new hash; without a name, in all translations.
"""

import ast
import hashlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path: path.with_name(path.name.replace("-zh.py", ".py")) for path in ROOT.glob("notebooks/source/*-zh.py")}
SOURCES |= {path: path.with_name(path.name.replace(".zh.md", ".md")) for path in ROOT.glob("*.zh.md")}
MARK = re.compile(r'sha256="([0-9a-f]{64})"')
CODE = re.compile(r"^```(bash|powershell|python)\n(.*?)^```", re.S | re.M)
every_translation = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_text("utf-8").encode()).hexdigest()  # read as text: line ends do not count


def in_step(path: Path, source: Path) -> bool:
    return MARK.findall(path.read_text("utf-8")) == [digest(source)]


def renew(path: Path, source: Path) -> None:
    """Write the source's hash into its translation."""
    text, count = MARK.subn(f'sha256="{digest(source)}"', path.read_text("utf-8"))
    if count != 1:
        raise ValueError(f'{path.name} has {count} marks sha256="…" with 64 digits, wanted one')
    path.write_text(text, "utf-8", newline="\n")


def links(text: str) -> list[str]:
    """Where a page leads, without the links from one language to the other."""
    return sorted(link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "README.md" != link != "README.zh.md")


@every_translation
def test_follows_its_source(path):
    assert in_step(path, SOURCES[path]), (
        f"{SOURCES[path].name} has changed since {path.name} was made from it. Carry the change over "
        f"(git log -p {SOURCES[path].relative_to(ROOT)}), then: python tests/test_translations.py {path.name}"
    )


def test_a_changed_source_is_noticed_and_renewed(tmp_path):
    source, path = tmp_path / "page.md", tmp_path / "page.zh.md"
    source.write_text("one", "utf-8")
    path.write_text(f'<!-- sha256="{"0" * 64}" -->', "utf-8")
    assert not in_step(path, source)
    renew(path, source)
    assert in_step(path, source)
    source.write_text("two", "utf-8")
    assert not in_step(path, source)
    path.write_text("no mark", "utf-8")
    with pytest.raises(ValueError, match="0 marks"):
        renew(path, source)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".py"], ids=lambda path: path.name)
def test_a_notebook_has_the_code_of_its_source(path):
    ours, theirs = (ast.dump(ast.parse(each.read_text("utf-8"))) for each in (path, SOURCES[path]))
    assert ours == theirs


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".md"], ids=lambda path: path.name)
def test_a_page_has_the_commands_and_links_of_its_source(path):
    ours, theirs = path.read_text("utf-8"), SOURCES[path].read_text("utf-8")
    assert CODE.findall(ours) == CODE.findall(theirs) != []
    assert links(ours) == links(theirs)


if __name__ == "__main__":
    names = sys.argv[1:]
    if unknown := set(names) - {path.name for path in SOURCES}:
        sys.exit(f"no translation {', '.join(unknown)}; there are {', '.join(path.name for path in SOURCES)}")
    for path, source in SOURCES.items():
        if not names or path.name in names:
            renew(path, source)
