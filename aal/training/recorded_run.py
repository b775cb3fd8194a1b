"""What a run folder records of its epochs, checked when read, and short names of runs."""

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aal.training.command_line import UserError

_LABELS = {"accuracy": ("accuracy", "%"), "f1": ("F1", "%"), "bleu": ("BLEU", "")}  # and units
_NEEDED = ("step", "train_loss", "val_loss", "saved_mib")  # that every epoch has
_LARGEST = 1e100  # which can still be drawn


@dataclass(frozen=True)
class RecordedRun:
    """The finished epochs of a run.

    Args:
        path: the run's folder.
        counts_steps: its length was given in steps, and its epochs lie between two validations.
        rows: metrics by epoch, as in ``metrics.jsonl``.
    """

    path: Path
    counts_steps: bool
    rows: Sequence[dict[str, Any]]

    @property
    def metric(self) -> str:
        """Name of what is validated beside the loss; the first one says which epoch is best."""
        return _metric(self.rows[0])

    @property
    def unit(self) -> str:
        """What the throughput counts, such as "samples"."""
        return _unit(self.rows[0])

    @property
    def best(self) -> str:
        """The best score of the validation, its name and unit."""
        label, unit = _LABELS.get(self.metric, (self.metric, ""))
        return f"{label} {np.nanmax(self.values(f'val_{self.metric}')):.2f} {unit}".rstrip()

    def values(self, key: str) -> np.ndarray:
        """A metric by epoch (epochs,); NaN where there is none."""
        return np.array([_or_nan(row.get(key)) for row in self.rows])

    def indicators(self) -> np.ndarray:
        """Median Learning Indicators (epochs, layers); NaN for layers without samples."""
        medians = [
            [_or_nan(statistics.get("median")) for statistics in row.get("indicator", {}).values()]
            for row in self.rows
        ]
        return np.array(list(itertools.zip_longest(*medians, fillvalue=math.nan))).T

    def curves(self) -> dict[str, dict[str, np.ndarray]]:
        """What can be drawn, by panel and by name: values by epoch, some of them finite."""
        panels = {"loss": {"validation": "val_loss", "training": "train_loss"}}
        for key in (key for key in self.rows[0] if key.startswith("val_") and key != "val_loss"):
            name = key.removeprefix("val_")
            label, unit = _LABELS.get(name, (name, ""))
            panels[f"{label}, {unit}" if unit else label] = {
                "validation": key,
                "training": f"train_{name}",
            }
        panels["saved memory, MiB"] = {"": "saved_mib"}
        panels["peak memory, MiB"] = {"": "peak_mib"}
        panels[f"{self.unit} per second"] = {"": f"{self.unit}_per_s"}
        found = {
            panel: {name: self.values(key) for name, key in keys.items()}
            for panel, keys in panels.items()
        }
        indicators = self.indicators()
        if np.isfinite(indicators).any():
            known = np.ma.masked_invalid(indicators)
            found["Learning Indicator"] = {
                "median layer": np.ma.median(known, axis=1).filled(math.nan),
                "lowest layer": known.min(axis=1).filled(math.nan),
            }
        finite = {
            panel: {name: values for name, values in curves.items() if np.isfinite(values).any()}
            for panel, curves in found.items()
        }
        return {panel: curves for panel, curves in finite.items() if curves}


def read_run(path: Path) -> RecordedRun:
    """Read a run folder.

    Raises:
        UserError: it is no run folder, it has no finished epoch, or its records are damaged.
    """
    try:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}")
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is no folder of a run: it has no config.json")
        config = json.loads((path / "config.json").read_text())
        if not isinstance(config, dict):
            raise UserError(f"{path / 'config.json'} is damaged: it holds no settings")
        file = path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the records in {path} are damaged: {error}") from error
    if not lines:
        raise UserError(f"the run in {path} has no finished epoch yet")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            _check(row, number)
            if rows and (_metric(row), _unit(row)) != (_metric(rows[0]), _unit(rows[0])):
                raise ValueError("it has other metrics than the first line")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {file} is damaged: {error}") from error
    return RecordedRun(path, config.get("num_steps") is not None, rows)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names that tell run folders apart: what their own names do not share, but a word at least.

    Folders of one name have as many of their parents before it as it takes.
    """
    parts = [_readable(path.resolve()).parts for path in paths]
    depths = range(1, max(map(len, parts)) + 1)
    depth = next(d for d in depths if len({part[-d:] for part in parts}) == len(parts))
    names = ["/".join(part) for part in _without_shared([part[-depth:] for part in parts])]
    shorter = ["_".join(words) for words in _without_shared([name.split("_") for name in names])]
    return shorter if all(shorter) else names


def _without_shared(names: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Sequences without the words with which all begin or end; each keeps one at least."""
    names = list(names)
    for end, rest in ((0, slice(1, None)), (-1, slice(-1))):
        while (
            len(names) > 1 and min(map(len, names)) > 1 and len({name[end] for name in names}) == 1
        ):
            names = [name[rest] for name in names]
    return names


def _readable(path: Path) -> Path:
    """With question marks for bytes that are no text."""
    return Path(os.fsencode(path).decode(errors="replace"))


def _check(row: Any, epoch: int) -> None:
    """Raise ``ValueError`` unless the line has what every epoch has, all of it finite."""
    if not isinstance(row, dict) or row.get("epoch") != epoch:
        raise ValueError(f"it is not epoch {epoch}")
    indicator = row.get("indicator", {})
    if not isinstance(indicator, dict):
        raise ValueError("it has no Learning Indicators by layer")
    if not all(isinstance(statistics, dict) for statistics in indicator.values()):
        raise ValueError("it has no statistics of Learning Indicators")
    medians = [statistics.get("median") for statistics in indicator.values()]
    numbers = [value for key, value in row.items() if key != "indicator"]
    for value in (*numbers, *medians):
        if value is not None and not _is_number(value):
            raise ValueError(f"{value!r:.40} is no number that can be drawn")
    missing = [key for key in _NEEDED if row.get(key) is None]
    if missing:
        raise ValueError(f"it has no {missing[0]}")


def _metric(row: dict[str, Any]) -> str:
    names = [key.removeprefix("val_") for key in row if key.startswith("val_")]
    found = [name for name in names if name != "loss" and row[f"val_{name}"] is not None]
    if not found:
        raise ValueError("it has no score of the validation")
    return found[0]


def _unit(row: dict[str, Any]) -> str:
    found = [key for key, value in row.items() if key.endswith("_per_s") and value is not None]
    if not found:
        raise ValueError("it has no throughput")
    return found[0].removesuffix("_per_s")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
