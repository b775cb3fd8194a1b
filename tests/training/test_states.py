"""The newest states of a run, and the lock on their folder."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aal.training.command_line import UserError
from aal.training.folder_lock import FolderLock
from aal.training.states import States


def _steps(folder: Path) -> dict[str, int]:
    """File -> what its state says, of the files that are states."""
    files = sorted(folder.glob("last*.pth"))
    return {path.name: torch.load(path, weights_only=True)["step"] for path in files}


def _written(folder: Path, keep: int, count: int) -> States:
    states = States(folder, keep)
    for step in range(count):
        states.write({"step": step})
    return states


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_states_stay(tmp_path: Path, keep: int):
    states = _written(tmp_path, keep, 6)
    names = ["last.pth", *(f"last-{number}.pth" for number in range(1, keep))]
    assert _steps(tmp_path) == {name: 5 - age for age, name in enumerate(names)}
    assert [path.name for path in states.paths()] == names
    assert len(list(tmp_path.iterdir())) == keep
    assert states.read() == (tmp_path / "last.pth", {"step": 5})


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    _written(tmp_path, 3, 4)
    assert _steps(tmp_path) == {"last.pth": 3, "last-1.pth": 2, "last-2.pth": 1}


def test_at_every_moment_the_newest_state_is_there(tmp_path: Path, monkeypatch):
    """A process may be killed before or after each change of a name."""
    states = _written(tmp_path, 3, 3)
    replace, seen = os.replace, []

    def watched(source, target):
        replace(source, target)
        seen.append(_steps(tmp_path)["last.pth"])
        shutil.copytree(tmp_path, tmp_path.parent / f"killed{len(seen)}", dirs_exist_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        states.write({"step": 3})
    assert seen == [2, 2, 3]
    for number in range(1, 4):  # and it goes on from any of them
        folder = tmp_path.parent / f"killed{number}"
        again = States(folder, 3)
        assert again.read()[1] == {"step": seen[number - 1]}
        again.write({"step": 4})
        assert _steps(folder)["last.pth"] == 4 and _steps(folder)["last-1.pth"] == seen[number - 1]


def test_any_number_of_states_may_stay(tmp_path: Path):
    (tmp_path / "last-01.pth").touch()  # somebody's own
    states = _written(tmp_path, 10**18, 4)
    names = ["last.pth", "last-1.pth", "last-2.pth", "last-3.pth"]
    assert [path.name for path in states.paths()] == names
    (tmp_path / "last-01.pth").unlink()
    assert _steps(tmp_path) == {name: 3 - age for age, name in enumerate(names)}


def test_fewer_states_stay_when_so_told(tmp_path: Path):
    _written(tmp_path, 4, 5)
    (tmp_path / "last-night.pth").touch()  # somebody's own
    States(tmp_path, 2).write({"step": 5})
    (tmp_path / "last-night.pth").unlink()
    assert _steps(tmp_path) == {"last.pth": 5, "last-1.pth": 4}


@pytest.mark.parametrize("count", [1, 2])
def test_damaged_states_are_passed_over_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture, count: int
):
    states = _written(tmp_path, 3, 3)
    damaged = states.paths()[:count]
    for path in damaged:
        path.write_bytes(b"nothing")
    path, state = states.read()
    assert (path.name, state) == (f"last-{count}.pth", {"step": 2 - count})
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(str(path) in err for path in damaged)
    states.write({"step": 7})
    assert states.read()[1] == {"step": 7}
    steps = _steps(tmp_path)
    assert steps.pop("last.pth") == 7 and set(steps.values()) == set(range(3 - count))


@pytest.mark.parametrize(
    "error, found, text",
    [
        (MemoryError(), MemoryError, "^$"),
        (OSError(errno.EIO, "Input/output error"), UserError, "cannot read .*: Input/output error"),
    ],
    ids=["memory", "disk"],
)
def test_a_state_that_cannot_be_read_may_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, found: type, text: str
):
    """It is neither passed over nor removed."""
    states = _written(tmp_path, 2, 2)

    def fail(*args, **kwargs) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(found, match=text):
        patch.setattr(torch, "load", fail)
        states.read()
    assert states.read()[1] == {"step": 1}
    states.write({"step": 2})
    assert _steps(tmp_path) == {"last.pth": 2, "last-1.pth": 1}


def test_a_damaged_state_may_ask_for_any_amount_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    states, load = _written(tmp_path, 2, 2), torch.load
    states.newest.write_bytes(states.newest.read_bytes()[:-9])

    def ask(file, **kwargs):
        if file.name == str(states.newest):
            raise MemoryError
        return load(file, **kwargs)

    monkeypatch.setattr(torch, "load", ask)
    assert states.read()[1] == {"step": 0}
    assert "last.pth is damaged" in capsys.readouterr().err


def test_no_whole_state_is_one_error(tmp_path: Path):
    states = _written(tmp_path, 2, 2)
    for path in states.paths():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="last.pth is damaged.*last-1.pth is damaged"):
        states.read()


def test_one_process_locks_a_folder(tmp_path: Path):
    lock = FolderLock(tmp_path)
    code = "import sys, pathlib, aal.training.folder_lock as f; f.FolderLock(pathlib.Path('.'))"
    other = [sys.executable, "-c", code]
    root = str(Path(__file__).resolve().parents[2])
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": root}, "capture_output": True}
    done = subprocess.run(other, text=True, **options)
    assert done.returncode == 1 and "another run is at work in ." in done.stderr
    with pytest.raises(UserError, match="another run is at work"):
        FolderLock(tmp_path)
    lock.release()
    assert subprocess.run(other, **options).returncode == 0
    FolderLock(tmp_path)  # which nobody keeps
    FolderLock(tmp_path).release()
