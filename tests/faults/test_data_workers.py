"""Processes that load data and hang, die or cannot be started: a run ends in one line."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts.conftest import (
    assert_same_results,
    call,
    run_folder,
    stop_after,
    tiny_imagenet,
    train,
    train_vit,
)
from torch.utils.data import Dataset, TensorDataset

from aal.training import loaders
from aal.training.command_line import UserError
from aal.training.devices import Worker
from aal.training.interruption import SIGNALS, leave_signals_to_parent
from aal.training.saving import Saver

__all__ = ["call", "stop_after", "tiny_imagenet", "train", "train_vit"]  # fixtures

WORDS = ("--workers", 1, "--batch-size", 2, "--epochs", 2, "--save-every", 1, "--get-li")
FEWER = "try fewer --workers\n"


@pytest.fixture
def kill_loader(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Kill the data-loading process after some step, inside a ``with`` block."""

    @contextlib.contextmanager
    def killed(step: int) -> Iterator[None]:
        after_step = Saver.after_step

        def kill(self, now):
            after_step(self, now)
            if now == step:
                (process,) = multiprocessing.active_children()
                os.kill(process.pid, signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(Saver, "after_step", kill)
            yield

    return killed


@pytest.fixture
def whole(train_vit: Callable, tmp_path: Path) -> Path:
    """The folder of a run that nothing befell."""
    assert train_vit(*WORDS)[0] == 0
    return Path(shutil.move(run_folder(tmp_path), tmp_path / "whole"))


def assert_goes_on(train_vit: Callable, tmp_path: Path, whole: Path) -> None:
    status, _, err = train_vit(*WORDS, "--resume")
    assert (status, err) == (0, "")
    assert_same_results(run_folder(tmp_path), whole)


@pytest.mark.parametrize("step", [1, 8])
def test_a_run_goes_on_after_a_process_was_killed(
    train_vit: Callable, kill_loader: Callable, whole: Path, tmp_path: Path, step: int
):
    with kill_loader(step):
        status, _, err = train_vit(*WORDS)
    told = f"a data-loading process was killed (Killed), perhaps for want of memory; {FEWER}"
    assert (status, err) == (2, f"train.py: error: {told}")
    assert_goes_on(train_vit, tmp_path, whole)


def test_a_run_goes_on_after_a_process_hung(
    train_vit: Callable,
    stop_after: Callable,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """It waits for a writer of a pipe, as for a disk that does not answer."""
    pipe, note = tmp_path / "pipe", tmp_path / "note"
    os.mkfifo(pipe)

    def hang(*_) -> None:
        note.write_text(str(os.getpid()))
        pipe.open()

    with stop_after(1):
        assert train_vit(*WORDS)[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr(loaders, "PATIENCE", 5)
        patch.setattr(Image, "open", hang)
        status, _, err = train_vit(*WORDS, "--resume")
    told = "the data-loading processes gave no batch for 5 s; look at the disk, or "
    assert (status, err) == (2, f"train.py: error: {told}{FEWER}")
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert_goes_on(train_vit, tmp_path, whole)


@pytest.mark.parametrize("notice, words", [(0.2, "was killed (Killed)"), (None, "died")])
def test_a_connection_that_breaks_waits_for_the_notice_of_a_death(
    monkeypatch: pytest.MonkeyPatch, notice: float | None, words: str
):
    """Which would come while the first error is handled, as PyTorch's comes by a signal."""

    def tell(*_) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. Details are")

    def batches() -> Iterator[None]:
        if notice is not None:
            signal.setitimer(signal.ITIMER_REAL, notice)
        raise ConnectionResetError("reset by peer")
        yield

    monkeypatch.setattr(loaders, "_NOTICE", 1)
    before = signal.signal(signal.SIGALRM, tell)
    try:
        with pytest.raises(UserError) as error, loaders.failures_explained():
            list(loaders._received(batches()))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert str(error.value).startswith(f"a data-loading process {words}, perhaps for want")


def test_a_death_is_told_while_a_batch_is_waited_for():
    """When PyTorch meets its own notice, and says less."""
    message = "DataLoader worker (pid(s) 7) exited unexpectedly"
    notice = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(UserError, match=r"was killed \(Killed\)"), loaders.failures_explained():
        raise RuntimeError(message) from notice


def test_processes_are_children_however_python_would_start_them(train_vit: Callable):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)  # as Python 3.14 does
    try:
        assert train_vit(*WORDS)[::2] == (0, "")
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("of the network"), OSError("of the disk")):
        with pytest.raises(type(error), match=str(error)), loaders.failures_explained():
            raise error


class Broken(Dataset):
    """Items that cannot be loaded."""

    def __init__(self, load: Callable[[], None]):
        self.load = load

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> None:
        self.load()


def a_mistake() -> None:
    raise OSError("a mistake")


def too_large_a_tensor() -> None:
    torch.empty(2**60)


def too_large_a_list() -> None:
    raise MemoryError  # as Python does


def loader_of(load: Callable[[], None], workers: int) -> loaders.Batches:
    return loaders.evaluation_loader(Broken(load), 2, workers, Worker(torch.device("cpu")))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_is_no_death(workers: int):
    with pytest.raises(OSError, match="a mistake"), loaders.failures_explained():
        list(loader_of(a_mistake, workers))


@pytest.mark.parametrize("load", [too_large_a_tensor, too_large_a_list])
def test_a_process_out_of_memory_is_told(load: Callable[[], None]):
    with pytest.raises(UserError, match="a data-loading process ran out of memory; try fewer"):
        list(loader_of(load, 1))


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="the system tells no senders")
def test_signals_to_a_group_leave_processes_alone_that_start(monkeypatch: pytest.MonkeyPatch):
    def signalled(number: int) -> None:
        for each in SIGNALS:
            os.kill(os.getpid(), each)
        leave_signals_to_parent(number)

    monkeypatch.setattr(loaders, "leave_signals_to_parent", signalled)
    part, worker = TensorDataset(torch.arange(4)), Worker(torch.device("cpu"))
    batches = list(loaders.evaluation_loader(part, 2, 1, worker))
    assert [batch.tolist() for (batch,) in batches] == [[0, 1], [2, 3]]
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_processes_that_cannot_be_started_are_told(monkeypatch: pytest.MonkeyPatch):
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(UserError, match="cannot start the data-loading processes .*try fewer"):
        list(loader_of(a_mistake, 1))
