"""Images in files: a folder for each class, or Tiny-ImageNet's table of file and class.

There may be millions of them, so that each is looked at only when it is read.
"""

import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from aal.training.command_line import UserError

if TYPE_CHECKING:
    from PIL import Image

_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Items = list[tuple[str, int]]  # files and their labels


class BadImage(Exception):
    """An image that is no good; the text names its file and says why."""


class ImageFiles(Dataset):
    """Images and labels.

    Args:
        items: files and labels.
        transform: of an image.
        size: pixels per side that images must have; None for any.
    """

    def __init__(self, items: Items, transform: Callable, size: int | None = None):
        self.items, self.transform, self.size = items, transform, size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Raises ``BadImage``."""
        file, label = self.items[index]
        image = read_image(file)
        if self.size is not None and image.size != (self.size, self.size):
            raise BadImage(
                f"{file} has {image.width}x{image.height} pixels instead of {self.size}x{self.size}"
            )
        return self.transform(image), label


def read_image(file: str) -> "Image.Image":
    """An image in red, green and blue of 8 bits, whatever it is in the file.

    Raises:
        BadImage: the file cannot be read, or is no whole image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        what = os.stat(file)
        if not stat.S_ISREG(what.st_mode):  # to open a pipe would wait for a writer
            raise BadImage(f"{file} is no regular file")
        if not what.st_size:
            raise BadImage(f"{file} is empty")
        with warnings.catch_warnings(), open(file, "rb") as opened:
            warnings.simplefilter("ignore")  # of what is odd, but can be read
            with Image.open(opened) as image:
                return _in_colour(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"{file} is no image of a known format") from error
    except OSError as error:
        if error.strerror is None:  # from PIL
            raise BadImage(f"{file} is damaged: {error}") from error
        raise BadImage(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:  # PIL tells of damage in errors of many types
        raise BadImage(f"{file} is damaged: {error}") from error


def _in_colour(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I;16"):  # of which PIL would keep values up to 255 alone
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("RGB")


def read_folders(root: Path, num_classes: int) -> tuple[Items, Items]:
    """The images of train/, and of val/ with its folders of classes or its table.

    Raises:
        UserError: a folder cannot be read, or is not what it should be.
    """
    try:
        classes, train = _read_classes(root / "train")
        if len(classes) > num_classes:
            raise UserError(
                f"{root / 'train'} has {len(classes)} classes; the data set has {num_classes}"
            )
        annotations = root / "val" / "val_annotations.txt"
        if annotations.is_file():
            indices = {name: index for index, name in enumerate(classes)}
            return train, _read_annotations(annotations, indices)
        others, val = _read_classes(root / "val")
        if odd := set(classes) ^ set(others):
            raise UserError(
                f"{root / 'val'} and {root / 'train'} hold different classes: "
                f"{min(odd)} is in one of them alone"
            )
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return train, val


def _read_classes(root: Path) -> tuple[list[str], Items]:
    """Names of classes, and their images, both in torchvision's order."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise UserError(f"{root} has no folders of classes")
    items = []
    for label, name in enumerate(classes):
        files = _files_below(root / name)
        if not files:
            raise UserError(f"{root / name} holds no images ({', '.join(_ENDINGS)})")
        items += [(file, label) for file in files]
    return classes, items


def _files_below(folder: Path) -> list[str]:
    """Names of image files in a folder and in those below it, links included."""
    seen, found = set(), []
    for root, _, names in os.walk(folder, onerror=_fail, followlinks=True):
        place = os.stat(root)
        if (place.st_dev, place.st_ino) in seen:
            raise UserError(f"{root} is a link to a folder that {folder} holds already; remove it")
        seen.add((place.st_dev, place.st_ino))
        names = sorted(name for name in names if name.lower().endswith(_ENDINGS))
        found.append((root, names))
    return [os.path.join(root, name) for root, names in sorted(found) for name in names]


def _fail(error: OSError) -> NoReturn:
    raise error


def _read_annotations(annotations: Path, indices: dict[str, int]) -> Items:
    """The validation images of Tiny-ImageNet, by a table of file and class."""
    items = []
    try:
        lines = annotations.read_text().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{annotations} is not a text file: {error}") from error
    for line in filter(str.strip, lines):
        name, label = (line.split("\t") + [""])[:2]
        if label not in indices:
            raise UserError(f"{annotations} names class {label!r}, which train/ lacks")
        file = annotations.parent / "images" / name
        if not os.path.lexists(file):
            raise UserError(f"{annotations} names {name}, which images/ lacks")
        items.append((str(file), indices[label]))
    return items
