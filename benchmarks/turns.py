"""Measurements that take turns until their time is over; who fails leaves the others alone."""

import gc
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
_LONGEST = 200  # letters of an error


class Rounds(NamedTuple):
    """How many rounds there may be; ``least`` is at least 1."""

    least: int
    most: int


class Failures(dict[Any, str]):
    """What went wrong, by whom it happened to."""

    def attempt(self, key: Hashable, action: Callable[[], Any]) -> Any:
        """What ``action`` returns, or None where it raises: then its error is noted."""
        try:
            return action()
        except Exception as error:  # of PyTorch, its compiler, a kernel: all are results
            self[key] = one_line(error)
        # Behind the handler: an error holds on to all tensors of the functions that it left.
        release_memory()
        return None


def one_line(error: Exception) -> str:
    """The kind of an error and the beginning of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_LONGEST]


def release_memory() -> None:
    """Give back to the device what nobody refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def take_turns_within(
    seconds: float,
    rounds: Rounds,
    actions: Mapping[Key, Callable[[], float]],
    failures: Failures,
) -> dict[Key, list[float]]:
    """What each of ``actions`` measured in each round.

    Args:
        seconds: no round begins that would end later.
        rounds: the fewest, whatever time they take, and the most.
        actions: return a measurement each. Who fails once is noted in ``failures`` and left out.
    """
    begin = time.monotonic()
    measured: dict[Key, list[float]] = {key: [] for key in actions}
    for number in range(rounds.most):
        if number >= rounds.least and (time.monotonic() - begin) * (number + 1) / number > seconds:
            break
        for key in list(measured):
            value = failures.attempt(key, actions[key])
            if key in failures:
                del measured[key]
            else:
                measured[key].append(value)
    return measured
