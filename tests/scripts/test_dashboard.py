"""What people watch of real runs: TensorBoard's event files, and pictures."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scripts.conftest import assert_refused, assert_same_results, run_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aal.training import report
from aal.training.recorded_run import read_run
from aal.training.tensorboard import scalars

WORDS = ("--learning-rule", "asa1", "--get-li", "--tensorboard")


def recorded(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_events_are_the_metrics(folder: Path, epochs: int) -> None:
    rows = recorded(folder)
    assert [row["epoch"] for row in rows] == [*range(1, epochs + 1)]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {tag for row in rows for tag in scalars(row)}
    for tag in events.Tags()["scalars"]:
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(row["epoch"], float(np.float32(scalars(row)[tag]))) for row in rows]


def test_a_run_writes_event_files_only_where_they_are_asked_for(
    train_patches: Callable, tmp_path: Path
):
    assert train_patches("--epochs", 2, *WORDS)[0] == 0
    folder = run_folder(tmp_path)
    assert_events_are_the_metrics(folder, 2)
    other = ("--output", tmp_path / "other")
    assert train_patches("--epochs", 2, *WORDS, *other, "--no-tensorboard")[0] == 0
    assert not (tmp_path / "other" / folder.name / "tensorboard").exists()
    assert_same_results(folder, tmp_path / "other" / folder.name)


@pytest.mark.parametrize("flags", [("--tensorboard",), ()], ids=["from the start", "on resuming"])
def test_a_resumed_run_has_every_epoch_once(
    train_vit: Callable, stop_after: Callable, tmp_path: Path, flags: tuple
):
    words = ("--epochs", 3, *WORDS[:3])
    with stop_after(1):
        assert train_vit(*words, *flags)[0] == 130
    assert train_vit(*words, "--tensorboard", "--resume")[0] == 0
    assert_events_are_the_metrics(run_folder(tmp_path), 3)


def test_a_run_that_was_stopped_before_its_first_epoch_is_begun_again(
    train_vit: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def stop(self, worker, title):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("aal.training.image_run.ImageRun.validate", stop)
        assert train_vit("--epochs", 1, *WORDS)[0] == 130
    assert (run_folder(tmp_path) / "tensorboard").is_dir()
    assert train_vit("--epochs", 1, *WORDS)[0] == 0
    assert_events_are_the_metrics(run_folder(tmp_path), 1)


def test_texts_have_event_files_too(train_transformer: Callable, tmp_path: Path):
    assert train_transformer("--epochs", 1, "--tensorboard")[0] == 0
    assert_events_are_the_metrics(run_folder(tmp_path), 1)


def test_a_missing_package_is_asked_for_before_any_work(
    train: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    assert_refused(train("--epochs", 1, "--tensorboard"), 'pip install "aal[tensorboard]"')
    assert not (tmp_path / "runs").exists()


def test_the_picture_of_real_runs_holds_their_metrics(
    train_vit: Callable, train_transformer: Callable, tmp_path: Path
):
    assert train_vit("--epochs", 2, *WORDS[:3])[0] == 0
    vit = run_folder(tmp_path).rename(tmp_path / "vit")
    assert train_transformer("--epochs", 1)[0] == 0
    transformer = run_folder(tmp_path)
    figure = report.draw([read_run(vit), read_run(transformer)])
    drawn = {
        axis.get_title(): [list(line.get_ydata()) for line in axis.get_lines()]
        for axis in figure.axes
    }
    images, texts = recorded(vit), recorded(transformer)
    for title, key in {
        "accuracy, %": "val_accuracy",
        "samples per second": "samples_per_s",
    }.items():
        assert drawn[title][0] == [row[key] for row in images]
    for title, key in {"BLEU": "val_bleu", "tokens per second": "tokens_per_s"}.items():
        assert drawn[title] == [[row[key] for row in texts]]
    for title, key in {"loss": "val_loss", "saved memory, MiB": "saved_mib"}.items():
        curves = [[row[key] for row in rows] for rows in (images, texts)]
        assert [values for values in drawn[title] if values in curves] == curves
    layers = [[statistics["median"] for statistics in row["indicator"].values()] for row in images]
    np.testing.assert_allclose(drawn["Learning Indicator"][0], np.median(layers, axis=1))
    assert not any("peak" in title for title in drawn)
