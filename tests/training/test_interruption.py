"""Signals are obeyed where a state can be saved."""

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


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            _send(signal.SIGINT)
        assert interruption.signal == 0
    finally:
        signal.signal(signal.SIGINT, before)


CHILD = """
import os, signal, sys, time
from aal.training.interruption import leave_signals_to_parent
child = os.fork()
if not child:
    leave_signals_to_parent()
    print("ready", flush=True)
    time.sleep(60)
    os._exit(1)
sys.stdin.readline()
print(os.waitpid(child, os.WNOHANG)[0], flush=True)
os.kill(child, signal.SIGTERM)
print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system tells no senders")
def test_a_process_that_loads_data_obeys_its_parent_alone():
    command = [sys.executable, "-c", CHILD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as parent:
        assert parent.stdout.readline() == "ready\n"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(int(children[0]), number)
            time.sleep(0.1)
        out, _ = parent.communicate("\n", timeout=30)
        assert out.split() == ["0", "0"]  # still there, then gone in good order
