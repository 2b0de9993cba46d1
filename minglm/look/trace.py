"""Traces: the arrays of one forward pass by name, chosen by patterns, with times, tokens and routing."""

import difflib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minglm.config import Config
from minglm.look.routing import RoutingTable, from_taps
from minglm.look.tables import html_table
from minglm.look.taps import TAPS, ExpectedTap, TapSpec, expected_taps
from minglm.model.ops import Array

if TYPE_CHECKING:
    from minglm.api import Model, UserTap

__all__ = ["TAPS", "StepRow", "TapSpec", "Trace", "estimate_bytes", "expected_taps", "load_trace", "take_trace"]

# -- choosing what to keep, and what it costs --------------------------------------------------------------------

_ROUTING = tuple(
    f"layers.*.mlp.{name}" for name in ("router_scores", "biased_scores", "expert_indices", "expert_weights")
)


def selected(names: Sequence[str], keep: str) -> set[str]:
    """The names that one of the patterns in `keep` matches. Raises ValueError for a pattern that matches none."""
    if not isinstance(keep, str):
        raise ValueError(f"keep = {keep!r} must be one str, patterns separated by commas")
    patterns = [pattern.strip() for pattern in keep.split(",") if pattern.strip()]
    if not patterns:
        raise ValueError(f"keep = {keep!r} names nothing; give patterns such as 'layers.1.*,logits', or '*' for all")
    selected: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(f"keep: no tap of this forward pass is called {pattern!r}; {_suggestion(pattern, names)}")
        selected |= matches
    return selected


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    """Near matches, any number standing for all; they can be used as patterns themselves."""
    spellings = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
    wanted = re.sub(r"\d+", "*", pattern)
    near = difflib.get_close_matches(wanted, spellings, n=4, cutoff=0.5) or spellings[:4]
    layers = max((int(m[1]) for name in names if (m := re.match(r"layers\.(\d+)", name))), default=-1)
    return f"did you mean {' or '.join(near)}? Layers are 0 … {layers}; the whole list is in docs/taps.md"


def estimate_bytes(config: Config, B: int, T: int, keep: str = "*", itemsize: int = 4) -> int:
    """Bytes that a trace of ids [B, T] will hold: exact for keep='*', otherwise never too low.

    The routing arrays are always among them. `itemsize` is that of the computation: 4, or 8 for float64.
    Raises ValueError for a pattern that matches no tap.
    """
    taps = expected_taps(config, B, T)
    kept = _kept(taps, keep)
    per_expert_row: dict[str, list[int]] = {}  # tap, experts of a layer together -> bytes a row, one entry an expert
    total = 0
    for tap in taps:
        if tap.name in kept:
            size = (8 if tap.dtype == "int" else itemsize) * int(np.prod([s for s in tap.shape if s is not None]))
            if None in tap.shape:
                per_expert_row.setdefault(re.sub(r"experts\.\d+", "experts.*", tap.name), []).append(size)
            else:
                total += size
    N, K = B * T, config.num_experts_per_tok
    # a token goes to an expert at most once, and to K experts in all
    return total + sum(min(len(sizes), K) * N * sizes[0] for sizes in per_expert_row.values())


def _kept(taps: Sequence[ExpectedTap], keep: str) -> set[str]:
    """What the user asked for, and the routing."""
    names = [tap.name for tap in taps]
    return selected(names, keep) | {name for name in names if _is_routing(name)}


def _is_routing(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _ROUTING)


# -- taking a trace ----------------------------------------------------------------------------------------------


class _Recorder:
    """The tap of a trace: lets the user's tap act, then copies what the model goes on with."""

    def __init__(self, kept: set[str], tap: "UserTap | None"):
        self.kept = kept
        self.tap = tap
        self.arrays: dict[str, Array] = {}
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, name: str, array: Array) -> Array:
        self.seconds[name] = time.perf_counter() - self.last
        replacement = None if self.tap is None else self.tap(name, array)
        used = array if replacement is None else replacement
        if name in self.kept:
            self.arrays[name] = np.array(used, dtype=array.dtype, order="C")  # a copy: the model may reuse its buffer
        self.last = time.perf_counter()  # the time in here is not the model's
        return used


def take_trace(
    model: "Model",
    ids: Array,
    keep: str = "*",
    tap: "UserTap | None" = None,
    limit: float = 2e9,
    segments: Array | None = None,
) -> "Trace":
    """Run ids [B, T] and keep every array whose name matches `keep`: patterns as in the shell, separated by commas.

    The routing is kept in any case, so that `.routing` works, but listed only if asked for. `tap` acts first: what is
    kept is what the model used. `segments` [B, T] as in `Model.forward`; padding is left out of `.tokens` and
    `.routing`. Raises ValueError, before running, for a pattern that matches nothing or more than `limit` bytes.
    """
    config = model.config
    B, T = ids.shape
    taps = expected_taps(config, B, T)
    shown = selected([t.name for t in taps], keep)
    needed = estimate_bytes(config, B, T, keep, np.dtype(model.compute_dtype).itemsize)
    if not needed <= limit:
        raise ValueError(
            f"keep = {keep!r} for {B} × {T} tokens would take {needed:,} bytes, the limit is {limit:,.0f}; narrow "
            "keep (for example 'layers.*.out'), shorten the prompt, or raise limit="
        )
    recorder = _Recorder(_kept(taps, keep), tap)
    model.forward(ids, segments=segments, tap=recorder)
    valid = np.ones(ids.shape, bool) if segments is None else np.asarray(segments) >= 0
    return Trace(
        arrays=recorder.arrays,
        shown=tuple(name for name in recorder.arrays if name in shown),
        ids=ids.copy(),
        valid=valid,
        tokens=_texts(model, ids[valid]),
        seconds=recorder.seconds,
        model=model.name,
    )


