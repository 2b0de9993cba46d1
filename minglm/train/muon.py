"""Muon: a step of the same size along every direction of a matrix; AdamW for what is no matrix.

The derivation, with the reasons for every constant, is docs/derivations/muon.md.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minglm.model.ops import Array
from minglm.model.params import Params, map_arrays, walk_stacked, zeros_like
from minglm.train.optim import AdamW, decays, read_moments

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of s, s³ and s⁵ (Keller Jordan, kellerjordan.github.io/posts/muon)
TINY = 1e-7  # a smaller matrix is not blown up to full size: a gradient of nothing but rounding stays small
RMS = 0.2  # about what AdamW's updates have, so that one learning rate serves both (arXiv 2502.16982)


def newton_schulz(x: Array, steps: int = 5) -> Array:  # [.., rows, cols] -> [.., rows, cols]
    """x = U S Vᵀ with singular values near 1 in place of S; every matrix of a stack by itself.

    A step makes a·s + b·s³ + c·s⁵ of each singular value s without looking for it: with the Gram matrix G = x xᵀ it is
    (a + b·G + c·G²) x.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x  # so that G is small
    size = np.linalg.norm(wide, axis=(-2, -1), keepdims=True)  # no singular value is larger
    y = wide / np.maximum(size, TINY)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if tall else y


def step_length(shape: tuple[int, ...]) -> float:
    """What an orthogonalised [.., rows, cols] is scaled by to get the RMS that AdamW's updates have."""
    return RMS * math.sqrt(max(shape[-2:]))


class Muon(NamedTuple):
    """The optimiser of GLM-4.5's report: Muon for every matrix but the embeddings (so for the head, the router and
    eh_proj too), AdamW for embeddings, biases and norms; one learning rate. `step` counts the updates made."""

    first: Params  # running mean of the gradients
    second: Params  # running mean of their squares, for AdamW; empty where Muon moves the weights
    step: int = 0
    momentum: float = 0.95
    steps: int = 5  # of Newton-Schulz
    head: str = "muon"  # "adamw": that moves the head instead
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW, as is eps
    eps: float = 1e-8
    weight_decay: float = 0.1

    @classmethod
    def start(cls, params: Params, **options: Any) -> "Muon":
        fresh = cls(zeros_like(params), params, **options)
        assert fresh.head in ("muon", "adamw"), fresh.head
        return fresh._replace(second=zeros_like(fresh._rest(params)))

    @classmethod
    def restore(cls, params: Params, arrays: dict[str, Array], step: int, **options: Any) -> "Muon":
        """After `step` updates of `params`, with the arrays that `walk` gave. Raises as `read_moments` does."""
        empty = cls.start(params, **options).second
        return cls(read_moments(arrays, "first", params), read_moments(arrays, "second", empty), step, **options)

    def turns(self, name: str) -> bool:
        """Whether Muon moves it, not AdamW. (What decays are the matrices but the embeddings.)"""
        is_head = name == "lm_head.weight" or name.endswith("shared_head.head.weight")
        return decays(name) and not (is_head and self.head == "adamw")

    def update(self, params: Params, grads: Params, rate: float) -> tuple[Params, "Muon"]:
        """One step: new parameters and the optimiser after it. Nothing is changed in place."""
        rest, adamw = self._adamw().update(self._rest(params), self._rest(grads), rate)
        others, means, grad = (dict(walk_stacked(record)) for record in (rest, adamw.first, grads))
        b = self.momentum
        first = map_arrays(lambda n, m: b * m + (1 - b) * grad[n] if self.turns(n) else means[n], self.first)
        means = dict(walk_stacked(first))

        def moved(name: str, p: Array) -> Array:
            if not self.turns(name):
                return others[name]
            ahead = b * means[name] + (1 - b) * grad[name]  # Nesterov: the mean after one more such gradient
            direction = newton_schulz(ahead, self.steps)
            return p * (1 - rate * self.weight_decay) - rate * step_length(p.shape) * direction

        return map_arrays(moved, params), self._replace(first=first, second=adamw.second, step=adamw.step)

    def update_in_place(self, params: Params, grads: Params, rate: float, scale: float, ops: Any) -> "Muon":
        """The same step on `scale` times the gradients, written over the parameters and moments by the kernels of
        `ops`."""
        adamw = self._adamw().update_in_place(self._rest(params), self._rest(grads), rate, scale, ops)
        grad, mean = dict(walk_stacked(grads)), dict(walk_stacked(self.first))
        matrices = [
            (p, grad[name], mean[name], rate * step_length(p.shape))
            for name, p in walk_stacked(params)
            if self.turns(name)
        ]
        ops.muon(matrices, scale, self.momentum, 1 - rate * self.weight_decay, COEFFICIENTS, TINY, self.steps)
        return self._replace(step=adamw.step)

    def walk(self) -> Iterator[tuple[str, Array]]:
        """Both moments as named arrays, for saving."""
        return AdamW(self.first, self.second).walk()

    def _adamw(self) -> AdamW:
        """The optimiser of what Muon does not move; it looks at the same moments."""
        return AdamW(self._rest(self.first), self.second, self.step, self.betas, self.eps, self.weight_decay)

    def _rest(self, record: Params) -> Params:
        """The record with nothing in the arrays that Muon moves."""
        return map_arrays(lambda name, array: array[:0] if self.turns(name) else array, record)
