"""Python source as text: reading a file, and the prose in its docstrings. Nothing is imported or run."""

import ast
import warnings
from pathlib import Path

MIN_DOCSTRING = 200  # characters of a module's or class's; shorter docstrings are labels rather than prose
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


def read_source(path: Path) -> str:
    """The file's text with \\n newlines; empty if it is not UTF-8."""
    try:
        return unix_newlines(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        return ""


def unix_newlines(text: str) -> str:
    """The text with \\n for \\r\\n and \\r."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse(source: str) -> ast.Module | None:
    """The syntax tree; None for source that this Python cannot read (a template, another version's)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings are not our user's business
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def docstrings(source: str, of_functions: int | None = None) -> str:
    """The module and class docstrings of at least `MIN_DOCSTRING` characters, a blank line between them.

    `of_functions`: the docstrings of functions and methods too, if they have at least so many characters.
    """
    tree = parse(source)
    nodes: list[Documented] = [tree] if tree else []
    found = []
    for node in nodes:  # grows while it is walked; nothing inside conditions, for speed
        nodes += [child for child in node.body if isinstance(child, ast.ClassDef)]
        if of_functions:
            nodes += [child for child in node.body if isinstance(child, Function)]
        at_least = of_functions if of_functions and isinstance(node, Function) else MIN_DOCSTRING
        if len(text := ast.get_docstring(node) or "") >= at_least:
            found.append(text)
    return "\n\n".join(found) + "\n" if found else ""
