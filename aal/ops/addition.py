"""What a layer under ASA adds to its input."""

from typing import NamedTuple

import torch
from torch import Tensor

from aal.ops.sign_pack import layout_in_rows, unpack_sign


class Addition(NamedTuple):
    """``epsilon * s``, where the sign code s is 1 where x > 0 and ``low`` (-1 or 0) elsewhere."""

    low: int
    epsilon: float

    def of_bits(self, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor to add, from the bits of s in the order of rows."""
        return unpack_sign(packed, layout_in_rows(shape), dtype, low=self.low) * self.epsilon

    def rounded(self, dtype: torch.dtype) -> tuple[float, float]:
        """What is added where x > 0, and elsewhere, for kernels that add in float32."""
        step = torch.tensor(self.epsilon, dtype=dtype, device="cpu").item()
        return step, self.low * step


NO_ADDITION = Addition(0, 0.0)

# Where the maker of a tensor adds for the layer that reads it, which saves a pass over memory. On
# CPU a layer adds to a tile of rows at a time, while it is in the cache.
_DEVICES = ("cuda",)


def maker_adds(x: Tensor) -> bool:
    """Should what makes the next layer's input of ``x`` add for that layer, too?"""
    return x.device.type in _DEVICES
