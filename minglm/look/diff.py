"""Two models step by step on the same tokens: the first step that differs by more than rounding.

An error that one step makes runs through all later ones. So every step of B is run twice: as it comes, and on A's
inputs. A tap that notes what B computed and then goes on with A's array does the second in one forward pass: what it
notes is the error that the step *adds*; what B's own pass has beyond that is *inherited*.

What rounding would add is measured: A is run in float64, and once more with each step on those inputs. And it is not
trusted: both models are run again in float64, where rounding all but vanishes and a mistake stays.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minglm.formats.memory import free_memory
from minglm.look.parts import (
    Field,
    Tensor,
    all_tensors_of,
    differing_fields,
    differing_tensors,
    reads,
    rounded_alike,
    storage_of,
    stored_as,
)
from minglm.look.tables import html_table, table
from minglm.look.taps import expected_taps
from minglm.look.trace import estimate_bytes, selected
from minglm.model import ops as numpy_ops
from minglm.model.ops import Array, Ops
from minglm.model.params import Params

if TYPE_CHECKING:
    from minglm.api import Model

SLACK = 10  # a step may round so many times as much as A's own: another order of sums, a lucky draw
VANISHES = 2.0**-20  # rounding falls by 2⁻²⁹ from float32 to float64; what is left of a mistake's size falls by nothing
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}  # half the distance from 1 to the next number

Arrays = dict[str, Array]


# -- what comes out ----------------------------------------------------------------------------------------------


class DiffRow(NamedTuple):
    """One step. Errors are max |b − a| / max |a|; of expert_indices the share of tokens with other experts."""

    name: str
    inherited: float | None  # by B's own inputs; None: B has no array to compare, its tokens went elsewhere
    added: float | None  # by B's step on A's inputs; None: one of the two has no such step, or does not show it
    limit: float  # the most that rounding (and storing the weights in fewer bits) would add
    exact: float | None  # added, in float64 with weights rounded alike; None: not run
    verdict: str  # "equal" to the bit, "rounding", "storage", "differs", or "not seen"
    note: str


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
        return shown + html_table([[text] for text in [*self.notes, self.sentence]], ["found"])


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


# -- running -----------------------------------------------------------------------------------------------------


class _Subject(NamedTuple):
    """A model and the way it is run."""

    label: str
    model: "Model"
    ops: Ops
    engine: str
    segments: Array | None

    def stored(self, params: Params) -> "_Subject":
        """The same with other weights."""
        model = copy(self.model)
        model.params = params
        return self._replace(model=model)

    def wide(self) -> "_Subject":
        return self.stored(stored_as(self.model.params, "float64"))

    @property
    def compute(self) -> str:
        return str(np.dtype(self.model.compute_dtype).name)

    def run(self, ids: Array, inputs: Mapping[str, Array] | None = None) -> Arrays:
        """Every array that the steps compute; each is then replaced by that of `inputs`, if it has one."""
        kept: Arrays = {}

        def tap(name: str, array: Array) -> Array:
            kept[name] = np.array(array)
            given = None if inputs is None or name.endswith(".tokens") else inputs.get(name)
            if given is None:
                return array
            if given.shape != array.shape:
                raise ValueError(_other_shape(name, given, array))
            return given.astype(array.dtype)  # a copy: whatever B does with it, A's stays

        if self.engine == "numpy":
            self.model.forward(ids, segments=self.segments, tap=tap, ops=self.ops)
        else:
            self._run_fast(ids, tap)
        return kept

    def _run_fast(self, ids: Array, tap: Callable[[str, Array], Array]) -> None:
        from minglm.fast.engine import Decoder
        from minglm.model.kvcache import KVCache

        config = self.model.config
        decoder = Decoder(self.model.params, config, ids.size)
        segments = np.zeros_like(ids) if self.segments is None else self.segments
        decoder.watch(ids, KVCache(config, batch=len(ids), capacity=ids.shape[1]), tap, segments)


def _other_shape(name: str, a: Array, b: Array) -> str:
    return f"{name} is {list(a.shape)} in A and {list(b.shape)} in B"


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
    ours = _Subject(_label(a, ops_a, "numpy"), a, ops_a, "numpy", segments)
    theirs = _Subject(_label(b, ops_b, engine_b), b, ops_b, engine_b, segments)
    seen, notes = _observe(ours, theirs, ids, float64)
    alike = rounded_alike(a.params, b.params)
    return Diff(
        a=ours.label,
        b=theirs.label,
        ids=ids,
        source=source,
        rows=[row for row in _judge(ours, theirs, ids, seen) if row.name in listed or row.name not in names],
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


class _Seen(NamedTuple):
    """What the runs computed."""

    a: Arrays
    plain: Arrays  # B as it comes
    isolated: Arrays  # B on A's inputs
    floor: tuple[Arrays, Arrays] | None  # A in float64; A in its own dtype on those inputs
    storage: tuple[Arrays, Arrays] | None  # the wider of the two, and with its weights rounded as the other's are
    exact: tuple[Arrays, Arrays] | None  # in float64, weights rounded alike: A; B on A's inputs


def _observe(a: _Subject, b: _Subject, ids: Array, float64: bool) -> tuple[_Seen, list[str]]:
    ours, fused = a.run(ids), b.engine == "fast"
    handed = functools.partial(_boundaries, fused=fused)
    seen = _Seen(ours, b.run(ids), b.run(ids, handed(ours)), None, None, None)
    alike, notes = rounded_alike(a.model.params, b.model.params), []
    seen = seen._replace(storage=_storage(a, b, ids, seen, alike, handed(ours)))
    if fused:
        notes.append(
            "The fast engine's layers are single kernels: B is seen between them, and each step is judged from its "
            "layer's input, which was A's. There is no float64."
        )
    if alike is None:
        kinds = " and ".join(storage_of(s.model.params) for s in (a, b))
        notes.append(f"{kinds} weights have no common rounding: not repeated in float64, weights not compared.")
    too_large = _too_large(a, b)
    if not float64 or too_large:
        notes.append(f"Not run in float64{': ' + too_large if too_large else ''}; rounding is estimated.")
        return seen, notes
    seen = seen._replace(floor=_floor(a, ids, handed))
    if alike is None or fused:
        return seen, notes
    reference = a.stored(alike[0]).wide().run(ids)
    try:
        seen = seen._replace(exact=(reference, b.stored(alike[1]).wide().run(ids, reference)))
    except (TypeError, ValueError) as error:
        notes.append(f"B does not run in float64 ({error}); only the limits decide.")
    return seen, notes


def _storage(
    a: _Subject, b: _Subject, ids: Array, seen: _Seen, alike: tuple[Params, Params] | None, inputs: Arrays
) -> tuple[Arrays, Arrays] | None:
    """What storing the weights in fewer bits does to the steps of the model that has more."""
    kinds = [storage_of(s.model.params) for s in (a, b)]
    if kinds[0] == kinds[1]:
        return None
    if alike is None:  # two narrow ones: A's weights as B would store them
        return seen.a, a.stored(stored_as(a.model.params, kinds[1])).run(ids, inputs)
    if alike[0] is not a.model.params:
        return seen.a, a.stored(alike[0]).run(ids, inputs)
    return seen.isolated, b.stored(alike[1])._replace(engine="numpy").run(ids, inputs)


def _floor(a: _Subject, ids: Array, handed: Callable[[Arrays], Arrays]) -> tuple[Arrays, Arrays]:
    """A in float64, and each step in float32 on its arrays: how far A's own rounding moves it."""
    reference = a.wide().run(ids)
    narrow = a.stored(stored_as(a.model.params, "float32")) if a.compute == "float64" else a
    return reference, narrow.run(ids, handed(reference))


