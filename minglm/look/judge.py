"""How two models are run, measured and judged step by step, for `minglm.look.diff`."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minglm.formats.memory import free_memory
from minglm.look.parts import rounded_alike, storage_of, stored_as
from minglm.look.taps import expected_taps
from minglm.model.ops import Array, Ops
from minglm.model.params import Moe, Params

if TYPE_CHECKING:
    from minglm.api import Model

SLACK = 10  # a step may round so many times as much as A's own: another order of sums, a lucky draw
VANISHES = 2.0**-20  # rounding falls by 2⁻²⁹ from float32 to float64, a mistake stays: between the two, with room
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}  # half the distance from 1 to the next number

USED = " used"  # after the name of expert_indices: those that a run went on with, where they were not its own

Arrays = dict[str, Array]


class DiffRow(NamedTuple):
    """One step. Errors are max |b − a| / max |a|; of expert_indices the share of tokens with other experts."""

    name: str
    inherited: float | None  # by B's own inputs; None: B has no array to compare, its tokens went elsewhere
    added: float | None  # by B's step on A's inputs; None: one of the two has no such step, or does not show it
    limit: float  # the most that rounding (and storing the weights in fewer bits) would add
    exact: float | None  # added, in float64 with weights rounded alike; None: not run
    verdict: str  # "equal" to the bit, "rounding", "storage", "differs", or "not seen"
    note: str


# -- running -----------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model and the way it is run."""

    label: str
    model: "Model"
    ops: Ops
    engine: str
    segments: Array | None

    def stored(self, params: Params) -> "Subject":
        """The same with other weights."""
        model = copy(self.model)
        model.params = params
        return self._replace(model=model)

    def wide(self) -> "Subject":
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
                raise ValueError(other_shape(name, given, array))
            if name.endswith("expert_indices"):
                kept[name + USED] = given
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


def other_shape(name: str, a: Array, b: Array) -> str:
    return f"{name} is {list(a.shape)} in A and {list(b.shape)} in B"


class Seen(NamedTuple):
    """What the runs computed."""

    a: Arrays
    plain: Arrays  # B as it comes
    isolated: Arrays  # B on A's inputs
    floor: tuple[Arrays, Arrays] | None  # A in float64; A in its own dtype on those inputs
    storage: tuple[Arrays, Arrays] | None  # the wider of the two, and with its weights rounded as the other's are
    exact: tuple[Arrays, Arrays] | None  # in float64, weights rounded alike: A; B on A's inputs


def observe(a: Subject, b: Subject, ids: Array, float64: bool) -> tuple[Seen, list[str]]:
    """All runs that there is something to learn from, and what is to be said of those that there are not."""
    ours, fused = a.run(ids), b.engine == "fast"
    handed = functools.partial(_boundaries, fused=fused)
    seen = Seen(ours, b.run(ids), b.run(ids, handed(ours)), None, None, None)
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
    a: Subject, b: Subject, ids: Array, seen: Seen, alike: tuple[Params, Params] | None, inputs: Arrays
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


def _floor(a: Subject, ids: Array, handed: Callable[[Arrays], Arrays]) -> tuple[Arrays, Arrays]:
    """A in float64, and each step in float32 on its arrays: how far A's own rounding moves it."""
    reference = a.wide().run(ids)
    narrow = a.stored(stored_as(a.model.params, "float32")) if a.compute == "float64" else a
    return reference, narrow.run(ids, handed(reference))


def _boundaries(arrays: Arrays, fused: bool) -> Arrays:
    """What is handed to the steps: everything, or of fused layers only the stream between them."""
    if not fused:
        return arrays
    return {name: array for name, array in arrays.items() if re.fullmatch(r"layers\.\d+\.out", name)}


def _too_large(a: Subject, b: Subject) -> str:
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
        picks = [arrays.get(indices + USED, arrays[indices]) for arrays in (x, y)]
        E = 1 + int(max(each.max() for each in picks))
        ours, theirs = (_by_expert(weights, at, E) for weights, at in zip((ours, theirs), picks, strict=True))
    if m := re.match(r"(.*\.experts\.\d+\.)", name):
        _, at_x, at_y = np.intersect1d(x[m[1] + "tokens"], y[m[1] + "tokens"], return_indices=True)
        return distance(ours[at_x], theirs[at_y], of) if len(at_x) else None
    if ours.shape != theirs.shape:
        raise ValueError(other_shape(name, ours, theirs))
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


def _group_margins(scores: Array, model: "Model", name: str) -> Array:  # [N, E] -> [N]
    """The last open group's sum of two scores minus that of the best closed one."""
    c = model.config
    if c.topk_group == c.n_group:
        return np.full(len(scores), np.inf)
    mlp = model.params.layers[int(name.split(".")[1])].mlp
    assert isinstance(mlp, Moe)
    groups = (scores + mlp.gate.e_score_correction_bias).reshape(len(scores), c.n_group, -1)
    ranked = -np.sort(-np.sort(groups, axis=-1)[:, :, -2:].sum(axis=-1), axis=-1)
    return np.asarray(ranked[:, c.topk_group - 1] - ranked[:, c.topk_group])


# -- judging -----------------------------------------------------------------------------------------------------


