"""Autocast for functions that cast their weights themselves.

PyTorch's autocast keeps a half-precision copy of every weight until backward. The functions here
keep the weight itself and cast it again when they need it.
"""

import contextlib

import torch
from torch import Tensor


def cast_input(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x`` in the dtype in which its product with ``weight`` is computed.

    That is autocast's dtype where autocast is on (float64 is left alone, as PyTorch does), and
    the dtype of ``x`` elsewhere.

    Raises:
        ValueError: the dtypes of ``x`` and ``weight`` differ and autocast is off.
    """
    if is_autocast_on(x):
        return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype != weight.dtype:
        raise ValueError(
            f"input is {x.dtype} but weight is {weight.dtype}; cast one or use autocast"
        )
    return x


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``tensor.to(dtype)`` for parameters that may be absent."""
    return None if tensor is None else tensor.to(dtype)


def is_autocast_on(x: Tensor) -> bool:
    """Is autocast on for the device of ``x``? The meta device has none, and may not be asked."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast for a device; None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast_again(device: torch.device, dtype: torch.dtype | None):
    """Autocast as it was when ``autocast_dtype`` returned ``dtype``, whatever it is now."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
