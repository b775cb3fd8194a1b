"""Scores of a model: one pass over a loader in which nothing is learned."""

import math
from collections.abc import Sequence
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
    with progress_bar(len(loader), title, worker) as bar:
        for batch in loader:
            batch = task.on_device(batch, worker.device)
            while True:
                parts = task.split(batch, count)
                outcomes = _scored(task, model, parts, worker, amp)
                if outcomes is not None:
                    break
                if len(parts) < count:
                    raise UserError(f"out of memory ({title}), even for one sample at a time")
                count *= 2
                release()
            for part, outcome in zip(parts, outcomes, strict=True):
                totals.add(outcome[0], task.weight(part), outcome[1])
            if bar.update():
                bar.set_postfix_str(f"{totals}", refresh=False)
    means = totals.means()
    if not math.isfinite(means["loss"]):
        raise UserError(f"the loss is {means['loss']} ({title}): the weights are no good")
    return means


def _scored(
    task: Task, model: nn.Module, parts: Sequence[Any], worker: Worker, amp: str
) -> list[tuple[Tensor, Sequence[Tensor]]] | None:
    """What the task's ``loss`` returns for each part; None if memory does not suffice."""
    try:
        with autocast(worker.device, amp):
            return [task.loss(model, part) for part in parts]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None
