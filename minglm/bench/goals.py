"""From seconds to a table: what is compared with what, and how far it should get.

Every ratio is "how many times as fast as", so more is better throughout, and a goal is met from there on.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minglm.bench.shapes import Work, unit_bytes
from minglm.config import Config

Points = dict[str, float]  # what was timed -> median seconds of a unit
Found = Mapping[str, Mapping[str, Points]]  # subject -> variant -> points

GOALS = {
    ("S", "decode", "float32"): {"torch": 15, "torch.compile": 7, "llama.cpp": 1.25},
    ("M", "decode", "float32"): {"torch": 4, "llama.cpp": 1.15, "bandwidth": 0.8},
    ("M", "decode", "bfloat16"): {"torch": 5, "llama.cpp": 1.3, "bandwidth": 0.8},
    ("air", "decode", "bfloat16"): {"torch": 4, "bandwidth": 0.75},
    ("S", "prefill", "float32"): {"torch": 2.2, "llama.cpp": 1.05, "products": 0.75},
    ("M", "prefill", "float32"): {"torch": 1.5, "llama.cpp": 1.1, "products": 0.75},
    ("S", "train", "float32"): {"torch": 2, "products": 0.6},
    ("M", "train", "float32"): {"torch": 2.5, "products": 0.6},
    ("S", "growth", "float32"): {"torch": 1, "bandwidth": 0.5, "straight line": 0.98},
}
START_GOALS = {"import minglm": 0.2, "first token, kernels cached": 1.0, "first token, empty cache": 10.0}  # seconds


class Row(NamedTuple):
    work: str
    ours: str
    against: str
    theirs: str
    ratio: float
    goal: float | None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio >= self.goal

    def cells(self) -> tuple[str, ...]:
        goal = "" if self.goal is None else f"≥ {self.goal:g}"
        verdict = {None: "", True: "met", False: "not met"}[self.met]
        return self.work, self.ours, self.against, self.theirs, f"{self.ratio:.3g}", goal, verdict


HEADER = ("work", "minglm", "against", "which does", "ratio", "goal", "")


def median_of_rounds(rounds: Sequence[Mapping[str, Points]]) -> dict[str, Points]:
    """One subject's answers -> {variant: {point: median over the rounds}}."""
    gathered: dict[str, dict[str, list[float]]] = {}
    for answer in rounds:
        for variant, points in answer.items():
            for point, seconds in points.items():
                gathered.setdefault(variant, {}).setdefault(point, []).append(seconds)
    return {v: {p: float(np.median(s)) for p, s in points.items()} for v, points in gathered.items()}


def best_variant(variants: Mapping[str, Points]) -> tuple[str, Points]:
    """The fastest way to run a subject, by its last point. Raises ValueError if none ran."""
    if not variants:
        raise ValueError("no variant ran")
    return min(variants.items(), key=lambda item: list(item[1].values())[-1])


def rows(shape: str, config: Config, work: Work, found: Found) -> Iterator[Row]:
    """A row for every subject that ran beside minglm."""
    if not found.get("minglm"):
        return
    goals = GOALS.get((shape, work.name, work.dtype), {})
    compare = _growth_rows if work.name == "growth" else _rate_rows
    for against, ours, theirs, ratio in compare(config, work, found):
        yield Row(f"{shape} {work}", ours, against, theirs, ratio, goals.get(against.split(" (")[0]))


def _rate_rows(config: Config, work: Work, found: Found) -> Iterator[tuple[str, str, str, float]]:
    ours = found["minglm"][""]["unit"]
    for subject, variants in found.items():
        if subject == "minglm" or not variants:
            continue
        variant, points = best_variant(variants)
        if subject == "bandwidth":  # the time to read what a unit must read
            theirs = points["byte"] * unit_bytes(config, work, work.prompt + work.units // 2)
        else:
            theirs = points["unit"]
        yield _named(subject, variant), _rate(work, ours), _rate(work, theirs), theirs / ours


def _growth_rows(config: Config, work: Work, found: Found) -> Iterator[tuple[str, str, str, float]]:
    ours = slope(found["minglm"][""])
    told = _per_key(ours.seconds)
    for subject, variants in found.items():
        if subject == "bandwidth":
            theirs = variants[""]["byte"] * config.kv_bytes_per_token(4)
            yield subject, told, _per_key(theirs), _ratio(theirs, ours.seconds)
        elif subject != "minglm" and variants:
            variant, theirs = min(((v, slope(p).seconds) for v, p in variants.items()), key=lambda item: item[1])
            yield _named(subject, variant), told, _per_key(theirs), _ratio(theirs, ours.seconds)
    yield "straight line", told, "share of the variance explained", ours.straightness


def _per_key(seconds: float) -> str:
    return f"{1e9 * seconds:.0f} ns a key" if seconds > 0 else "no growth seen, noise"


def _ratio(theirs: float, ours: float) -> float:
    """Of two slopes; NaN, which meets no goal, where noise hid one."""
    return theirs / ours if min(theirs, ours) > 0 else float("nan")


class Slope(NamedTuple):
    seconds: float  # for each further key
    straightness: float  # share of the variance that the line explains: 1 is a perfect line


def slope(points: Points) -> Slope:
    """The line through seconds by number of keys."""
    keys, seconds = np.array([float(p) for p in points]), np.array(list(points.values()))
    line = np.polynomial.Polynomial.fit(keys, seconds, 1)
    left = ((seconds - line(keys)) ** 2).sum() / max(((seconds - seconds.mean()) ** 2).sum(), 1e-300)
    return Slope(float(line.convert().coef[1]), float(1 - left))


def start_rows(points: Points) -> Iterator[Row]:
    """Import and first token: limits in seconds; the ratio is limit ÷ time."""
    for what, limit in START_GOALS.items():
        if what in points:
            yield Row(f"glm-nano {what}", f"{points[what]:.2f} s", "limit", f"{limit:g} s", limit / points[what], 1.0)


def _named(subject: str, variant: str) -> str:
    return f"{subject} ({variant})" if variant else subject


def _rate(work: Work, seconds: float) -> str:
    return (
        f"{work.tokens / seconds:,.0f} tok/s" if work.tokens / seconds >= 100 else f"{work.tokens / seconds:.1f} tok/s"
    )


def as_json(row: Row) -> dict[str, Any]:
    return {**row._asdict(), "met": row.met}