def _texts(model: "Model", ids: Array) -> list[str]:  # [n] -> n texts
    if model.tokenizer is None:
        return [str(i) for i in ids]
    known = model.usable_tokens
    return [model.tokenizer.token(int(i)) if i < known else str(i) for i in ids]


class StepRow(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float | None  # None for whole numbers, which are numbers of tokens or experts; −∞ (hidden) is left out
    std: float | None
    ms: float


class Trace(Mapping[str, Array]):
    """The arrays of one forward pass by tap name, in the order of the computation.

    Made by `Model.trace`; `load_trace` reads a saved one. Looking up a name that is not there raises KeyError with
    near matches.
    """

    def __init__(
        self,
        arrays: dict[str, Array],
        shown: tuple[str, ...],
        ids: Array,
        valid: Array,
        tokens: list[str],
        seconds: dict[str, float],
        model: str = "model",
    ):
        self._arrays = arrays  # with the routing, whether it was asked for or not
        self._shown = {name: arrays[name] for name in shown}
        self.ids = ids  # [B, T]
        self.valid = valid  # bool [B, T]: not padding
        self.tokens = tokens  # text of each token, row after row, padding left out: row t of `routing` is tokens[t]
        self.seconds = seconds  # from the tap before to this one, for every tap, kept or not
        self.model = model

    # -- as a mapping ------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Array:
        if name not in self._shown:
            raise KeyError(self._missing(name))
        return self._shown[name]

    def _missing(self, name: str) -> str:
        if name in self.seconds:
            return f"{name} was computed but not kept; give trace(…, keep=) a pattern that matches it"
        near = difflib.get_close_matches(str(name), self._shown, n=4, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else "see trace.names() or docs/taps.md"
        silent = "; an expert that no token picked has no arrays" if ".experts." in str(name) else ""
        return f"{name!r} is not in this trace; {advice}{silent}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown)

    def __len__(self) -> int:
        return len(self._shown)

    __eq__ = object.__eq__  # a mapping's would compare arrays and fail
    __hash__ = object.__hash__

    def names(self, pattern: str = "*") -> list[str]:
        """Names in the order of the computation; only those that match the pattern."""
        return [name for name in self._shown if fnmatchcase(name, pattern)]

    # -- what is in it -----------------------------------------------------------------------------------------

    @cached_property
    def routing(self) -> RoutingTable:
        """Which experts each token went to. Raises ValueError if no layer of the model has a router."""
        return from_taps(self._arrays, self.valid)

    @property
    def nbytes(self) -> int:
        """Bytes held, the routing included."""
        return sum(array.nbytes for array in self._arrays.values())

    def rows(self) -> list[StepRow]:
        """One row for each kept step; milliseconds are counted from the tap before it, kept or not."""
        return [
            StepRow(name, array.shape, array.dtype.name, *_mean_and_std(array), 1e3 * self.seconds[name])
            for name, array in self.items()
        ]

    # -- keeping -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: every array, the ids, and the rest as metadata. What was there before stays
        until the new file is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "version": 1,
            "model": self.model,
            "names": list(self._arrays),
            "shown": list(self._shown),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        tensors = {"ids": self.ids, "valid": self.valid, **self._arrays}
        # safetensors 0.8 garbles arrays that are not contiguous, without an error
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            save_file(tensors, temporary, metadata={"format": "np", "minglm_trace": json.dumps(about)})
            os.replace(temporary, path)
        except SafetensorError as error:
            raise OSError(f"{path}: the trace could not be written: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    # -- showing -----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        B, T = self.ids.shape
        return f"Trace({self.model}, B = {B}, T = {T}: {len(self)} arrays, {self.nbytes / 1e6:.1f} MB)"

    def _repr_html_(self, most: int = 200) -> str:
        """The table of steps, at most so many of them."""
        rows = self.rows()
        more = f", the first {most} of them here; trace.rows() has all" if len(rows) > most else ""
        return html_table(rows[:most], StepRow._fields, f"{self!r}{more}")


def _mean_and_std(array: Array) -> tuple[float | None, float | None]:
    if np.issubdtype(array.dtype, np.integer):
        return None, None
    values = array[array != -np.inf]  # hidden keys and closed groups; a NaN stays and shows
    if not values.size:
        return None, None
    with np.errstate(invalid="ignore", over="ignore"):
        return float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))


def load_trace(path: str | Path) -> Trace:
    """Read what `Trace.save` wrote. Raises ValueError with the path for anything else."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if "minglm_trace" not in metadata:
                raise ValueError(f"{path}: a safetensors file, but not a trace; wanted one written by Trace.save")
            about: dict[str, Any] = json.loads(metadata["minglm_trace"])
            arrays = {name: file.get_tensor(name) for name in about["names"]}
            ids, valid = file.get_tensor("ids"), file.get_tensor("valid")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot read the trace: {error}") from error
    return Trace(arrays, tuple(about["shown"]), ids, valid, about["tokens"], about["seconds"], about["model"])
