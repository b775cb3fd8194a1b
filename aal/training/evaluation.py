"""Scores of a model: one pass over a loader in which nothing is learned."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aal.training.command_line import UserError
from aal.training.devices import Worker
from aal.training.memory_limit import is_out_of_memory, release
from aal.training.precision import autocast
from aal.training.task import Task
from aal.training.totals import Totals, progress_bar


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, loader: Any, worker: Worker, amp: str, title: str
) -> dict[str, float]:
    """Means of the loss and of the task's measures, and number of units, over all processes.

    Batches that do not fit in memory are scored part by part.

    Raises:
        UserError: the loss is not finite, or not even the smallest parts fit in memory.
    """
    model.eval()
    totals, count = Totals(task.unit, task.measures, worker), 1

    def score(part: Any) -> tuple[Tensor, Sequence[Tensor]]:
        with autocast(worker.device, amp):
            return task.loss(model, part)

    with progress_bar(len(loader), title, worker) as bar:
        for batch in loader:
            batch = task.on_device(batch, worker.device)
            outcomes, count = in_parts(partial(task.split, batch), score, title, count)
            for part, (loss, sums) in outcomes:
                totals.add(loss, task.weight(part), sums)
            if bar.update():
                bar.set_postfix_str(f"{totals}", refresh=False)
    means = totals.means()
    if not math.isfinite(means["loss"]):
        raise UserError(f"the loss is {means['loss']} ({title}): the weights are no good")
    return means


def in_parts(
    split: Callable[[int], Sequence[Any]], score: Callable[[Any], Any], title: str, count: int = 1
) -> tuple[list[tuple[Any, Any]], int]:
    """Do something with a batch in as few parts as memory allows.

    Args:
        split: cuts the batch into at most so many parts.
        score: what is done with a part.
        title: of what is done, for people.
        count: parts to begin with.

    Returns:
        Each part with its result, and a count for the next batch.

    Raises:
        UserError: not even single samples fit in memory.
    """
    tried = 0
    while True:
        parts = split(count)
        if len(parts) == tried:  # as there are samples
            raise UserError(f"out of memory ({title}), even for one sample at a time")
        try:
            return [(part, score(part)) for part in parts], count
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        tried, count = len(parts), 2 * count
        release()
