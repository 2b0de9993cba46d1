"""What an exercise is: a reference with a flag for each known mistake, cases that tell them apart, and what to say."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minglm.model.ops import Array

Inputs = tuple[Any, ...]
Outputs = dict[str, Array]  # by name, in an order that does not depend on how the student sorted them


class Mistake(NamedTuple):
    """A wrong variant: the reference with these flags. Mistakes that give the same numbers share one id."""

    id: str
    flags: dict[str, Any]
    says: str  # what was computed, as a clause: "the weights come from the biased scores"


class Design(NamedTuple):
    """Another model's choice, or a plausible one, and so no mistake: what a graded exercise may ask for."""

    id: str
    flags: dict[str, Any]
    asks: str  # the sentence that asks for it


class Property(NamedTuple):
    """Something that right answers have, whatever the inputs."""

    says: str  # what is wrong if it does not hold
    holds: Callable[[Inputs, Outputs], bool]


class Case(NamedTuple):
    """One set of inputs. Cases with the same point are passed or failed together."""

    point: str  # what is tried: "without normalisation"
    inputs: Inputs


def called_once(function: Callable[..., Any], inputs: Inputs) -> Any:
    """How most exercises run a function: one call with the case's inputs."""
    return function(*inputs)


class Exercise(NamedTuple):
    name: str
    minutes: int  # for somebody who has read the notebook
    brief: str  # signature with shapes, and the formula's source
    reference: Callable[..., Any]  # (*inputs, **flags); without flags it is the model's own function
    cases: Callable[[int], Sequence[Case]]  # of one draw: always the same numbers; 0 is the public one
    mistakes: tuple[Mistake, ...]
    axes: dict[str, str]  # output name -> its axis letters, "T H d"
    outputs: Callable[[Inputs, Any], Outputs]  # from what the function returned to named arrays
    properties: tuple[Property, ...] = ()
    designs: tuple[Design, ...] = ()
    pairs: bool = True  # whether two mistakes at once are looked for
    tolerance: float = 1e-9  # of max|a − b| / max|b|, in float64
    run: Callable[[Callable[..., Any], Inputs], Any] = called_once  # (function, inputs): several calls, for a cache
    detours: tuple[Mistake, ...] = ()  # other ways to a right result, each with what it costs: they pass
    bill: Callable[[Callable[..., Any], Inputs], str | None] | None = None  # of a right function: what it did too much

    def points(self) -> list[str]:
        """Names of the points for values; one for the dtype comes on top."""
        return list(dict.fromkeys(each.point for each in self.cases(0)))

    def truth(self, inputs: Inputs, **flags: Any) -> Outputs:
        """The reference's answer, by name."""
        return self.outputs(inputs, self.run(partial(self.reference, **flags), inputs))


def one(name: str) -> Callable[[Inputs, Any], Outputs]:
    """For functions that return one array."""

    def outputs(inputs: Inputs, returned: Any) -> Outputs:
        if isinstance(returned, tuple) and len({np.shape(each) for each in returned}) > 1:
            raise ValueError(f"{len(returned)} things, wanted one: {name}")
        return {name: np.asarray(returned)}

    return outputs


def several(*names: str) -> Callable[[Inputs, Any], Outputs]:
    """For functions that return a tuple of arrays."""

    def outputs(inputs: Inputs, returned: Any) -> Outputs:
        if not isinstance(returned, tuple | list) or len(returned) != len(names):
            found = f"{len(returned)} things" if isinstance(returned, tuple | list) else type(returned).__name__
            raise ValueError(f"{found}, wanted {len(names)} things: {', '.join(names)}")
        return {name: np.asarray(each) for name, each in zip(names, returned, strict=True)}

    return outputs


def distance(a: Array, b: Array) -> float:
    """max|a − b| / max|b|; infinite where one is not finite and the other is, or the shapes differ."""
    if a.shape != b.shape:
        return np.inf
    if not a.size:
        return 0.0
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.where(same, 0.0, np.abs(a.astype(np.float64) - b.astype(np.float64)))
    worst = float(np.nan_to_num(apart, nan=np.inf).max())
    return worst / (float(np.abs(b[np.isfinite(b)]).max(initial=0)) or 1.0)


def apart(a: Outputs, b: Outputs) -> float:
    """The largest distance of two answers' outputs."""
    return max((distance(a[name], b[name]) for name in b), default=0.0)
