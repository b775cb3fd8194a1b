"""DIVISION: the low frequencies of feature maps in bfloat16, the rest of them in two bits.

Wang et al., "DIVISION: Memory Efficient Training via Dual Activation Precision", ICML 2023. There
is nothing to learn or to search: every tensor is kept in the same way in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aal.compression.codecs import Codec, Encoded
from aal.compression.method import Keep, Method, Use, least_bits
from aal.compression.published_codecs import Ranges
from aal.ops.block_mean import BlockCode, decode_blocks, quantise_blocks
from aal.ops.noise import Noise

_PUBLISHED = ("ConvolutionBackward0", "BatchNormBackward0")  # how names of nodes end


class Division(Method):
    """Block means and codes for the inputs of convolutions and norms, as published.

    Masks of ReLU and dropout have one bit. Beyond the publication, so that other networks than
    convolutional ones are covered, all other values, and maps that are smaller than a block, have
    codes in groups of 256 neighbours with a range each: they have no low frequencies worth a mean.
    Queries and keys of fused attention get 4 bits at least.

    Args:
        bits: of a code, 1 to 8.
        block: side of a block.
        faithful: as released. Blocks of maps whose sides ``block`` does not divide are shifted
            against their means, codes are made with other ranges than they are decoded with, and
            everything but the inputs of convolutions and batch norms over maps is kept.

    Raises:
        ValueError: ``bits`` or ``block`` is out of its range.
    """

    name = "division"

    def __init__(self, bits: int = 2, block: int = 8, faithful: bool = False):
        if not isinstance(bits, int) or bits not in range(1, 9):
            raise ValueError(f"bits must be a whole number from 1 to 8, got {bits}")
        if not isinstance(block, int) or block < 1:
            raise ValueError(f"block must be a whole number of at least 1, got {block}")
        self.bits, self.block, self.faithful = bits, block, faithful

    def values(self, use: Use) -> Codec | Keep:
        x, name = use.tensor, use.consumer.node
        height, width = x.shape[2:] if x.dim() == 4 else (0, 0)
        if self.faithful:
            if name.endswith(_PUBLISHED) and height > 1 and width >= min(self.block, height):
                return Blocks(self.bits, self.block, faithful=True)
            return Keep("not compressed as released")
        has_maps = name == "ConvolutionBackward0" or use.consumer.kind == "norm"
        if has_maps and min(height, width) >= self.block:
            return Blocks(self.bits, self.block)
        return Ranges(max(self.bits, least_bits(use)))


@dataclass(frozen=True)
class Blocks:
    """Means of blocks, and what remains between the ends of each map (``aal.ops.block_mean``).

    Args:
        bits: of a code.
        block: side of a block, at most.
        faithful: as released.
    """

    bits: int  # type: ignore[assignment]
    block: int
    faithful: bool = False
    name = "blocks"
    is_flat = False
    is_exact = False

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        code = quantise_blocks(x, self.bits, noise, self.block, faithful=self.faithful)
        return tuple(code), (x.size(), x.dtype)

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        code = BlockCode(*tensors)
        return decode_blocks(code, *meta, self.bits, self.block, faithful=self.faithful)
