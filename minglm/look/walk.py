"""A forward pass walked through in both directions.

On, into, back, to a place, until something holds; change a number and see what follows. `model.step(prompt)` starts
one, `minglm step MODEL "prompt"` is its terminal. The pass is run once and kept, so that going back is as exact as
going on; an edit runs it again with the changed number, and `script()` writes the whole walk down as plain Python.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minglm.look.conditions import Condition
from minglm.look.formulas import FORMULAS, line_of, spec_of
from minglm.look.taps import SPECS
from minglm.look.trace import Trace
from minglm.look.why import Why, why
from minglm.model.ops import Array

if TYPE_CHECKING:
    from minglm.api import Model

_SHORT = {"w": "expert_weights", "experts": "expert_indices", "indices": "expert_indices"}
_NUMBER = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|inf|∞)|nan"


class Edit(NamedTuple):
    """One number, or one slice, that the walk goes on with instead of what was computed."""

    name: str
    place: Any  # an index or slices, as NumPy takes them
    value: float

    def holds(self, index: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether it changed this number of an array of this shape."""
        changed = np.zeros(shape, bool)
        changed[self.place] = True
        return bool(changed[index])


class Place(NamedTuple):
    """Where the walk stands."""

    number: int  # from 1
    of: int
    name: str
    idea: str  # "layer 1, router"
    shape: str  # "[N = 5, K = 2]"
    what: str
    formula: str
    line: str
    numbers: str  # mean, spread, smallest, largest
    changed: str  # "" or how far from the walk without edits

    def __str__(self) -> str:
        head = f"{self.number} of {self.of}  {self.name} {self.shape}  ({self.idea})"
        return "\n".join(
            filter(
                None, [head, f"  {self.what}", f"  {self.formula}", f"  {self.line}", f"  {self.numbers}", self.changed]
            )
        )

    def __repr__(self) -> str:
        return str(self)


