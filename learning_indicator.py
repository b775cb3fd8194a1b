"""Draw the distribution of Learning Indicators that training runs recorded.

    python learning_indicator.py --li_path results/RUN/RUN_li.npy [MORE_li.npy ...]

One panel per file on common axes: counts on a logarithmic scale, indicators above 0 (the loss goes
down) in a warm colour, the others in a cool one. Per file it prints the median, the 5 % quantile
and the share above 0.
"""

import argparse
import os
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

PICTURES = ("png", "svg", "pdf")
WARM, COOL = "#d1495b", "#30638e"
BINS = 200
_TITLE_WIDTH = 84  # letters; names of runs can be long


def main(arguments: Sequence[str]) -> int:
    """Return the exit status: 0, or 2 after a file that cannot be drawn."""
    try:
        args = parse_args(arguments)
        samples = [load(path) for path in args.li_path]
        if args.output.resolve() in [path.resolve() for path in args.li_path]:
            raise ValueError(f"--output {args.output} would overwrite what is to be drawn")
        for path, values in zip(args.li_path, samples, strict=True):
            print(f"{path}: {describe(values)}")
        save(args.li_path, samples, args.output, args.show)
    except ValueError as error:
        one_line = " ".join(str(error).split())
        print(f"learning_indicator.py: error: {one_line}", file=sys.stderr)
        return 2
    return 0


class Parser(argparse.ArgumentParser):
    """Reports mistakes like those in files: in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="learning_indicator.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    help = "files that training with --get-li wrote, *_li.npy"
    parser.add_argument(
        "--li_path", "--li-path", type=Path, nargs="+", required=True, metavar="FILE", help=help
    )
    help = "picture to write, its type by its ending (default: the first file's name with .png)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=help)
    parser.add_argument("--show", action="store_true", help="open a window too")
    args = parser.parse_args(arguments)
    if not all(path.name for path in args.li_path):
        parser.error("--li_path needs files")
    args.output = args.output or args.li_path[0].with_suffix(".png")
    if args.output.suffix.lstrip(".") not in PICTURES:
        parser.error(f"--output {args.output} must end in .{', .'.join(PICTURES)}")
    return args


def load(path: Path) -> np.ndarray:
    """Read the indicators of a file as one flat array.

    Raises:
        ValueError: no such file, not an array of numbers, or no finite value in it.
    """
    try:
        with open(path, "rb") as file:  # which np.load would leave open if it cannot read it
            values = np.load(file, allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
            raise ValueError("it holds no array of real numbers")
        values = values.astype(np.float64).ravel()
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; train with --get-li to make one") from None
    except Exception as error:  # zipfile, tokenize and NumPy raise many types for damaged files
        raise ValueError(f"{path} is not an array of indicators: {error}") from error
    values = values[np.isfinite(values) & (np.abs(values) < 1e100)]
    if not values.size:
        raise ValueError(f"{path} holds no finite value")
    return values


def describe(values: np.ndarray) -> str:
    """Median, 5 % quantile and share above 0 in words."""
    return (
        f"median {np.median(values):.4f}, 5 % quantile {np.quantile(values, 0.05):.4f}, "
        f"{100 * np.mean(values > 0):.2f} % above 0 ({values.size} values)"
    )


def limits(samples: Sequence[np.ndarray]) -> tuple[float, float]:
    """Common limits that hold 0 and all but the outermost 0.1 % of every file's values."""
    low = min(0.0, *(np.quantile(values, 0.001) for values in samples))
    high = max(0.0, *(np.quantile(values, 0.999) for values in samples))
    margin = 0.03 * (high - low) or 1.0
    return low - margin, high + margin


def save(
    paths: Sequence[Path], samples: Sequence[np.ndarray], output: Path, show: bool = False
) -> None:
    """Draw one panel per file and write the picture, whole or not at all.

    Raises:
        ValueError: the folder or the type of the picture will not do.
    """
    if not show:
        os.environ["MPLBACKEND"] = "Agg"  # draws without a display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(samples),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
        figsize=(7, 1 + 2 * len(samples)),
    )
    low, high = limits(samples)
    edges = np.linspace(low, high, BINS + 1)
    # 0 is an edge, so that no bar mixes the two colours
    edges = np.unique(np.append(edges, 0.0))
    for axis, path, values in zip(axes[:, 0], paths, samples, strict=True):
        clipped = np.clip(values, low, high)
        positive = values > 0
        axis.hist(clipped[positive], edges, color=WARM, label="LI > 0")
        axis.hist(clipped[~positive], edges, color=COOL, label="LI ≤ 0")
        axis.axvline(np.median(values), color="black", linewidth=1, linestyle=":", label="median")
        axis.set(yscale="log", ylabel="count", xlim=(low, high))
        title = textwrap.fill(path.stem.removesuffix("_li"), _TITLE_WIDTH)
        axis.set_title(title, fontsize=9)
    axes[0, 0].legend(fontsize=8)
    axes[-1, 0].set_xlabel("Learning Indicator")
    try:
        _write_whole(figure, output)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror}") from error
    print(f"picture: {output}")
    if show:
        plt.show()
    plt.close(figure)


def _write_whole(figure, output: Path) -> None:
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        temporary = Path(folder) / output.name
        figure.savefig(temporary, dpi=150)
        temporary.replace(output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
