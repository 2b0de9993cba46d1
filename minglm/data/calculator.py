"""A calculator that is safe to hand a model: it reads an expression, and evaluates nothing but arithmetic."""

import ast
import operator
from collections.abc import Callable

MAX_LENGTH = 200  # characters of an expression
MAX_NUMBER = 10**60  # the size of any number on the way
MAX_EXPONENT = 100

Number = int | float

_OPERATIONS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def calculate(expression: str) -> str:
    """Calculate the value of an arithmetic expression.

    Args:
        expression: numbers with + - * / // % ** and parentheses, such as "(4821+937)*3"

    Returns:
        The value: exact for whole numbers, to 12 digits otherwise.

    ValueError, with a sentence that can be shown to whoever asked, for anything else.
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression has {len(expression)} characters: at most {MAX_LENGTH} are calculated")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is not an arithmetic expression") from None
    value = _value(tree.body)
    return str(value) if isinstance(value, int) else f"{value + 0.0:.12g}"  # -0.0 + 0.0 is 0.0


def calculator(expression: str) -> str:
    """Value of an arithmetic expression."""  # as the training's schema says it
    return calculate(expression)


def _value(node: ast.expr) -> Number:
    """The value of a number, of a sign before a value, or of an operation on two values."""
    if isinstance(node, ast.Constant):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _operation(node.op, _value(node.left), _value(node.right))
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic: only numbers, + - * / // % ** and parentheses are")


def _operation(op: ast.operator, left: Number, right: Number) -> Number:
    if isinstance(op, ast.Pow) and abs(right) > MAX_EXPONENT:
        raise ValueError(f"the exponent {right} is too large: at most {MAX_EXPONENT} is calculated")
    try:
        return _bounded(_OPERATIONS[type(op)](left, right))
    except ZeroDivisionError:
        raise ValueError(f"division by zero: {left} by {right}") from None
    except OverflowError:
        raise ValueError("a number on the way is too large") from None


def _bounded(value: object) -> Number:
    """The value, if it is a whole or decimal number of bearable size: no text, truth value or complex number."""
    if type(value) is not int and type(value) is not float:
        raise ValueError(f"{value!r:.40} is not a whole or decimal number")
    if not abs(value) <= MAX_NUMBER:  # "not a number" is not either
        raise ValueError("a number on the way is too large")
    return value
