"""Python expressions, evaluated one sub-expression a line, and expressions for a calculator.

    python      max(len("abc")+3,9)-2       max(3+3,9)-2
                                            max(6,9)-2
                                            9-2
                                            7                       7
    calculator  (4821+937)*3                (4821+937)*3            17274

A Python expression is an onion: a value, inside an operation on it, inside another; the steps take the layers off.
Values are written without spaces and with double quotes. Numbers stay between 0 and 99. The thinking of a calculator
item is what to hand to the calculator (`minglm.data.calculator`), which gives the answer.
"""

import ast
import math
import operator
import re
from typing import Any, NamedTuple

from numpy.random import Generator

from minglm.data.calculator import calculate
from minglm.data.items import Item, Task, below, below_each, draw_number, draw_size, not_a_question, pick

PYTHON_SIZES = (1, 2, 3)  # layers
CALCULATOR_SIZES = (2, 3, 4)  # numbers
LARGEST = 99
LONGEST = 8  # characters of a string; a list has at most six numbers

Value = int | str | list[int]  # a truth value is an int

# How tightly an expression binds, from loose to tight: Python's precedence.
CONDITION, NOT, COMPARISON, SUM, PRODUCT, ATOM = range(6)


class Layer(NamedTuple):
    """Text around a value, and what the whole gives."""

    before: str
    after: str
    value: Value
    binds: int = ATOM  # how tightly the whole binds
    needs: int = CONDITION  # what binds less than this needs parentheses inside


def show(value: Value) -> str:
    """The value as the task writes it: `[4,1,2]`, `"abc"`, `True`, `7`."""
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


# -- made: layers around a value, whose lines grow with them --


def make_python(rng: Generator, size: int | None = None) -> Item:
    """A Python expression of `size` layers."""
    size = draw_size(rng, size, PYTHON_SIZES, "python")
    value = _first_value(rng)
    lines, binds = [show(value)], ATOM
    for _ in range(size):
        layer = _around(rng, value)
        inside = [f"({line})" for line in lines[:-1]] if binds < layer.needs else lines[:-1]
        lines = [f"{layer.before}{line}{layer.after}" for line in (*inside, lines[-1])]
        lines.append(show(layer.value))
        value, binds = layer.value, layer.binds
    chance = 0.5 if isinstance(value, bool) else 10.0 ** -len(lines[-1])
    return Item("python", lines[0], "\n".join(lines[1:]), lines[-1], size, chance)


def _first_value(rng: Generator) -> Value:
    kind = below(rng, 3)
    if kind == 0:
        return _number(rng)
    return _letters(rng, 2 + below(rng, 4)) if kind == 1 else below_each(rng, 10, 2 + below(rng, 3))


def _number(rng: Generator) -> int:
    """One digit two times out of three, else two."""
    return draw_number(rng, 1 + (below(rng, 3) == 0))


def _letters(rng: Generator, count: int) -> str:
    return "".join(["abcdefghijklmnopqrstuvwxyz"[i] for i in below_each(rng, 26, count)])


def _around(rng: Generator, value: Value) -> Layer:
    """A layer around the value, any that fits it with equal chance."""
    if isinstance(value, bool):
        return _around_truth(rng, value)
    if isinstance(value, int):
        layers = _around_number(rng, value)
    elif isinstance(value, str):
        layers = _around_string(rng, value)
    else:
        layers = _around_list(rng, value)
    return pick(rng, [layer for layer in layers if _fits(layer.value)])


def _fits(value: Value) -> bool:
    if isinstance(value, int):
        return 0 <= value <= LARGEST
    return len(value) <= (LONGEST if isinstance(value, str) else 6)


def _around_truth(rng: Generator, value: bool) -> Layer:
    if rng.random() < 0.25:
        return Layer("not ", "", not value, NOT, NOT)
    yes, no = _number(rng), _number(rng)
    return Layer(f"{yes} if ", f" else {no}", yes if value else no, CONDITION, NOT)


COMPARE = {
    "<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">=": operator.ge, ">": operator.gt
}  # fmt: skip


