"""How the learning rate moves."""

import math


def warmup_cosine(step: int, total: int, warmup: int, peak: float, floor: float) -> float:
    """Up in a straight line over `warmup` steps, then half a cosine down from `peak` to `floor` at the last step.

    `step` counts from 0; step 0 already has a rate above zero.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - 1 - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def ramp(step: int, over: int, first: int, last: int) -> int:
    """A whole number that grows from `first` to `last` in a straight line over so many steps, rounded."""
    return last if step >= over else first + round((last - first) * step / over)
