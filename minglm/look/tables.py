"""Plain tables, for the terminal and for notebooks."""

import html
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

Rows = Iterable[Sequence[Any]]


def table(rows: Rows, header: Sequence[str]) -> str:
    """Aligned columns: numbers to the right, everything else to the left. Raises ValueError for a row of another
    length than the header."""
    body = _checked(rows, header)
    numeric = _numeric_columns(body, len(header))
    lines = [[printable(name) for name in header], *([cell(value) for value in row] for row in body)]
    widths = [max(_width(line[c]) for line in lines) for c in range(len(header))]
    lines.insert(1, ["─" * width for width in widths])
    return "\n".join(
        "  ".join(_pad(text, width, right) for text, width, right in zip(line, widths, numeric, strict=True)).rstrip()
        for line in lines
    )


def html_table(rows: Rows, header: Sequence[str], title: str = "") -> str:
    """The same as an HTML table with a title line above; every text escaped, no style sheet and no script."""
    body = _checked(rows, header)
    align = ["right" if right else "left" for right in _numeric_columns(body, len(header))]

    def line(tag: str, texts: Iterable[str]) -> str:
        cells = (
            f'<{tag} style="text-align:{side}">{html.escape(t)}</{tag}>' for t, side in zip(texts, align, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    head = line("th", header)
    lines = "".join(line("td", map(cell, row)) for row in body)
    above = f"<p>{html.escape(title)}</p>" if title else ""
    return f"{above}<table><thead>{head}</thead><tbody>{lines}</tbody></table>"


def markdown_table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """The same in Markdown, cells as `str` gives them. A bar in a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def cell(value: Any) -> str:
    """One value as a table shows it: four digits of a fraction, shapes as [2, 3], nothing for None."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return str(list(value))
    if isinstance(value, str):
        return printable(value)
    return f"{value:.4g}" if _is_fraction(value) else str(value)


def printable(text: str) -> str:
    """Line breaks and control characters as escapes, so that a token's text can neither break a table nor steer a
    terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _checked(rows: Rows, header: Sequence[str]) -> list[Sequence[Any]]:
    body = list(rows)
    for row in body:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header {len(header)}: {list(row)!r}")
    return body


def _numeric_columns(body: list[Sequence[Any]], columns: int) -> list[bool]:
    def is_number(value: Any) -> bool:
        return value is None or _is_fraction(value) or hasattr(value, "__index__")

    return [bool(body) and all(is_number(row[c]) for row in body) for c in range(columns)]


def _is_fraction(value: Any) -> bool:
    """A Python or NumPy floating-point number."""
    return hasattr(value, "is_integer") and not hasattr(value, "__index__")


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _width(text: str) -> int:
    """Columns in a terminal: two for a Chinese character, none for a combining accent."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
