"""Runs that are stopped anywhere go on as if nothing had happened."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts.conftest import (
    ROOT,
    SMALL,
    assert_refused,
    assert_same_results,
    files_of,
    run_folder,
)

from aal.compression.codecs import Codec, Groups
from aal.compression.compress import METHODS
from aal.compression.method import Method, Use
from aal.training.devices import Worker
from aal.training.folder_lock import FolderLock
from aal.training.run_folder import RunFolder

VIT = ("--cutmix", "--mixup", "--dropout", 0.2, "--get-li")
VIT += ("--learning-rule", "asa1", "--compress", "four", "--epochs", 2, "--batch-size", 4)


class FourBits(Method):
    """Does not learn, but rounds at random."""

    name = "four"
    smallest = 1

    def values(self, use: Use) -> Codec:
        return Groups(4)


@pytest.fixture(autouse=True)
def four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "four", (__name__, "FourBits"))


@pytest.fixture
def goes_on(tmp_path: Path, stop_at: Callable) -> Callable:
    """Check that a run that is stopped after some steps and resumed ends as one that is not."""

    def check(run: Callable, words: tuple, *steps: int, resumed: tuple = ()) -> None:
        status, _, err = run(*words)
        assert status == 0, err
        folder = run_folder(tmp_path)
        rows = _rows(folder)
        shutil.move(folder, tmp_path / "whole")
        for number, step in enumerate(steps):
            with stop_at(step):
                status, _, err = run(*words, *(("--resume", *resumed) if number else ()))
            hint = f"train.py: terminated at step {step}; --resume continues there\n"
            assert (status, err) == (143, hint)
        status, _, err = run(*words, "--resume", *resumed)
        assert (status, err) == (0, "")
        assert_same_results(folder, tmp_path / "whole")
        assert _rows(folder) == rows

    return check


def _rows(folder: Path) -> list[dict]:
    """The metrics of all epochs, apart from times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "samples_per_s", "tokens_per_s")
    return [{name: row[name] for name in row if name not in times} for row in rows]


@pytest.mark.parametrize("steps", [(1,), (3, 4)], ids=["first epoch", "second epoch, twice"])
def test_a_resnet(goes_on: Callable, train: Callable, steps: tuple[int, ...]):
    words = ("--learning-rule", "ara", "--get-li", "--epochs", 2, "--batch-size", 4)
    goes_on(train, words, *(step + 1 for step in steps))


def test_a_vit_with_everything_that_is_random(goes_on: Callable, train_vit: Callable):
    goes_on(train_vit, VIT, 2, 4)


@pytest.mark.parametrize("method", ["adaptive", "actnn", "gact", "mesa"])
def test_a_vit_whose_compressor_learns(goes_on: Callable, train_vit: Callable, method: str):
    words = ("--compress", method, "--learning-rule", "asa1", "--epochs", 3, "--batch-size", 4)
    words += ("--hidden", 32, "--mlp-hidden", 256, "--get-li")  # large enough to be compressed
    goes_on(train_vit, words, 2, 4)


def test_a_vit_that_counts_steps(goes_on: Callable, train_vit: Callable):
    length = ("--num-steps", 9, "--eval-every", 4, "--batch-size", 6, "--get-li")
    goes_on(train_vit, length, 2, 7)


@pytest.mark.slow
def test_data_may_be_loaded_by_other_processes(goes_on: Callable, train_vit: Callable):
    goes_on(train_vit, (*VIT, "--workers", 2), 2, resumed=("--workers", 1))


def test_a_mixer(goes_on: Callable, train_mixer: Callable):
    words = ("--cutmix-prob", 0.7, "--learning-rule", "asa4", "--get-li", "--compress", "four")
    goes_on(train_mixer, (*words, "--epochs", 2, "--batch-size", 4), 4)


def test_a_transformer(goes_on: Callable, train_transformer: Callable):
    words = ("--learning-rule", "asa1", "--get-li", "--compress", "four", "--epochs", 2)
    goes_on(train_transformer, words, 2, 5)


def test_a_bert(goes_on: Callable, train_bert: Callable):
    words = ("--task", "mrpc", "--learning-rule", "asa4", "--get-li", "--compress", "four")
    goes_on(train_bert, (*words, "--epochs", 2), 1, 4)


# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["validate", "test"])
def test_no_score_is_waited_for(
    train_vit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
):
    """A signal while the last epoch is validated, or the best one tested."""
    from aal.training.image_run import ImageRun

    train_vit(*VIT)
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    method, calls = getattr(ImageRun, phase), []

    def score(self, *args):
        calls.append(args)
        torch.rand(3)  # what a half-finished score has drawn does not count
        if len(calls) == (2 if phase == "validate" else 1):
            os.kill(os.getpid(), signal.SIGINT)
        return method(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ImageRun, phase, score)
        status, _, err = train_vit(*VIT)
    hint = "train.py: interrupted at step 6; --resume continues there\n"
    assert (status, err) == (130, hint)
    status, _, err = train_vit(*VIT, "--resume")
    assert (status, err) == (0, "")
    if phase == "test":
        assert_same_results(run_folder(tmp_path), tmp_path / "whole")
    compression = [
        place / "compression.txt" for place in (tmp_path / "whole", run_folder(tmp_path))
    ]
    assert compression[0].read_text() == compression[1].read_text()


