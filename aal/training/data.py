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

from aal.training.augmentation import transforms
from aal.training.command_line import UserError
from aal.training.descriptions import DATASETS
from aal.training.devices import Worker
from aal.training.interruption import leave_signals_to_parent
from aal.training.sampling import EpochSampler, Seeded, StepSampler

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
        parts = _folders(name, _root(path, ("imagenet", "ImageNet")), augmented, plain)
    elif name == "tiny-imagenet":
        root = _root(path, ("tiny-imagenet-200", "tiny-imagenet"))
        parts = _folders(name, root, augmented, plain)
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


def train_loader(part: Dataset, batch_size: int, workers: int, seed: int, worker: Worker):
    """Shuffled batches of this process; call ``loader.sampler.set_epoch`` before every epoch.

    ``batch_size`` is that of all processes together. An incomplete last batch is left out.
    """
    own_size = batch_size // worker.world_size
    sampler = EpochSampler(len(part), own_size, seed, worker)
    return _loader(part, own_size, sampler, workers, worker)


def step_loader(
    part: Dataset,
    batch_size: int,
    workers: int,
    seed: int,
    worker: Worker,
    num_steps: int,
    eval_every: int,
):
    """As ``train_loader`` in a run of ``num_steps`` steps, validated after every ``eval_every``.

    ``loader.sampler.set_epoch`` chooses which of these stretches comes next.
    """
    sampler = StepSampler(len(part), batch_size, seed, worker, num_steps, eval_every)
    return _loader(part, batch_size // worker.world_size, sampler, workers, worker)


def _loader(
    part: Dataset,
    own_size: int,
    sampler: EpochSampler | StepSampler,
    workers: int,
    worker: Worker,
) -> DataLoader:
    return DataLoader(
        Seeded(part),
        own_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=worker.device.type == "cuda",
        worker_init_fn=leave_signals_to_parent,
    )


def evaluation_loader(part: Dataset, batch_size: int, workers: int, worker: Worker) -> DataLoader:
    """This process's share of a part, every item in exactly one process."""
    share = Subset(part, range(worker.rank, len(part), worker.world_size))
    own_size = max(1, batch_size // worker.world_size)
    return DataLoader(
        share,
        own_size,
        num_workers=workers,
        pin_memory=worker.device.type == "cuda",
        worker_init_fn=leave_signals_to_parent,
    )


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

    return _with_validation(
        open_part(True, augmented), open_part(True, plain), open_part(False, plain)
    )


def _folders(name: str, root: Path, augmented: Callable, plain: Callable) -> Parts:
    """train/ and val/ with one folder per class, or Tiny-ImageNet's flat val/; val is the test."""
    from torchvision.datasets import ImageFolder

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