def _boundaries(arrays: Arrays, fused: bool) -> Arrays:
    """What is handed to the steps: everything, or of fused layers only the stream between them."""
    if not fused:
        return arrays
    return {name: array for name, array in arrays.items() if re.fullmatch(r"layers\.\d+\.out", name)}


def _too_large(a: _Subject, b: _Subject) -> str:
    needed = 16 * max(s.model.config.count_parameters().total for s in (a, b))
    free = free_memory()
    return "" if free is None or needed < free else f"{needed / 1e9:,.1f} GB of weights, {free / 1e9:,.1f} GB are free"


# -- comparing ---------------------------------------------------------------------------------------------------


def distance(a: Array, b: Array, scale: Array | None = None) -> float:
    """max |a − b| / max |scale| (by default a's), over numbers that are finite in all; infinite if −∞, the mark of
    hidden keys and closed groups, or NaN stand elsewhere in a than in b."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    seen = np.isfinite(x)
    odd_x, odd_y = x[~seen], y[~seen]
    if not np.array_equal(seen, np.isfinite(y)) or not ((odd_x == odd_y) | (np.isnan(odd_x) & np.isnan(odd_y))).all():
        return math.inf
    apart = float(np.abs(x[seen] - y[seen]).max(initial=0))
    of = np.asarray(a if scale is None else scale, np.float64)
    size = float(np.abs(of[np.isfinite(of)]).max(initial=0))
    return 0.0 if apart == 0 else apart / size if size else math.inf


def _set_distance(a: Array, b: Array) -> Array:  # [N, K] ×2 -> bool [N]
    """Tokens whose sets of experts differ; the order within a token does not count."""
    return (np.sort(a, axis=-1) != np.sort(b, axis=-1)).any(axis=-1)


def _between(name: str, x: Arrays, y: Arrays, scale: Arrays, keep: Array | None = None) -> float | None:
    """The distance of y's array from x's as a share of scale's: where tokens chose different experts, of what can be
    compared. None if nothing can. `keep` bool [N]: only these tokens."""
    if name not in x or name not in y:
        return None
    ours, theirs, of = x[name], y[name], scale.get(name, x[name])
    if name.endswith("expert_indices"):
        return float(_tokens(_set_distance(ours, theirs), keep).mean())
    if name.endswith("expert_weights"):  # by expert's number: the ranks may hold different experts
        indices = name.replace("weights", "indices")
        E = 1 + int(max(x[indices].max(), y[indices].max()))
        ours, theirs = (_by_expert(arrays[name], arrays[indices], E) for arrays in (x, y))
    if m := re.match(r"(.*\.experts\.\d+\.)", name):
        _, at_x, at_y = np.intersect1d(x[m[1] + "tokens"], y[m[1] + "tokens"], return_indices=True)
        return distance(ours[at_x], theirs[at_y], of) if len(at_x) else None
    if ours.shape != theirs.shape:
        raise ValueError(_other_shape(name, ours, theirs))
    return distance(_tokens(ours, keep), _tokens(theirs, keep), of)


def _tokens(array: Array, keep: Array | None) -> Array:
    """The rows [N, …] or [B, T, …] of these tokens."""
    if keep is None or keep.all():
        return array
    return array.reshape(keep.size, -1)[keep]


def _by_expert(weights: Array, indices: Array, E: int) -> Array:  # [N, K] ×2 -> [N, E]
    spread = np.zeros((len(weights), E), weights.dtype)
    np.put_along_axis(spread, indices, weights, axis=-1)
    return spread


def _margins(arrays: Arrays, name: str) -> Array:  # -> [N]
    """K-th minus next biased score of each token, at the layer of this tap."""
    biased, K = arrays[f"{name.rpartition('.')[0]}.biased_scores"], arrays[name].shape[-1]
    if biased.shape[-1] == K:
        return np.full(len(biased), np.inf)
    ranked = -np.sort(-biased, axis=-1)
    return np.asarray(ranked[:, K - 1] - ranked[:, K])


# -- judging -----------------------------------------------------------------------------------------------------


def _judge(a: _Subject, b: _Subject, ids: Array, seen: _Seen) -> list[DiffRow]:
    shape_b = {tap.name for tap in expected_taps(b.model.config, *ids.shape)}
    order = [tap.name for tap in expected_taps(a.model.config, *ids.shape)]
    only_b = [name for name in seen.plain if name not in order and ".experts." not in name]
    near_ties = {} if b.engine == "numpy" else _near_ties(seen, _unit(a, b))
    rows = []
    for name in [*order, *only_b]:
        if name.endswith(".tokens") or (b.engine == "fast" and name not in seen.plain):
            continue
        if name in seen.a and name in seen.isolated:
            rows.append(_row(name, a, b, seen, near_ties.get(_layer(name))))
        elif name in only_b or name not in shape_b:
            where = "B" if name in only_b else "A"
            rows.append(DiffRow(name, None, None, 0.0, None, "differs", f"only {where} has this step"))
        elif name in seen.a:
            rows.append(DiffRow(name, None, None, 0.0, None, "not seen", "B's function does not tap it"))
    return rows


def _row(name: str, a: _Subject, b: _Subject, seen: _Seen, keep: Array | None) -> DiffRow:
    added = _between(name, seen.a, seen.isolated, seen.a, keep)
    inherited = _between(name, seen.isolated, seen.plain, seen.a, keep)
    exact = None if seen.exact is None else _between(name, *seen.exact, seen.exact[0])
    if name.endswith("expert_indices"):
        return _index_row(name, seen, inherited, exact, keep)
    assert added is not None
    rounding = SLACK * max(_unit(a, b), _measured(name, a, b, seen, keep))
    limit = rounding if seen.storage is None else rounding + 2 * _pair(name, seen.storage, keep)  # 2: rounded twice
    decided, most = (added, limit) if exact is None else (exact, rounding * _left_in_float64(a, b))
    note = ""
    if not decided <= most:
        verdict = "differs"
        note = (
            "below rounding, seen in float64: a small mistake, or float32 inside"
            if exact is not None and added <= limit
            else ""
        )
    else:
        verdict = "equal" if added == 0 else "rounding" if added <= rounding or seen.storage is None else "storage"
        note = "" if added <= limit else "more than A's own, but gone in float64"
    if math.isinf(added):
        note = "−∞ or NaN stand elsewhere" if seen.a[name].any() else "A is all zeros, B is not"
    if keep is not None and not keep.all():
        note = f"without {np.count_nonzero(~keep)} tokens at near-ties"
    return DiffRow(name, inherited, added, limit, exact, verdict, note)


def _unit(a: _Subject, b: _Subject) -> float:
    """One rounding of a number, in the coarser of the two computations."""
    return max(UNIT[s.compute] for s in (a, b))


def _left_in_float64(a: _Subject, b: _Subject) -> float:
    """The share of a step's rounding that may be left when both are run in float64."""
    return VANISHES if _unit(a, b) == UNIT["float32"] else 1.0


