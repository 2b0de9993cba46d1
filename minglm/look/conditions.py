"""Conditions on a step, as a walk waits for them.

"margin < 0.01", "max > 100 and layer >= 2": comparisons of numbers and of the quantities below, joined by and, or,
not, with + − · /. Read from the text's syntax tree, never run as Python. What a step does not have is unknown there,
and so is a comparison with it; `or` needs one side that holds, `and` both, and `not` of the unknown stays unknown.
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


class Condition:
    """Raises ValueError for a text that is no condition."""

    def __init__(self, text: str):
        try:
            self.tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"{text!r:.80} is no condition; wanted something like margin < 0.01") from None
        try:
            _check(self.tree)
        except RecursionError:
            raise ValueError(f"{text!r:.80} is too long") from None
        if not _compares(self.tree):
            raise ValueError(f"{text!r:.80} is no condition: nothing is compared; wanted something like margin < 0.01")

    def holds(self, name: str, array: Array, K: int) -> bool:
        """Whether it is true of a step; K: experts picked for each token."""
        measured = self.measured(name, array, K)
        with np.errstate(all="ignore"):
            return _value(self.tree, measured) is True

    def measured(self, name: str, array: Array, K: int) -> dict[str, float]:
        """The quantities that the text names, as far as the step has them."""
        named = dict.fromkeys(node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name))
        with np.errstate(all="ignore"):
            found = {quantity: measure(quantity, name, array, K) for quantity in named}
        return {quantity: value for quantity, value in found.items() if value is not None}


def measure(quantity: str, name: str, array: Array, K: int) -> float | None:
    """One of QUANTITIES at a step; None where there is none."""
    m = re.match(r"layers\.(\d+)\.", name)
    if quantity == "layer":
        return None if m is None else int(m[1])
    if quantity == "nan":
        return float(np.isnan(array).sum()) if array.dtype.kind == "f" else 0.0
    if quantity in _AT:
        place, function = _AT[quantity]
        return function(array.astype(np.float64), K) if name.endswith(place) else None
    known = array[array != -np.inf].astype(np.float64)
    if not known.size:
        return None
    if quantity == "rms":
        return float(np.sqrt(np.mean(known**2)))
    return float(getattr(known, quantity)())  # max, min, mean, std


def _margin(biased: Array, K: int) -> float | None:
    if biased.shape[-1] <= K:
        return None
    ranked = -np.sort(-biased, axis=-1)
    return float((ranked[:, K - 1] - ranked[:, K]).min())


def _entropy(probs: Array, K: int) -> float:
    logs = np.log(np.where(probs > 0, probs, 1))
    return float((-(probs * logs)).sum(axis=-1).max())


def _load(indices: Array, K: int) -> float:
    return float(np.bincount(indices.astype(int).ravel()).max() / len(indices))


_AT: dict[str, tuple[str, Callable[[Array, int], float | None]]] = {
    "margin": ("biased_scores", _margin),
    "entropy": ("self_attn.probs", _entropy),
    "load": ("expert_indices", _load),
}


def _check(node: ast.expr) -> None:
    """Raises ValueError for anything but what the module's text names."""
    truths = numbers = list[ast.expr]()
    if isinstance(node, ast.BoolOp):
        truths = node.values
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        truths = [node.operand]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        numbers = [node.operand]
    elif isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
        numbers = [node.left, *node.comparators]
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        numbers = [node.left, node.right]
    elif _is_number(node):
        pass
    elif not (isinstance(node, ast.Name) and node.id in QUANTITIES):
        raise ValueError(f"{ast.unparse(node)!r:.80} is not known here; there are {', '.join(QUANTITIES)}")
    for part, is_truth in [(part, True) for part in truths] + [(part, False) for part in numbers]:
        _check(part)
        if is_truth != _compares(part):
            wanted = "nothing is compared" if is_truth else "it is no number"
            raise ValueError(f"{ast.unparse(part)!r:.80}: {wanted}; wanted something like margin < 0.01")


def _is_number(node: ast.expr) -> bool:
    value: Any = node.value if isinstance(node, ast.Constant) else None
    return type(value) in (int, float) and abs(value) < 1e300


def _compares(node: ast.expr) -> bool:
    """Whether it is true or false, and not a number."""
    return isinstance(node, ast.Compare | ast.BoolOp) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    )


def _value(node: ast.expr, measured: dict[str, float]) -> Any:
    """A number or a truth; None where it is not known."""
    if isinstance(node, ast.Name):
        return measured.get(node.id)
    if isinstance(node, ast.Constant):
        number: Any = node.value
        return float(number)
    if isinstance(node, ast.BoolOp):
        parts = [_value(part, measured) for part in node.values]
        settles = isinstance(node.op, ast.Or)  # one true part settles an or, one false part an and
        return settles if settles in parts else None if None in parts else not settles
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, measured)
        return None if inner is None else not inner if isinstance(node.op, ast.Not) else -inner
    if isinstance(node, ast.BinOp):
        a, b = _value(node.left, measured), _value(node.right, measured)
        if a is None or b is None or (b == 0 and isinstance(node.op, ast.Div)):
            return None
        return _ARITHMETIC[type(node.op)](a, b)
    assert isinstance(node, ast.Compare)
    values = [_value(each, measured) for each in (node.left, *node.comparators)]
    if None in values:
        return None
    return all(_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, values[:-1], values[1:], strict=True))
