"""Several processes of one script, started and watched over by another one."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from aal.training import launch
from aal.training.command_line import LOST, ProcessLost


@pytest.fixture
def started(tmp_path: Path) -> Callable:
    """Run what each process is to do, one after the other; returns the status."""

    def start(*scripts: str) -> int:
        path = tmp_path / "script.py"
        path.write_text(
            f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\nexec({scripts}[rank])\n"
        )
        return launch.launch(str(path), [], len(scripts))

    return start


WAITS = "time.sleep(100)"
LOSES = f"sys.exit({LOST})"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def test_a_killed_process_ends_the_others(started: Callable):
    message = "^process 2 of 3 was killed by signal 9 .SIGKILL., perhaps for want of memory$"
    with pytest.raises(ProcessLost, match=message):
        started(WAITS, KILLED, LOSES)


def test_a_signal_is_named(started: Callable):
    with pytest.raises(ProcessLost, match="^process 1 of 1 was killed by signal 6 .SIGABRT.$"):
        started(KILLED.replace("KILL", "ABRT"))


def test_a_status_is_that_of_the_process_that_the_others_lost(started: Callable):
    """Which ends later than they do."""
    assert started(LOSES, "time.sleep(0.5); sys.exit(2)", LOSES) == 2


def test_processes_that_lost_none_that_ended(started: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_PATIENCE", 0.3)
    for other in (LOSES, WAITS):
        with pytest.raises(ProcessLost, match="^process 1 of 2 waited in vain"):
            started(LOSES, other)


def test_a_process_that_ignores_signals_is_ended(
    started: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "_PATIENCE", 0.3)
    ignores = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    assert started(ignores, "time.sleep(0.5); sys.exit(7)") == 7


def test_a_process_ends_without_what_python_does_at_its_end(
    started: Callable, capfd: pytest.CaptureFixture
):
    """Where threads of PyTorch's process groups abort, which this stands for."""
    script = """
import atexit
from aal.training.command_line import run
atexit.register(os.abort)
print("done")
sys.exit(run(lambda arguments: 7, [], "train.py"))
"""
    assert started(script) == 7
    assert capfd.readouterr() == ("done\n", "")


@pytest.mark.slow
def test_processes_leave_notes_to_their_parent(tmp_path: Path, capfd: pytest.CaptureFixture):
    script = tmp_path / "script.py"
    script.write_text("from aal.training.command_line import note\nnote('again')\nprint('done')\n")
    assert launch.launch(str(script), [], 2) == 0
    out, err = capfd.readouterr()
    assert (out.replace("\n", ""), err) == ("done" * 2, "")  # lines may be mixed


FROZEN = """
import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed

from aal.training import command_line
from aal.training.devices import joined, parse_devices

torch.distributed.distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=5)


def main(arguments):
    folder = os.path.dirname(__file__)
    open(os.path.join(folder, os.environ["RANK"]), "w").close()
    while len(os.listdir(folder)) < 3:  # as they have little time to meet
        time.sleep(0.01)
    with joined(parse_devices(["cpu", "cpu"])) as worker:
        worker.barrier()
        if not worker.is_main:
            os.kill(os.getpid(), signal.SIGSTOP)
        worker.barrier()


sys.exit(command_line.run(main, [], "train.py"))
"""


@pytest.mark.slow
def test_a_process_that_hangs_is_waited_for_as_long_as_pytorch_does(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "_PATIENCE", 1)
    script = tmp_path / "script.py"
    script.write_text(FROZEN)
    with pytest.raises(ProcessLost, match="^process 1 of 2 waited in vain for another one"):
        launch.launch(str(script), [], 2)
    assert capfd.readouterr().err == ""


FAILS = """
import os
import sys

from aal.training.command_line import UserError, run


def main(arguments):
    with open(f"{os.environ['RANK']}", "w"):
        while len(os.listdir()) < 3:  # so that all of them come to their errors
            pass
    raise UserError({MESSAGE})


sys.exit(run(main, [], "train.py"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "message, lines",
    [
        ("'no such thing'", ["no such thing"]),
        ("f'no thing {min(1, int(os.environ[\"RANK\"]))}'", ["no thing 0", "no thing 1"]),
    ],
    ids=["the same", "others"],
)
def test_processes_that_fail_are_heard_once(
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    lines: list[str],
):
    script, place = tmp_path / "script.py", tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    ends = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # of its own accord
    script.write_text(ends + FAILS.replace("{MESSAGE}", message))
    assert launch.launch(str(script), [], 3) == 2
    out, err = capfd.readouterr()
    assert out == "" and sorted(err.splitlines()) == [f"train.py: error: {line}" for line in lines]


INTERRUPTED = """
import os
import signal
import sys

from aal.training.interruption import Interruption

os.kill(os.getpid(), signal.SIGINT)  # as a terminal sends it while modules are imported
with Interruption() as interruption:
    sys.exit(interruption.signal)
"""


def test_processes_leave_an_interrupt_for_where_they_can_save(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    assert launch.launch(str(script), [], 1) == signal.SIGINT
    assert capfd.readouterr().err == ""
