"""Batches of images, loaded by processes that may meet bad images, hang or die."""

import contextlib
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from aal.training.command_line import UserError, warn
from aal.training.devices import Worker
from aal.training.image_folders import BadImage
from aal.training.interruption import leave_signals_to_parent, signals_held
from aal.training.memory_limit import is_out_of_memory
from aal.training.sampling import Draw, EpochSampler, Seeded, StepSampler

PATIENCE = 600  # seconds without a batch after which the processes are given up
_NOTICE = 5  # seconds after which PyTorch has noticed that a process died, if it ever does
# Processes that are started otherwise, as by Python 3.14, are not children of this one.
_START_METHOD = "fork" if sys.platform == "linux" else None
_RAISED_THERE = "in DataLoader worker process"  # what PyTorch says of errors in the processes
_MOST_REPLACED = 100  # bad images in a row; with more of them, most of the data set is bad


class BadImages:
    """What becomes of bad images, in one process of a run.

    Args:
        are_skipped: name each once and go on, in place of ending the run.
    """

    def __init__(self, are_skipped: bool = False):
        self.are_skipped = are_skipped
        self._named: set[str] = set()

    def meet(self, problems: Sequence[str]) -> None:
        """Tell the user of some, each by its file and what is wrong with it.

        Raises:
            UserError: they are not skipped.
        """
        for problem in problems:
            if not self.are_skipped:
                raise UserError(f"{problem}; mend or remove it, or give --bad-images skip")
            if problem not in self._named:
                self._named.add(problem)
                warn(f"{problem}; skipped", anywhere=True)


class _Loaded(NamedTuple):
    """An item, or a batch of items; None where all images are bad."""

    items: Any
    problems: list[str]  # of the bad images that were met
    missing: int  # items that nothing came in place of


class _Replaced(Dataset):
    """Seeded items, with the next good one of the data set in place of a bad one."""

    def __init__(self, items: Dataset):
        self.items = Seeded(items)

    def __getitem__(self, draw: Draw) -> _Loaded:
        (index, seed), count = draw, len(self.items)
        problems = []
        for further in range(min(count, _MOST_REPLACED)):
            try:
                item = self.items[(index + further) % count, seed]
            except BadImage as error:
                problems.append(str(error))
            else:
                return _Loaded(item, problems, 0)
        return _Loaded(None, problems, 1)


class _LeftOut(Dataset):
    """Items, with nothing in place of a bad one."""

    def __init__(self, items: Dataset):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> _Loaded:
        try:
            return _Loaded(self.items[index], [], 0)
        except BadImage as error:
            return _Loaded(None, [str(error)], 1)


def _collated(loaded: Sequence[_Loaded]) -> _Loaded:
    good = [one.items for one in loaded if not one.missing]
    problems = [problem for one in loaded for problem in one.problems]
    return _Loaded(default_collate(good) if good else None, problems, len(loaded) - len(good))


