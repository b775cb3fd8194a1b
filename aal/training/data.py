"""Image data sets, each with a training, a validation and a test part.

The validation part is cut from the training images by a permutation that is the same for every
run, so that the test images choose nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from aal.training.augmentation import transforms
from aal.training.command_line import UserError
from aal.training.descriptions import DATASETS, Description
from aal.training.image_folders import ImageFiles, read_folders

_VALIDATION_SHARE, _MAX_VALIDATION = 0.1, 10_000
_SPLIT_SEED = 0
_SYNTHETIC_SIZE = 2  # batches, for a dry run


@dataclass(frozen=True)
class Parts:
    """The three parts of a data set; each item is (image (C, H, W) float32, label)."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load(name: str, path: Path, *, img_size: int | None = None, autoaugment: bool = False) -> Parts:
    """Open a data set.

    Args:
        name: a key of ``DATASETS``.
        path: folder to read from; torchvision downloads into it what it can.
        img_size: pixels per side to bring images to, as when fine-tuning; None keeps their size.
        autoaugment: change training images by the policy found for the data set.

    Raises:
        UserError: the files are missing or damaged; the text says what to put where.
    """
    augmented, plain = transforms(name, img_size, autoaugment)
    if name == "digits":
        parts = _digits(augmented, plain)
    elif name == "imagenet":
        root = _root(path, ("imagenet", "ImageNet"))
        parts = _from_folders(name, root, augmented, plain, None)
    elif name == "tiny-imagenet":
        root = _root(path, ("tiny-imagenet-200", "tiny-imagenet"))
        size = DATASETS[name].size if img_size is None else None
        parts = _from_folders(name, root, augmented, plain, size)
    else:
        parts = _from_torchvision(name, path, augmented, plain)
    for title, part in vars(parts).items():
        if not len(part):
            raise UserError(f"{name} in {path} has no images for its {title} part")
    return parts


def synthetic(name: str, batch_size: int, *, img_size: int | None = None) -> Parts:
    """Random images of the shape of data set ``name``, for a dry run."""
    what = DATASETS[name]
    count, size = _SYNTHETIC_SIZE * batch_size, img_size or what.size
    images = torch.randn(count, what.channels, size, size)
    labels = torch.randint(what.num_classes, (count,))
    part = TensorDataset(images, labels)
    return Parts(part, part, part)


class _ImagesInMemory(Dataset):
    """Images as one tensor (N, C, H, W) of values from 0 to 1."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


def _digits(augmented: Callable, plain: Callable) -> Parts:
    """scikit-learn's 1797 handwritten digits, 8x8, enlarged to 32x32; a fifth is the test part."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    images, labels = F.interpolate(images, size=32, mode="bilinear"), torch.tensor(bunch.target)
    learned, scored = (_ImagesInMemory(images, labels, t) for t in (augmented, plain))
    rest, test = _split(len(labels), len(labels) // 5)
    train, validation = _split(len(rest), _validation_size(len(rest)))
    return Parts(
        Subset(learned, [rest[i] for i in train]),
        Subset(scored, [rest[i] for i in validation]),
        Subset(scored, test),
    )


def _from_torchvision(name: str, path: Path, augmented: Callable, plain: Callable) -> Parts:
    """Data sets that torchvision reads.

    Files of CIFAR and SVHN have known checksums. Those of CIFAR are unpickled, which could run code
    of their author, but only where the checksum is the right one.
    """
    from torchvision import datasets

    dataset, files = {
        "mnist": (datasets.MNIST, "MNIST/raw/*-ubyte"),
        "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte"),
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py/"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python/"),
        "svhn": (datasets.SVHN, "train_32x32.mat and test_32x32.mat"),
    }[name]

    def open_part(train: bool, transform: Callable) -> Dataset:
        which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        try:
            return dataset(path, **which, transform=transform)
        except Exception:
            pass  # absent or damaged, which torchvision reports in many types; fetch it anew
        try:
            return dataset(path, **which, transform=transform, download=True)
        except Exception as error:  # network, disk and checksum errors of many types
            raise UserError(
                f"{name} in {path} is missing or damaged, and cannot be downloaded ({error}); put "
                f"{files} there or name another folder with --data-path"
            ) from error

    parts = open_part(True, augmented), open_part(True, plain), open_part(False, plain)
    for part in parts:
        labels = part.labels if name == "svhn" else part.targets
        _check(f"{name} in {path}", DATASETS[name], part.data.shape, torch.as_tensor(labels))
    return _with_validation(*parts)


def _check(title: str, what: Description, shape: Sequence[int], labels: Tensor) -> None:
    """Raise ``UserError`` if images, of shape (N, height, width) and perhaps channels, are odd."""
    if len(labels) != shape[0]:
        raise UserError(f"{title} has {shape[0]} images, but {len(labels)} labels")
    if list(shape[1:]).count(what.size) != 2:
        sizes = "x".join(map(str, shape[1:]))
        raise UserError(f"{title} has images of {sizes}, not of {what.size}x{what.size}")
    if odd := labels[(labels < 0) | (labels >= what.num_classes)].tolist():
        raise UserError(f"{title} has the label {odd[0]}, above {what.num_classes - 1} or below 0")


def _from_folders(
    name: str, root: Path, augmented: Callable, plain: Callable, size: int | None
) -> Parts:
    """train/ and val/ with one folder per class, or Tiny-ImageNet's flat val/; val is the test."""
    train, test = read_folders(root, DATASETS[name].num_classes)
    parts = ImageFiles(train, augmented, size), ImageFiles(train, plain, size)
    return _with_validation(*parts, ImageFiles(test, plain, size))


def _root(path: Path, names: tuple[str, str]) -> Path:
    """The folder that holds train/ and val/: ``path`` itself or a usual name below it."""
    for root in (path, *(path / name for name in names)):
        if (root / "train").is_dir() and (root / "val").is_dir():
            return root
    raise UserError(
        f"no train/ and val/ in {path} or {path / names[0]}; unpack the data set there "
        "or name its folder with --data-path"
    )


def _with_validation(augmented: Dataset, plain: Dataset, test: Dataset) -> Parts:
    """Cut the validation part from the training images, without their augmentation."""
    train, validation = _split(len(augmented), _validation_size(len(augmented)))
    return Parts(Subset(augmented, train), Subset(plain, validation), test)


def _validation_size(count: int) -> int:
    return max(1, min(_MAX_VALIDATION, int(count * _VALIDATION_SHARE)))


def _split(count: int, held_out: int) -> tuple[list[int], list[int]]:
    """The indices 0 to ``count - 1`` in two parts, the second of ``held_out`` items."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(count, generator=generator).tolist()
    return order[held_out:], order[:held_out]
