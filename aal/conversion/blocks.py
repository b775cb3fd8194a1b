"""The residual blocks of torchvision's and timm's ResNets, and their groups."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from aal.conversion.swap import original_class
from aal.rules.groups import first_of_groups, number_of_stages


class Block(NamedTuple):
    """One block.

    Args:
        name: of the block.
        is_first: of its group; it learns by backpropagation.
        hands_on: the next block is in the same group.
        packs: no first block of a group keeps the output, so its ReLU had better keep bits.
        readers: names of the convolutions that read the input of the block.
        closing: name of the ReLU behind the addition.
    """

    name: str
    is_first: bool
    hands_on: bool
    packs: bool
    readers: tuple[str, ...]
    closing: str | None


def residual_blocks(modules: Mapping[str, nn.Module], stride: Sequence[int]) -> list[Block]:
    """The blocks of a ResNet in order; empty if there are none.

    Raises:
        ValueError: ``stride`` does not have a number of at least 1 for each stage.
    """
    names = [name for name, module in modules.items() if _is_block(module)]
    if not names:
        return []
    changes = [modules[name].downsample is not None for name in names]
    stages = number_of_stages(changes)
    if len(stride) != stages or min(stride) < 1:
        raise ValueError(f"the network needs {stages} group sizes >= 1, got {list(stride)}")
    firsts = first_of_groups(changes, stride)
    blocks = []
    for i, name in enumerate(names):
        followed = i + 1 < len(names)
        hands_on, packs = followed and not firsts[i + 1], not (followed and firsts[i + 1])
        readers, closing = tuple(_readers(name, modules)), _closing(name, modules)
        blocks.append(Block(name, firsts[i], hands_on, packs, readers, closing))
    return blocks


def _is_block(module: nn.Module) -> bool:
    parts = ("conv1", "bn1", "conv2", "bn2")
    return original_class(module).__name__ in ("BasicBlock", "Bottleneck") and all(
        hasattr(module, part) for part in (*parts, "downsample")
    )


def _readers(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    readers = [f"{name}.conv1"]
    if isinstance(modules.get(f"{name}.downsample.0"), nn.Conv2d):
        readers.append(f"{name}.downsample.0")
    return readers


def _closing(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """timm's last of several activations, torchvision's one for all."""
    acts = ("act3", "act2", "relu")
    found = [f"{name}.{act}" for act in acts if f"{name}.{act}" in modules]
    return found[0] if found and original_class(modules[found[0]]) is nn.ReLU else None