def test_a_second_interrupt_stops_at_once(
    train_vit: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from aal.training.loop import Trainer

    learn = Trainer._learn

    def interrupted(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        if self.step:
            os.kill(os.getpid(), signal.SIGINT)
        learn(self, batch)

    monkeypatch.setattr(Trainer, "_learn", interrupted)
    status, _, err = train_vit("--epochs", 1)
    assert (status, err) == (130, "train.py: interrupted at step 1; --resume continues there\n")
    status, _, err = train_vit("--epochs", 1, "--resume")
    hint = "train.py: interrupted; --resume continues from the last saved state\n"
    assert (status, err) == (130, hint)


def test_states_are_saved_every_few_steps(train_vit: Callable, tmp_path: Path, stop_at: Callable):
    words = ("--num-steps", 9, "--eval-every", 9, "--save-every", 2, "--keep", 3)
    with stop_at(7):
        assert train_vit(*words)[0] == 143
    folder = run_folder(tmp_path)
    names = ("last.pth", "last-1.pth", "last-2.pth")
    steps = [torch.load(folder / name, weights_only=True)["step"] for name in names]
    assert steps == [7, 6, 4]
    assert sorted(path.name for path in folder.glob("last*")) == sorted(names)
    assert train_vit(*words[:4], "--keep", 1, "--resume")[0] == 0
    assert [path.name for path in folder.glob("last*")] == ["last.pth"]


def test_minutes_are_counted_from_the_last_state(
    train_vit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = iter(range(0, 10**9, 25))  # seconds, whenever somebody looks
    monkeypatch.setattr("aal.training.saving.time", type("", (), {"monotonic": clock.__next__}))
    written = []
    save = RunFolder.save
    monkeypatch.setattr(
        RunFolder, "save", lambda self, s: written.append(s["step"]) or save(self, s)
    )
    words = ("--num-steps", 9, "--eval-every", 9, "--save-every", "1m")
    assert train_vit(*words)[0] == 0
    assert written == [3, 6]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path: Path) -> None:
    """One bit of a weight."""
    weights = next(iter(torch.load(path, weights_only=True)["model"].values()))
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_cut, _flip])
def test_a_damaged_state_gives_way_to_the_one_before(
    train_vit: Callable, tmp_path: Path, stop_at: Callable, damage: Callable
):
    train_vit(*VIT)
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_at(5):
        train_vit(*VIT, "--save-every", 2, "--keep", 3)
    folder = run_folder(tmp_path)
    for name in ("last.pth", "last-1.pth"):
        damage(folder / name)
    status, out, err = train_vit(*VIT, "--resume", "--keep", 3)
    assert status == 0 and err.count("\n") == 1
    assert err.startswith("train.py: warning: ") and "last-2.pth" in err
    assert_same_results(folder, tmp_path / "whole")
    # Damaged states are gone, the whole ones that were left have their names.
    for path in folder.glob("last*.pth"):
        torch.load(path, weights_only=True)


def test_a_run_without_a_whole_state_is_refused(
    train_vit: Callable, tmp_path: Path, stop_at: Callable
):
    with stop_at(5):
        train_vit(*VIT, "--save-every", 2)
    for path in run_folder(tmp_path).glob("last*.pth"):
        _cut(path)
    before = files_of(tmp_path)
    assert_refused(train_vit(*VIT, "--resume"), "last.pth is damaged")
    assert_refused(train_vit(*VIT), "already holds a run")
    assert files_of(tmp_path) == before


def test_resume_auto_begins_and_continues(train_vit: Callable, tmp_path: Path, stop_at: Callable):
    train_vit(*VIT)
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_at(2):
        assert train_vit(*VIT, "--resume", "auto")[0] == 143
    status, out, err = train_vit(*VIT, "--resume=auto")
    assert (status, err) == (0, "")
    assert_same_results(run_folder(tmp_path), tmp_path / "whole")


def test_processes_go_on_from_one_state(
    train_vit: Callable, stop_at: Callable, monkeypatch: pytest.MonkeyPatch
):
    """Whose file systems might show them different ones."""
    with stop_at(2):
        train_vit(*VIT)
    monkeypatch.setattr(Worker, "gather_objects", lambda self, value: [value, None])
    found = "the processes found different states in "
    assert_refused(train_vit(*VIT, "--resume"), found)


