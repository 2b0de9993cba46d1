"""What one training run is made of: every number that decides its outcome."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any


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
    workers: int = 2  # the rows of a batch are shared among so many threads; their mean gradient is used
    log_every: int = 10
    eval_every: int = 250
    save_every: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "workers", "log_every", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"recipe: {name} = {getattr(self, name)} must be 1 or more")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"recipe: {name} = {getattr(self, name)} must be above 0")
        if self.sequence_length < 2:
            raise ValueError("recipe: sequence_length must be 2 or more: a token and the one after it")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        values: dict[str, Any] = json.loads(text)
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"recipe: unknown {', '.join(unknown)}; known are {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**values)


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
