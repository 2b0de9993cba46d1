"""The terms of minglm in English and Chinese, as records: from docs/glossary.toml, which a wheel brings along.

`python -m minglm.look.glossary docs/glossary.md` renews the tables of that page.
"""

import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from minglm.look.tables import markdown_table


class Term(NamedTuple):
    """One row of the glossary."""

    kind: str  # "axis": a letter; "field": a word of the field; "here": a word of this code
    english: str
    chinese: str  # as Chinese papers write it; "" if they have no word for it
    code: str  # its name in code or config; "" if it has none
    meaning: str  # a phrase, in Markdown
    symbol: str  # its letter; "" but for axes


KINDS = ("axis", "field", "here")


@cache
def terms() -> tuple[Term, ...]:
    """Every term, in the order of the file."""
    here = Path(__file__).resolve().parent
    beside, checkout = here / "glossary.toml", here.parents[1] / "docs" / "glossary.toml"
    values = tomllib.loads((beside if beside.exists() else checkout).read_text("utf-8"))
    empty = dict.fromkeys(("chinese", "code", "symbol"), "")
    return tuple(Term(kind=kind, **{**empty, **row}) for kind in KINDS for row in values[kind])


def find(word: str) -> Term | None:
    """The term with this letter, English or Chinese name, or name in code. Letters as they are, words in any case."""
    for term in terms():
        names = (term.english.strip("`"), term.chinese, term.code)
        if word and (word == term.symbol or word.lower() in [name.lower() for name in names]):
            return term
    return None


def tables() -> dict[str, str]:
    """The tables of docs/glossary.md by kind, in Markdown."""
    by_kind = {kind: [term for term in terms() if term.kind == kind] for kind in KINDS}
    axes = [(t.symbol, t.meaning, t.chinese, _code(t)) for t in by_kind["axis"]]
    return {
        "axis": markdown_table(axes, ("letter", "axis", "中文", "config")),
        "field": _words(by_kind["field"]),
        "here": _words(by_kind["here"]),
    }


def renew(page: str) -> str:
    """A page's text with each table between its markers made again. Raises ValueError if a marker is missing."""
    for kind, made in tables().items():
        begin, end = f"<!-- glossary.toml: {kind} -->\n", "<!-- end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the page has no {begin.strip()} with {end} after it; add both, each on a line")
        page = before + begin + made + end + after
    return page


def _words(chosen: Iterable[Term]) -> str:
    return markdown_table(
        [(t.english, t.chinese, _code(t), t.meaning) for t in chosen], ("word", "中文", "code", "meaning")
    )


def _code(term: Term) -> str:
    return f"`{term.code}`" if term.code else ""


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renew(path.read_text("utf-8")), "utf-8")
