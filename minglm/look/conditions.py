"""Conditions on a step, as a walk waits for them.

"margin < 0.01", "max > 100 and layer >= 2": comparisons of numbers and of the quantities below, joined by and, or,
not, with + − · /. Read from the text's syntax tree, never run as Python. A quantity that a step does not have makes
the condition false there.
"""

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from minglm.model.ops import Array

QUANTITIES = {
    "max": "largest number",
    "min": "smallest number, −∞ left out",
    "mean": "mean, −∞ left out",
    "std": "standard deviation, −∞ left out",
    "rms": "root of the mean square, −∞ left out",
    "nan": "how many are NaN",
    "layer": "number of the layer; not for embedding, final norm and head",
    "margin": "smallest gap over the tokens between the last expert picked and the next; at biased_scores",
    "entropy": "largest entropy of a row in nats; at probs",
    "load": "largest share of the tokens that picked one expert; at expert_indices",
}

_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[type, Callable[[Any, Any], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


class _Absent(Exception):
    """This step does not have the quantity."""


class Condition:
    """Raises ValueError for a text that is no condition."""

    def __init__(self, text: str):
        try:
            self.tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"{text!r} is no condition; wanted something like margin < 0.01") from None
        if not isinstance(self.tree, ast.Compare | ast.BoolOp | ast.UnaryOp):
            raise ValueError(f"{text!r} is no condition: nothing is compared; wanted something like margin < 0.01")
        _check(self.tree)

    def holds(self, name: str, array: Array, K: int) -> bool:
        """Whether it is true of a step; K: experts picked for each token."""
        try:
            with np.errstate(all="ignore"):
                return bool(_value(self.tree, lambda quantity: measure(quantity, name, array, K)))
        except (_Absent, ZeroDivisionError):
            return False

    def measured(self, name: str, array: Array, K: int) -> dict[str, float]:
        """The quantities that the text names, at a step that has them."""
        named = [node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)]
        return {quantity: measure(quantity, name, array, K) for quantity in dict.fromkeys(named)}


def measure(quantity: str, name: str, array: Array, K: int) -> float:
    """One of QUANTITIES at a step. Raises _Absent where there is none."""
    m = re.match(r"layers\.(\d+)\.", name)
    if quantity == "layer":
        if m is None:
            raise _Absent
        return int(m[1])
    if quantity == "nan":
        return float(np.isnan(array).sum()) if array.dtype.kind == "f" else 0.0
    if quantity in _AT:
        place, function = _AT[quantity]
        if not name.endswith(place):
            raise _Absent
        return function(array.astype(np.float64), K)
    known = array[array != -np.inf].astype(np.float64)
    if not known.size:
        raise _Absent
    if quantity == "rms":
        return float(np.sqrt(np.mean(known**2)))
    return float(getattr(known, quantity)())  # max, min, mean, std


def _margin(biased: Array, K: int) -> float:
    if biased.shape[-1] <= K:
        raise _Absent
    ranked = -np.sort(-biased, axis=-1)
    return float((ranked[:, K - 1] - ranked[:, K]).min())


def _entropy(probs: Array, K: int) -> float:
    logs = np.log(np.where(probs > 0, probs, 1))
    return float((-(probs * logs)).sum(axis=-1).max())


def _load(indices: Array, K: int) -> float:
    return float(np.bincount(indices.astype(int).ravel()).max() / len(indices))


_AT: dict[str, tuple[str, Callable[[Array, int], float]]] = {
    "margin": ("biased_scores", _margin),
    "entropy": ("self_attn.probs", _entropy),
    "load": ("expert_indices", _load),
}


def _check(node: ast.expr) -> None:
    """Raises ValueError for anything but what the module's text names."""
    if isinstance(node, ast.BoolOp):
        parts = node.values
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        parts = [node.operand]
    elif isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
        parts = [node.left, *node.comparators]
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        parts = [node.left, node.right]
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        parts = []
    elif isinstance(node, ast.Name) and node.id in QUANTITIES:
        parts = []
    else:
        raise ValueError(f"{ast.unparse(node)!r} is not known here; there are {', '.join(QUANTITIES)}")
    for part in parts:
        _check(part)


def _value(node: ast.expr, measured: Callable[[str], float]) -> Any:
    if isinstance(node, ast.Name):
        return measured(node.id)
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BoolOp):
        join = all if isinstance(node.op, ast.And) else any
        return join(_value(part, measured) for part in node.values)
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, measured)
        return not inner if isinstance(node.op, ast.Not) else -inner
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_value(node.left, measured), _value(node.right, measured))
    assert isinstance(node, ast.Compare)
    values = [_value(each, measured) for each in (node.left, *node.comparators)]
    return all(_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, values[:-1], values[1:], strict=True))
