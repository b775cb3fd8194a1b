"""What a model learns, as the training loop sees it."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Task(Protocol):
    """What a model learns. A batch is what the loader yields, and a part of one is a batch too.

    Attributes:
        unit: what the loss is a mean over, such as "samples".
        is_even: in every step the batches of all processes have equally many of them.
        measures: names of what is summed over them beside the loss.
    """

    unit: str
    is_even: bool
    measures: Sequence[str]

    def on_device(self, batch: Any, device: torch.device) -> Any:
        """The batch where the model is."""

    def changed(self, batch: Any) -> Any:
        """A batch on the device as it is to be learned, perhaps changed at random."""

    def split(self, batch: Any, count: int) -> Sequence[Any]:
        """At most ``count`` parts of a batch, none of them empty.

        If the task is not ``is_even``, exactly as many, or one per sample if those are fewer.
        """

    def first(self, batch: Any, count: int) -> Any:
        """At most ``count`` samples of a batch."""

    def weight(self, batch: Any) -> int:
        """How many units the batch has. Does not wait for the device."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Sequence[Tensor]]:
        """The mean loss over the batch's units, and the sums over them of ``measures``."""
