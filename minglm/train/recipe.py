"""What one training run is made of: every number that decides its outcome, in a TOML file of a page.

A recipe has stages that follow each other: GLM-4.5's are pre-training, mid-training and fine-tuning on conversations.
`Recipe.at(step)` says what holds at a step; everything else asks there, so a run can be resumed anywhere.
"""

import math
import tomllib
from bisect import bisect_right
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from minglm.config import PRESETS, Config
from minglm.train.schedule import ramp, warmup_cosine

FOLDER = Path(__file__).with_name("recipes")
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


@dataclass(frozen=True)
class Stage:
    """Steps on one mixture of data, in one layout."""

    name: str
    steps: int
    batch_size: int  # B, rows per step
    sequence_length: int  # T
    weights: dict[str, float] = field(default_factory=dict)  # shares of the tokens: domains, tasks, conversations
    format: str = "text"  # "text": loss on every token; "chat": conversations, loss on what the assistant says
    packing: str = "truncate"  # "truncate": rows cut documents anywhere; "best-fit": whole documents where they fit
    thinking: float = 0.5  # share of the task items whose steps are written out
    switch: float = 0.0  # share of the rows that change their domain midway
    first_batch_size: int | None = None  # B at the first step, from which it grows
    ramp: int = 0  # steps until B is batch_size
    learning_rate: float | None = None  # at its peak; None: the schedule of the stage before goes on
    final_rate: float | None = None
    warmup: int = 0  # steps; of a schedule that begins here
    rope_theta: float | None = None  # None: the preset's
    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    bias_rate: float = 1e-3  # step of the selection bias


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. The same recipe and data give the same bits on the same machine."""

    preset: str  # name of a config in minglm.config.PRESETS
    stages: tuple[Stage, ...]
    config: dict[str, Any] = field(default_factory=dict)  # what differs from the preset
    optimiser: str = "muon"  # or "adamw"
    head_optimiser: str | None = None  # "adamw": that moves the head where Muon moves the rest; None: no exception
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    engine: str = "fast"  # "fast": compiled kernels; "numpy": the book
    log_every: int = 10
    eval_every: int = 250
    save_every: int = 250

    def __post_init__(self) -> None:
        _check_numbers(self, "recipe", MOST_ABOVE_ZERO)
        known = isinstance(self.preset, str) and self.preset in PRESETS
        _require(known, "recipe", "preset", self.preset, f"one of {', '.join(PRESETS)}")
        for name, choices in (("engine", ("fast", "numpy")), ("optimiser", ("muon", "adamw"))):
            value = getattr(self, name)
            _require(value in choices, "recipe", name, value, " or ".join(map(repr, choices)))
        head = self.head_optimiser
        _require(head in (None, "adamw"), "recipe", "head_optimiser", head, "'adamw', or left out")
        staged = isinstance(self.stages, tuple) and all(isinstance(stage, Stage) for stage in self.stages)
        _require(staged and bool(self.stages), "recipe", "stages", self.stages, "one [[stages]] table or more")
        _require(
            isinstance(self.config, dict), "recipe", "config", self.config, "a table of fields of a model's config"
        )
        known_fields = {f.name for f in fields(Config)} - {"extra"}
        unknown = sorted(self.config.keys() - known_fields)
        _require(
            not unknown, "recipe", "config", unknown, f"fields of a model's config: {', '.join(sorted(known_fields))}"
        )
        context = self.model_config().max_position_embeddings
        for number, stage in enumerate(self.stages):
            _check_stage(stage, number, context)

    # -- what holds at a step ---------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        return self.ends[-1]

    @property
    def ends(self) -> list[int]:
        """The step at which each stage is over."""
        return list(accumulate(stage.steps for stage in self.stages))

    @property
    def tokens(self) -> int:
        """Places in all batches of the run, padding among them."""
        return sum(self.tokens_at(step) for step in range(self.steps))

    def tokens_at(self, step: int) -> int:
        now = self.at(step)
        return now.batch_size * now.stage.sequence_length

    def at(self, step: int) -> "Now":
        """What holds at this step, counted from 0. The last step's also after the end."""
        step = min(step, self.steps - 1)
        number = bisect_right(self.ends, step)
        stage = self.stages[number]
        inside = step - self.ends[number] + stage.steps
        batch_size = ramp(inside, stage.ramp, stage.first_batch_size or stage.batch_size, stage.batch_size)
        return Now(number, stage, inside, batch_size, self._rate(number, step))

    def _rate(self, number: int, step: int) -> float:
        """The learning rate: a schedule begins at a stage that names a rate, and runs until the next such stage."""
        begins = [i for i, stage in enumerate(self.stages) if stage.learning_rate is not None]
        first = max(i for i in begins if i <= number)
        last = min([i for i in begins if i > number], default=len(self.stages)) - 1
        begin, stage = self.ends[first] - self.stages[first].steps, self.stages[first]
        peak, floor = stage.learning_rate, stage.final_rate
        assert peak is not None  # checked when the recipe was made
        floor = peak / 10 if floor is None else floor
        return warmup_cosine(step - begin, self.ends[last] - begin, stage.warmup, peak, floor)

    def model_config(self, number: int = -1) -> Config:
        """The model's config in a stage: of the last one, if none is asked for."""
        lists = {name: tuple(value) for name, value in self.config.items() if isinstance(value, list)}
        config = PRESETS[self.preset].replace(**self.config | lists)
        theta = self.stages[number].rope_theta if self.stages else None
        return config if theta is None else config.replace(rope_theta=theta)

    def shortened(self, steps: int) -> "Recipe":
        """The same recipe with another number of steps, shared among the stages as before."""
        least = len(self.stages)
        _require(_is_whole(steps) and steps >= least, "recipe", "steps", steps, f"{least} or more")
        stages: list[Stage] = []
        for stage, end in zip(self.stages, self.ends, strict=True):
            done, after = sum(s.steps for s in stages), len(self.stages) - len(stages) - 1
            here = min(max(round(end * steps / self.steps) - done, 1), steps - done - after)
            warmup, grows = (min(round(n * steps / self.steps), here // 2) for n in (stage.warmup, stage.ramp))
            first = stage.first_batch_size if grows else None
            stages.append(replace(stage, steps=here, warmup=warmup, ramp=grows, first_batch_size=first))
        return replace(self, stages=tuple(stages))

    # -- files ------------------------------------------------------------------------------------------------

    def to_toml(self) -> str:
        import tomli_w

        def without_none(values: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if value is not None}

        values = asdict(self)
        stages = [without_none(stage) for stage in values.pop("stages")]
        return tomli_w.dumps({**without_none(values), "stages": stages})

    @classmethod
    def from_toml(cls, text: str, where: str = "recipe") -> "Recipe":
        """Raises ValueError for what is no recipe, naming the stage and the field; `where` is the file's name."""
        try:
            values = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not valid TOML: {error}") from error
        stages = values.pop("stages", None)
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            raise ValueError(f"{where}: wanted one [[stages]] table or more")
        try:
            made = tuple(_from_table(Stage, stage, f"stage {n + 1}") for n, stage in enumerate(stages))
            return _from_table(cls, {**values, "stages": made}, "recipe")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


class Now(NamedTuple):
    """What holds at one step."""

    number: int  # of the stage, from 0
    stage: Stage
    step: int  # in the stage, from 0
    batch_size: int
    learning_rate: float


def load_recipe(name: str) -> Recipe:
    """A recipe of the package by its name, or a TOML file. Raises ValueError if it is neither."""
    path = FOLDER / f"{name}.toml" if name in NAMES else Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a recipe file nor one of {', '.join(NAMES)}")
    try:
        return Recipe.from_toml(path.read_text("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


# -- checks ------------------------------------------------------------------------------------------------------

LEAST = {"seed": 0, "warmup": 0, "ramp": 0, "sequence_length": 2}  # of whole numbers; of the others 1
MOST = 10_000_000  # of whole numbers
MOST_ABOVE_ZERO = ("learning_rate", "clip_norm", "rope_theta")
SHARES = ("thinking", "switch")


def _from_table(kind: Any, values: dict[str, Any], where: str) -> Any:
    names = [f.name for f in fields(kind)]
    if unknown := sorted(values.keys() - set(names)):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(names)}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    return kind(**values)


def _check_numbers(record: Any, where: str, above_zero: tuple[str, ...]) -> None:
    for f in fields(record):
        value, kinds = getattr(record, f.name), str(f.type)
        if value is None and "None" in kinds:
            continue
        if "int" in kinds:
            least = LEAST.get(f.name, 1)
            holds = _is_whole(value) and least <= value <= MOST
            _require(holds, where, f.name, value, f"a whole number from {least} to {MOST:,}")
        elif "float" in kinds and "dict" not in kinds:
            above = f.name in above_zero
            holds = _is_number(value) and (value > 0 if above else value >= 0)
            _require(holds, where, f.name, value, f"a finite number {'above 0' if above else '0 or more'}")
            _require(f.name not in SHARES or value <= 1, where, f.name, value, "a share from 0 to 1")


def _check_stage(stage: Stage, number: int, context: int) -> None:
    where = f"stage {number + 1} ({stage.name})"
    _require(isinstance(stage.name, str) and bool(stage.name), where, "name", stage.name, "a text")
    _check_numbers(stage, where, MOST_ABOVE_ZERO)
    for name, choices in (("format", ("text", "chat")), ("packing", ("truncate", "best-fit"))):
        value = getattr(stage, name)
        _require(value in choices, where, name, value, " or ".join(map(repr, choices)))
    fits = stage.sequence_length <= context
    _require(fits, where, "sequence_length", stage.sequence_length, f"at most the model's context, {context}")
    shares = isinstance(stage.weights, dict) and all(_is_number(w) and 0 <= w <= 1e9 for w in stage.weights.values())
    _require(shares, where, "weights", stage.weights, "a table of names and shares, numbers from 0 up")
    first = stage.learning_rate is not None or number > 0
    _require(first, where, "learning_rate", stage.learning_rate, "given: the first stage begins the schedule")
    begins = stage.learning_rate is not None or not (stage.warmup or stage.final_rate is not None)
    _require(
        begins, where, "warmup and final_rate", (stage.warmup, stage.final_rate), "left out without a learning_rate"
    )
    for name in ("warmup", "ramp"):
        value = getattr(stage, name)
        _require(value <= stage.steps, where, name, value, f"at most the stage's {stage.steps} steps")
    ramps = (stage.first_batch_size is None) == (stage.ramp == 0)
    _require(ramps, where, "first_batch_size and ramp", (stage.first_batch_size, stage.ramp), "given together")
    grows = (stage.first_batch_size or 1) <= stage.batch_size
    _require(grows, where, "first_batch_size", stage.first_batch_size, f"at most batch_size, {stage.batch_size}")
    whole = stage.format == "text" or stage.packing == "best-fit"
    _require(whole, where, "packing", stage.packing, "'best-fit' for conversations, which must not be cut")


def _require(holds: bool, where: str, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {name} = {value!r} must be {wanted}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
