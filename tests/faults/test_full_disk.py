"""Runs on a disk that is full: one clear line, nothing lost, and on they go when there is room."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scripts.conftest import (
    assert_same_results,
    call,
    files_of,
    stop_at,
    tiny_imagenet,
    train_vit,
)

__all__ = ["call", "stop_at", "tiny_imagenet", "train_vit"]  # fixtures

WORDS = ("--dropout", 0.2, "--get-li", "--learning-rule", "asa1", "--epochs", 2)
WORDS += ("--batch-size", 4, "--name", "run")
PAGE = 4096  # bytes, of which the disk consists


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", error)
        pytest.skip(f"{str(reason).strip()}; under unshare --map-root-user --mount it works")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, room: int) -> None:
    """Leave so many bytes free."""
    pages = (shutil.disk_usage(disk).free - room) // PAGE
    (disk / "filler").write_bytes(bytes(pages * PAGE))


# What a run is given beside WORDS, the room that it has, as a share of a state, and the file that
# it cannot write.
CASES = {
    "while the run goes on": (("--save-every", 1), 0.5, r"last\.pth"),
    "at the end of an epoch": ((), 0.5, r"last\.pth"),
    "for the metrics": ((), 0, r"metrics\.jsonl"),
    "for TensorBoard": (("--tensorboard",), 0, r"tensorboard/events\.out\.tfevents\.\d+"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_lacks_room_keeps_what_there_is_and_can_be_resumed(
    train_vit: Callable, tmp_path: Path, disk: Path, stop_at: Callable, case: str
):
    extra, share, file = CASES[case]
    assert train_vit(*WORDS)[0] == 0
    words = (*WORDS, "--output", disk)
    with stop_at(2):
        assert train_vit(*words)[0] == 143
    folder = disk / "run"
    before = files_of(folder)
    fill(disk, int(share * len(before["last.pth"])))
    status, out, err = train_vit(*words, *extra, "--resume")
    assert (status, out) == (2, "")
    line = rf"train\.py: error: cannot write {folder}/{file}: No space left on device\n"
    assert re.fullmatch(line, err), err
    after = files_of(folder)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name.startswith(".")} == {".lock"}
    (disk / "filler").unlink()
    status, _, err = train_vit(*words, "--resume")
    assert (status, err) == (0, "")
    assert_same_results(folder, tmp_path / "runs" / "run")


def test_a_run_that_cannot_begin_leaves_room_for_the_next_one(train_vit: Callable, disk: Path):
    fill(disk, 0)
    words = ("--epochs", 1, "--output", disk, "--name", "run")
    status, out, err = train_vit(*words)
    message = f"cannot write {disk}/run/config.json: No space left on device"
    assert (status, out, err) == (2, "", f"train.py: error: {message}\n")
    (disk / "filler").unlink()
    assert train_vit(*words)[::2] == (0, "")


@pytest.mark.slow
def test_the_first_of_two_processes_speaks_for_both(train_vit: Callable, disk: Path):
    fill(disk, 0)
    words = ("--epochs", 1, "--output", disk, "--name", "run", "--device", "cpu", "cpu")
    message = f"cannot write {disk}/run/config.json: No space left on device"
    assert train_vit(*words) == (2, "", f"train.py: error: {message}\n")
