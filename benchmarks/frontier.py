"""Memory against time: what PyTorch's own means reach together, and where other points lie."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from settings import ALTERNATIVE, OURS

COLOURS = {OURS: "#d1495b", ALTERNATIVE: "#30638e"}
SLOWEST = 2.0  # step time that is drawn, in units of plain's: offloading takes many times as long

Point = tuple[float, float]  # MiB, step time


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the convex curve below all points, from the least memory to the least time.

    A point beyond the fastest takes more memory for nothing, and belongs to no curve.
    """
    hull: list[Point] = []
    for point in sorted(points):
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    fastest = min(range(len(hull)), key=lambda i: hull[i][1], default=-1)
    return hull[: fastest + 1]


def _turns_down(a: Point, b: Point, c: Point) -> bool:
    """Does b lie on the line from a to c, or above it?"""
    return (b[0] - a[0]) * (c[1] - a[1]) <= (b[1] - a[1]) * (c[0] - a[0])


def time_at(hull: Sequence[Point], memory: float) -> float | None:
    """The least time on the curve for ``memory`` MiB; None where that is too little."""
    if not hull or memory < hull[0][0]:
        return None
    for (left, slow), (right, fast) in zip(hull, hull[1:], strict=False):
        if memory < right:
            return slow + (fast - slow) * (memory - left) / (right - left)
    return hull[-1][1]


def curve_of(rows: Sequence[Mapping[str, Any]], memory: str) -> list[Point]:
    """The hull of the alternatives among ``rows``; ``memory`` names the column to take."""
    measured = [row for row in rows if row["group"] == ALTERNATIVE and row["ratio"] is not None]
    return lower_hull([(row[memory], row["ratio"]) for row in measured])


def draw(rows: Sequence[Mapping[str, Any]], memory: str, label: str, path: Path) -> None:
    """Draw a panel for every network, with a numbered point for every setting, into a picture.

    Args:
        rows: of the table of ``speed.py``; those without a ratio are left out.
        memory: the column that goes to the right.
        label: what it is called.
        path: of the picture.
    """
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(9, 4.5 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), squeeze=False)[:, 0]
    for axis, network in zip(axes, networks, strict=True):
        own = [row for row in rows if row["network"] == network and row["ratio"] is not None]
        curve = curve_of(own, memory)
        axis.plot(
            [point[0] for point in curve],
            [point[1] for point in curve],
            color=COLOURS[ALTERNATIVE],
            label="the best of PyTorch's own means",
        )
        for number, row in enumerate(own, 1):
            place, text = (row[memory], row["ratio"]), f"{number}  {row['setting']}"
            if row["ratio"] > SLOWEST:
                text += f" ({row['ratio']:.2g} x, not in view)"
            axis.plot(*place, "o", color=COLOURS[row["group"]], label=text)
            axis.annotate(str(number), place, (4, 4), textcoords="offset points", fontsize=8)
        axis.set(title=network, xlabel=label, ylabel="step time / plain", xlim=(0, None))
        axis.set_ylim(top=min(axis.get_ylim()[1], SLOWEST))
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=150)
