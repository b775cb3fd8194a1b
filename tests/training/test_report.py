"""The picture and the table of recorded runs."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from aal.training import command_line, report
from aal.training.recorded_run import read_run, short_names


def row(epoch: int, **changed: object) -> dict:
    """An epoch of an image run on a CPU."""
    return {
        "epoch": epoch,
        "step": 5 * epoch,
        "train_accuracy": 10.0 * epoch,
        "val_accuracy": 50.0 - (epoch - 2) ** 2,
        "train_loss": 2.5 / epoch,
        "val_loss": 3.0 / epoch,
        "learning_rate": 0.1,
        "saved_mib": 12.25,
        "peak_mib": None,
        "samples_per_s": 100.0 + epoch,
        "seconds": 1.5,
    } | changed


def text_row(epoch: int, **changed: object) -> dict:
    """An epoch of a translation on a GPU."""
    own = {"val_bleu": 20.0 + epoch, "peak_mib": 99.5, "tokens_per_s": 5000.0, "saved_mib": 7.0}
    left_out = ("train_accuracy", "val_accuracy", "samples_per_s")
    return {k: v for k, v in row(epoch).items() if k not in left_out} | own | changed


def indicator(*medians: float | None) -> dict:
    return {f"layers.{i}": {"median": median} for i, median in enumerate(medians)}


@pytest.fixture
def record(tmp_path: Path) -> Callable:
    """Make a run folder of some rows."""

    def make(name: str, rows: list[dict], **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"get_li": False} | config))
        lines = "".join(json.dumps(metrics) + "\n" for metrics in rows)
        (folder / "metrics.jsonl").write_text(lines)
        return folder

    return make


def call(*words: object) -> int:
    """Run the report as its command line does."""
    return command_line.run(report.main, [str(word) for word in words], report.PROGRAM)


def panels(*folders: Path, x: str | None = None) -> dict[str, Axes]:
    return {axis.get_title(): axis for axis in figure(*folders, x=x).axes}


def figure(*folders: Path, x: str | None = None):
    return report.draw([read_run(folder) for folder in folders], x)


def curves(axis: Axes) -> list[list[tuple[float, float]]]:
    """The points of every curve in a panel, apart from a line at zero."""
    lines = [line for line in axis.get_lines() if line.get_linestyle() != ":"]
    return [list(zip(*line.get_data(), strict=True)) for line in lines]


def points(rows: list[dict], key: str, x: str = "epoch") -> list[tuple[float, float]]:
    return [(metrics[x], metrics[key]) for metrics in rows]


def test_every_number_of_every_run_is_drawn_where_it_belongs(record: Callable):
    images = [row(epoch) for epoch in (1, 2, 3)]
    texts = [text_row(epoch) for epoch in (1, 2)]
    found = panels(record("vit", images), record("transformer", texts))
    expected = {
        "loss": [(images, "val_loss"), (images, "train_loss")]
        + [(texts, "val_loss"), (texts, "train_loss")],
        "accuracy, %": [(images, "val_accuracy"), (images, "train_accuracy")],
        "BLEU": [(texts, "val_bleu")],
        "saved memory, MiB": [(images, "saved_mib"), (texts, "saved_mib")],
        "peak memory, MiB": [(texts, "peak_mib")],
        "samples per second": [(images, "samples_per_s")],
        "tokens per second": [(texts, "tokens_per_s")],
    }
    assert list(found) == list(expected)
    for title, sources in expected.items():
        assert curves(found[title]) == [points(*source) for source in sources], title
        assert found[title].get_xlabel() == "epochs"


def test_indicators_are_the_median_and_the_lowest_of_the_layers(record: Callable):
    rows = [
        row(1, indicator=indicator(None, None)),
        row(2, indicator=indicator(0.1, 0.7)),
        row(3, indicator=indicator(0.2, 0.4, -0.6)),
        row(4, indicator=indicator(0.5, None, 0.3)),
    ]
    found = panels(record("ara", rows), record("bp", [row(1)]))
    middle, lowest = curves(found["Learning Indicator"])
    nan = math.nan
    expected = [[(1, nan), (2, 0.4), (3, 0.2), (4, 0.4)], [(1, nan), (2, 0.1), (3, -0.6), (4, 0.3)]]
    np.testing.assert_allclose([middle, lowest], expected)


def test_a_panel_without_numbers_is_left_out(record: Callable):
    rows = [row(1, indicator=indicator(None))]
    titles = ["loss", "accuracy, %", "saved memory, MiB", "samples per second"]
    assert list(panels(record("x", rows))) == titles


def test_scores_that_an_epoch_lacks_are_gaps(record: Callable):
    rows = [row(1, val_f1=None), row(2, val_f1=40.0)]
    ((first, second),) = curves(panels(record("x", rows))["F1, %"])
    assert math.isnan(first[1]) and second == (2, 40.0)


def test_steps_are_counted_where_a_run_counts_them_or_the_user_asks(record: Callable):
    rows = [row(1), row(2)]
    by_epochs, by_steps = record("a", rows), record("b", rows, num_steps=10)
    for found, axis in (
        (panels(by_epochs), "epoch"),
        (panels(by_epochs, by_steps), "step"),
        (panels(by_epochs, x="steps"), "step"),
        (panels(by_steps, x="epochs"), "epoch"),
    ):
        assert found["loss"].get_xlabel() == f"{axis}s"
        assert curves(found["loss"])[0] == points(rows, "val_loss", axis)


@pytest.mark.parametrize("count", [1, 3, 14])
def test_runs_have_a_colour_each_which_the_legend_explains(record: Callable, count: int):
    names = ["_hidden", "cost in $", "$x^2$", *(f"run{i}" for i in range(count))][:count]
    drawn = figure(*(record(name, [row(1), row(2)]) for name in names))
    (legend,) = drawn.legends
    drawn.draw_without_rendering()
    assert [text.get_text() for text in legend.get_texts()] == names
    keys = [tuple(np.atleast_1d(line.get_color())) for line in legend.get_lines()]
    lines = drawn.axes[2].get_lines()  # the saved memory: a curve of each run
    assert [tuple(np.atleast_1d(line.get_color())) for line in lines] == keys
    assert len(set(keys)) == count


NAMES = {
    ("results/digits_vit_bp",): ["digits_vit_bp"],
    ("r/digits_vit_bp_epochs-2", "r/digits_vit_asa1_lean-exact_epochs-2"): [
        "bp",
        "asa1_lean-exact",
    ],
    ("digits_ara", "digits_ara_gcp"): ["ara", "ara_gcp"],
    ("one/small", "two/small"): ["one", "two"],
    ("x/one/run", "y/one/run", "y/two/run"): ["x/one", "y/one", "y/two"],
    ("a", "b/c"): ["a", "c"],
    ("a_", "a_b"): ["a_", "a_b"],
}


@pytest.mark.parametrize("paths, names", NAMES.items(), ids=str)
def test_names_are_what_runs_do_not_share(paths: tuple[str, ...], names: list[str]):
    assert short_names([Path(path) for path in paths]) == names


def test_names_that_are_no_text_are_readable():
    (name,) = short_names([Path(b"run\xff".decode(errors="surrogateescape"))])
    assert name.encode() and name.startswith("run")


def test_it_prints_the_last_epochs_and_writes_a_picture(record: Callable, tmp_path: Path, capsys):
    images = [row(epoch, indicator=indicator(0.25, 0.5, 0.75)) for epoch in (1, 2, 3)]
    folders = [record("vit", images), record("transformer", [text_row(1)])]
    assert call(*folders, "--output", tmp_path / "picture.png") == 0
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "run" and last == f"picture: {tmp_path / 'picture.png'}"
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines]
    assert cells == [
        ["vit", "3", "accuracy 50.00 %", "1.0000", "12.2", "-", "103.0 samples/s", "0.5000"],
        ["transformer", "1", "BLEU 21.00", "3.0000", "7.0", "99.5", "5000.0 tokens/s", "-"],
    ]
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_the_picture_is_report_png_unless_told(record: Callable, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(record("run", [row(1)])) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "report.png"}


DAMAGED = {
    "no JSON": "{",
    "not even text": b"\xff\xfe",
    "too deep": "[" * 100_000,
    "a list": "[1]",
    "another epoch": json.dumps(row(3)),
    "not finite": json.dumps(row(2, val_loss=math.nan)),
    "too large": json.dumps(row(2)).replace("12.25", "1" * 400),
    "digits without end": json.dumps(row(2)).replace("12.25", "1" * 5000),
    "text for a number": json.dumps(row(2, peak_mib="9")),
    "truth for a number": json.dumps(row(2, peak_mib=True)),
    "no loss": json.dumps(row(2, train_loss=None)),
    "no score": json.dumps(row(2, val_accuracy=None)),
    "no throughput": json.dumps(row(2, samples_per_s=None)),
    "another score": json.dumps({"val_f1": 3.0} | row(2)),
    "indicators in a list": json.dumps(row(2, indicator=[1])),
    "an indicator without statistics": json.dumps(row(2, indicator={"fc": 1})),
    "an indicator in words": json.dumps(row(2, indicator=indicator("high"))),
    "an empty line": "",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_metrics_get_one_line_and_status_2(
    record: Callable, tmp_path: Path, capsys, line: str | bytes
):
    folder = record("run", [row(1)])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line if isinstance(line, bytes) else line.encode())
        file.write(b"\n")
    assert_refused(capsys, tmp_path, "damaged: ", folder)


def assert_refused(capsys, tmp_path: Path, words: str, *arguments: object) -> None:
    """The report ended with one line that holds ``words``, and without a picture."""
    assert call(*arguments, "--output", tmp_path / "picture.png") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
    assert err.startswith("aal.training.report: error: ")
    assert not (tmp_path / "picture.png").exists()


def test_what_is_no_run_gets_one_line_and_status_2(record: Callable, tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    good, unfinished = record("good", [row(1)]), record("unfinished", [])
    settings, text = record("settings", [row(1)]), record("text", [row(1)])
    (settings / "config.json").write_text("[]")
    (text / "config.json").write_text("{")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for arguments, words in (
        ([tmp_path / "nowhere"], "there is no folder"),
        ([good / "metrics.jsonl"], "there is no folder"),
        (["x" * 300], "File name too long"),
        ([loop], "there is no folder"),
        ([tmp_path / "empty"], "no folder of a run: it has no config.json"),
        ([unfinished], "no finished epoch"),
        ([settings], "damaged"),
        ([text], "damaged"),
        ([good, unfinished], "no finished epoch"),
        ([good, tmp_path / "empty" / ".." / "good"], "named twice"),
        ([good] * 51, "too many"),
        ([], "required"),
        ([good, "--x", "days"], "invalid choice"),
    ):
        assert_refused(capsys, tmp_path, words, *arguments)
    (unfinished / "metrics.jsonl").unlink()
    assert_refused(capsys, tmp_path, "no finished epoch", unfinished)


def test_a_bad_output_gets_one_line_and_status_2(record: Callable, tmp_path: Path, capsys):
    folder = record("run", [row(1)])
    (tmp_path / "folder.png").mkdir()
    for output, words in itertools.chain(
        {"picture.jpg": "must end in .png", "nowhere/picture.png": "there is no folder"}.items(),
        {"folder.png": "cannot write", f"{'x' * 300}.png": "cannot write"}.items(),
    ):
        assert call(folder, "--output", tmp_path / output) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and words in err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "folder.png"}
