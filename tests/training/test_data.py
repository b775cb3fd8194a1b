"""Parts of data sets that do not overlap, and what is said when files are missing."""

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

from aal.training import data, loaders
from aal.training.command_line import UserError
from aal.training.devices import Worker

CPU = torch.device("cpu")


def test_digits_are_images_of_the_described_shape_and_statistics():
    parts = data.load("digits", Path("unused"))
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [1295, 143, 359]
    images = torch.stack([image for image, _ in parts.train])
    assert images.shape[1:] == (1, 32, 32)
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=0.02, rtol=0)
    torch.testing.assert_close(images.std(), torch.tensor(1.0), atol=0.02, rtol=0)


def test_the_parts_of_digits_hold_every_image_once():
    parts = data.load("digits", Path("unused"))
    indices = [*parts.train.indices, *parts.validation.indices, *parts.test.indices]
    assert sorted(indices) == list(range(1797))
    again = data.load("digits", Path("unused"))
    assert again.test.indices == parts.test.indices


def _write_mnist(folder: Path, size: int = 28, first: int = 0, lacking: int = 0) -> None:
    """Ten training and four test images in MNIST's own file format, by their labels' order.

    Args:
        size: pixels per side.
        first: smallest label.
        lacking: labels.
    """
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 10), ("t10k", 4)):
        images = np.arange(count * size * size, dtype=np.uint32).astype(np.uint8)
        header = struct.pack(">IIII", 2051, count, size, size)
        values = range(first, first + count - lacking)
        labels = struct.pack(">II", 2049, len(values)) + bytes(values)
        for kind, content in (("images-idx3", header + images.tobytes()), ("labels-idx1", labels)):
            (raw / f"{name}-{kind}-ubyte").write_bytes(content)
            (raw / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


def test_mnist_is_read_from_torchvisions_files_in_one_channel(tmp_path: Path):
    _write_mnist(tmp_path)
    parts = data.load("mnist", tmp_path)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [9, 1, 4]
    image, label = parts.test[3]
    expected = (np.arange(3 * 784, 4 * 784) % 256 / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(image.flatten(), torch.tensor(expected, dtype=torch.float32))
    assert image.shape == (1, 28, 28) and label == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first": 1}, "mnist in .* has the label 10, above 9"),
        ({"lacking": 1}, "has 10 images, but 9 labels"),
        ({"size": 30}, "has images of 30x30, not of 28x28"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, words: str):
    _write_mnist(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        data.load("mnist", tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path: Path):
    _write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="mnist in .* is missing or damaged, .*--data-path"):
        data.load("mnist", tmp_path)


def _write_folders(root: Path, flat: bool) -> None:
    for part in ("train", "val"):
        for label in ("a", "b"):
            folder = root / part / label
            if flat and part == "val":
                folder = root / part / "images"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(4 if part == "train" else 2):
                colour = (255, 0, 0) if label == "a" else (0, 0, 255)
                Image.new("RGB", (64, 64), colour).save(folder / f"{label}{i}.png")
    if flat:
        lines = [f"{label}{i}.png\t{label}\t0\t0\t1\t1" for label in "ab" for i in range(2)]
        (root / "val" / "val_annotations.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "sorted"])
def test_both_layouts_of_tiny_imagenet_are_read(tmp_path: Path, flat: bool):
    _write_folders(tmp_path / "tiny-imagenet-200", flat)
    for path in (tmp_path, tmp_path / "tiny-imagenet-200"):
        parts = data.load("tiny-imagenet", path)
        assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [7, 1, 4]
        for image, label in parts.test:
            assert image.shape == (3, 64, 64)
            assert (image[0] > image[2]).all() == (label == 0)


def test_training_and_validation_images_differ_and_only_training_is_augmented(tmp_path: Path):
    _write_folders(tmp_path, flat=True)
    parts = data.load("tiny-imagenet", tmp_path)
    assert not set(parts.train.indices) & set(parts.validation.indices)
    images = [
        torch.stack([part[0][0] for _ in range(8)]) for part in (parts.train, parts.validation)
    ]
    assert not torch.equal(images[0], images[0][:1].expand_as(images[0]))
    assert torch.equal(images[1], images[1][:1].expand_as(images[1]))


def test_images_come_in_torchvisions_order(tmp_path: Path):
    _write_folders(tmp_path, flat=False)
    for folder in ("train/b/sub", "train/b/SUB", "train/a/1"):
        (tmp_path / folder).mkdir()
        for name in ("z.PNG", "y.jpeg", "notes.txt"):
            shutil.copy(tmp_path / "train" / "a" / "a0.png", tmp_path / folder / name)
    (tmp_path / "train" / "a" / "0").symlink_to(tmp_path / "train" / "b" / "sub")
    parts = data.load("imagenet", tmp_path)
    assert parts.train.dataset.items == ImageFolder(tmp_path / "train").samples
    assert parts.test.items == ImageFolder(tmp_path / "val").samples


def test_imagenet_is_cropped_to_224_pixels(tmp_path: Path):
    _write_folders(tmp_path / "ImageNet", flat=False)
    parts = data.load("imagenet", tmp_path)
    assert parts.train[0][0].shape == parts.test[0][0].shape == (3, 224, 224)


def test_missing_files_are_named(tmp_path: Path):
    for name in ("imagenet", "tiny-imagenet"):
        with pytest.raises(UserError, match="no train/ and val/ in .*--data-path"):
            data.load(name, tmp_path)
    _write_folders(tmp_path, flat=True)
    (tmp_path / "val" / "val_annotations.txt").write_text("a0.png\tc\t0\t0\t1\t1")
    with pytest.raises(UserError, match="names class 'c'"):
        data.load("tiny-imagenet", tmp_path)


@pytest.mark.parametrize("name", sorted(data.DATASETS))
def test_synthetic_images_have_the_described_shape(name: str):
    what = data.DATASETS[name]
    image, label = data.synthetic(name, 1).train[0]
    assert image.shape == (what.channels, what.size, what.size)
    assert len(what.mean) == len(what.std) == what.channels
    assert 0 <= label < what.num_classes


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_shards_hold_every_item_once(world_size: int):
    part = TensorDataset(torch.arange(7))
    found = []
    for rank in range(world_size):
        loader = loaders.evaluation_loader(part, 4, 0, Worker(CPU, rank, world_size))
        found += [value for (batch,) in loader for value in batch.tolist()]
    assert sorted(found) == list(range(7))


def test_training_order_depends_on_seed_and_epoch_alone():
    part = TensorDataset(torch.arange(20))

    def order(seed: int, epoch: int) -> list[int]:
        loader = loaders.train_loader(part, 4, 0, seed, Worker(CPU))
        loader.sampler.set_epoch(epoch)
        return [value for (batch,) in loader for value in batch.tolist()]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) != order(1, 2)
    assert sorted(order(3, 4)) == list(range(20))


def test_an_incomplete_batch_is_used_only_where_there_is_no_other():
    part = TensorDataset(torch.arange(5))
    assert [len(b) for (b,) in loaders.train_loader(part, 2, 0, 0, Worker(CPU))] == [2, 2]
    assert [len(b) for (b,) in loaders.train_loader(part, 8, 0, 0, Worker(CPU))] == [5]
