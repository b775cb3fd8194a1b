"""Eight-bit floating point: what hardware has, without random numbers, and with a small bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aal.compression.codecs import Codec, Encoded
from aal.compression.method import Keep, Method, Use
from aal.ops.float8 import Float8Code, decode_float8, quantise_float8
from aal.ops.noise import Noise

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Float8(Method):
    """Keep all values in a format of eight bits, with a scale for every 256 neighbours.

    Args:
        format: "e4m3", which is the more precise, or "e5m2", which spans more powers of two.

    Raises:
        ValueError: another format.
    """

    name = "fp8"

    def __init__(self, format: str = "e4m3"):
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        self.format = format

    def values(self, use: Use) -> Codec | Keep:
        return Scaled(self.format)


@dataclass(frozen=True)
class Scaled:
    """Numbers of eight bits, rounded to nearest, and a scale per group (``aal.ops.float8``).

    Args:
        format: a key of ``FORMATS``.
    """

    format: str
    is_flat = True
    is_exact = False
    bits: float | None = 8

    @property
    def name(self) -> str:
        return self.format

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        return tuple(quantise_float8(x, FORMATS[self.format])), (x.numel(), x.dtype)

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        numel, dtype = meta
        return decode_float8(Float8Code(*tensors), (numel,), dtype)
