"""What a wrong answer looks like, where no known mistake fits: the most specific true sentence first."""

from collections.abc import Iterator

import numpy as np

from minglm.learn.exercise import Exercise, Inputs, Outputs, distance
from minglm.model.ops import Array

_CLOSE = 1e-6


def describe(task: Exercise, inputs: Inputs, found: Outputs) -> list[str]:
    """Sentences about each output that differs from the truth."""
    with np.errstate(all="ignore"):
        truth = task.truth(inputs)
    lines = []
    for name, wanted in truth.items():
        if distance(found[name], wanted) > task.tolerance:
            other = next((o for o in truth if o != name and distance(found[name], truth[o]) <= task.tolerance), None)
            letters = task.axes[name].split()
            said = f"{name} is what {other} should be: are they returned in another order?"
            lines.append(said if other else next(_sentences(name, letters, found[name], wanted)))
        elif len(truth) > 1:
            lines.append(f"{name} is right.")
    return lines


def _sentences(name: str, letters: list[str], found: Array, wanted: Array) -> Iterator[str]:
    if not np.isfinite(found).all():
        first = np.argwhere(~np.isfinite(found))[0].tolist()
        why = "somewhere 0/0, ∞ − ∞, an overflow, or the root of a negative number"
        yield f"{name} has NaN or infinity, first at {first}: {why}."
    if found.dtype.kind in "iub":
        share = float((found == wanted).mean())
        yield f"{name}: {share:.0%} of its entries are right."
        return
    if np.allclose(found, -wanted, rtol=_CLOSE, atol=0):
        yield f"{name} has the opposite sign everywhere."
    nonzero = np.abs(wanted) > 1e-9 * np.abs(wanted).max(initial=0)
    ratio = found[nonzero] / wanted[nonzero]
    if ratio.size and np.allclose(ratio, ratio.flat[0], rtol=_CLOSE) and np.allclose(found[~nonzero], 0):
        yield f"{name}: yours / right = {ratio.flat[0]:.6g} everywhere. Where does such a factor come from?"
    if wanted.ndim == 2 and wanted.shape[0] == wanted.shape[1] and distance(found, wanted.T) < _CLOSE:
        yield f"{name} is transposed."
    difference = found - wanted
    if np.allclose(difference, difference.flat[0], rtol=_CLOSE):
        yield f"{name}: yours − right = {difference.flat[0]:.4g} everywhere."
    for axis in range(wanted.ndim if wanted.ndim > 1 else 0):
        letter = _letter(letters, wanted.ndim, axis)
        moved_found, moved = np.moveaxis(found, axis, 0), np.moveaxis(wanted, axis, 0)
        yield from _along(name, letter, moved_found.reshape(len(moved), -1), moved.reshape(len(moved), -1))
    if np.allclose(np.sort(found, axis=None), np.sort(wanted, axis=None), rtol=_CLOSE):
        yield f"{name} has the right numbers in other places."
    yield f"{name} differs from the right answer by up to {distance(found, wanted):.2g} of its largest entry."


def _letter(letters: list[str], ndim: int, axis: int) -> str:
    """The letter of an axis, counted from the last; `..` stands for any number of axes, which have none."""
    letter = letters[axis - ndim] if ndim - axis <= len(letters) else ".."
    return f"axis {axis}" if letter == ".." else letter


def _numbers(wrong: Array) -> str:
    if len(wrong) > 3 and wrong[-1] - wrong[0] == len(wrong) - 1:
        return f"{wrong[0]} … {wrong[-1]}"
    return ", ".join(map(str, wrong[:8])) + (" …" if len(wrong) > 8 else "")


def _along(name: str, letter: str, found: Array, wanted: Array) -> Iterator[str]:
    """Sentences about slices along one axis: [slice, rest] each."""
    right = np.array([distance(f, w) < _CLOSE for f, w in zip(found, wanted, strict=True)])
    first = int(np.argmin(right))
    if right.any() and not right.all():
        if right[:first].all() and not right[first:].any():
            yield f"{name} is right for {letter} < {first}, and wrong from {letter} = {first} on."
        else:
            yield f"{name} is wrong for {letter} = {_numbers(np.flatnonzero(~right))} only."
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = found / wanted
    if wanted.shape[1] > 1 and np.allclose(ratios, ratios[:, :1], rtol=_CLOSE, equal_nan=False):
        yield f"{name}: yours / right is one number for each {letter}: {', '.join(f'{r:.3g}' for r in ratios[:4, 0])} …"
    order = [int(np.argmin([distance(f, w) for w in wanted])) for f in found]
    if sorted(order) == list(range(len(order))) and all(
        distance(found[i], wanted[j]) < _CLOSE for i, j in enumerate(order)
    ):
        yield f"{name} has the right slices along {letter} in another order: {order}."