def _measured(name: str, a: _Subject, b: _Subject, seen: _Seen, keep: Array | None) -> float:
    """What A's own step rounds, in the coarser of the two computations: measured in float32. Where there is no float64
    the square root of the longest sum stands for it."""
    if seen.floor is not None:
        return _pair(name, seen.floor, keep) * _unit(a, b) / UNIT["float32"]
    c = a.model.config
    return math.sqrt(max(c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim)) * _unit(a, b)


def _pair(name: str, pair: tuple[Arrays, Arrays], keep: Array | None) -> float:
    """The distance of two runs that both are right; 0 if they have no such array, or hide other keys. Where they let
    tokens choose for themselves, those that chose differently are left out, and so is what `keep` leaves out."""
    indices = f"{_layer(name)}mlp.expert_indices"
    if keep is not None and all(indices in arrays for arrays in pair):
        keep = keep & ~_set_distance(*(arrays[indices] for arrays in pair))
    found = _between(name, *pair, pair[0], keep)
    return found if found is not None and math.isfinite(found) else 0.0


def _index_row(name: str, seen: _Seen, inherited: float | None, exact: float | None, keep: Array | None) -> DiffRow:
    """A choice is right or wrong: B was given A's biased scores (in fused layers: `keep` leaves out near-ties)."""
    other, margins = _set_distance(seen.a[name], seen.isolated[name]), _margins(seen.a, name)
    clear = other & (margins > 0) & (True if keep is None else keep)
    note = ""
    for what, tokens in (("inherited", _set_distance(seen.isolated[name], seen.plain[name])), ("added", other)):
        if tokens.any():
            share = f"{np.count_nonzero(tokens)} of {len(tokens)} tokens"
            note = f"{what}: {share} go to other experts, margins up to {margins[tokens].max():.1e}"
    verdict = "differs" if clear.any() else "rounding" if other.any() else "equal"
    return DiffRow(name, inherited, float(other.mean()), 0.0, exact, verdict, note)


