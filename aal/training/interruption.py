"""Signals that ask a run to stop: it does so where its state can be saved."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Self

from aal.training.command_line import is_launched

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STATUSES = tuple(128 + number for number in SIGNALS)  # of processes that stopped for them


class StopAtOnce(BaseException):
    """A signal came where it need not wait."""


class Interruption:
    """Notes SIGINT and SIGTERM down inside a ``with`` block, in the main thread.

    A second SIGINT raises ``KeyboardInterrupt``. A signal that is ignored stays ignored. A SIGINT
    that was held, as by ``interrupts_held``, comes.

    Attributes:
        signal: the first that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._interrupts, self._obeys_at_once = 0, False
        self._before: dict[int, Any] = {}
        self._held: set[signal.Signals] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
            self._held = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return self

    def __exit__(self, *error: Any) -> None:
        if self._held is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._held)
        # One of several processes ends now, and has something to say; the others' end may make
        # torchrun or the parent send it another signal.
        is_over = is_launched() and (self.signal or error[0] is not None)
        for number, handler in self._before.items():
            if is_over and number == signal.SIGTERM:
                handler = signal.SIG_IGN
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise ``StopAtOnce`` inside this ``with`` block as soon as a signal comes."""
        self._obeys_at_once = True
        try:
            if self.signal:
                raise StopAtOnce
            yield
        finally:
            self._obeys_at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if self._obeys_at_once:
            self._obeys_at_once = False
            raise StopAtOnce


def signals_held() -> AbstractContextManager[None]:
    """Signals that ask to stop wait for the end of the ``with`` block.

    Processes that are started inside hold them from birth, until ``leave_signals_to_parent``.
    """
    return _held(SIGNALS)


def interrupts_held() -> AbstractContextManager[None]:
    """SIGINT waits for the end of the ``with`` block.

    Processes that are started inside hold it from birth, until an ``Interruption`` begins.
    """
    return _held([signal.SIGINT])


@contextlib.contextmanager
def _held(signals: Collection[int]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_: int = 0) -> None:
    """In a process that loads data: go on when a signal reaches all processes of a group.

    Else the run would lack data before it comes to the end of its step. SIGTERM of the parent
    still ends the process, as PyTorch has it. The argument is the number of the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """End when the parent says so or has ended, which PyTorch overlooks while the child starts."""
    parent = multiprocessing.parent_process().pid
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
