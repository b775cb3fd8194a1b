"""The folder of one run: configuration, environment, metrics, indicators and checkpoints."""

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aal.training.command_line import UserError
from aal.training.files import (
    read_checkpoint,
    remove_leftovers,
    write_array,
    write_checkpoint,
    write_json,
    write_text,
)
from aal.training.folder_lock import FolderLock
from aal.training.states import States

# Of the full state:
_ONLY_TO_RESUME = ("optimizer", "scaler", "rng", "step", "progress", "compression")


class RunFolder:
    """``<output>/<experiment>/``; every file in it is written whole or not at all.

    Args:
        output: parent folder.
        experiment: name that tells the run apart.
        metric: what says which epoch is best, such as "accuracy".
        columns: metrics of an epoch that go into the table ``<experiment>.npy``.
        keep: how many full states stay.
    """

    def __init__(
        self, output: Path, experiment: str, metric: str, columns: Sequence[str], keep: int
    ):
        self.path, self.experiment = output / experiment, experiment
        self.states = States(self.path, keep)
        self._lock: FolderLock | None = None
        self.best_metric, self.columns = f"best_{metric}", columns
        self.metrics: list[dict[str, Any]] = []
        self.indicators: list[np.ndarray] = []
        self.indicator_names: list[str] = []  # of the rows of the last one, on resuming

    @property
    def last(self) -> Path:
        return self.states.newest

    @property
    def has_state(self) -> bool:
        """Is there a run to be continued?

        Raises:
            UserError: the folder cannot be looked at.
        """
        try:
            return bool(self.states.paths())
        except OSError as error:
            raise UserError(f"cannot use {self.path}: {error.strerror}") from error

    @property
    def best(self) -> Path:
        return self.path / "best.pth"

    def check(self, resume: bool) -> None:
        """Raise ``UserError`` if there is a run and none should be, or the other way round.

        A run that was stopped before its first checkpoint left nothing to continue, and is begun
        again. A folder that holds anything else is somebody else's. From here on the folder is
        locked, if there is one.
        """
        try:
            names = [file.name for file in self.path.iterdir()] if self.path.exists() else []
        except OSError as error:
            raise UserError(f"cannot use {self.path}: {error.strerror}") from error
        files = {name for name in names if not name.startswith(".")}  # our lock, cut-off writes
        if resume and not self.has_state:
            raise UserError(f"nothing to resume: there is no {self.last}")
        if not resume and self.has_state:
            raise UserError(
                f"{self.path} already holds a run; --resume continues it, --output names another "
                "place"
            )
        if not resume and files and not self._is_begun_run(files):
            raise UserError(f"{self.path} already holds other files; --output names another place")
        if self.path.exists():
            self._lock = FolderLock(self.path)
            if self.has_state != resume:
                self.release()
                raise UserError(f"another run was at work in {self.path} until now; start again")
            remove_leftovers(self.path, {*self._own_files, "last.pth", "test.json"})

    def release(self) -> None:
        """Let another run work in the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _is_begun_run(self, files: set[str]) -> bool:
        """Are these the files that a run leaves before its first checkpoint, and no others?"""
        foreign = files - self._own_files
        try:
            config = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError):
            return False
        return not foreign and isinstance(config, dict) and "get_li" in config

    def start(self, config: dict[str, Any]) -> None:
        """Create the folder and record what runs, and where."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {self.path}: {error.strerror}") from error
        if self._lock is None:
            self.check(resume=False)  # once more, as another run may have come first
        write_json(self.path / "config.json", config)
        write_json(self.path / "environment.json", environment())

    def resume(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the last full state, and read the records that go with it.

        Raises:
            UserError: a file is damaged, or belongs to a run with other settings.
        """
        path, state = self.states.read()
        if not {"config", "epoch", self.best_metric} <= set(state):
            raise UserError(f"{path} is not the state of a run")
        check_agrees(path, state["config"], config)
        if epochs := state["epoch"]:
            self._read_records(epochs, config["get_li"])
            read_checkpoint(self.best)  # which the run ends with
        return state

    def _read_records(self, epochs: int, has_indicators: bool) -> None:
        path = self.path / "metrics.jsonl"
        try:
            self.metrics = [json.loads(line) for line in path.read_text().splitlines()[:epochs]]
            if [row["epoch"] for row in self.metrics] != list(range(1, epochs + 1)):
                raise ValueError("it lacks epochs")
            if has_indicators:
                self.indicator_names = list(self.metrics[-1]["indicator"])
                path = self._indicator_file
                indicators = np.load(path, allow_pickle=False)[:epochs]
                if indicators.ndim != 3 or len(indicators) != epochs:
                    raise ValueError("it lacks epochs")
                self.indicators = list(indicators)
        except (OSError, ValueError, EOFError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path} is damaged: {error}") from error

    def finish_epoch(
        self, row: dict[str, Any], indicator: np.ndarray | None, state: dict[str, Any], best: bool
    ) -> None:
        """Record an epoch. The full state comes last: until it is there, the epoch is redone."""
        self.metrics.append(row)
        lines = "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in self.metrics)
        write_text(self.path / "metrics.jsonl", lines)
        table = [[metrics[column] for column in self.columns] for metrics in self.metrics]
        write_array(self.path / f"{self.experiment}.npy", np.array(table))
        if indicator is not None:
            self.indicators.append(indicator)
            write_array(self._indicator_file, _stacked(self.indicators))
        if best:
            left_out = {*_ONLY_TO_RESUME, self.best_metric}
            kept = {name: value for name, value in state.items() if name not in left_out}
            write_checkpoint(self.best, kept)
        self.states.write(state)

    def save(self, state: dict[str, Any]) -> None:
        """Write the full state within an epoch."""
        self.states.write(state)

    def record_compression(self, report: str) -> None:
        """Record what became of each tensor that autograd saved."""
        write_text(self.path / "compression.txt", f"{report}\n")

    def finish(self, test: dict[str, Any]) -> None:
        """Record the score of the best checkpoint on the test part."""
        write_json(self.path / "test.json", test)

    @property
    def _own_files(self) -> set[str]:
        """What a run leaves before its first full state."""
        own = {"config.json", "environment.json", "metrics.jsonl", "best.pth", "compression.txt"}
        return own | {"tensorboard", f"{self.experiment}.npy", self._indicator_file.name}

    @property
    def _indicator_file(self) -> Path:
        return self.path / f"{self.experiment}_li.npy"


def _stacked(indicators: list[np.ndarray]) -> np.ndarray:
    """(epochs, layers, samples); a last stretch of few steps has NaN behind its samples.

    A place that is compressed later than others has NaN before.
    """
    shape = (len(indicators), *np.max([values.shape for values in indicators], axis=0))
    stacked = np.full(shape, np.nan, np.float32)
    for padded, values in zip(stacked, indicators, strict=True):
        padded[: values.shape[0], : values.shape[1]] = values
    return stacked


def check_agrees(path: Path, made_with: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ``UserError`` if a checkpoint was made with other settings than the wanted ones."""
    if not isinstance(made_with, dict):
        raise UserError(f"{path} is not a checkpoint of this project")
    for name, value in wanted.items():
        if made_with.get(name, value) != value:
            flag = name.replace("_", "-")
            made = str(made_with[name]).strip()  # the text of a file ends its last line
            raise UserError(f"{path} was made with --{flag} {made}, not {value}")


def environment() -> dict[str, Any]:
    """Versions, hardware and commit, to be stored beside every number."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda if gpus else None,
        "gpus": gpus,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "commit": _commit(),
    }


def _processor() -> str:
    """The processor's model where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, marked if it has changes; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        source = Path(__file__).parent
        result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