class Batches:
    """The good images of a ``DataLoader`` of ``_Loaded``; its length counts all batches.

    Where images are skipped, all processes go through it together, and to its end.
    """

    def __init__(self, loader: DataLoader, bad_images: BadImages, worker: Worker):
        self.loader, self.bad_images, self.worker = loader, bad_images, worker

    @property
    def sampler(self) -> Any:
        """Which images come."""
        return self.loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Begins to load at once, for which PyTorch draws a random number.

        Raises:
            UserError: the processes cannot be started.
        """
        try:
            with signals_held():
                loaded = iter(self.loader)
        except OSError as error:
            raise UserError(
                f"cannot start the data-loading processes ({error}); try fewer --workers"
            ) from error
        return self._good(_received(loaded) if self.loader.num_workers else loaded)

    def _good(self, loaded: Iterator[_Loaded]) -> Iterator[Any]:
        raise NotImplementedError


class TrainBatches(Batches):
    """Batches that are whole, since others come in place of bad images."""

    def _good(self, loaded: Iterator[_Loaded]) -> Iterator[Any]:
        for batch, problems, missing in loaded:
            self.bad_images.meet(problems)
            if missing:
                raise UserError(
                    f"too many images are bad, {len(problems)} of them in one batch; "
                    f"the last: {problems[-1]}"
                )
            yield batch


class EvaluationBatches(Batches):
    """Batches without bad images, none of which are empty."""

    def _good(self, loaded: Iterator[_Loaded]) -> Iterator[Any]:
        count = 0
        for batch, problems, _ in loaded:
            self.bad_images.meet(problems)
            if batch is not None:
                count += 1
                yield batch
        if self.bad_images.are_skipped:
            total = torch.tensor(count, device=self.worker.device)
            if not int(self.worker.sum(total)):
                raise UserError("all images that were to be scored are bad")


def train_loader(
    part: Dataset,
    batch_size: int,
    workers: int,
    seed: int,
    worker: Worker,
    bad_images: BadImages | None = None,
) -> TrainBatches:
    """Shuffled batches of this process; call ``loader.sampler.set_epoch`` before every epoch.

    ``batch_size`` is that of all processes together. An incomplete last batch is left out.
    """
    sampler = EpochSampler(len(part), batch_size // worker.world_size, seed, worker)
    return _train_batches(part, batch_size, workers, worker, sampler, bad_images)


def step_loader(
    part: Dataset,
    batch_size: int,
    workers: int,
    seed: int,
    worker: Worker,
    num_steps: int,
    eval_every: int,
    bad_images: BadImages | None = None,
) -> TrainBatches:
    """As ``train_loader`` in a run of ``num_steps`` steps, validated after every ``eval_every``.

    ``loader.sampler.set_epoch`` chooses which of these stretches comes next.
    """
    sampler = StepSampler(len(part), batch_size, seed, worker, num_steps, eval_every)
    return _train_batches(part, batch_size, workers, worker, sampler, bad_images)


def _train_batches(
    part: Dataset,
    batch_size: int,
    workers: int,
    worker: Worker,
    sampler: EpochSampler | StepSampler,
    bad_images: BadImages | None,
) -> TrainBatches:
    own_size = batch_size // worker.world_size
    loader = _loader(_Replaced(part), own_size, workers, worker, sampler)
    return TrainBatches(loader, bad_images or BadImages(), worker)


def evaluation_loader(
    part: Dataset,
    batch_size: int,
    workers: int,
    worker: Worker,
    bad_images: BadImages | None = None,
) -> EvaluationBatches:
    """This process's share of a part, every item in exactly one process."""
    share = Subset(part, range(worker.rank, len(part), worker.world_size))
    own_size = max(1, batch_size // worker.world_size)
    loader = _loader(_LeftOut(share), own_size, workers, worker)
    return EvaluationBatches(loader, bad_images or BadImages(), worker)


def _loader(
    items: Dataset,
    own_size: int,
    workers: int,
    worker: Worker,
    sampler: EpochSampler | StepSampler | None = None,
) -> DataLoader:
    return DataLoader(
        items,
        own_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=worker.device.type == "cuda",
        timeout=PATIENCE if workers else 0,
        multiprocessing_context=_START_METHOD if workers else None,
        worker_init_fn=leave_signals_to_parent,
    )


class _ProcessDied(RuntimeError):
    """What a data-loading process had to give went with it."""


def _received(loaded: Iterator[_Loaded]) -> Iterator[_Loaded]:
    """What processes have loaded; says what their errors mean."""
    try:
        yield from loaded
    except (OSError, EOFError, MemoryError, RuntimeError) as error:
        was_raised_there = _RAISED_THERE in str(error)
        if was_raised_there and is_out_of_memory(error):
            raise UserError(
                "a data-loading process ran out of memory; try fewer --workers"
            ) from error
        if was_raised_there or not isinstance(error, OSError | EOFError):
            raise
        # Where the process died, its notice comes at any moment, and must not meet the handlers of
        # another error. It says more, too.
        time.sleep(_NOTICE)
        raise _ProcessDied from error


@contextlib.contextmanager
def failures_explained() -> Iterator[None]:
    """Raise ``UserError`` where a data-loading process hangs or dies inside a ``with`` block.

    PyTorch tells of a death as soon as it notices, wherever the main thread is then.
    """
    try:
        yield
    except RuntimeError as error:
        text = _explanation(error)
        if text is None:
            raise
        _end_processes()
        raise UserError(text) from error


def _explanation(error: RuntimeError) -> str | None:
    """What the user is told of a failure of data-loading processes."""
    message = str(error)
    if timeout := re.match(r"DataLoader timed out after (\d+)", message):
        return (
            f"the data-loading processes gave no batch for {timeout[1]} s; "
            "look at the disk, or try fewer --workers"
        )
    if isinstance(error, _ProcessDied) or re.match(r"DataLoader worker \(pid", message):
        # While a batch is waited for, PyTorch hides its own notice behind another error.
        found = re.search(r"killed by signal: ([\w ]+)", f"{message} {error.__cause__}")
        return (
            f"a data-loading process {f'was killed ({found[1]})' if found else 'died'}, "
            "perhaps for want of memory; try fewer --workers"
        )
    return None


def _end_processes() -> None:
    """End the processes that load data; one that hangs may hear no other signal."""
    while True:
        try:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
            return
        except RuntimeError:  # PyTorch tells of the first death, again
            pass
