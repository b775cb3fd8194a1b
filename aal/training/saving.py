"""When a run saves its full state, and how: now and then, and when it is asked to stop."""

import argparse
import copy
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from aal.training.command_line import Parser, Stopped, positive_int
from aal.training.devices import Worker
from aal.training.interruption import Interruption

USUAL_INTERVAL = "15m"

_ASKED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@dataclass(frozen=True)
class Interval:
    """Time between two saved states: so many optimiser steps, or so many seconds."""

    steps: int | None = None
    seconds: float | None = None


def interval(text: str) -> Interval:
    """An interval from ``--save-every``: "500" are steps, "15m" are minutes."""
    if re.fullmatch("[0-9]{1,15}", text) and int(text):
        return Interval(steps=int(text))
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?m", text) and float(text[:-1]):
        return Interval(seconds=60 * float(text[:-1]))
    raise argparse.ArgumentTypeError(
        f"must be a number of steps such as 500, or of minutes such as 15m, got {text!r}"
    )


def add_saving_flags(parser: Parser) -> None:
    """Add the flags that say when the state is saved, and how many states stay."""
    help = "optimiser steps (500) or minutes (15m) between saved states, beside those of epochs"
    parser.add_argument(
        "--save-every", type=interval, metavar="STEPS|MINUTESm", default=USUAL_INTERVAL, help=help
    )
    help = "how many of the newest states stay, in case one is damaged"
    parser.add_argument("--keep", type=positive_int, default=2, help=help)


class Saver:
    """Saves the state of a run between the steps of its epochs, and stops the run on signals.

    The file is written in a thread while training goes on; one at a time. All processes save and
    stop at the same step.

    Args:
        every: time between two states; those of finished epochs count.
        state: makes the state, all processes together; complete in the first one.
        write: writes a state to disk, in the first process.
        worker: this process.
        interruption: signals.
    """

    def __init__(
        self,
        every: Interval,
        state: Callable[[], dict[str, Any]],
        write: Callable[[dict[str, Any]], None],
        worker: Worker,
        interruption: Interruption,
    ):
        self.every, self.worker, self.interruption = every, worker, interruption
        self._state, self._write = state, write
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.restart_clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # whose error must not hide this one
            self._thread.join()

    def restart_clock(self) -> None:
        """A state has just been saved."""
        self._saved_at = time.monotonic()

    def after_step(self, step: int) -> None:
        """Save the state if it is time to; save it and stop if a signal came.

        Args:
            step: optimiser steps that are done.

        Raises:
            Stopped: a signal came.
            UserError: this state cannot be written, or the one before could not.
        """
        number, is_due = self.worker.largest([self.interruption.signal, self._is_due(step)])
        if number:
            self.save_and_stop(step, number)
        elif is_due:
            state = self._state()
            self.wait()
            if self.worker.is_main:
                self._thread = threading.Thread(target=self._write_behind, args=(on_cpu(state),))
                self._thread.start()
            self.restart_clock()

    def asked(self) -> int:
        """The number of a signal that came in any process, or 0."""
        return self.worker.largest([self.interruption.signal])[0]

    def obeying(self) -> AbstractContextManager[None]:
        """Inside this ``with`` block a signal raises ``StopAtOnce``.

        One of several processes cannot leave alone, so it goes on.
        """
        return self.interruption.at_once() if self.worker.world_size == 1 else nullcontext()

    def save_and_stop(self, step: int, number: int) -> NoReturn:
        """Save the state and raise ``Stopped`` for a signal's number."""
        state = self._state()
        self.wait()
        if self.worker.is_main:
            self._write(state)
        self.stop(step, number)

    def stop(self, step: int, number: int) -> NoReturn:
        """Raise ``Stopped`` for a signal's number, once the first process has saved the state."""
        self.worker.barrier()
        raise Stopped(number, f"{_ASKED[number]} at step {step}; --resume continues there")

    def wait(self) -> None:
        """Wait until the last state is written; raises ``UserError`` if that was impossible."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _is_due(self, step: int) -> bool:
        if self.every.steps is not None:
            return step % self.every.steps == 0
        return time.monotonic() - self._saved_at >= self.every.seconds

    def _write_behind(self, state: dict[str, Any]) -> None:
        try:
            self._write(state)
        except BaseException as error:  # for the training thread to raise
            self._error = error


def on_cpu(state: Any) -> Any:
    """A copy of a state in the host's memory, which training does not change.

    Tensors that are the same memory stay so. What PyTorch attaches to a state dict is kept.
    """
    copies: dict[tuple, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            place = value.untyped_storage().data_ptr(), value.storage_offset()
            place += value.dtype, value.size(), value.stride()
            if place not in copies:
                copies[place] = value.detach().to("cpu", copy=True)
            return copies[place]
        if isinstance(value, dict):
            other = copy.copy(value)
            other.update((key, copied(item)) for key, item in value.items())
            return other
        if isinstance(value, list | tuple):
            return type(value)(map(copied, value))
        return value

    with torch.no_grad():
        return copied(state)