def _around_number(rng: Generator, value: int) -> list[Layer]:
    number, factor, sign = _number(rng), 2 + below(rng, 8), pick(rng, [*COMPARE])
    layers = [
        Layer("", f"+{number}", value + number, SUM, SUM),
        Layer(f"{number}+", "", number + value, SUM, PRODUCT),
        Layer("", f"-{number}", value - number, SUM, SUM),
        Layer(f"{number}-", "", number - value, SUM, PRODUCT),
        Layer("", f"*{factor}", value * factor, PRODUCT, PRODUCT),
        Layer(f"{factor}*", "", factor * value, PRODUCT, ATOM),
        Layer("", f"//{factor}", value // factor, PRODUCT, PRODUCT),
        Layer("", f"%{factor}", value % factor, PRODUCT, PRODUCT),
        Layer("max(", f",{number})", max(value, number)),
        Layer(f"min({number},", ")", min(value, number)),
        Layer("", f"{sign}{number}", COMPARE[sign](value, number), COMPARISON, SUM),
    ]
    if value < 3:
        choices = below_each(rng, 10, 3)
        layers.append(Layer(f"{show(choices)}[", "]", choices[value]))
    if 0 < value <= 4:
        text = _letters(rng, 2)
        layers.append(Layer(f'"{text}"*', "", text * value, PRODUCT, ATOM))
    return layers


def _around_string(rng: Generator, value: str) -> list[Layer]:
    place, letter, more, times = below(rng, len(value)), pick(rng, value), _letters(rng, 2), 2 + below(rng, 2)
    other = value if rng.random() < 0.5 else value[::-1]
    case, changed = ("lower", value.lower()) if value.isupper() else ("upper", value.upper())
    return [
        Layer("len(", ")", len(value)),
        Layer("", "[::-1]", value[::-1], needs=ATOM),
        Layer("", f"[{place}]", value[place], needs=ATOM),
        Layer("", "[-1]", value[-1], needs=ATOM),
        Layer("", f".{case}()", changed, needs=ATOM),
        Layer("", f'.count("{letter}")', value.count(letter), needs=ATOM),
        Layer("", f'.index("{letter}")', value.index(letter), needs=ATOM),
        Layer("", f'+"{more}"', value + more, SUM, SUM),
        Layer(f'"{more}"+', "", more + value, SUM, PRODUCT),
        Layer("", f"*{times}", value * times, PRODUCT, PRODUCT),
        Layer("", f'=="{other}"', value == other, COMPARISON, SUM),
    ]


def _around_list(rng: Generator, value: list[int]) -> list[Layer]:
    place, member, number = below(rng, len(value)), pick(rng, value), below(rng, 10)
    wanted = member if rng.random() < 0.5 else number
    return [
        Layer("len(", ")", len(value)),
        Layer("sum(", ")", sum(value)),
        Layer("max(", ")", max(value)),
        Layer("min(", ")", min(value)),
        Layer("sorted(", ")", sorted(value)),
        Layer("", "[::-1]", value[::-1], needs=ATOM),
        Layer("", f"[{place}]", value[place], needs=ATOM),
        Layer("", "[-1]", value[-1], needs=ATOM),
        Layer("", f".count({wanted})", value.count(wanted), needs=ATOM),
        Layer("", f".index({member})", value.index(member), needs=ATOM),
        Layer("", f"+[{number}]", [*value, number], SUM, SUM),
        Layer(f"{wanted} in ", "", wanted in value, COMPARISON, SUM),
    ]


def make_calculator(rng: Generator, size: int | None = None) -> Item:
    """An expression of `size` numbers of up to four digits; one in three of the longer ones has parentheses."""
    size = draw_size(rng, size, CALCULATOR_SIZES, "calculator")
    numbers = [str(draw_number(rng, 1 + digits)) for digits in below_each(rng, 4, size)]
    if size > 2 and rng.random() < 1 / 3:
        first = below(rng, size - 1)
        numbers[first], numbers[first + 1] = f"({numbers[first]}", f"{numbers[first + 1]})"
    signs = ["+-*"[i] for i in below_each(rng, 3, size - 1)]
    question = "".join([text for pair in zip(numbers, [*signs, ""], strict=True) for text in pair])
    answer = calculate(question)
    return Item("calculator", question, question, answer, size, 10.0 ** -len(answer))


# -- solved: Python read by its own parser --

_FUNCTIONS = {"len": len, "max": max, "min": min, "sorted": sorted, "sum": sum}
_METHODS = ("count", "index", "lower", "upper")
_PARTS = (ast.BinOp, ast.Call, ast.Compare, ast.IfExp, ast.List, ast.Subscript, ast.UnaryOp)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Not, ast.USub, ast.cmpop)
_ALLOWED = (*_PARTS, *_OPERATORS, ast.Slice, ast.Load)


