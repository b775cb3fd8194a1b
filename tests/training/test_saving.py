"""When states are saved, and what a saved state is."""

import argparse
import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn

from aal.training.command_line import Stopped, UserError
from aal.training.devices import Worker
from aal.training.interruption import Interruption
from aal.training.saving import Interval, Saver, interval, on_cpu

CPU = Worker(torch.device("cpu"))


def test_intervals_are_steps_or_minutes():
    assert interval("500") == Interval(steps=500)
    assert interval("15m") == Interval(seconds=900)
    assert interval("0.5m") == Interval(seconds=30)


@pytest.mark.parametrize("text", ["", "0", "0m", "-1", "1.5", "m", "15s", "1e3", "٣", "9" * 20])
def test_other_intervals_are_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="steps such as 500"):
        interval(text)


def test_a_copy_does_not_change_with_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_parameter("again", model[0].weight)
    state = {"model": model.state_dict(), "plain": [1, (2.5, "three")], "step": 3}
    copied = on_cpu(state)
    assert type(copied["model"]) is OrderedDict
    assert copied["model"]._metadata == state["model"]._metadata
    assert copied["plain"] == state["plain"]
    before = model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    assert torch.equal(copied["model"]["0.weight"], before)
    one, other = copied["model"]["0.weight"], copied["model"]["again"]
    assert one.data_ptr() == other.data_ptr()  # so that the file holds it once


def _saver(write, every: Interval = Interval(steps=2), interruption=None) -> Saver:  # noqa: B008
    steps = iter(range(100))
    return Saver(every, lambda: {"number": next(steps)}, write, CPU, interruption or Interruption())


def test_one_file_is_written_at_a_time_behind_the_training():
    may_write, written = threading.Event(), []

    def write(state):
        assert may_write.wait(10)
        written.append((state["number"], threading.current_thread()))

    with _saver(write) as saver:
        for step in range(1, 4):
            saver.after_step(step)
        assert not written  # training went on meanwhile
        may_write.set()
        saver.after_step(4)
    assert [number for number, _ in written] == [0, 1]
    assert threading.main_thread() not in [thread for _, thread in written]


@pytest.mark.parametrize("steps", [1, 2])
def test_what_went_wrong_in_the_thread_comes_up_in_the_training(steps: int):
    def write(state):
        raise UserError("cannot write")

    with pytest.raises(UserError, match="cannot write"), _saver(write, Interval(1)) as saver:
        for step in range(steps):
            saver.after_step(step)


def test_an_error_of_the_training_is_not_hidden():
    def write(state):
        raise UserError("cannot write")

    with pytest.raises(ValueError, match="mine"), _saver(write, Interval(1)) as saver:
        saver.after_step(1)
        raise ValueError("mine")


def test_a_signal_saves_and_stops():
    interruption, written = Interruption(), []
    with _saver(written.append, Interval(100), interruption) as saver:
        saver.after_step(1)
        interruption.signal = 15
        with pytest.raises(Stopped, match="terminated at step 2; --resume") as stop:
            saver.after_step(2)
    assert written == [{"number": 0}] and stop.value.status == 143
