"""What is done to images at random before they are learned, and to their labels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aal.training.descriptions import DATASETS

_FINE_TUNING_SCALE = (0.05, 1.0)  # share of the image's area that a crop keeps
_CENTRE = 0.5  # mean and spread that networks trained on cropped images expect


def transforms(name: str, img_size: int | None, autoaugment: bool) -> tuple[Callable, Callable]:
    """Transforms of data set ``name`` for training and for scoring.

    Args:
        name: a key of ``DATASETS``.
        img_size: pixels per side to bring images to, as when fine-tuning; None keeps their size.
        autoaugment: change training images by the policy found for the data set.
    """
    from torchvision.transforms import v2

    what = DATASETS[name]
    mean, std = what.mean, what.std
    if img_size is not None:
        size = (img_size, img_size)
        train = [v2.RandomResizedCrop(size, scale=_FINE_TUNING_SCALE, antialias=True)]
        score = [v2.Resize(size, antialias=True)]
        mean = std = (_CENTRE,) * what.channels
    elif name == "imagenet":
        train = [v2.RandomResizedCrop(what.size, antialias=True), v2.RandomHorizontalFlip()]
        score = [v2.Resize(256, antialias=True), v2.CenterCrop(what.size)]
    elif what.flip:
        train, score = [v2.RandomCrop(what.size, padding=4), v2.RandomHorizontalFlip()], []
    else:
        train, score = [], []
    if autoaugment:  # which knows images of whole numbers alone
        train += [v2.ToImage(), v2.ToDtype(torch.uint8, scale=True)]
        train.append(v2.AutoAugment(v2.AutoAugmentPolicy(what.policy)))
    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
        v2.ToPureTensor(),
    ]
    return v2.Compose([*train, *to_tensor]), v2.Compose([*score, *to_tensor])


@dataclass(frozen=True)
class Mixing:
    """Mixes the images of a batch and their labels, on a share of the steps.

    Args:
        num_classes: of the labels; mixed ones are shares of classes, (N, num_classes).
        cutmix: paste a rectangle of another image.
        mixup: average with another image. With both, each mixed step takes one at random.
        alpha: both parameters of the beta distribution of the other image's share.
        probability: share of the steps.

    Draws from PyTorch's random state alone.
    """

    num_classes: int
    cutmix: bool
    mixup: bool
    alpha: float
    probability: float

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from torchvision.transforms import v2

        kinds = [kind for kind, on in ((v2.CutMix, self.cutmix), (v2.MixUp, self.mixup)) if on]
        if torch.rand(()) >= self.probability:
            return images, labels
        kind = kinds[torch.randint(len(kinds), ())]
        return kind(alpha=self.alpha, num_classes=self.num_classes)(images, labels)
