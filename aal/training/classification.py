"""The task of classifying images: cross entropy, and the share of images that are right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

_Batch = tuple[Tensor, Tensor]  # images (N, C, H, W), and classes (N,) or shares of them (N, K)


@dataclass(frozen=True)
class Classification:
    """Images and their labels, to be learned or scored (see ``aal.training.task.Task``).

    Args:
        label_smoothing: share of each label spread over all classes.
        mix: changes a batch of images and labels before it is learned.
    """

    label_smoothing: float = 0.0
    mix: Callable[[Tensor, Tensor], _Batch] | None = None

    unit: ClassVar[str] = "samples"
    is_even: ClassVar[bool] = True
    measures: ClassVar[Sequence[str]] = ("accuracy",)  # in per cent

    def on_device(self, batch: _Batch, device: torch.device) -> _Batch:
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        return images, labels

    def changed(self, batch: _Batch) -> _Batch:
        return batch if self.mix is None else self.mix(*batch)

    def split(self, batch: _Batch, count: int) -> Sequence[_Batch]:
        return list(zip(*(tensor.chunk(count) for tensor in batch), strict=True))

    def first(self, batch: _Batch, count: int) -> _Batch:
        images, labels = batch
        return images[:count], labels[:count]

    def weight(self, batch: _Batch) -> int:
        return len(batch[0])

    def loss(self, model: nn.Module, batch: _Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Of mixed labels, the class with the largest share is the right one."""
        images, labels = batch
        logits = model(images)
        smoothing = self.label_smoothing
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        classes = labels if labels.dim() == 1 else labels.argmax(1)
        return loss, [100 * (logits.detach().argmax(1) == classes).sum()]
