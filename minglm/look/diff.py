"""Two models step by step on the same tokens: the first step that differs by more than rounding.

An error that one step makes runs through all later ones. So every step of B is run twice: as it comes, and on A's
inputs. A tap that notes what B computed and then goes on with A's array does the second in one forward pass: what it
notes is the error that the step *adds*; what B's own pass has beyond that is *inherited*.

What rounding would add is measured: A is run in float64, and once more with each step on those inputs. And it is not
trusted: both models are run again in float64, where rounding all but vanishes and a mistake stays.
"""

import html
import json
import math
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minglm.look.judge import DiffRow, Subject, judge, layer_of, observe
from minglm.look.parts import (
    Field,
    Tensor,
    all_tensors_of,
    differing_fields,
    differing_tensors,
    reads,
    rounded_alike,
    storage_of,
)
from minglm.look.tables import html_table, table
from minglm.look.taps import expected_taps
from minglm.look.trace import estimate_bytes, selected
from minglm.model import ops as numpy_ops
from minglm.model.ops import Array, Ops

if TYPE_CHECKING:
    from minglm.api import Model

# -- what comes out ----------------------------------------------------------------------------------------------


class Diff(NamedTuple):
    """Two models compared by `diff`."""

    a: str
    b: str
    ids: Array  # int [B, T]
    source: str  # where the ids came from
    rows: list[DiffRow]  # in the order of the computation
    fields: list[Field]  # config fields that differ, of those that the computation reads
    tensors: list[Tensor]  # weights that differ by more than how they are stored
    fused: bool  # B ran as fused layers: each step is judged from the layer's input
    tied: bool  # the head is the embedding
    notes: list[str]

    @property
    def first(self) -> DiffRow | None:
        """The first step that adds more than rounding, or None."""
        return next((row for row in self.rows if row.verdict == "differs"), None)

    @property
    def same(self) -> bool:
        """No step beyond rounding, and no weight or config field that could differ on another prompt."""
        return self.first is None and not self.fields and not self.tensors

    @property
    def sentence(self) -> str:
        """What was found, in words."""
        return _sentence(self)

    def to_json(self) -> str:
        """Everything but the arrays; errors that are not finite as text."""

        def plain(value: Any) -> Any:
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        def records(rows: Sequence[Any]) -> list[dict[str, Any]]:
            return [{key: plain(value) for key, value in row._asdict().items()} for row in rows]

        about = {"a": self.a, "b": self.b, "ids": self.ids.tolist(), "source": self.source, "notes": self.notes}
        first = None if self.first is None else self.first.name
        found = {"same": self.same, "first": first, "sentence": self.sentence, "fused": self.fused}
        lists = {name: records(getattr(self, name)) for name in ("rows", "fields", "tensors")}
        return json.dumps({**about, **found, **lists}, indent=1, default=str)

    def table(self, every: bool = False) -> str:
        """The steps for a terminal; `every`: one by one, where else steps of a layer within rounding share a line."""
        return table(_lines(self, every), _HEADER)

    def text(self, every: bool = False) -> str:
        """Title, table, notes and sentence."""
        return "\n".join([self._title(), "", self.table(every), "", *self.notes, self.sentence])

    def _title(self) -> str:
        B, T = self.ids.shape
        return f"A: {self.a}\nB: {self.b}\nB = {B}, T = {T}, {self.source}"

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        shown = html_table(_lines(self, False), _HEADER, self._title().replace("\n", "; "))
        return shown + "".join(f"<p>{html.escape(text)}</p>" for text in [*self.notes, self.sentence])


# -- other operations --------------------------------------------------------------------------------------------

REPLACEABLE = ("embed", "linear", "rms_norm", "rope", "attend", "expert_mlp", "add", "router", "routed_experts")


def ops_with(**functions: Callable[..., Any]) -> Ops:
    """The book's operations with some of them replaced: `ops_with(rope=interleaved)`, for `Model.forward(ops=)` and
    `diff(ops_b=)`.

    A replacement takes and returns what the function of that name in `minglm.model` does, and calls its taps. Raises
    ValueError for a name that the forward pass does not look up.
    """
    for name in functions:
        if name not in REPLACEABLE:
            inner = " (it is called inside attend, expert_mlp or router: replace those)"
            raise ValueError(
                f"ops_with: the forward pass asks for no {name!r}{inner if hasattr(numpy_ops, name) else ''}; it asks "
                f"for {', '.join(REPLACEABLE)}"
            )
    return SimpleNamespace(**{**vars(numpy_ops), **functions})


# -- comparing ---------------------------------------------------------------------------------------------------


