"""What the layers of all rules share.

A layer with a rule offers, beside ``forward``:

``stock_forward(*inputs)``
    the layer of PyTorch that it stands for, used to say what backpropagation would have kept;
``auxiliary(*inputs) -> (h, r, gain)``
    the activation ``h`` that the weight multiplies in the forward pass, what stands in for it in
    the weight gradient, ``gain * r``, and the gain (``lr_expansion``). The Learning Indicator
    compares the two.
``auxiliary_dims``
    the number of last dimensions over which the indicator is summed: a sample, or a row.
``replay_operation()``
    for linear layers: their part in a replayed chain, see ``aal.ops.operation``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Observer = Callable[..., None]


class RuleLayer:
    """Stands first among the bases of every layer with a rule.

    ``observer`` is called with the inputs of each forward pass that autograd records. It is None
    but for the steps whose Learning Indicators are recorded.
    """

    observer: Observer | None = None

    def active_observer(self) -> Observer | None:
        return self.observer if torch.is_grad_enabled() else None

    def observe(self, *inputs: Any) -> None:
        if (observer := self.active_observer()) is not None:
            observer(*inputs)


class Conv2dRule(RuleLayer, nn.Conv2d):
    """Base of the convolution layers: ``nn.Conv2d`` with zero padding only."""

    auxiliary_dims = 3

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(
                f"{type(self).__name__} pads with zeros only, got padding_mode="
                f"{self.padding_mode!r}; pad the input with F.pad and use padding=0"
            )

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``F.conv2d`` after weight and bias."""
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}


def batched(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call ``function`` on (N, C, H, W) tensors where (C, H, W) is allowed too."""
    if inputs[0].dim() == 3:
        return function(*(x.unsqueeze(0) for x in inputs)).squeeze(0)
    return function(*inputs)


def learns(weight: Tensor) -> bool:
    """Will autograd ask for the gradient of a weight?"""
    return weight.requires_grad and torch.is_grad_enabled()