def _near_ties(seen: _Seen, unit: float) -> dict[str, Array]:
    """Of fused layers, which choose for themselves: the tokens [N] to compare, by layer. Left out are those with other
    experts whose margin is below what their scores may be off by."""
    found = {}
    for name in seen.isolated:
        if name.endswith("expert_indices"):
            scores = f"{name.rpartition('.')[0]}.router_scores"
            slack = SLACK * unit
            if seen.floor is not None:
                slack = SLACK * max(unit, distance(*(arrays[scores] for arrays in seen.floor)))
            if seen.storage is not None:
                slack += 2 * distance(*(arrays[scores] for arrays in seen.storage))
            other = _set_distance(seen.a[name], seen.isolated[name])
            found[_layer(name)] = ~(other & (_margins(seen.a, name) <= 2 * slack))
    return found


def _layer(name: str) -> str:
    m = re.match(r"layers\.\d+\.", name)
    return m[0] if m else ""


# -- in words ----------------------------------------------------------------------------------------------------

_HEADER = ("step", "inherited", "added", "limit", "in float64", "verdict", "")
_MOST = 24  # steps that differ, in a compact table


def _lines(found: Diff, every: bool) -> list[tuple[str, ...]]:
    """Rows as text. But for `every`, neighbours of one layer within rounding share a line with their largest errors."""
    groups: list[list[DiffRow]] = []
    for row in found.rows:
        alone = every or row.verdict in ("differs", "not seen")
        last = groups[-1][-1] if groups else None
        if alone or last is None or last.verdict in ("differs", "not seen") or _layer(last.name) != _layer(row.name):
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
        name = f"{name} … {group[-1].name.removeprefix(_layer(name))} ({len(group)} steps)"
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
    if found.fused and _layer(row.name):
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
    shown = ", ".join(kinds[: 4 if len(kinds) > 5 else 5]) + (
        f" and {len(kinds) - 4} more kinds" if len(kinds) > 5 else ""
    )
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