def diff(
    a: "Model",
    b: "Model",
    prompt: Any,
    *,
    ops_a: Ops = numpy_ops,
    ops_b: Ops = numpy_ops,
    engine_b: str = "numpy",
    keep: str = "*",
    segments: Any = None,
    float64: bool = True,
    limit: float = 2e9,
) -> Diff:
    """Compare b with a on a prompt: text, or ids [T] or [B, T]; `segments` as in `Model.forward`.

    `ops_a`, `ops_b`: other operations than the book's (`ops_with`). `engine_b="fast"`: b as the fused step of the fast
    engine, of which only what stands between its layers can be seen. `keep`: the steps to list, patterns as in
    `Model.trace`. `float64=False` leaves out the runs in float64, which need the weights in 8 bytes a number.

    Raises ValueError for models of different sizes or tokenizers, and for more than `limit` bytes of arrays.
    """
    if engine_b not in ("fast", "numpy"):
        raise ValueError(f"engine_b = {engine_b!r} is not there; take 'fast' or 'numpy'")
    if engine_b == "fast" and ops_b is not numpy_ops:
        raise ValueError("ops_b would not be used by the fast engine; take engine_b='numpy'")
    ids, source = _same_ids(a, b, prompt)
    segments = None if segments is None else np.asarray(segments)
    _check_sizes(a, b, ids, limit)
    names = [tap.name for tap in expected_taps(a.config, *ids.shape)]
    listed = selected(names, keep)
    ours = Subject(_label(a, ops_a, "numpy"), a, ops_a, "numpy", segments)
    theirs = Subject(_label(b, ops_b, engine_b), b, ops_b, engine_b, segments)
    seen, notes = observe(ours, theirs, ids, float64)
    alike = rounded_alike(a.params, b.params)
    return Diff(
        a=ours.label,
        b=theirs.label,
        ids=ids,
        source=source,
        rows=[row for row in judge(ours, theirs, ids, seen) if row.name in listed or row.name not in names],
        fields=differing_fields(a, b),
        tensors=[] if alike is None else differing_tensors(*alike),
        fused=engine_b == "fast",
        tied=a.config.tie_word_embeddings,
        notes=notes,
    )


def _label(model: "Model", ops: Ops, engine: str) -> str:
    changed = ", operations of its own" if ops is not numpy_ops else ""
    return f"{model.name}, {storage_of(model.params)}{changed}{', fast engine' if engine == 'fast' else ''}"


def _same_ids(a: "Model", b: "Model", prompt: Any) -> tuple[Array, str]:
    """The ids and where they came from. Raises ValueError if the two models would read a text as different tokens."""
    if not isinstance(prompt, str):
        ids = a.as_ids(prompt)
        return b.as_ids(ids), "ids as given"
    able = [(name, model) for name, model in (("A", a), ("B", b)) if model.tokenizer is not None]
    if not able:
        raise ValueError("neither model has a tokenizer; give token ids instead of text")
    found = [model.as_ids(prompt) for _, model in able]
    if len(found) == 2 and not np.array_equal(found[0], found[1]):
        at = next(t for t in range(found[0].size + 1) if found[0][0, : t + 1].tolist() != found[1][0, : t + 1].tolist())
        raise ValueError(
            f"the tokenizers disagree from token {at} of the text on: {a.name} {found[0][0, at : at + 3].tolist()}, "
            f"{b.name} {found[1][0, at : at + 3].tolist()}; give token ids instead of text"
        )
    ids = b.as_ids(a.as_ids(found[0]))
    return ids, "ids by both tokenizers, alike" if len(able) == 2 else f"ids by {able[0][0]}'s tokenizer, the only one"


def _check_sizes(a: "Model", b: "Model", ids: Array, limit: float) -> None:
    """Raises ValueError for models whose steps have different shapes, and for too many arrays."""
    shapes = [{tap.name: tap.shape for tap in expected_taps(model.config, *ids.shape)} for model in (a, b)]
    other = next((name for name, shape in shapes[0].items() if shapes[1].get(name, shape) != shape), None)
    if other is not None:
        sizes = [str(f) for f in differing_fields(a, b) if isinstance(f.a, int) and not isinstance(f.a, bool)]
        raise ValueError(
            f"{a.name} and {b.name} have different shapes, so their steps cannot be compared: {', '.join(sizes)}; "
            f"the first step of another shape is {other}, {list(shapes[0][other])} against {list(shapes[1][other])}"
        )
    held = 11 * estimate_bytes(a.config, *ids.shape)  # seven runs, three of them in float64
    if not held <= limit:
        B, T = ids.shape
        raise ValueError(
            f"comparing {B} × {T} tokens would hold {held:,} bytes of arrays, the limit is {limit:,.0f}; shorten the "
            "prompt, or raise limit="
        )