class Walk:
    """Made by `Model.step`. Every move returns the `Place` it leads to; the notebook and the terminal show it."""

    def __init__(self, model: "Model", ids: Array, limit: float = 2e9):
        self.model, self.ids, self.limit = model, ids, limit
        self.edits: list[Edit] = []
        self.plain = self.trace = self._run([])  # without edits; with them
        self.at = 0
        self._visited: list[int] = []
        self._log: list[str] = []  # lines of the script

    # -- where we are ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The steps in the order of the computation."""
        return self.trace.names()

    @property
    def name(self) -> str:
        """The step that the walk stands at."""
        return self.names[self.at]

    @property
    def array(self) -> Array:
        """What it computed."""
        return self.trace[self.name]

    def where(self) -> Place:
        """The step, its formula, its line of the book, its numbers."""
        name, array = self.name, self.array
        spec = spec_of(name, self.model.config.num_hidden_layers)
        tap = SPECS[spec]
        shape = ", ".join(f"{letter} = {n}" for letter, n in zip(tap.axes.split(), array.shape, strict=True))
        return Place(
            self.at + 1, len(self.names), name, idea_of(name), f"[{shape}]", tap.what, FORMULAS[spec],
            str(line_of(spec)), _numbers(array), self._changed(name),
        )  # fmt: skip

    def __repr__(self) -> str:
        return str(self.where())

    def _changed(self, name: str) -> str:
        if not self.edits:
            return ""
        if not same_tokens(name, self.plain, self.trace):
            return "  other tokens are here than without the edits"
        a, b = self.plain[name], self.trace[name]
        differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
        if not differs.any():
            return "  the same as without the edits"
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(b[differs].astype(np.float64) - a[differs])
        known = apart[np.isfinite(apart)]
        far = f", by up to {known.max():.3g}" if known.size else ""
        odd = f", {apart.size - known.size} of them to or from ∞ or NaN" if known.size < apart.size else ""
        return f"  {apart.size} of {a.size} numbers differ from the walk without edits{far}{odd}"

    # -- moves -------------------------------------------------------------------------------------------------------

    def into(self) -> Place:
        """One step on, however small."""
        return self._go(min(self.at + 1, len(self.names) - 1))

    def next(self) -> Place:
        """To the end of the next idea: over the parts of attention, of the router, of the experts."""
        ideas = [idea_of(name) for name in self.names]
        begin = next((i for i in range(self.at + 1, len(ideas)) if ideas[i] != ideas[self.at]), len(ideas) - 1)
        end = next((i for i in range(begin + 1, len(ideas)) if ideas[i] != ideas[begin]), len(ideas)) - 1
        return self._go(end)

    def back(self) -> Place:
        """To where the walk stood before the last move."""
        while self._visited:
            left, self.at = self.at, self._visited.pop()
            if self.at != left:  # after an edit that took steps away, two places may have become one
                break
        return self.where()

    def to(self, target: str | int) -> Place:
        """To a step by its full or short name, or to a layer by its number: the next one ahead, or else the first.

        Raises ValueError if there is none.
        """
        text = str(target).strip()
        if not text:
            raise ValueError("to wants a step or a layer: to router_scores, to 2")
        if m := re.fullmatch(r"(?:layer\s*=?\s*)?(\d+)", text):
            fitting = [i for i, name in enumerate(self.names) if name.startswith(f"layers.{m[1]}.")][:1]
            if not fitting:
                last = self.model.config.num_hidden_layers - 1
                raise ValueError(f"there is no layer {m[1]:.20}; they are 0 … {last}")
        else:
            fitting = self._called(text)
        return self._go(next((i for i in fitting if i > self.at), fitting[0]))

    def until(self, condition: str) -> Place:
        """On to the next step at which a condition holds: "margin < 0.01", "max > 100", "nan > 0 and layer >= 2".

        The quantities are those of `minglm.look.conditions`. Raises ValueError if it is none, or never holds from here.
        """
        asked = Condition(condition)
        K = self.model.config.num_experts_per_tok
        for i in range(self.at + 1, len(self.names)):
            if asked.holds(self.names[i], self.trace[self.names[i]], K):
                return self._go(i)
        raise ValueError(f"{condition!r:.80} does not hold at any later step; the walk stays where it is")

    def _go(self, i: int) -> Place:
        if i != self.at:
            self._visited.append(self.at)
            self.at = i
        return self.where()

    # -- looking -----------------------------------------------------------------------------------------------------

    def look(self, text: str = "") -> Array:
        """An array or part of it, by name and place: "w", "w[5, 1]", "probs H=2 T=5", "q[0, :, 3]"; nothing: this step.

        A short name is that of the nearest step up to here. Raises ValueError for a name or place that is not there.
        """
        name, place = self.find(text)
        self._log.append(f"print(trace[{name!r}]{_written(place)})")
        return np.array(self.trace[name][place])

    def why(self, text: str = "") -> Why:
        """One number as the formula with its numbers: why("w[5, 1]"). Raises ValueError as `look` does."""
        name, place = self.find(text)
        if len(place) < self.trace[name].ndim or not all(isinstance(i, int) for i in place):
            shape = list(self.trace[name].shape)
            raise ValueError(
                f"why takes one number: {name} has the shape {shape}, write {name.split('.')[-1]}[{_example(shape)}]"
            )
        self._log.append(f"print(why(model, trace, ids, {name!r}, {place}))")
        opened = why(self.model, self.trace, self.ids, name, place)
        if any(edit.name == name and edit.holds(place, self.trace[name].shape) for edit in self.edits):
            return opened._replace(formula=f"{opened.formula}; edited here, so the formula makes another number")
        return opened

    def find(self, text: str) -> tuple[str, Any]:
        """The full name of a step and a place in it, as NumPy takes it, from a text such as "w[5, 1]"."""
        m = re.fullmatch(r"\s*([\w.]*)\s*(\[.*\])?\s*((?:\w\s*=\s*[-\d:]+\s*,?\s*)*)", text)
        if m is None:
            raise ValueError(f"{text!r:.80}: wanted a name and a place, such as w[5, 1] or probs H=2 T=5")
        name = self._named(m[1])
        inner = (m[2] or "")[1:-1]
        by_letter = m[3] or (inner if "=" in inner else "")
        return name, self._by_letter(name, by_letter) if by_letter else self._by_place(name, inner)

    def _named(self, text: str) -> str:
        if not text:
            return self.name
        fitting = self._called(text)
        return self.names[max((i for i in fitting if i <= self.at), default=fitting[0])]

    def _called(self, text: str) -> list[int]:
        """The steps of this name, full or short. Raises ValueError if there is none."""
        wanted = _SHORT.get(text, text)
        if wanted == "stream":  # between the layers; other steps are called "out" too
            fitting = [i for i, name in enumerate(self.names) if re.fullmatch(r"embed_tokens|layers\.\d+\.out", name)]
        else:
            fitting = [i for i, name in enumerate(self.names) if name == wanted or name.endswith(f".{wanted}")]
        if not fitting:
            silent = "; an expert that no token picked has no steps" if "experts." in text else ""
            raise ValueError(f"no step is called {text!r:.80}; `list` shows the names{silent}")
        return fitting

    def _axes(self, name: str) -> list[str]:
        return SPECS[spec_of(name, self.model.config.num_hidden_layers)].axes.split()

    def _by_place(self, name: str, inner: str) -> Any:
        shape, axes = self.trace[name].shape, self._axes(name)
        parts = [part.strip() for part in inner.split(",")] if inner.strip() else []
        if len(parts) > len(shape):
            raise ValueError(f"{name} has {len(shape)} axes ({' '.join(axes)}), {inner!r:.80} names {len(parts)}")
        return tuple(_index(part, n, f"{name}, axis {a}") for part, n, a in zip(parts, shape, axes, strict=False))

    def _by_letter(self, name: str, text: str) -> Any:
        axes = self._axes(name)
        pairs = re.findall(r"(\w)\s*=\s*([-\d:]+)", text)
        given = dict(pairs)
        if len(given) < len(pairs):
            raise ValueError(f"{text.strip()!r:.80} names an axis twice")
        if "N" in axes and "T" in given and len(self.ids) == 1:
            given["N"] = given.pop("T")  # of one row: the same
        if unknown := set(given) - set(axes):
            raise ValueError(f"{name} has the axes {' '.join(axes)}, not {' '.join(sorted(unknown))}")
        shape = self.trace[name].shape
        return tuple(_index(given.get(a, ":"), n, f"{name}, axis {a}") for a, n in zip(axes, shape, strict=True))

    # -- changing ----------------------------------------------------------------------------------------------------

    def edit(self, text: str) -> Place:
        """Change a number, or all numbers of a slice, and go on with it: edit("w[5, 1] = 0.9").

        Everything after it is computed anew. Raises ValueError for what cannot be changed; nothing is changed then.
        """
        m = re.fullmatch(rf"\s*(.+?)\s*=\s*({_NUMBER})\s*", text.replace("−", "-"), re.IGNORECASE)
        if m is None or (m[1].count("[") != m[1].count("]")):
            raise ValueError(f"{text!r:.80}: wanted NAME[PLACE] = NUMBER, such as w[5, 1] = 0.9")
        name, place = self.find(m[1])
        value = float(m[2].replace("∞", "inf"))
        _check_fits(value, name, self.trace[name][place])
        self._continue([*self.edits, Edit(name, place, value)])
        self._log += [f"EDITS.append(({name!r}, {_tuple(place)}, {_plain(value)}))", _AGAIN]
        return self.where()

    def undo(self) -> Place:
        """Take the last edit back. Raises ValueError if there is none."""
        if not self.edits:
            raise ValueError("nothing was edited")
        self._continue(self.edits[:-1])
        self._log += ["EDITS.pop()", _AGAIN]
        return self.where()

    def _continue(self, edits: list[Edit]) -> None:
        """With these edits, at the same step; if its expert is not picked any more, at the last one before it that is
        still there. Nothing changes if the pass cannot be run."""
        before, trace = self.trace, self._run(edits)
        for edit in edits:
            if not same_tokens(edit.name, before, trace):
                raise ValueError(
                    f"this would send other tokens to the expert of your edit of {edit.name}; undo that first"
                )
        self.edits, self.trace = edits, trace
        old, now = before.names(), {name: i for i, name in enumerate(trace.names())}

        def still_there(i: int) -> int:
            return next(now[name] for name in reversed(old[: i + 1]) if name in now)

        self.at, self._visited = still_there(self.at), [still_there(i) for i in self._visited]

    def _run(self, edits: list[Edit]) -> Trace:
        with np.errstate(all="ignore"):  # NaN and ∞ are shown, not warned of
            return self.model.trace(self.ids, tap=tap_of(edits) if edits else None, limit=self.limit)

    # -- keeping -----------------------------------------------------------------------------------------------------

    def script(self) -> str:
        """The walk as plain Python: what was looked at, and the edits as a tap, in their order. The same bits come out.

        Of a model that was not loaded from a folder the script says that it must be made there.
        """
        needs_why = any(line.startswith("print(why(") for line in self._log)
        imports = "import numpy as np\n\nimport minglm\n" + ("from minglm.look.why import why\n" if needs_why else "")
        lines = self._log if any(line.startswith("print(") for line in self._log) else [*self._log, self._here()]
        return _SCRIPT.format(imports=imports, model=self._loading(), ids=self.ids.tolist(), lines="\n".join(lines))

    def _here(self) -> str:
        return f"print(trace[{self.name!r}])"

    def _loading(self) -> str:
        """The line that makes this model again."""
        model = self.model
        if model.folder is None:
            return f"model = ...  # {model.name!r} came from no folder: make it here as you did before"
        kept = "" if model.storage == "float32" else f", dtype={model.storage!r}"
        shipped = model.folder.parent in [parent / "weights" for parent in Path(__file__).resolve().parents[1:3]]
        return f"model = minglm.load({model.name if shipped else str(model.folder)!r}{kept})"