def solve_python(question: str) -> tuple[str, str]:
    """Steps and answer of `len("abc")+3`: the innermost part is replaced by its value until one value is left."""
    text, lines = question, []
    while not _is_value(tree := _parse(text, question)):
        part = _innermost(tree)
        text = _replace(text, part, _evaluate(text[part.col_offset : part.end_col_offset], question))
        lines.append(text)
    return "\n".join(lines or [text]), text


def _parse(text: str, question: str) -> ast.expr:
    """The tree of the text. ValueError for whatever the task has no use for: names, powers, attributes, long text."""
    try:
        tree = ast.parse(text, mode="eval").body
        if len(text) <= 200 and text.isascii() and text.isprintable() and all(map(_allowed, ast.walk(tree))):
            return tree
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        pass
    raise not_a_question("python", question, 'len("abc")+3')


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, str)) and str(node.value).isalnum()
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS
    if isinstance(node, ast.Attribute):
        return node.attr in _METHODS
    return isinstance(node, _ALLOWED)


def _is_value(node: ast.AST) -> bool:
    """A constant, a negative one, or a list of them."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return isinstance(node.operand, ast.Constant)
    return isinstance(node, ast.Constant) or (isinstance(node, ast.List) and all(map(_is_value, node.elts)))


def _innermost(node: ast.expr) -> ast.expr:
    """The first part, from the left, all of whose own parts are values."""
    for child in ast.iter_child_nodes(node):
        part = child.value if isinstance(child, ast.Attribute) else child
        if isinstance(part, _PARTS) and not _is_value(part):
            return _innermost(part)
    return node


def _evaluate(part: str, question: str) -> Value:
    try:
        return eval(part, {"__builtins__": {}}, _FUNCTIONS)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise not_a_question("python", question, 'len("abc")+3') from error


def _replace(text: str, part: ast.expr, value: Any) -> str:
    """The text with the value instead of the part and of parentheses around it alone, unless they call something."""
    before, after = text[: part.col_offset], text[part.end_col_offset :]
    if re.search(r"(^|[^\w\])])\($", before) and after.startswith(")"):
        before, after = before[:-1], after[1:]
    return f"{before}{show(value)}{after}"


def solve_calculator(question: str) -> tuple[str, str]:
    """Steps and answer of `(4821+937)*3`, by rewriting text: parentheses, then products, then sums."""
    if not re.fullmatch(r"[\d+*()-]+", question, re.ASCII):
        raise not_a_question("calculator", question, "(4821+937)*3")
    text = question
    while "(" in text:
        shorter = re.sub(r"\(([^()]*)\)", lambda inside: _flat_value(inside[1], question), text)
        if shorter == text:
            raise not_a_question("calculator", question, "(4821+937)*3")
        text = shorter
    return question, _flat_value(text, question)


def _flat_value(text: str, question: str) -> str:
    """The value of numbers, some of them negative, with + - and * between them."""
    if not re.fullmatch(r"-?\d+([+*-]-?\d+)*", text):
        raise not_a_question("calculator", question, "(4821+937)*3")
    plain = text.replace("--", "+").replace("+-", "-")
    terms = re.findall(r"[+-]?\d+(?:\*-?\d+)*", plain)
    return str(sum(math.prod(map(int, term.split("*"))) for term in terms))


EXPRESSIONS = (
    Task("python", make_python, PYTHON_SIZES, solve_python),
    Task("calculator", make_calculator, CALCULATOR_SIZES, solve_calculator),
)
