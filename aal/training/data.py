"""Image data sets, each with a training, a validation and a test part.

The validation part is cut from the training images by a permutation that is the same for every
run, so that the test images choose nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from aal.training.command_line import UserError
from aal.training.devices import Worker

_VALIDATION_SHARE, _MAX_VALIDATION = 0.1, 10_000
_SPLIT_SEED = 0
_SYNTHETIC_SIZE = 2  # batches, for a dry run


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
    workers: int = 4  # loading processes
    batch_size: int | None = None  # where the recipe's would leave too few steps


_MNIST = {"num_classes": 10, "channels": 1, "size": 28, "stem": "small"}
_CIFAR = {"channels": 3, "size": 32, "stem": "small", "flip": True}

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
    "svhn": Description(10, 3, 32, "small", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "tiny-imagenet": Description(
        200, 3, 64, "medium", (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821), flip=True
    ),
    "imagenet": Description(
        1000, 3, 224, "large", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), flip=True
    ),
}


@dataclass(frozen=True)
class Parts:
    """The three parts of a data set; each item is (image (C, H, W) float32, label)."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load(name: str, path: Path) -> Parts:
    """Open a data set.

    Args:
        name: a key of ``DATASETS``.
        path: folder to read from; torchvision downloads into it what it can.

    Raises:
        UserError: the files are missing or damaged; the text says what to put where.
    """
    if name == "digits":
        parts = _digits()
    elif name == "imagenet":
        parts = _folders(name, _root(path, ("imagenet", "ImageNet")))
    elif name == "tiny-imagenet":
        parts = _folders(name, _root(path, ("tiny-imagenet-200", "tiny-imagenet")))
    else:
        parts = _from_torchvision(name, path)
    for title, part in vars(parts).items():
        if not len(part):
            raise UserError(f"{name} in {path} has no images for its {title} part")
    return parts


def synthetic(name: str, batch_size: int) -> Parts:
    """Random images of the shape of data set ``name``, for a dry run."""
    what = DATASETS[name]
    count = _SYNTHETIC_SIZE * batch_size
    images = torch.randn(count, what.channels, what.size, what.size)
    labels = torch.randint(what.num_classes, (count,))
    part = TensorDataset(images, labels)
    return Parts(part, part, part)


def train_loader(part: Dataset, batch_size: int, workers: int, seed: int, worker: Worker):
    """Shuffled batches of this process; call ``loader.sampler.set_epoch`` before every epoch.

    ``batch_size`` is that of all processes together. An incomplete last batch is left out.
    """
    own_size = batch_size // worker.world_size
    sampler = DistributedSampler(part, worker.world_size, worker.rank, shuffle=True, seed=seed)
    return DataLoader(
        part,
        own_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=len(sampler) >= own_size,
        pin_memory=worker.device.type == "cuda",
    )


def evaluation_loader(part: Dataset, batch_size: int, workers: int, worker: Worker) -> DataLoader:
    """This process's share of a part, every item in exactly one process."""
    share = Subset(part, range(worker.rank, len(part), worker.world_size))
    own_size = max(1, batch_size // worker.world_size)
    pin_memory = worker.device.type == "cuda"
    return DataLoader(share, own_size, num_workers=workers, pin_memory=pin_memory)


def _digits() -> Parts:
    """scikit-learn's 1797 handwritten digits, 8x8, enlarged to 32x32; a fifth is the test part."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=32, mode="bilinear")
    what = DATASETS["digits"]
    everything = TensorDataset((images - what.mean[0]) / what.std[0], torch.tensor(bunch.target))
    rest, test = _split(len(everything), len(everything) // 5)
    train, validation = _split(len(rest), _validation_size(len(rest)))
    return Parts(
        Subset(everything, [rest[i] for i in train]),
        Subset(everything, [rest[i] for i in validation]),
        Subset(everything, test),
    )


def _from_torchvision(name: str, path: Path) -> Parts:
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
                f"{name} is not in {path} and cannot be downloaded ({error}); put {files} there "
                "or name another folder with --data-path"
            ) from error

    augmented, plain = _transforms(name)
    return _with_validation(
        open_part(True, augmented), open_part(True, plain), open_part(False, plain)
    )


def _folders(name: str, root: Path) -> Parts:
    """train/ and val/ with one folder per class, or Tiny-ImageNet's flat val/; val is the test."""
    from torchvision.datasets import ImageFolder

    augmented, plain = _transforms(name)
    try:
        train = ImageFolder(root / "train", augmented)
        if len(train.classes) > DATASETS[name].num_classes:
            raise UserError(
                f"{root / 'train'} has {len(train.classes)} classes, too many for {name}"
            )
        annotations = root / "val" / "val_annotations.txt"
        if annotations.is_file():
            test: Dataset = _AnnotatedImages(annotations, train.class_to_idx, plain)
        else:
            test = ImageFolder(root / "val", plain)
            if test.classes != train.classes:
                raise UserError(f"{root / 'val'} and {root / 'train'} hold different classes")
        return _with_validation(train, ImageFolder(root / "train", plain), test)
    except FileNotFoundError as error:
        raise UserError(f"{name} in {root} is incomplete: {error}") from error


class _AnnotatedImages(Dataset):
    """The validation images of Tiny-ImageNet: one folder, and a table of file and class."""

    def __init__(self, annotations: Path, class_to_index: dict[str, int], transform: Callable):
        self.transform = transform
        self.items = []
        try:
            lines = annotations.read_text().split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{annotations} is not a text file: {error}") from error
        for line in filter(str.strip, lines):
            file, label = (line.split("\t") + [""])[:2]
            if label not in class_to_index:
                raise UserError(f"{annotations} names class {label!r}, which train/ lacks")
            if not (annotations.parent / "images" / file).is_file():
                raise UserError(f"{annotations} names {file}, which images/ lacks")
            self.items.append((annotations.parent / "images" / file, class_to_index[label]))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.datasets.folder import default_loader

        file, label = self.items[index]
        return self.transform(default_loader(str(file))), label


def _root(path: Path, names: tuple[str, str]) -> Path:
    """The folder that holds train/ and val/: ``path`` itself or a usual name below it."""
    for root in (path, *(path / name for name in names)):
        if (root / "train").is_dir() and (root / "val").is_dir():
            return root
    raise UserError(
        f"no train/ and val/ in {path} or {path / names[0]}; unpack the data set there "
        "or name its folder with --data-path"
    )


def _transforms(name: str) -> tuple[Callable, Callable]:
    """Transforms for training and for scoring."""
    from torchvision.transforms import v2

    what = DATASETS[name]
    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(what.mean, what.std),
    ]
    if name == "imagenet":
        train = [v2.RandomResizedCrop(what.size, antialias=True), v2.RandomHorizontalFlip()]
        score = [v2.Resize(256, antialias=True), v2.CenterCrop(what.size)]
        return v2.Compose([*train, *to_tensor]), v2.Compose([*score, *to_tensor])
    train = [v2.RandomCrop(what.size, padding=4), v2.RandomHorizontalFlip()] if what.flip else []
    return v2.Compose([*train, *to_tensor]), v2.Compose(to_tensor)


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
