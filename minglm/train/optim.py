"""AdamW with decoupled weight decay, and gradient clipping. Muon is in muon.py."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minglm.model.ops import Array
from minglm.model.params import Params, is_norm, map_arrays, walk_stacked, zeros_like


def decays(name: str) -> bool:
    """Whether weight decay applies: to every matrix but the embeddings; not to norms and biases."""
    return not (is_norm(name) or name.endswith("bias") or "embed_tokens" in name)


def trainable(name: str) -> bool:
    """Whether a gradient moves it: the selection bias follows the balancing rule instead."""
    return not name.endswith("e_score_correction_bias")


class AdamW(NamedTuple):
    """Moments of every parameter and how they are used (arXiv 1711.05101). `step` counts the updates made."""

    first: Params  # running mean of the gradients
    second: Params  # running mean of their squares
    step: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    @classmethod
    def start(cls, params: Params, **options: Any) -> "AdamW":
        return cls(zeros_like(params), zeros_like(params), **options)

    @classmethod
    def restore(cls, params: Params, arrays: dict[str, Array], step: int, **options: Any) -> "AdamW":
        """After `step` updates of `params`, with the arrays that `walk` gave. Raises as `read_moments` does."""
        return cls(read_moments(arrays, "first", params), read_moments(arrays, "second", params), step, **options)

    def update(self, params: Params, grads: Params, rate: float) -> tuple[Params, "AdamW"]:
        """One step: new parameters and the optimiser after it. Nothing is changed in place."""
        step, (b1, b2) = self.step + 1, self.betas
        grad = dict(walk_stacked(grads))
        first = map_arrays(lambda name, m: b1 * m + (1 - b1) * grad[name], self.first)
        second = map_arrays(lambda name, v: b2 * v + (1 - b2) * grad[name] ** 2, self.second)
        means, squares = dict(walk_stacked(first)), dict(walk_stacked(second))
        # both means start at zero: divide by the share of weight that real gradients have in them
        share1, share2 = 1 - b1**step, 1 - b2**step

        def moved(name: str, p: Array) -> Array:
            if not trainable(name):
                return p
            direction = means[name] / share1 / (np.sqrt(squares[name] / share2) + self.eps)
            kept = 1 - rate * self.weight_decay if decays(name) else 1.0
            return p * kept - rate * direction

        return map_arrays(moved, params), self._replace(first=first, second=second, step=step)

    def update_in_place(self, params: Params, grads: Params, rate: float, scale: float, ops: Any) -> "AdamW":
        """The same step on `scale` times the gradients, written over the parameters and moments by the kernels of
        `ops`: a large model has no room for a second copy of them."""
        step, (b1, b2) = self.step + 1, self.betas
        grad, first, second = (dict(walk_stacked(record)) for record in (grads, self.first, self.second))
        for name, p in walk_stacked(params):
            if trainable(name):
                kept = 1 - rate * self.weight_decay if decays(name) else 1.0
                how = scale, b1, b2, 1 - b1**step, 1 - b2**step, rate, kept, self.eps
                ops.adamw(p, grad[name], first[name], second[name], *how)
        return self._replace(step=step)

    def walk(self) -> Iterator[tuple[str, Array]]:
        """Both moments as named arrays, for saving."""
        for kind, record in (("first", self.first), ("second", self.second)):
            for name, array in walk_stacked(record):
                yield f"{kind}.{name}", array


def read_moments(arrays: dict[str, Array], kind: str, like: Params) -> Params:
    """The saved arrays `kind`.NAME as a record. Raises KeyError if one is missing, ValueError if one has not the shape
    that it has in `like`."""

    def find(name: str, wanted: Array) -> Array:
        found = arrays[f"{kind}.{name}"]
        if found.shape != wanted.shape:
            raise ValueError(f"{kind}.{name} has shape {found.shape}, not {wanted.shape}: saved by another optimiser")
        return found

    return map_arrays(find, like)


def sum_of_squares(x: Array) -> float:
    """Σ x², in float64."""
    return float(np.sum(x * x, dtype=np.float64))


def global_norm(grads: Params, squares: Callable[[Array], float] = sum_of_squares) -> float:
    """√(Σ g²) over all parameters."""
    return float(np.sqrt(sum(squares(g) for _, g in walk_stacked(grads))))


def clip(grads: Params, norm: float, most: float) -> Params:
    """Scale all gradients so that their global norm, which is `norm`, is at most `most`."""
    if norm <= most:
        return grads
    return map_arrays(lambda name, g: g * (most / norm), grads)
