"""Sums over what a pass over a loader has seen, and how far the pass has come."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from aal.training.devices import Worker


class Totals:
    """Sums over the units of a task, on the device until they are asked for.

    Args:
        unit: what is counted, such as "samples".
        measures: names of what is summed over the units beside the loss.
        worker: this process.
    """

    def __init__(self, unit: str, measures: Sequence[str], worker: Worker):
        self.unit, self.measures, self.worker = unit, measures, worker
        self.load_state(torch.zeros(2 + len(measures), dtype=torch.float64))

    def add(self, loss: Tensor, weight: int, sums: Sequence[Tensor]) -> None:
        """A batch of a mean loss and of sums of the measures."""
        self.loss = self.loss + loss.detach() * weight
        self.weight = self.weight + weight
        self.sums = [total + value for total, value in zip(self.sums, sums, strict=True)]

    def means(self) -> dict[str, float]:
        """Over all processes, and the number of units."""
        loss, weight, *sums = self.worker.sum(self._stacked()).tolist()
        measures = zip(self.measures, sums, strict=True)
        return {
            "loss": loss / weight,
            **{name: value / weight for name, value in measures},
            self.unit: weight,
        }

    def state(self) -> Tensor:
        """(2 + measures,) float64: this process's sums, on the CPU."""
        return self._stacked().cpu()

    def load_state(self, state: Tensor) -> None:
        """Continue from a ``state()``."""
        self.loss, self.weight, *self.sums = state.to(self.worker.device)

    def __str__(self) -> str:
        """Means of this process."""
        names = ("loss", *self.measures)
        values = zip(names, (self.loss, *self.sums), strict=True)
        return ", ".join(f"{name} {value / self.weight:.4f}" for name, value in values)

    def _stacked(self) -> Tensor:
        return torch.stack([self.loss, self.weight, *self.sums])


@dataclass
class Progress:
    """How far an epoch has come in this process.

    Args:
        title: what people call the epoch.
        of: steps of the whole epoch.
        totals: of the steps that are done.
        steps: that are done.
        skipped: steps among them in which nothing was learned, as gradients overflowed.
        seconds: that they took.
    """

    title: str
    of: int
    totals: Totals
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0


def progress_bar(steps: int, title: str, worker: Worker, initial: int = 0) -> tqdm:
    """A progress bar where there is a terminal."""
    quiet = not (worker.is_main and sys.stderr.isatty())
    kind = {"unit": " steps", "leave": False, "disable": quiet}
    return tqdm(total=steps, desc=title, initial=initial, **kind)
