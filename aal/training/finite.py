"""Numbers that are not finite: how a step learns of them, and which part they came from."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from aal.preserved import preserved


class LossWatch:
    """Reads the loss of a step on the host, and lets a GPU go on with the backward pass meanwhile.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device):
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._loss = torch.zeros((), dtype=torch.float64, pin_memory=self._event is not None)

    def see(self, loss: Tensor) -> None:
        """Copy a loss, a scalar, as soon as the device has computed it."""
        self._loss.copy_(loss.detach(), non_blocking=True)
        if self._event is not None:
            self._event.record()

    def value(self) -> float:
        """The loss that was seen last; waits for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._loss.item()


def origin(model: nn.Module, batch: Any, forward: Callable[[], Any]) -> str:
    """Say where numbers that are not finite first appear: in weights, the batch or a module.

    Args:
        model: without the wrapper of DDP.
        batch: what the network is given, tensors in any containers.
        forward: computes the loss of the batch once more; buffers and random state stay.

    Returns:
        A clause that goes on behind "the loss is nan", or nothing where the place is not found.
    """
    if names := list(_not_finite(model)):
        others = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
        return f", as {names[0]}{others} not finite since the step before"
    if not _is_finite(batch):
        return ", as the batch itself has numbers that are not finite"
    if isinstance(model, FSDPModule) or _exchanges(model):
        return ""  # a forward pass would wait for the other processes
    found: list[str] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not _is_finite(output):
            found.append(f"{names_of[module]} ({type(module).__name__})")

    names_of = {module: name for name, module in model.named_modules() if name}
    handles = [module.register_forward_hook(look) for module in names_of]
    try:
        with preserved(model), torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return f"; the first output that is not finite is that of {found[0]}" if found else ""


def weights_not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter that is not finite everywhere; None if all are."""
    return next(_not_finite(model), None)


def gradient_not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter whose gradient is not finite everywhere."""
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return next((name for name, grad in gradients if not _is_finite(grad)), None)


def _not_finite(model: nn.Module) -> Iterator[str]:
    return (name for name, weights in model.named_parameters() if not _is_finite(weights))


def _exchanges(model: nn.Module) -> bool:
    """Do forward passes take part in something that all processes do together?"""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


@torch.no_grad()
def _is_finite(tree: Any) -> bool:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            own = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            if not own.isfinite().all():
                return False
    return True
