"""One of several processes dies or hangs: the others stop, and one line says what happened."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scripts.conftest import ROOT, SMALL, call, run_folder, stop_at, tiny_imagenet, train_vit

__all__ = ["call", "stop_at", "tiny_imagenet", "train_vit"]  # fixtures

SCRIPT = "ViT/train.py"
MARK = "AAL_TEST_OF_DYING_PROCESSES"  # in the environment of all processes of a run
LONG = ("--epochs", 100000, "--save-every", 1, "--workers", 1, "--get-li", "--name", "run")
HINT = "; --resume continues from the last saved state\n"
KILLED = "was killed by signal 9 (SIGKILL), perhaps for want of memory"


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))


def until(condition: Callable, seconds: float = 300):
    """Wait for something that is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def processes_of_run(tmp_path: Path) -> dict[int, dict[str, str]]:
    """The environment of every process that was started here and lives, by its id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        environment = dict(word.split("=", 1) for word in words if "=" in word)
        if environment.get(MARK) == str(tmp_path):
            found[int(folder.name)] = environment
    return found


def process_of_rank(tmp_path: Path, rank: int) -> int | None:
    """The id of a process, which is lower than those of processes that load its data."""
    found = processes_of_run(tmp_path)
    return min((pid for pid in found if found[pid].get("RANK") == str(rank)), default=None)


@pytest.fixture
def meanwhile() -> Callable:
    """Do something in a thread until the end of the test, which fails if that does."""
    errors, threads = [], []

    def start(action: Callable) -> None:
        def act() -> None:
            try:
                action()
            except BaseException as error:
                errors.append(error)

        threads.append(threading.Thread(target=act))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()
    assert not errors


def kill_within_epoch(tmp_path: Path, rank: int) -> float:
    """Returns when it was."""
    until(lambda: list(tmp_path.glob("runs/run/last-1.pth")))
    os.kill(process_of_rank(tmp_path, rank), signal.SIGKILL)
    return time.monotonic()


@pytest.fixture
def goes_on(train_vit: Callable, tmp_path: Path, stop_at: Callable) -> Callable:
    """Check that nothing hinders the run from going on at once, and that no process is left."""

    def check() -> None:
        step = torch.load(run_folder(tmp_path) / "last.pth", weights_only=True)["step"]
        stop = step + 1 + step % 2  # not at the end of an epoch of two
        with stop_at(stop):
            status, _, err = train_vit(*LONG, "--workers", 0, "--resume")
        hint = f"train.py: terminated at step {stop}; --resume continues there\n"
        assert (status, err) == (143, hint)
        until(lambda: not processes_of_run(tmp_path), seconds=60)

    return check


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run(
    train_vit: Callable, tmp_path: Path, meanwhile: Callable, goes_on: Callable, rank: int
):
    killed_at = []
    meanwhile(lambda: killed_at.append(kill_within_epoch(tmp_path, rank)))
    status, _, err = train_vit(*LONG, "--device", "cpu", "cpu")
    assert time.monotonic() - killed_at[0] < 60
    assert (status, err) == (1, f"train.py: error: process {rank + 1} of 2 {KILLED}{HINT}")
    goes_on()


def words(tiny_imagenet: Path, tmp_path: Path) -> list[str]:
    """Of a command line: the script and a long run."""
    found = [ROOT / SCRIPT, "--dataset", "tiny-imagenet", "--data-path", tiny_imagenet, *LONG]
    found += ["--img-size", 8, *SMALL[SCRIPT].split(), "--batch-size", 6]
    return [str(word) for word in [*found, "--output", tmp_path / "runs"]]


def listens(port: int) -> bool:
    with socket.socket() as ours:
        return ours.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_process_that_dies_before_it_has_met_the_others(
    train_vit: Callable, tmp_path: Path, meanwhile: Callable
):
    def kill() -> None:
        pid = until(lambda: process_of_rank(tmp_path, 1))
        os.kill(pid, signal.SIGSTOP)
        port = int(processes_of_run(tmp_path)[pid]["MASTER_PORT"])
        until(lambda: listens(port))
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)

    meanwhile(kill)
    status, _, err = train_vit(*LONG, "--device", "cpu", "cpu")
    assert (status, err) == (1, f"train.py: error: process 2 of 2 {KILLED}\n")
    until(lambda: not processes_of_run(tmp_path), seconds=60)


@pytest.mark.slow
def test_processes_end_with_their_parent(tiny_imagenet: Path, tmp_path: Path, goes_on: Callable):
    """They would go on, and keep another run out of the folder."""
    command = [sys.executable, *words(tiny_imagenet, tmp_path), "--device", "cpu", "cpu"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until(lambda: list(tmp_path.glob("runs/run/last-1.pth")))
    parent.kill()
    _, err = parent.communicate(timeout=60)  # the end of all that could write to it
    assert err.startswith("train.py: terminated at step ") and err.count("\n") == 1
    goes_on()


@pytest.mark.slow
def test_processes_of_torchrun_say_that_one_is_lost(
    tiny_imagenet: Path, tmp_path: Path, meanwhile: Callable, goes_on: Callable
):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [*words(tiny_imagenet, tmp_path), "--device", "cpu"]
    meanwhile(lambda: kill_within_epoch(tmp_path, 1))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("train.py"))
    assert line.startswith("train.py: error: lost another process of the run (")
    assert line.endswith(HINT.strip())
    assert done.stderr.count("Traceback (") == 1  # of torchrun itself
    goes_on()