_AGAIN = "trace = model.trace(ids, tap=tap)"
BEGINS = '"""A walk through a forward pass, written by minglm step.'
_SCRIPT = '''"""A walk through a forward pass, written by minglm step."""

{imports}
{model}
ids = np.array({ids})

EDITS = []  # step, place, the number to go on with


def tap(name, array):
    for edited, place, value in EDITS:
        if name == edited:
            array = array.copy()
            array[place] = value
    return array


trace = model.trace(ids, tap=tap)
{lines}
'''


def tap_of(edits: list[Edit]) -> Any:
    """A tap that makes these changes, in their order."""

    def tap(name: str, array: Array) -> Array | None:
        mine = [edit for edit in edits if edit.name == name]
        if not mine:
            return None
        array = array.copy()
        for edit in mine:
            try:
                array[edit.place] = edit.value
            except IndexError:
                raise ValueError(f"your edit of {name} has no place any more; undo that first") from None
        return array

    return tap


def idea_of(name: str) -> str:
    """What a step belongs to: "layer 1, attention"."""
    m = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if m is None:
        return {"embed_tokens": "embedding", "norm": "final norm", "logits": "head"}[name]
    rest = m[2]
    for beginning, idea in _IDEAS:
        if rest.startswith(beginning):
            return f"layer {m[1]}, {idea}"
    return f"layer {m[1]}, {'MLP' if rest.startswith('mlp.') else rest}"


