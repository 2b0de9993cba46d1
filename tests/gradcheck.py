"""Is a backward function right? Compare it with central differences, in float64.

A function y = f(x) is projected to one number by a random dy, and then (Σ dy·f(x + h) − Σ dy·f(x − h)) / 2h must be
the entry of f_bwd(dy, x). A dy of ones would prove nothing for a softmax: its rows sum to one, so every gradient is 0.

Functions that choose experts are flat between choices and jump where the choice changes. `choices` tells what was
chosen: a coordinate counts only if the choice at both perturbed points is the choice at x, else it is skipped.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from minglm.model.loss import loss_and_grads
from minglm.model.mtp import mtp_chain, mtp_head_weight
from minglm.model.ops import IGNORE, cross_entropy, linear
from minglm.model.params import map_arrays, walk
from minglm.model.router import balance_loss
from minglm.model.transformer import head, transformer

BOUND = 1e-6
STEP = 1e-5  # its square (truncation) and 1e-16 over it (rounding) are both far below the bound
SEED = 2046  # not one that tests draw their inputs from: dy = x once made xᵀdy symmetric and hid a lost transpose


class Report(NamedTuple):
    errors: dict[str, float]
    checked: int  # coordinates compared
    skipped: int  # coordinates where the experts changed

    def wrong(self, bound: float = BOUND) -> list[str]:
        return [name for name, error in self.errors.items() if not error <= bound]


def check_gradients(f, f_bwd, inputs, choices=None, samples=24, step=STEP, seed=SEED, known=None) -> Report:
    """`inputs` {name: float64 array}; f(**inputs) -> y; f_bwd(dy, **inputs) -> one gradient per input, as a tuple in
    the order of the inputs or as {name: gradient}; choices(**inputs) -> int array. `known`: a dictionary that keeps
    the differences, to try several f_bwd of one f."""
    random = np.random.RandomState(seed)
    inputs = {name: np.array(array) for name, array in inputs.items()}
    assert all(array.dtype == np.float64 for array in inputs.values())
    dy = random.standard_normal(np.shape(f(**inputs)))
    found = f_bwd(dy, **inputs)
    found = found if isinstance(found, dict) else dict(zip(inputs, found, strict=True))
    assert found.keys() == inputs.keys(), f"gradients for {list(found)}, inputs {list(inputs)}"

    def evaluate():
        return f(**inputs), None if choices is None else choices(**inputs)

    def slope(high, low):
        return np.vdot(dy, high - low)

    return _compare(inputs, found, evaluate, slope, samples, step, random, known)


def check_model(
    ids, targets, params, config, samples=2, step=STEP, seed=SEED, leave_out=None, known=None, **arguments
) -> Report:
    """Every named parameter of a whole model (but those that `leave_out` matches) against the total of
    `loss_and_grads`; `known` as above."""
    random = np.random.RandomState(seed)
    params = map_arrays(lambda name, array: np.array(array, np.float64), params)
    found = dict(walk(loss_and_grads(ids, targets, params, config, **arguments)[1]))

    def evaluate():
        return total_loss(ids, targets, params, config, **arguments)

    arrays = {name: array for name, array in walk(params) if not (leave_out and re.search(leave_out, name))}
    return _compare(arrays, found, evaluate, lambda high, low: high - low, samples, step, random, known)


def total_loss(ids, targets, params, config, mtp_weight=0.3, balance_weight=0.0, segments=None):
    """The total loss put together once more, forward only, and all experts chosen on the way."""
    hidden, saved = transformer(ids, params, config, segments=segments, save=True)
    total = cross_entropy(head(hidden, params), targets)[0]
    depths = min(len(params.mtp), ids.shape[1] - 1) if mtp_weight else 0
    chain = mtp_chain(hidden, ids, saved.layout, params, config, depths)
    for k, depth in enumerate(chain, start=1):
        logits = linear(depth.normed, mtp_head_weight(params, params.mtp[depth.number]))
        wanted = np.where(depth.valid, targets[:, k:], IGNORE)
        total = total + mtp_weight / depths * cross_entropy(logits, wanted)[0]
    mlps = [(saved_layer.mlp, saved.layout.sight.segments >= 0) for saved_layer in saved.layers]
    mlps += [(depth.saved.layer.mlp, depth.valid) for depth in chain]
    routers = [(mlp.router, valid) for mlp, valid in mlps if hasattr(mlp, "router")]
    for router, valid in routers:
        scores, indices = (a.reshape(*valid.shape, -1) for a in (router.scores, router.routing.indices))
        total = total + balance_weight * balance_loss(scores, indices, valid)[0]
    return total, np.concatenate([np.sort(r.routing.indices, axis=-1).reshape(-1) for r, _ in routers] or [[]])


# -- the comparison ----------------------------------------------------------------------------------------------


def _compare(arrays, found, evaluate, slope, samples, step, random, known) -> Report:
    """`evaluate()` computes (value, choice) from the arrays as they stand; each is moved in place and put back."""
    known = {} if known is None else known
    _, choice = evaluate()

    def difference(array, at):
        (high, choice_high), (low, choice_low) = _both_sides(array, at, step, evaluate)
        if choice is None or (np.array_equal(choice_high, choice) and np.array_equal(choice_low, choice)):
            return float(slope(high, low)) / (2 * step)
        return None

    pairs: dict[str, list[tuple[float, float]]] = {}
    skipped = 0
    for name, array in arrays.items():
        pairs[name] = []
        if np.shape(found.get(name)) != array.shape:
            pairs[name].append((math.inf, 0.0))
            continue
        for at in _coordinates(found[name], samples, random):
            if (name, at) not in known:
                known[name, at] = difference(array, at)
            if known[name, at] is None:
                skipped += 1
            else:
                pairs[name].append((float(found[name][at]), known[name, at]))
    checked = sum(len(p) for p in pairs.values())
    unseen = [name for name, p in pairs.items() if not p]
    assert not unseen, f"no coordinate of {unseen} keeps its experts: take another seed"
    return Report(_errors(pairs), checked, skipped)


def _both_sides(array, at, step, evaluate):
    kept = array[at]
    array[at] = kept + step
    high = evaluate()
    array[at] = kept - step
    low = evaluate()
    array[at] = kept
    return high, low


def _coordinates(gradient, samples, random):
    """The entry with the largest gradient, and random others."""
    largest = int(np.argmax(np.abs(gradient)))
    others = random.permutation(gradient.size)[:samples]
    chosen = [largest, *(int(i) for i in others if i != largest)][:samples]
    return [np.unravel_index(i, gradient.shape) for i in chosen]


def _errors(pairs):
    """max|a − b| / max(max|b|, 1e-3 × the largest of that kind of tensor): some gradients are rounding noise around
    zero, and noise has no relative error."""
    size = {name: max(abs(b) for _, b in p) for name, p in pairs.items()}
    largest: dict[str, float] = {}
    for name in pairs:
        largest[_kind(name)] = max(largest.get(_kind(name), 0.0), size[name])
    errors = {}
    for name, p in pairs.items():
        gaps = [abs(a - b) for a, b in p]
        gap = max(gaps) if np.isfinite(gaps).all() else math.inf
        scale = max(size[name], 1e-3 * largest[_kind(name)])
        errors[name] = gap / scale if scale else (math.inf if gap else 0.0)
    return errors


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)
