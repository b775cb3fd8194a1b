"""Scores of a model: one pass over a loader in which nothing is learned."""

import math
from typing import Any

import torch
from torch import nn

from aal.training.command_line import UserError
from aal.training.devices import Worker
from aal.training.precision import autocast
from aal.training.task import Task
from aal.training.totals import Totals, progress_bar


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, loader: Any, worker: Worker, amp: str, title: str
) -> dict[str, float]:
    """Means of the loss and of the task's measures, and number of units, over all processes.

    Raises:
        UserError: the loss is not finite.
    """
    model.eval()
    totals = Totals(task.unit, task.measures, worker)
    with progress_bar(len(loader), title, worker) as bar:
        for batch in loader:
            batch = task.on_device(batch, worker.device)
            with autocast(worker.device, amp):
                loss, sums = task.loss(model, batch)
            totals.add(loss, task.weight(batch), sums)
            if bar.update():
                bar.set_postfix_str(f"{totals}", refresh=False)
    means = totals.means()
    if not math.isfinite(means["loss"]):
        raise UserError(f"the loss is {means['loss']} ({title}): the weights are no good")
    return means
