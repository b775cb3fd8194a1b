"""Mixed precision: what is computed in half precision, and the loss scale of float16."""

from typing import Any

import torch
from torch import Tensor

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_SCALE = 65536.0
MAX_SKIPPED = 20  # steps in a row; the scale falls from 65536 to 0.06 meanwhile


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision, by a key of ``AMP_DTYPES``."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")


class LossScaler:
    """Multiplies the loss under fp16, so that small gradients do not vanish.

    A step in which a gradient is not finite is skipped, and the scale halved.

    Args:
        device: of the gradients.
        amp: a key of ``AMP_DTYPES``. But for "fp16" losses and steps are left as they are.
        processes: by which the losses of all processes are multiplied, as their gradients are
            averaged. The scale is that of one process.

    Attributes:
        skipped_in_row: steps that were skipped since the last that was taken.
    """

    def __init__(self, device: torch.device, amp: str, processes: int = 1):
        self.is_enabled, self.processes = amp == "fp16", processes
        options = {"init_scale": _FIRST_SCALE / processes, "enabled": self.is_enabled}
        self._scaler = torch.amp.GradScaler(device.type, **options)
        self.skipped_in_row = 0

    @property
    def scale(self) -> float:
        """By which the mean loss over all processes is multiplied. Waits for the device."""
        return self._scaler.get_scale() * self.processes

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is to be computed."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Give gradients their own size before the step, for them to be clipped, say."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step, if all gradients are finite; was the step skipped?"""
        self._scaler.step(optimizer)
        if not self.is_enabled:
            return False
        before = self.scale
        self._scaler.update()
        is_skipped = self.scale < before
        self.skipped_in_row = self.skipped_in_row + 1 if is_skipped else 0
        return is_skipped

    def state_dict(self) -> dict[str, Any]:
        """What the next steps depend on, for any number of processes."""
        state = self._scaler.state_dict()
        if self.is_enabled:
            state |= {"scale": self.scale, "skipped_in_row": self.skipped_in_row}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict()``."""
        if self.is_enabled:
            self.skipped_in_row = state["skipped_in_row"]
            state = state | {"scale": state["scale"] / self.processes}
        self._scaler.load_state_dict(state)
