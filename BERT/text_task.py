"""The task of classifying texts: cross entropy, accuracy and F1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from batches import Batch
from torch import Tensor, nn


@dataclass(frozen=True)
class TextClassification:
    """Texts and their classes, to be learned or scored (see ``aal.training.task.Task``).

    Args:
        has_segments: the network is told the first text of a pair from the second.
    """

    has_segments: bool

    unit: ClassVar[str] = "samples"
    is_even: ClassVar[bool] = False
    measures: ClassVar[Sequence[str]] = ("accuracy",)  # in per cent

    def on_device(self, batch: Batch, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))

    def changed(self, batch: Batch) -> Batch:
        return batch

    def split(self, batch: Batch, count: int) -> Sequence[Batch]:
        count = min(count, len(batch.classes))
        return [Batch(*part) for part in zip(*(t.tensor_split(count) for t in batch), strict=True)]

    def first(self, batch: Batch, count: int) -> Batch:
        return Batch(*(tensor[:count] for tensor in batch))

    def weight(self, batch: Batch) -> int:
        return len(batch.classes)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        segments = {"token_type_ids": batch.segments} if self.has_segments else {}
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, **segments).logits
        loss = nn.functional.cross_entropy(logits, batch.classes)
        found = logits.detach().argmax(1)
        self.count(batch.classes, found)
        return loss, [100 * (found == batch.classes).sum()]

    def count(self, classes: Tensor, found: Tensor) -> None:
        """Take note of the classes of a batch, (B,), and of those that the network found."""


@dataclass(frozen=True)
class Scoring(TextClassification):
    """The same, counting as it goes.

    Args:
        confusion: (K, K) int64, texts by class (row) and by the class that the network found.
    """

    confusion: Tensor

    def count(self, classes: Tensor, found: Tensor) -> None:
        number = len(self.confusion)
        pairs = torch.bincount(number * classes + found, minlength=number**2)
        self.confusion.add_(pairs.view(number, number))


def f1_score(confusion: Tensor) -> float:
    """F1 in per cent: of class 1 of two, or else the mean over the classes that occur.

    F1 of a class is ``2 T / (A + F)`` for ``T`` texts of the class that were found to be in it,
    ``A`` in it and ``F`` found to be in it: the harmonic mean of precision and recall.

    Args:
        confusion: (K, K), as in ``Scoring``.
    """
    both = (confusion.sum(0) + confusion.sum(1)).double()
    scores = 200 * confusion.diagonal() / both.clamp_min(1)
    return (scores[1] if len(scores) == 2 else scores[both > 0].mean()).item()
