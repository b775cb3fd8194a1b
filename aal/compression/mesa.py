"""Mesa: one byte per value, between running ends that a head or a group of channels shares.

Pan et al., "Mesa: A Memory-saving Training Framework for Transformers", arXiv 2111.11124. The ends
follow those of the batches, so that a range need not be found before a tensor is encoded. A policy
(``mesa_policy``) says which layers are compressed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aal.compression.codecs import Codec, Encoded
from aal.compression.mesa_policy import DEFAULT_POLICY, MesaPolicy, Settings
from aal.compression.method import Keep, Method, Use
from aal.ops.head_quantise import (
    HeadCode,
    Ranges,
    decode_heads,
    quantise_heads,
    updated_ranges,
)
from aal.ops.noise import Noise

_NOT_COUNTED = -1  # a rule has to be for all layers to hold for what Mesa knows no layer of
_OF_HEADS = ("matmul", "softmax")
_NOT_ENABLED = Keep("not in the policy")
_TAGS = {
    "ConvolutionBackward0": "conv",
    "AddmmBackward0": "fc",
    "MmBackward0": "fc",
    "LinearBackward0": "fc",
    "BmmBackward0": "matmul",
    "BaddbmmBackward0": "matmul",
    "GeluBackward0": "gelu",
    "SoftmaxBackward0": "softmax",
    "NativeBatchNormBackward0": "bn",
    "CudnnBatchNormBackward0": "bn",
    "MiopenBatchNormBackward0": "bn",
    "NativeGroupNormBackward0": "bn",
    "NativeLayerNormBackward0": "layernorm",
    "FusedRmsNormBackward0": "layernorm",
}


class Mesa(Method):
    """Codes of a byte between running ends, for the layers that the policy enables.

    Layers of a tag are counted from 0 as they first run; all that one module saves for one tag
    has one number. Products of attention have the tag "matmul", also where one fused operation
    does them. What a ReLU saved is a mask of one bit. Beyond the publication, so that every model
    is covered, values that have no tag have one pair of ends each, if the policy enables all "fc".

    Args:
        policy: which layers are compressed, and how; ``DEFAULT_POLICY`` if not given. Text has
            the form of a policy file.
        groups: of channels that have a pair of ends each. If not given, as many as there are
            heads, once attention has been seen. Where channels are no multiple, as many groups as
            divide both.
        faithful: as released. Numbers beyond the ends turn over, NaN stays in them for ever, and
            a tensor is decoded with the ends of its site's latest batch.

    Raises:
        ValueError: ``groups`` is out of its range, or the policy is not understood.
    """

    name = "mesa"

    def __init__(
        self,
        policy: MesaPolicy | str | None = None,
        groups: int | None = None,
        faithful: bool = False,
    ):
        if groups is not None and groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.policy = MesaPolicy.parse(policy) if isinstance(policy, str) else policy
        if self.policy is None:
            self.policy = DEFAULT_POLICY
        self.groups, self.faithful = groups, faithful
        self._heads = 1
        self._numbers: dict[str, dict[str, int]] = {}  # by tag and module

    def values(self, use: Use) -> Codec | Keep:
        tag = _tag_of(use)
        settings = self._settings(tag, use)
        if not settings.enable:
            return _NOT_ENABLED
        size = use.tensor.size()
        if len(size) == 4 and tag in _OF_HEADS:
            self._heads = size[1]
        shape, groups = _channels(tag, size, self.groups or self._heads)
        state = use.handle.site.state
        return Running(shape, groups, settings.level, settings.ema_decay, self.faithful, state)

    def state(self) -> dict[str, Any]:
        numbers = {tag: list(modules) for tag, modules in self._numbers.items()}
        return {"heads": self._heads, "numbers": numbers}

    def load_state(self, state: dict[str, Any]) -> None:
        self._heads = state["heads"]
        self._numbers = {
            tag: {module: number for number, module in enumerate(modules)}
            for tag, modules in state["numbers"].items()
        }

    def mask(self, use: Use) -> Codec | Keep:
        return super().mask(use) if self._settings("relu", use).enable else _NOT_ENABLED

    def _settings(self, tag: str | None, use: Use) -> Settings:
        if tag is None:
            return self.policy.settings("fc", _NOT_COUNTED, self.epoch)
        numbers = self._numbers.setdefault(tag, {})
        number = numbers.setdefault(use.handle.site.module, len(numbers))
        return self.policy.settings(tag, number, self.epoch)


@dataclass(frozen=True)
class Running:
    """Codes of a byte between running ends (``aal.ops.head_quantise``).

    Without bias for numbers between the ends.

    Args:
        shape: as which a tensor is seen.
        groups: of its channels, with a pair of ends each.
        level: number of codes.
        decay: weight of the ends so far, each time that a tensor is encoded.
        faithful: as released.
        state: of the site, which keeps the ends.
    """

    shape: tuple[int, ...]
    groups: int
    level: int
    decay: float
    faithful: bool
    state: dict[str, Any] = field(compare=False, repr=False)
    name = "running"
    is_flat = False
    is_exact = False
    bits: float | None = 8

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        size, x = x.size(), x.reshape(self.shape)
        before = self.state.get("ranges")
        if before is not None:
            before = Ranges(*(end.to(x.device) for end in before))
            if before.low.numel() != self.groups:
                before = None
        ranges = updated_ranges(x, before, self.groups, self.decay, self.faithful)
        if self.faithful and before is not None:  # what was encoded before has to follow
            for end, now in zip(before, ranges, strict=True):
                end.copy_(now)
            ranges = before
        self.state["ranges"] = ranges
        code = quantise_heads(x, ranges, noise, self.level, self.faithful)
        return tuple(code), (size, x.dtype)

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        size, dtype = meta
        x = decode_heads(HeadCode(*tensors), dtype, self.level, self.faithful)
        return x.reshape(size)


def _tag_of(use: Use) -> str | None:
    return "matmul" if use.consumer.kind == "attention" else _TAGS.get(use.consumer.node)


def _channels(tag: str | None, size: torch.Size, groups: int) -> tuple[tuple[int, ...], int]:
    """A shape that ``aal.ops.head_quantise`` takes, and groups that divide its channels."""
    count, dims = size.numel(), len(size)
    if tag is None or dims < 2 or count == 0:
        return (1, count), 1
    if tag in _OF_HEADS and dims == 3:  # heads are part of the first dimension
        groups = math.gcd(groups, size[0])
        return (size[0] // groups, groups, *size[1:]), groups
    if dims == 2 or tag in ("fc", "layernorm") or (tag == "gelu" and dims == 3):
        return (count // size[-1], size[-1]), math.gcd(groups, size[-1])
    shape = size if dims == 4 else (*size[:2], count // size[:2].numel(), 1)
    return tuple(shape), math.gcd(groups, size[1])
