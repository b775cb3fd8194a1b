"""Draw loss, scores, memory, throughput and Learning Indicators of one or more runs in one picture.

    python -m aal.training.report results/RUN [MORE ...] --output report.png

One panel per kind of number, one colour per run. It also prints a table of the runs' last epochs.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aal.training import command_line
from aal.training.command_line import Parser, UserError, write_output
from aal.training.files import write_whole
from aal.training.recorded_run import RecordedRun, read_run, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROGRAM = "aal.training.report"
STYLES = (  # of the first curve in a panel, and of the second
    {"linestyle": "-", "marker": "."},
    {"linestyle": "--", "marker": "x", "markersize": 4},
)
_MAX_RUNS = 50
_COLUMNS = 3
_PANEL = (4.2, 3.0)  # inches
_LINE_HEIGHT = 0.22  # inches
_LETTERS_PER_COLUMN = 50  # of panels
_LAST_PANELS = ("MiB", "per second", "Indicator")  # endings of titles; the others come first
_HEADER = ("run", "epoch", "best", "loss", "saved MiB", "peak MiB", "rate", "LI")


def main(arguments: Sequence[str]) -> int:
    """Draw and print; returns the exit status, or raises ``UserError``."""
    args = parse_args(arguments)
    runs = [read_run(path) for path in args.runs]
    figure = draw(runs, args.x)
    write_whole(args.output, lambda file: figure.savefig(file, format="png", dpi=150))
    write_output(f"{table(runs)}\npicture: {args.output}\n".encode(errors="replace"))
    return 0


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; raises ``UserError`` for what cannot be meant."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run folder, such as results/small")
    help = "picture to write, a PNG"
    add("--output", type=Path, default=Path("report.png"), metavar="FILE", help=help)
    help = "what the horizontal axis counts; if not given, steps where a run has --num-steps"
    add("--x", choices=("epochs", "steps"), default=argparse.SUPPRESS, help=help)
    args = parser.parse_args(arguments)
    args.x = vars(args).get("x")
    if len(args.runs) > _MAX_RUNS:
        raise UserError(f"{len(args.runs)} runs are too many for one picture: {_MAX_RUNS} at most")
    if len({os.path.realpath(path) for path in args.runs}) < len(args.runs):
        raise UserError("a run is named twice")
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output {args.output} must end in .png")
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
    return args


def draw(runs: Sequence[RecordedRun], x: str | None = None) -> "Figure":
    """The picture of some runs: a panel per kind of number that one of them has.

    Args:
        x: "epochs" or "steps"; None for steps where one of the runs counts them, else epochs.
    """
    from matplotlib.figure import Figure

    x = x or ("steps" if any(run.counts_steps for run in runs) else "epochs")
    curves = [run.curves() for run in runs]
    panels = list(dict.fromkeys(panel for own in curves for panel in own))
    panels.sort(key=lambda panel: [panel.endswith(ending) for ending in _LAST_PANELS[::-1]])
    names, colours = short_names([run.path for run in runs]), _colours(len(runs))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    places = [run.values("epoch" if x == "epochs" else "step") for run in runs]
    low, high = (end(map(end, places)) for end in (min, max))
    margin = 0.04 * (high - low) or 0.5
    figure = Figure(layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis, panel in zip(grid.flat, panels, strict=False):
        for at, own, colour in zip(places, curves, colours, strict=True):
            for values, style in zip(own.get(panel, {}).values(), STYLES, strict=False):
                axis.plot(at, values, color=colour, linewidth=1.2, **style)
        axis.set(title=panel, xlabel=x, xlim=(low - margin, high + margin))
        _finish(axis, panel, max((own.get(panel, {}) for own in curves), key=len))
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    lines = _add_legend(figure, names, colours, columns)
    figure.set_size_inches(columns * _PANEL[0], rows * _PANEL[1] + (lines + 1) * _LINE_HEIGHT)
    return figure


def table(runs: Sequence[RecordedRun]) -> str:
    """The last epochs of some runs, and their best scores, as aligned text.

    The rate is the last epoch's; LI is the median layer's Learning Indicator.
    """
    names = short_names([run.path for run in runs])
    rows = [_HEADER, *(_row(name, run) for name, run in zip(names, runs, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def _row(name: str, run: RecordedRun) -> tuple[str, ...]:
    def last(values: np.ndarray, digits: int) -> str:
        return f"{values[-1]:.{digits}f}" if np.isfinite(values[-1]) else "-"

    indicators = run.curves().get("Learning Indicator", {"": np.array([np.nan])})
    return (
        name,
        str(len(run.rows)),
        run.best,
        last(run.values("val_loss"), 4),
        last(run.values("saved_mib"), 1),
        last(run.values("peak_mib"), 1),
        f"{last(run.values(f'{run.unit}_per_s'), 1)} {run.unit}/s",
        last(next(iter(indicators.values())), 4),
    )


def _finish(axis: "Axes", panel: str, names: Sequence[str]) -> None:
    """Say which curve is which, and show 0 where numbers are to be compared with it."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    if panel.endswith(_LAST_PANELS[:2]):
        axis.set_ylim(bottom=0)
    elif panel.endswith(_LAST_PANELS[2]):
        axis.axhline(0, color="black", linewidth=1, linestyle=":")
    if len(names) > 1:
        keys = [Line2D([], [], color="black", **style) for style in STYLES]
        axis.legend(keys, names, fontsize=8)


def _colours(count: int) -> list[Any]:
    """A colour for each run, unlike each other for up to ten."""
    from matplotlib import colormaps

    if count <= 10:
        return [f"C{number}" for number in range(count)]
    return list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def _add_legend(
    figure: "Figure", names: Sequence[str], colours: Sequence[Any], panel_columns: int
) -> int:
    """Say above all panels which colour is which run; returns how many lines that takes."""
    from matplotlib.lines import Line2D

    letters = _LETTERS_PER_COLUMN * panel_columns
    wrapped = [textwrap.fill(name, letters) for name in names]
    longest = max(len(line) for name in wrapped for line in name.splitlines())
    columns = max(1, min(len(names), letters // (longest + 8)))
    keys = [Line2D([], [], color=colour, marker=".") for colour in colours]
    numbers = [str(number) for number in range(len(names))]
    legend = figure.legend(
        keys, numbers, loc="outside upper center", ncols=columns, fontsize=9, frameon=False
    )
    # Names are set here because labels may not begin with "_", and "$" would start a formula.
    for text, name in zip(legend.get_texts(), wrapped, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    return sum(name.count("\n") + 1 for name in wrapped) // columns + 1


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:], PROGRAM))
