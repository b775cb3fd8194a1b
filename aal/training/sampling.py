"""Which images a step learns, and the seeds of their random changes.

Both follow from the run's seed and from places in the run alone. So a run can be taken up at any
step, with any number of processes that load data.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from aal.training.devices import Worker

Draw = tuple[int, int]  # index of an image, and seed of its random changes


class Seeded(Dataset):
    """A data set whose random changes of an item depend on a seed that comes with its index.

    The random state of the process is left as it was.
    """

    def __init__(self, items: Dataset):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: Draw) -> Any:
        index, seed = draw
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # that of GPUs draws nothing here
        try:
            return self.items[index]
        finally:
            torch.set_rng_state(before)


class EpochSampler(Sampler[Draw]):
    """This process's share of every batch of a shuffled pass; an incomplete last one is left out.

    All processes together draw the same batches, whatever their number. Of fewer images than a
    batch has, each process draws equally many: where they do not divide, the first come again.

    Args:
        count: images of the data set.
        batch_size: images per step of this process.
        seed: of the order; every epoch has another.
        worker: this process.
    """

    def __init__(self, count: int, batch_size: int, seed: int, worker: Worker):
        self.count, self.batch_size, self.seed, self.worker = count, batch_size, seed, worker
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose an epoch, of which so many steps are done already."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        """Of the whole epoch."""
        steps = self.count // (self.batch_size * self.worker.world_size)
        return max(1, steps) * self._own_size

    @property
    def _own_size(self) -> int:
        """Images per step of this process."""
        return min(self.batch_size, -(-self.count // self.worker.world_size))

    def __iter__(self) -> Iterator[Draw]:
        size, worker = self._own_size, self.worker
        order, seeds = _pass(self.count, self.seed + self.epoch)
        for number in range(self.done * size, len(self)):
            step, within = divmod(number, size)
            place = (step * worker.world_size + worker.rank) * size + within
            index = order[place % self.count]
            yield index, seeds[index]


class StepSampler(Sampler[Draw]):
    """Draws of whole batches, cut from one shuffled pass over the data after another.

    What a step sees depends on the seed and on the number of the step alone, not on
    ``eval_every``.

    Args:
        count: images of the data set.
        batch_size: images per step of all processes together.
        seed: of the order.
        worker: this process.
        num_steps: of the run.
        eval_every: steps of a stretch, which counts as an epoch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        worker: Worker,
        num_steps: int,
        eval_every: int,
    ):
        self.count, self.batch_size, self.seed, self.worker = count, batch_size, seed, worker
        self.num_steps, self.eval_every = num_steps, eval_every
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Go to stretch ``epoch``, of which so many steps are done; the last may be shorter."""
        first = epoch * self.eval_every
        self.steps = range(first, min(first + self.eval_every, self.num_steps))
        self.done = done

    def __len__(self) -> int:
        """Of the whole stretch."""
        return len(self.steps) * self.batch_size // self.worker.world_size

    def __iter__(self) -> Iterator[Draw]:
        own_size, number, order, seeds = self.batch_size // self.worker.world_size, -1, [], []
        for step in self.steps[self.done :]:
            start = step * self.batch_size + self.worker.rank * own_size
            for place in range(start, start + own_size):
                if place // self.count != number:
                    number = place // self.count
                    order, seeds = _pass(self.count, self.seed + number)
                index = order[place % self.count]
                yield index, seeds[index]


def _pass(count: int, seed: int) -> tuple[list[int], list[int]]:
    """An order of all images, and a seed for each by its index."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    return order, torch.randint(2**63 - 1, (count,), generator=generator).tolist()
