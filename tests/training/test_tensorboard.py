"""Event files, read back with TensorBoard's own reader."""

import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aal.training import tensorboard
from aal.training.command_line import UserError
from aal.training.tensorboard import EventFile, scalars


def row(epoch: int, peak_mib: float | None = None) -> dict:
    statistics = {"median": epoch / 7, "quantile_05": 0.0, "positive": 1.0, "scaled_median": 0.9}
    return {
        "epoch": epoch,
        "step": 5 * epoch,
        "train_loss": 2.5 / epoch,
        "val_loss": 3.0 / epoch,
        "val_bleu": 11.0 * epoch,
        "learning_rate": 0.1,
        "peak_mib": peak_mib,
        "tokens_per_s": 1000.0 + epoch,
        "indicator": {"encoder.0": statistics, "unseen": dict.fromkeys(statistics)},
    }


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(epoch, value) of everything that TensorBoard would draw, by name."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def expected(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """What ``read`` should find of some epochs; event files hold single precision."""
    found: dict[str, list[tuple[int, float]]] = {}
    for metrics in rows:
        for tag, value in scalars(metrics).items():
            found.setdefault(tag, []).append((metrics["epoch"], float(np.float32(value))))
    return found


def test_numbers_are_grouped_and_what_is_missing_is_left_out():
    assert scalars(row(2)) == {
        "run/step": 10,
        "loss/train": 1.25,
        "loss/val": 1.5,
        "bleu/val": 22.0,
        "run/learning_rate": 0.1,
        "run/tokens_per_s": 1002.0,
        "learning_indicator/encoder.0": 2 / 7,
    }
    assert scalars(row(2, peak_mib=3.5))["run/peak_mib"] == 3.5


def test_epochs_come_back(tmp_path: Path):
    rows = [row(1), row(2, peak_mib=7.25), row(3)]
    events = EventFile(tmp_path / "tensorboard", [])
    for metrics in rows:
        events.record(metrics)
        assert read(tmp_path / "tensorboard") == expected(rows[: metrics["epoch"]])


def test_epochs_after_the_resumed_one_are_void(tmp_path: Path):
    folder = tmp_path / "tensorboard"
    first = EventFile(folder, [])
    for epoch in (1, 2, 3):
        first.record(row(epoch))
    again = EventFile(folder, [row(1)])
    assert read(folder) == expected([row(1)])
    redone = [row(2) | {"val_bleu": 5.0}, row(3) | {"val_bleu": 6.0}]
    for metrics in redone:
        again.record(metrics)
    assert read(folder) == expected([row(1), *redone])
    assert len(list(folder.iterdir())) == 2


def test_a_run_without_event_files_gets_its_earlier_epochs(tmp_path: Path):
    rows = [row(1), row(2)]
    EventFile(tmp_path / "tensorboard", rows).record(row(3))
    assert read(tmp_path / "tensorboard") == expected([*rows, row(3)])


def test_a_file_in_the_folders_place_is_named(tmp_path: Path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="cannot .*tensorboard"):
        EventFile(tmp_path / "tensorboard", [])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    events = EventFile(tmp_path / "tensorboard", [])
    events.path = Path("/dev/full")
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        events.record(row(1))


def test_a_missing_package_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    tensorboard.check_installed()
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(UserError, match=r'--tensorboard needs: pip install "aal\[tensorboard\]"'):
        tensorboard.check_installed()
