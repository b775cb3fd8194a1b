"""Mixed precision: what is computed in half precision, and the loss scale of float16."""

from typing import Any

import torch
from torch import Tensor

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
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

    Attributes:
        skipped_in_row: steps that were skipped since the last that was taken.
    """

    def __init__(self, device: torch.device, amp: str):
        self.is_enabled = amp == "fp16"
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.is_enabled)
        self.skipped_in_row = 0

    @property
    def scale(self) -> float:
        return self._scaler.get_scale()

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
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict()``."""
        self._scaler.load_state_dict(state)
