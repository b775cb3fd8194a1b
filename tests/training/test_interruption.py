"""Signals are obeyed where a state can be saved."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aal.training.interruption import Interruption, StopAtOnce

ROOT = Path(__file__).resolve().parents[2]


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_down(number: int):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with Interruption() as interruption:
        assert interruption.signal == 0
        _send(number)
        assert interruption.signal == number
        _send(signal.SIGTERM)
        assert interruption.signal == number
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_interrupt_is_obeyed():
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        _send(signal.SIGTERM)
        _send(signal.SIGINT)  # as a terminal and a launcher send them together
        assert interruption.signal == signal.SIGTERM
        _send(signal.SIGINT)


def test_a_signal_may_be_obeyed_at_once():
    done = []
    with Interruption() as interruption:
        with pytest.raises(StopAtOnce), interruption.at_once():
            done.append("before")
            _send(signal.SIGTERM)
            done.append("behind")
        _send(signal.SIGTERM)
        with pytest.raises(StopAtOnce), interruption.at_once():  # one that came before
            done.append("inside")
    assert done == ["before"] and interruption.signal == signal.SIGTERM


@pytest.mark.parametrize("is_signalled", [True, False])
def test_the_end_of_one_of_several_processes_is_not_disturbed(
    monkeypatch: pytest.MonkeyPatch, is_signalled: bool
):
    """By those who saw the signal, or the end of another process, too."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.suppress(RuntimeError), Interruption():
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
            if is_signalled:
                _send(signal.SIGTERM)
            else:
                raise RuntimeError("another process has gone")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        with Interruption():
            pass
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            _send(signal.SIGINT)
        assert interruption.signal == 0
    finally:
        signal.signal(signal.SIGINT, before)


CHILD = """
import multiprocessing, os, signal, sys, time
from aal.training.interruption import leave_signals_to_parent

def load():
    leave_signals_to_parent()
    print("ready", flush=True)
    time.sleep(600)

child = multiprocessing.get_context("fork").Process(target=load)
child.start()
sys.stdin.readline()
print(child.is_alive(), flush=True)
child.terminate()
child.join()
print(child.exitcode, flush=True)
"""
ORPHAN = """
import multiprocessing, os, time
from aal.training.interruption import leave_signals_to_parent

def load():
    while os.getppid() == parent:
        time.sleep(0.01)
    leave_signals_to_parent()
    time.sleep(600)

parent = os.getpid()
multiprocessing.get_context("fork").Process(target=load).start()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="the system tells no senders")
def test_a_process_that_loads_data_obeys_its_parent_alone():
    command = [sys.executable, "-c", CHILD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as parent:
        assert parent.stdout.readline() == "ready\n"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(int(children[0]), number)
            time.sleep(0.1)
        out, _ = parent.communicate("\n", timeout=100)
        assert out.split() == ["True", "0"]  # still there, then gone in good order


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="the system tells no senders")
def test_a_process_whose_parent_dies_as_it_starts_ends_too():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ORPHAN]
    # Waits for the end of all that could write to the pipe.
    subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=100, check=True)
