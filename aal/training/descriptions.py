"""What the scripts know of each image data set."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """What the network and the transforms need to know of a data set."""

    num_classes: int
    channels: int
    size: int  # pixels per side
    stem: str  # of the ResNet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False  # mirror training images; random crops go with it
    policy: str = "cifar10"  # of --autoaugment
    workers: int = 4  # loading processes
    batch_size: int | None = None  # where the recipe's would leave too few steps


_MNIST = {"num_classes": 10, "channels": 1, "size": 28, "stem": "small"}
_CIFAR = {"channels": 3, "size": 32, "stem": "small", "flip": True}
_IMAGENET = {"channels": 3, "flip": True, "policy": "imagenet"}

DATASETS: dict[str, Description] = {
    "digits": Description(10, 1, 32, "small", (0.3053,), (0.3236,), workers=0, batch_size=32),
    "mnist": Description(**_MNIST, mean=(0.1307,), std=(0.3081,)),
    "fashion-mnist": Description(**_MNIST, mean=(0.2860,), std=(0.3530,)),
    "cifar10": Description(
        num_classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), **_CIFAR
    ),
    "cifar100": Description(
        num_classes=100, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), **_CIFAR
    ),
    "svhn": Description(
        num_classes=10,
        channels=3,
        size=32,
        stem="small",
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        policy="svhn",
    ),
    "tiny-imagenet": Description(
        num_classes=200,
        size=64,
        stem="medium",
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        **_IMAGENET,
    ),
    "imagenet": Description(
        num_classes=1000,
        size=224,
        stem="large",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        **_IMAGENET,
    ),
}
_ALIASES = {"c10": "cifar10", "c100": "cifar100"}


def dataset_name(word: str) -> str:
    """A key of ``DATASETS`` for one of its spellings; other words come back as they are."""
    return _ALIASES.get(word, word)