def test_a_run_that_ends_before_the_folder_is_locked_is_noticed(
    train_vit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train_vit(*VIT, "--lr", 1e30)  # leaves no state

    def lock(folder: Path) -> FolderLock:
        (folder / "last.pth").touch()
        return FolderLock(folder)

    monkeypatch.setattr("aal.training.run_folder.FolderLock", lock)
    assert_refused(train_vit(*VIT, "--lr", 1e30), "another run was at work in ")


def test_a_folder_that_cannot_be_looked_at_is_refused(train_vit: Callable):
    refused = train_vit("--output", "x" * 300, "--resume", "auto")
    assert_refused(refused, "File name too long")


@pytest.mark.parametrize("extra", [(), ("--resume",), ("--resume", "auto")])
def test_a_second_run_in_a_folder_is_refused(
    train_vit: Callable, tmp_path: Path, stop_at: Callable, extra: tuple
):
    if extra:
        with stop_at(2):
            train_vit(*VIT)
    else:
        train_vit(*VIT, "--lr", 1e30)  # leaves no state
        runs = list((tmp_path / "runs").iterdir())
        runs[0].rename(runs[0].parent / "mine")
    name = () if extra else ("--name", "mine")
    with (run_folder(tmp_path) / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_refused(train_vit(*VIT, *name, *extra), "another run is at work")
    status, _, err = train_vit(*VIT, *name, *extra)
    assert (status, err) == (0, "")


# -----------------------------------------------------------------------------------------------


def _start(tiny_imagenet: Path, tmp_path: Path, *words: object) -> subprocess.Popen:
    """``train_vit`` in a process of its own, for many epochs."""
    command = [sys.executable, ROOT / "ViT/train.py", "--dataset", "tiny-imagenet", "--workers", 1]
    command += ["--data-path", tiny_imagenet, "--img-size", 8, *SMALL["ViT/train.py"].split()]
    command += ["--batch-size", 6, "--output", tmp_path / "runs", "--epochs", 10000, *words]
    command += ["--save-every", 1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], start_new_session=True, **pipes)


def _wait_for_state(process: subprocess.Popen, tmp_path: Path, after: int = 0) -> int:
    """Wait until a state is written, after one of another time; returns its time."""
    deadline = time.monotonic() + 100
    while True:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        for path in tmp_path.glob("runs/*/last.pth"):
            if (now := path.stat().st_mtime_ns) != after:
                return now
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu")], ids=["alone", "two processes"])
def test_processes_obey_signals(tiny_imagenet: Path, tmp_path: Path, devices: tuple[str, ...]):
    """As a terminal or torchrun sends them: to all processes, those that load data among them."""
    words, saved = ("--device", *devices), 0
    for resume, number, status in (
        ((), signal.SIGTERM, 143),
        (("--resume", "auto"), signal.SIGINT, 130),
    ):
        process = _start(tiny_imagenet, tmp_path, *words, *resume)
        _wait_for_state(process, tmp_path, saved)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == status, err
        assert err.count("\n") == 1 and "--resume continues there" in err
        state = torch.load(run_folder(tmp_path) / "last.pth", weights_only=True)
        saved = (run_folder(tmp_path) / "last.pth").stat().st_mtime_ns
        assert f"at step {state['step']};" in err and len(state["rng"]) == len(devices)


@pytest.mark.slow
def test_a_killed_run_is_continued_at_once(
    train_vit: Callable, tiny_imagenet: Path, tmp_path: Path, stop_at: Callable
):
    """Processes that load data outlive it for seconds, and hold no lock."""
    process = _start(tiny_imagenet, tmp_path, "--device", "cpu")
    _wait_for_state(process, tmp_path)
    process.kill()
    process.wait()
    step = torch.load(run_folder(tmp_path) / "last.pth", weights_only=True)["step"]
    with stop_at(step + 1 + step % 2):  # not at the end of an epoch of two
        status, _, err = train_vit("--epochs", 10000, "--resume")
    assert (status, err) == (
        143,
        f"train.py: terminated at step {step + 1 + step % 2}; --resume continues there\n",
    )
    process.communicate()


def test_rows_stay_right(train_vit: Callable, tmp_path: Path, stop_at: Callable):
    with stop_at(5):
        train_vit(*VIT)
    folder = run_folder(tmp_path)
    assert len(_rows(folder)) == 1 and np.load(folder / f"{folder.name}_li.npy").shape[0] == 1


def test_files_of_others_stay_and_leftovers_go(
    train_vit: Callable, tmp_path: Path, stop_at: Callable
):
    with stop_at(2):
        train_vit(*VIT)
    folder = run_folder(tmp_path)
    (folder / "notes.txt").touch()
    others = {".notes.txt.swp", ".metrics.jsonl.swp", ".last.pth.mine", ".notes.txt.ab.part"}
    names = ("test.json", "last.pth", "metrics.jsonl", f"{folder.name}_li.npy")
    for name in (*others, *(f".{name}.k2n3m4x5.part" for name in names)):
        (folder / name).touch()
    assert train_vit(*VIT, "--resume")[::2] == (0, "")
    assert {path.name for path in folder.glob(".*")} == {".lock", *others}