def judge(a: Subject, b: Subject, ids: Array, seen: Seen) -> list[DiffRow]:
    """A row for each step of A or B, in A's order."""
    shape_b = {tap.name for tap in expected_taps(b.model.config, *ids.shape)}
    order = [tap.name for tap in expected_taps(a.model.config, *ids.shape)]
    only_b = [name for name in seen.plain if name not in order and ".experts." not in name]
    near_ties = {} if b.engine == "numpy" else _near_ties(seen, a.model, _unit(a, b))
    rows = []
    for name in [*order, *only_b]:
        if name.endswith(".tokens") or (b.engine == "fast" and name not in seen.plain):
            continue
        if name in seen.a and name in seen.isolated:
            rows.append(_row(name, a, b, seen, near_ties.get(layer_of(name))))
        elif name in only_b or name not in shape_b:
            where = "B" if name in only_b else "A"
            rows.append(DiffRow(name, None, None, 0.0, None, "differs", f"only {where} has this step"))
        elif name in seen.a:
            rows.append(DiffRow(name, None, None, 0.0, None, "not seen", "B's function does not tap it"))
    return rows


def _row(name: str, a: Subject, b: Subject, seen: Seen, keep: Array | None) -> DiffRow:
    added = _between(name, seen.a, seen.isolated, seen.a, keep)
    inherited = _between(name, seen.isolated, seen.plain, seen.a, keep)
    exact = None if seen.exact is None else _between(name, *seen.exact, seen.exact[0])
    if name.endswith("expert_indices"):
        tie = 0.0 if a.compute == b.compute else 4 * _unit(a, b)  # A's scores, narrowed, may tie
        return _index_row(name, seen, inherited, exact, keep, tie)
    assert added is not None
    rounding = SLACK * max(_unit(a, b), _measured(name, a, b, seen, keep))
    limit = rounding if seen.storage is None else rounding + 2 * _pair(name, seen.storage, keep)  # 2: rounded twice
    decided, most = (added, limit) if exact is None else (exact, rounding * _left_in_float64(a, b))
    dtypes = seen.a[name].dtype.name, seen.isolated[name].dtype.name
    note = f"A computes {dtypes[0]}, B {dtypes[1]}" if dtypes[0] != dtypes[1] and a.compute == b.compute else ""
    if not decided <= most:
        verdict = "differs"
        if added <= limit:
            note = "below rounding, seen in float64: a small mistake, or float32 inside"
    else:
        verdict = "equal" if added == 0 else "rounding" if added <= rounding or seen.storage is None else "storage"
        if added > limit:
            note = "more than A's own, but gone in float64"
    if math.isinf(added):
        note = "−∞ or NaN stand elsewhere" if seen.a[name].any() else "A is all zeros, B is not"
    if keep is not None and not keep.all():
        note = f"without {np.count_nonzero(~keep)} tokens at near-ties"
    return DiffRow(name, inherited, added, limit, exact, verdict, note)


def _unit(a: Subject, b: Subject) -> float:
    """One rounding of a number, in the coarser of the two computations."""
    return max(UNIT[s.compute] for s in (a, b))


def _left_in_float64(a: Subject, b: Subject) -> float:
    """The share of a step's rounding that may be left when both are run in float64."""
    return VANISHES if _unit(a, b) == UNIT["float32"] else 1.0


def _measured(name: str, a: Subject, b: Subject, seen: Seen, keep: Array | None) -> float:
    """What A's own step rounds, in the coarser of the two computations: measured in float32. Where there is no float64
    the square root of the longest sum stands for it."""
    if seen.floor is not None:
        return _pair(name, seen.floor, keep) * _unit(a, b) / UNIT["float32"]
    c = a.model.config
    return math.sqrt(max(c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim)) * _unit(a, b)


def _pair(name: str, pair: tuple[Arrays, Arrays], keep: Array | None) -> float:
    """The distance of two runs that both are right; 0 if they have no such array, or hide other keys. Where they let
    tokens choose for themselves, those that chose differently are left out, and so is what `keep` leaves out."""
    indices = f"{layer_of(name)}mlp.expert_indices"
    if keep is not None and all(indices in arrays for arrays in pair):
        keep = keep & ~_set_distance(*(arrays[indices] for arrays in pair))
    found = _between(name, *pair, pair[0], keep)
    return found if found is not None and math.isfinite(found) else 0.0


def _index_row(
    name: str, seen: Seen, inherited: float | None, exact: float | None, keep: Array | None, tie: float
) -> DiffRow:
    """A choice is right or wrong: B was given A's biased scores (in fused layers: `keep` leaves out near-ties)."""
    other, margins = _set_distance(seen.a[name], seen.isolated[name]), _margins(seen.a, name)
    clear = other & (margins > tie) & (True if keep is None else keep)
    note = ""
    for what, tokens in (("inherited", _set_distance(seen.isolated[name], seen.plain[name])), ("added", other)):
        if tokens.any():
            share = f"{np.count_nonzero(tokens)} of {len(tokens)} tokens"
            note = f"{what}: {share} go to other experts, margins up to {margins[tokens].max():.1e}"
    verdict = "differs" if clear.any() else "rounding" if other.any() else "equal"
    return DiffRow(name, inherited, float(other.mean()), 0.0, exact, verdict, note)


def _near_ties(seen: Seen, model: "Model", unit: float) -> dict[str, Array]:
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
            margins = np.minimum(_margins(seen.a, name), _group_margins(seen.a[scores], model, name) / 2)
            found[layer_of(name)] = ~(other & (margins <= 2 * slack))
    return found


def layer_of(name: str) -> str:
    m = re.match(r"layers\.\d+\.", name)
    return m[0] if m else ""