_IDEAS = (
    ("input_layernorm", "norm before attention"), ("self_attn.", "attention"), ("middle", "residual after attention"),
    ("post_attention_layernorm", "norm before the MLP"), ("mlp.router", "router"), ("mlp.biased", "router"),
    ("mlp.expert_", "router"), ("mlp.experts.", "experts"), ("mlp.routed", "experts"), ("mlp.shared", "shared expert"),
    ("mlp.out", "what the MLP adds"), ("out", "residual after the MLP"),
)  # fmt: skip


def steps_of(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Ideas with their steps, in order."""
    idea, held = "", list[str]()
    for name in names:
        if idea_of(name) != idea and held:
            yield idea, held
            held = []
        idea = idea_of(name)
        held.append(name)
    if held:
        yield idea, held


def same_tokens(name: str, a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    """Whether a step has the same rows in both: an expert's are those of the tokens that picked it."""
    if ".mlp.experts." not in name:
        return True
    tokens = f"{name.rsplit('.', 1)[0]}.tokens"
    return tokens in a and tokens in b and np.array_equal(a[tokens], b[tokens])


def _check_fits(value: float, name: str, numbers: Array) -> None:
    """Raises ValueError for a number that an array cannot hold, and for a place that holds none."""
    if not numbers.size:
        raise ValueError(f"there is no number of {name} at that place")
    if numbers.dtype.kind in "iu":
        if not (value.is_integer() and abs(value) < 2**53):
            raise ValueError(f"{name} holds whole numbers, {value:g} is none that fits")
    elif np.isfinite(value) and abs(value) > float(np.finfo(numbers.dtype).max):
        raise ValueError(f"{value:g} is too large for {numbers.dtype}; write inf for ∞")


def _index(text: str, n: int, where: str) -> Any:
    if ":" in text:
        try:
            parts = slice(*(int(part) if part.strip() else None for part in text.split(":")))
        except (ValueError, TypeError):
            raise ValueError(f"{text!r:.80} is no slice; wanted something like 2:5") from None
        if parts.step == 0:
            raise ValueError(f"{text!r:.80}: the step of a slice cannot be 0")
        return parts
    if not re.fullmatch(r"-?\d+", text):
        raise ValueError(f"{text!r:.80} is no whole number")
    if len(text) > 18 or not -n <= int(text) < n:
        raise ValueError(f"{where}: {text:.20} is outside of 0 … {n - 1}")
    return int(text) % n


def _tuple(place: Any) -> str:
    return f"({' '.join(f'{_part(i)},' for i in place)})"


def _part(i: Any) -> str:
    return str(i) if isinstance(i, int) else f"slice({i.start}, {i.stop}, {i.step})"


def _written(place: Any) -> str:
    return f"[{_tuple(place)}]" if place else ""


def _plain(value: float) -> str:
    return repr(value) if np.isfinite(value) else f'float("{value}")'


def _example(shape: list[int]) -> str:
    return ", ".join(str(min(1, n - 1)) for n in shape)


def _numbers(array: Array) -> str:
    if array.dtype.kind in "iu":
        return f"whole numbers, {array.min()} … {array.max()}"
    kinds = (("−∞", np.isneginf(array)), ("∞", np.isposinf(array)), ("NaN", np.isnan(array)))
    odd = [f"{mask.sum()} × {what}" for what, mask in kinds if mask.any()]
    known = array[np.isfinite(array)].astype(np.float64)
    if not known.size:
        return ", ".join(odd)
    with np.errstate(over="ignore"):
        said = f"mean {known.mean():.4g}, sd {known.std():.4g}, {known.min():.4g} … {known.max():.4g}"
    return ", ".join([said, *odd])