# -- in words ----------------------------------------------------------------------------------------------------

_HEADER = ("step", "inherited", "added", "limit", "in float64", "verdict", "")
_MOST = 24  # steps that differ, in a compact table


def _lines(found: Diff, every: bool) -> list[tuple[str, ...]]:
    """Rows as text. But for `every`, neighbours of one layer within rounding share a line with their largest errors."""
    groups: list[list[DiffRow]] = []
    for row in found.rows:
        alone = every or row.verdict in ("differs", "not seen")
        last = groups[-1][-1] if groups else None
        closed = last is None or last.verdict in ("differs", "not seen") or layer_of(last.name) != layer_of(row.name)
        if alone or closed:
            groups.append([row])
        else:
            groups[-1].append(row)
    if every:
        return [_line(group) for group in groups]
    differing = [i for i, group in enumerate(groups) if group[0].verdict == "differs"]
    if len(differing) <= _MOST:
        return [_line(group) for group in groups]
    end = differing[_MOST]
    rest = sum(len(group) for group in groups[end:])
    return [*(_line(group) for group in groups[:end]), (f"… {rest} more steps", "", "", "", "", "", "")]


def _line(group: list[DiffRow]) -> tuple[str, ...]:
    def largest(field: str) -> str:
        values = [value for row in group if (value := getattr(row, field)) is not None]
        return f"{max(values):.1e}" if values and max(values) else "0" if values else ""

    ranks = ("equal", "rounding", "storage", "not seen", "differs")
    worst = max((row.verdict for row in group), key=ranks.index)
    name, note = group[0].name, group[0].note
    if len(group) > 1:
        name = f"{name} … {group[-1].name.removeprefix(layer_of(name))} ({len(group)} steps)"
        note = next((row.note for row in group if row.note), "")
    return name, *(largest(field) for field in ("inherited", "added", "limit", "exact")), worst, note


def _sentence(found: Diff) -> str:
    first = found.first
    if first is None:
        return _no_difference(found)
    if first.added is None:
        return f"first step beyond rounding: {first.name}: {first.note}. {_causes(found, first)}{_more(found, first)}"
    size = f"added {first.added:.1e} (rounding would be at most {first.limit:.1e})"
    if first.name.endswith("expert_indices") or math.isinf(first.added):
        size = first.note
    elif first.exact is not None:
        size += f", in float64 {first.exact:.1e}: not rounding"
    return f"first step beyond rounding: {first.name}: {size}. {_causes(found, first)}{_more(found, first)}"


def _causes(found: Diff, row: DiffRow) -> str:
    """The weights and config fields of this step that differ."""
    if found.fused and layer_of(row.name):
        tensors, fields = list(all_tensors_of(row.name, found.tensors)), found.fields
    else:
        known, used = reads(row.name, found.tied)
        tensors = [t for t in found.tensors if t.name in known and row.added is not None]
        fields = [f for f in found.fields if f.name in used or row.added is None]
    parts = [f"its weights differ: {', '.join(map(str, tensors[:4]))}"] if tensors else []
    parts += [f"its config differs: {', '.join(map(str, fields))}"] if fields else []
    text = "; ".join(parts) or "its weights and config fields are equal: the operation differs"
    return text[0].upper() + text[1:] + "."


def _more(found: Diff, first: DiffRow) -> str:
    more = [re.sub(r"\d+", "*", r.name) for r in found.rows if r.verdict == "differs" and r.name != first.name]
    kinds = list(dict.fromkeys(more))
    if not more:
        return " Later steps only inherit it."
    shown = ", ".join(kinds if len(kinds) < 6 else [*kinds[:4], f"and {len(kinds) - 4} more kinds"])
    adds = "steps add errors of their own" if len(more) > 1 else "step adds an error of its own"
    return f" {len(more)} more {adds}: {shown}."


def _no_difference(found: Diff) -> str:
    compared = [row for row in found.rows if row.added is not None and not row.name.endswith("expert_indices")]
    if not compared:
        text = "no step was compared"
    elif all(row.verdict == "equal" for row in compared):
        text = "no step beyond rounding: all are equal to the bit"
    else:
        row = max(compared, key=lambda row: (row.added or 0) / (row.limit or 1))
        kind = " by the storage of the weights" if row.verdict == "storage" else ""
        text = f"no step beyond rounding; largest: {row.name}, added {row.added:.1e}{kind} (at most {row.limit:.1e})"
    if found.fields or found.tensors:
        names = [str(each) for each in (*found.fields, *found.tensors)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        text += f". But no listed step shows what differs: {'; '.join(names[:3])}{more}"
    return text + "."
