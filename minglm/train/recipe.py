"""What one training run is made of: every number that decides its outcome."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from minglm.config import PRESETS


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. The same recipe and data give the same bits on the same machine."""

    preset: str  # name of a config in minglm.config.PRESETS
    steps: int
    batch_size: int  # B, rows per step
    sequence_length: int  # T
    weights: dict[str, float]  # shares of the rows: text domains and tasks
    learning_rate: float = 3e-3  # at its peak
    final_rate: float = 3e-4
    warmup: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    bias_rate: float = 1e-3  # step of the selection bias
    seed: int = 0
    engine: str = "fast"  # "fast": compiled kernels; "numpy": the book
    log_every: int = 10
    eval_every: int = 250
    save_every: int = 250

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int:
                least = 0 if f.name in ("seed", "warmup") else 2 if f.name == "sequence_length" else 1
                _require(_is_whole(value) and value >= least, f.name, value, f"a whole number, {least} or more")
            elif f.type is float:
                above = f.name in ("learning_rate", "clip_norm")
                holds = _is_number(value) and (value > 0 if above else value >= 0)
                _require(holds, f.name, value, f"a finite number {'above 0' if above else '0 or more'}")
        _require(
            isinstance(self.preset, str) and self.preset in PRESETS,
            "preset",
            self.preset,
            f"one of {', '.join(PRESETS)}",
        )
        _require(self.engine in ("fast", "numpy"), "engine", self.engine, "'fast' or 'numpy'")
        context = PRESETS[self.preset].max_position_embeddings
        fits = self.sequence_length <= context
        _require(fits, "sequence_length", self.sequence_length, f"at most the context of {self.preset}, {context}")
        _require(isinstance(self.weights, dict), "weights", self.weights, "an object of names and shares")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Raises ValueError for what is no recipe, naming the field."""
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"recipe: not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"recipe: wanted a JSON object, got {type(values).__name__}")
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"recipe: unknown {', '.join(unknown)}; known are {', '.join(f.name for f in fields(cls))}"
            )
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"recipe: missing {', '.join(missing)}")
        return cls(**values)


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"recipe: {name} = {value!r} must be {wanted}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


RECIPES = {
    "glm-nano": Recipe(
        preset="glm-nano",
        steps=3600,
        batch_size=16,
        sequence_length=256,
        weights={
            "code": 0.48,
            "prose": 0.14,
            "addition": 0.2,
            "subtraction": 0.06,
            "reversal": 0.06,
            "number_words": 0.06,
        },
    )
}
