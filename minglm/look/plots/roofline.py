"""What a machine allows, and how much of it was reached."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from minglm.look.plots.figure import FONT, SUBJECTS, named, new_figure, title
from minglm.look.tables import printable


def plot_roofline(
    points: Sequence[tuple[str, str, float, float]], bandwidth: float, peak: float, name: str = ""
) -> Figure:
    """What was reached of what the machine allows: GFLOP/s over FLOP per byte, both axes logarithmic.

    points: (work, subject, FLOP per byte, GFLOP/s); `bandwidth` in GB/s makes the slanted roof, `peak` in GFLOP/s the
    flat one; `name` of the machine. Raises ValueError without points.
    """
    if not points:
        raise ValueError("nothing to plot: no work was measured")
    figure, ax = new_figure(9, 6)
    ax.set_xscale("log")
    ax.set_yscale("log")
    intensities = [point[2] for point in points]
    x = np.geomspace(min(intensities) / 3, max(*intensities, peak / bandwidth) * 3, 200)
    roof = f"reading {bandwidth:.0f} GB/s, products {peak:,.0f} GFLOP/s"
    ax.plot(x, np.minimum(x * bandwidth, peak), color="black", linewidth=1.5, label=roof)
    for i, subject in enumerate(dict.fromkeys(point[1] for point in points)):
        colour, marker = SUBJECTS[i % len(SUBJECTS)]
        own = [point for point in points if point[1] == subject]
        ax.plot([p[2] for p in own], [p[3] for p in own], marker, color=colour, label=printable(subject), markersize=7)
    works = _letter_works(ax, points)
    ax.set_xlabel("FLOP per byte that must be read", fontsize=FONT + 1)
    ax.set_ylabel("GFLOP/s", fontsize=FONT + 1)
    ax.set_ylim(min(point[3] for point in points) / 3, peak * 4)
    ax.grid(True, which="major", color="#dddddd")
    ax.legend(fontsize=FONT, loc="lower right")
    title(ax, f"Roofline{named(name)}", f"{works} works; the nearer to the line, the less is left to gain")
    return figure


def _letter_works(ax: Any, points: Sequence[tuple[str, str, float, float]]) -> int:
    """A letter beside each point, and what they stand for in the corner above the roof. Returns how many works."""
    letters = {work: chr(ord("A") + i) for i, work in enumerate(dict.fromkeys(point[0] for point in points))}
    for work, _, x, y in points:
        ax.annotate(letters[work], (x, y), (7, 0), textcoords="offset points", fontsize=FONT, va="center")
    key = "\n".join(f"{letter}  {printable(work)}" for work, letter in letters.items())
    ax.text(0.015, 0.98, key, transform=ax.transAxes, fontsize=FONT, va="top")
    return len(letters)
