"""What fits in memory: two steps of a run on random data, with some of its flags changed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Self

import torch

from aal.memory import MIB, SavedTensor
from aal.training import devices, memory_limit
from aal.training.command_line import UserError, note, silence
from aal.training.run import Run

# Ways to keep less, the gradient exact or nearest to it first. A script refuses what it lacks.
_ARA = "--learning-rule ara --lean exact"
_ASA = "--learning-rule asa1 --lean approx"
_FOUR_BITS = "--compress adaptive --compress-bits 4"
_WAYS = (
    "--lean exact",
    "--lean exact --gcp",
    *(f"{rule}{more}" for more in ("", " --gcp") for rule in (_ARA, _ASA)),
    *(f"{rule}{_FOUR_BITS}" for rule in ("", f"{_ARA} ", f"{_ASA} ")),
)
_MANY = 3  # ways, and kinds of saved tensors, that are told
_PARTS = (16, 4, 1)


@dataclass(frozen=True)
class Trial:
    """Two steps that fit.

    Args:
        peak: bytes in use at most, see ``memory_limit.peak``.
        rate: speed, for people.
    """

    peak: int | None
    rate: str


@dataclass(frozen=True)
class Trials:
    """Runs of one command line with changes.

    Args:
        make_run: makes a run from flags, or raises ``UserError``.
        arguments: the flags.
        data_size: of the run with these flags, see ``Run.data_size``.
    """

    make_run: Callable[[Sequence[str]], Run]
    arguments: Sequence[str]
    data_size: Any = None

    @classmethod
    def of(
        cls, make_run: Callable[[Sequence[str]], Run], arguments: Sequence[str], run: Run
    ) -> Self:
        """Those of a run that was made from its flags."""
        return cls(make_run, [*arguments, *map(str, run.trial_flags())], run.data_size())

    def changed(self, *flags: object) -> Run:
        """The run with other flags behind its own, on random data; raises ``UserError``."""
        undone = ("--no-resume", "--no-checkpoint", "--no-find-batch-size", "--dry-run")
        with silence():
            run = self.make_run([*self.arguments, *undone, *map(str, flags)])
            if self.data_size is not None:
                run.resemble(self.data_size)
            return run

    def attempt(self, *flags: object) -> Trial | None:
        """Try two steps of ``changed``; None if they do not fit.

        Raises:
            UserError: flags are refused, or steps go wrong otherwise.
        """
        memory_limit.release()
        try:
            run = self.changed(*flags)
            with silence(), devices.joined(run.devices) as worker:
                memory_limit.reset_peak(worker.device)
                rate = run.try_steps(worker)
                return Trial(memory_limit.peak(worker.device), rate)
        except UserError as error:
            if error.__cause__ is None or not memory_limit.is_out_of_memory(error.__cause__):
                raise
        except Exception as error:
            if not memory_limit.is_out_of_memory(error):
                raise
        return None

    def fitting_ways(self) -> Iterator[tuple[str, Trial]]:
        """Flags that change a run so that it fits, and their trials."""
        own = None
        try:
            own = self.changed().config
        except Exception as error:
            _check_expected(error)
        for way in _WAYS:
            words = way.split()
            try:
                if self.changed(*words).config == own:
                    continue
                trial = self.attempt(*words)
            except Exception as error:  # flags that the script does not know, say
                _check_expected(error)
                continue
            if trial is not None:
                yield way, trial

    def largest_saved(self, batch_size: int) -> list[str]:
        """The largest tensors that autograd would keep of a batch, for people.

        They are measured with the smallest of some parts of it; none where no part is possible.
        """
        for few in {batch_size // divisor: None for divisor in _PARTS if batch_size >= divisor}:
            memory_limit.release()
            try:
                run = self.changed("--batch-size", few)
                with silence(), devices.joined(run.devices) as worker:
                    found = run.saved_tensors(worker)
            except Exception as error:
                _check_expected(error)
                continue  # a larger part may be possible where a small one holds no text, say
            kinds = groupby(found, key=lambda tensor: (tensor.num_bytes, tensor.kind))
            groups = islice((list(group) for _, group in kinds), _MANY)
            return [_text(group, batch_size / few) for group in groups]
        return []


def explain(trials: Trials, batch_size: int) -> str:
    """Say what a run with so large batches keeps that ran out of memory, and what would fit."""
    note("out of memory; steps that keep less are tried now, to tell which would have fitted")
    parts = []
    if largest := trials.largest_saved(batch_size):
        parts.append(f"largest saved tensors: {'; '.join(largest)}")
    if fitting := [_way_text(*found) for found in islice(trials.fitting_ways(), _MANY)]:
        parts.append(f"two steps were tried and fit with {', or '.join(fitting)}")
    parts.append("--find-batch-size tells how large a batch may be")
    return "; ".join(parts)


def _check_expected(error: Exception) -> None:
    """Raise an error again that is no refusal of flags and not for want of memory."""
    if not isinstance(error, UserError) and not memory_limit.is_out_of_memory(error):
        raise error


def _way_text(way: str, trial: Trial) -> str:
    peak = "" if trial.peak is None else f" (peak {trial.peak / MIB:.0f} MiB)"
    return f"{way}{peak}"


def _text(alike: Sequence[SavedTensor], scale: float) -> str:
    first = alike[0]
    count = f"{len(alike)} x " if len(alike) > 1 else ""
    dtype = str(first.dtype).removeprefix("torch.")
    whose = f"{first.module} ({first.kind})" if first.module else first.kind
    more = ", ..." if len(alike) > 1 else ""
    return f"{count}{first.num_bytes * scale / MIB:.1f} MiB {dtype} of {whose}{more}"


def peak_text(device: torch.device) -> str:
    """What was in use at most, for people."""
    peak, limit = memory_limit.peak(device), memory_limit.limit(device)
    if peak is None or limit is None:
        return ""
    return f": {peak / MIB:.0f} of {max(peak, limit) / MIB:.0f} MiB were in use at most"
