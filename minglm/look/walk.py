"""A forward pass walked through in both directions.

On, into, back, to a place, until something holds; change a number and see what follows. `model.step(prompt)` starts
one, `minglm step MODEL "prompt"` is its terminal. The pass is run once and kept, so that going back is as exact as
going on; an edit runs it again with the changed number, and `script()` writes the whole walk down as plain Python.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minglm.look.conditions import Condition
from minglm.look.formulas import FORMULAS, line_of, spec_of
from minglm.look.taps import TAPS
from minglm.look.trace import Trace
from minglm.look.why import Why, why
from minglm.model.ops import Array

if TYPE_CHECKING:
    from minglm.api import Model

_SPECS = {tap.name: tap for tap in TAPS}
_SHORT = {"w": "expert_weights", "experts": "expert_indices", "indices": "expert_indices", "stream": "out"}


class Edit(NamedTuple):
    """One number, or one slice, that the walk goes on with instead of what was computed."""

    name: str
    place: Any  # an index or slices, as NumPy takes them
    value: float


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
        self.plain = self.trace = self._run()  # without edits; with them
        self.at = 0
        self._visited: list[int] = []
        self._seen: list[str] = []  # lines of the script

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
        tap = _SPECS[spec]
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
        if name not in self.plain or self.plain[name].shape != self.trace[name].shape:
            return "  other tokens are here than without the edits"
        a, b = self.plain[name], self.trace[name]
        if np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            return "  the same as without the edits"
        with np.errstate(invalid="ignore"):
            apart = np.abs(np.nan_to_num(b.astype(np.float64) - a, nan=0.0, posinf=0.0, neginf=0.0))
        count = int((a != b).sum())
        return f"  {count} of {a.size} numbers differ from the walk without edits, by up to {apart.max():.3g}"

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
        if self._visited:
            self.at = self._visited.pop()
        return self.where()

    def to(self, target: str | int) -> Place:
        """To a step by its full or short name, or to a layer by its number: the next one ahead, or else the first.

        Raises ValueError if there is none.
        """
        text = str(target).strip()
        if re.fullmatch(r"(layer\s*=?\s*)?\d+", text):
            number = int(re.findall(r"\d+", text)[0])
            fitting = [i for i, name in enumerate(self.names) if name.startswith(f"layers.{number}.")][:1]
        else:
            wanted = _SHORT.get(text, text)
            fitting = [i for i, name in enumerate(self.names) if name == wanted or name.endswith(f".{wanted}")]
        if not fitting:
            raise ValueError(f"no step is called {text!r}; `list` shows the names, a number is a layer")
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
        raise ValueError(f"{condition!r} does not hold at any later step; the walk stays where it is")

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
        name, place = self._find(text)
        self._seen.append(f"print(trace[{name!r}]{_written(place)})")
        return np.asarray(self.trace[name][place])

    def why(self, text: str = "") -> Why:
        """One number as the formula with its numbers: why("w[5, 1]"). Raises ValueError as `look` does."""
        name, place = self._find(text)
        if len(place) < self.trace[name].ndim or not all(isinstance(i, int) for i in place):
            shape = list(self.trace[name].shape)
            raise ValueError(
                f"why takes one number: {name} has the shape {shape}, write {name.split('.')[-1]}[{_example(shape)}]"
            )
        self._seen.append(f"print(why(model, trace, ids, {name!r}, {place}))")
        return why(self.model, self.trace, self.ids, name, place)

    def _find(self, text: str) -> tuple[str, Any]:
        m = re.fullmatch(r"\s*([\w.]*)\s*(\[.*\])?\s*((?:\w\s*=\s*[-\d:]+\s*,?\s*)*)", text)
        if m is None:
            raise ValueError(f"{text!r}: wanted a name and a place, such as w[5, 1] or probs H=2 T=5")
        name = self._named(m[1])
        inner = (m[2] or "")[1:-1]
        by_letter = m[3] or (inner if "=" in inner else "")
        return name, self._by_letter(name, by_letter) if by_letter else self._by_place(name, inner)

    def _named(self, text: str) -> str:
        if not text:
            return self.name
        wanted = _SHORT.get(text, text)
        fitting = [i for i, name in enumerate(self.names) if name == wanted or name.endswith(f".{wanted}")]
        if not fitting:
            raise ValueError(f"no step is called {text!r}; `list` shows the names")
        return self.names[max((i for i in fitting if i <= self.at), default=fitting[0])]

    def _by_place(self, name: str, inner: str) -> Any:
        shape = self.trace[name].shape
        parts = [part.strip() for part in inner.split(",")] if inner.strip() else []
        if len(parts) > len(shape):
            raise ValueError(f"{name} has {len(shape)} axes, {inner!r} names {len(parts)}")
        return tuple(_index(part, n, name) for part, n in zip(parts, shape, strict=False))

    def _by_letter(self, name: str, text: str) -> Any:
        axes = _SPECS[spec_of(name, self.model.config.num_hidden_layers)].axes.split()
        given = dict(re.findall(r"(\w)\s*=\s*([-\d:]+)", text))
        if "N" in axes and "T" in given and len(self.ids) == 1:
            given["N"] = given.pop("T")  # of one row: the same
        if unknown := set(given) - set(axes):
            raise ValueError(f"{name} has the axes {' '.join(axes)}, not {' '.join(sorted(unknown))}")
        shape = self.trace[name].shape
        return tuple(_index(given.get(letter, ":"), n, name) for letter, n in zip(axes, shape, strict=True))

    # -- changing ----------------------------------------------------------------------------------------------------

    def edit(self, text: str) -> Place:
        """Change a number, or all numbers of a slice, and go on with it: edit("w[5, 1] = 0.9").

        Everything after it is computed anew. Raises ValueError for what cannot be changed; nothing is changed then.
        """
        m = re.fullmatch(r"\s*(.+?)\s*=\s*([-+]?[\d.]+(?:e[-+]?\d+)?|[-+]?inf|nan)\s*", text)
        if m is None or (m[1].count("[") != m[1].count("]")):
            raise ValueError(f"{text!r}: wanted NAME[PLACE] = NUMBER, such as w[5, 1] = 0.9")
        name, place = self._find(m[1])
        here, kept = self.name, self.trace
        self.edits.append(Edit(name, place, float(m[2])))
        try:
            self.trace = self._run()
        except ValueError:
            self.edits.pop()
            self.trace = kept
            raise
        self._stay(here, kept)
        return self.where()

    def undo(self) -> Place:
        """Take the last edit back. Raises ValueError if there is none."""
        if not self.edits:
            raise ValueError("nothing was edited")
        here, kept = self.name, self.trace
        self.edits.pop()
        self.trace = self._run()
        self._stay(here, kept)
        return self.where()

    def _stay(self, here: str, before: Trace) -> None:
        """The same step, or if its expert is not picked any more the last one before it that is still there."""
        old, now = before.names(), self.names
        self.at = next(now.index(name) for name in reversed(old[: old.index(here) + 1]) if name in now)
        self._visited = [i for i in self._visited if i < len(now)]

    def _run(self) -> Trace:
        return self.model.trace(self.ids, tap=tap_of(self.edits) if self.edits else None, limit=self.limit)

    # -- keeping -----------------------------------------------------------------------------------------------------

    def script(self) -> str:
        """The walk as plain Python: the edits as a tap, what was looked at as prints. The same bits come out."""
        edits = "".join(
            f"    ({e.name!r}, {_written(e.place) and _tuple(e.place)}, {e.value!r}),\n" for e in self.edits
        )
        needs_why = any("why(" in line for line in self._seen)
        imports = "import numpy as np\n\nimport minglm\n" + ("from minglm.look.why import why\n" if needs_why else "")
        seen = "\n".join(self._seen) or f"print(trace[{self.name!r}])"
        return _SCRIPT.format(imports=imports, model=self.model.name, ids=self.ids.tolist(), edits=edits, seen=seen)


_SCRIPT = '''"""A walk through a forward pass, written by minglm step."""

{imports}
model = minglm.load({model!r})
ids = np.array({ids})

EDITS = [  # step, place, the number to go on with
{edits}]


def tap(name, array):
    for edited, place, value in EDITS:
        if name == edited:
            array = array.copy()
            array[place] = value
    return array


trace = model.trace(ids, tap=tap)
{seen}
'''


def tap_of(edits: list[Edit]) -> Any:
    """A tap that makes these changes, in their order."""

    def tap(name: str, array: Array) -> Array | None:
        mine = [edit for edit in edits if edit.name == name]
        if not mine:
            return None
        array = array.copy()
        for edit in mine:
            array[edit.place] = edit.value
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


def _index(text: str, n: int, name: str) -> Any:
    if ":" in text:
        try:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        except (ValueError, TypeError):
            raise ValueError(f"{text!r} is no slice; wanted something like 2:5") from None
    if not re.fullmatch(r"-?\d+", text):
        raise ValueError(f"{text!r} is no whole number")
    if not -n <= int(text) < n:
        raise ValueError(f"{name}: {text} is outside of 0 … {n - 1}")
    return int(text) % n


def _tuple(place: Any) -> str:
    return f"({', '.join(_part(i) for i in place)},)"


def _part(i: Any) -> str:
    return str(i) if isinstance(i, int) else f"slice({i.start}, {i.stop}, {i.step})"


def _written(place: Any) -> str:
    return f"[{_tuple(place)}]" if place else ""


def _example(shape: list[int]) -> str:
    return ", ".join(str(min(1, n - 1)) for n in shape)


def _numbers(array: Array) -> str:
    if array.dtype.kind in "iu":
        return f"whole numbers, {array.min()} … {array.max()}"
    known = array[np.isfinite(array)]
    hidden = f", {array.size - known.size} hidden (−∞)" if known.size < array.size else ""
    if not known.size:
        return hidden.lstrip(", ")
    values = known.astype(np.float64)
    return f"mean {values.mean():.4g}, sd {values.std():.4g}, {values.min():.4g} … {values.max():.4g}{hidden}"
