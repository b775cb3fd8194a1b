"""Images that cannot be read or are mislabelled: named, and skipped or fatal by option."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scripts.conftest import (
    CLASSES,
    assert_refused,
    assert_same_results,
    call,
    run_folder,
    stop_after,
    stop_at,
    tiny_imagenet,
    train,
    train_vit,
)
from torch import Tensor
from torch.utils.data import Dataset

from aal.training.command_line import UserError
from aal.training.devices import Worker
from aal.training.image_folders import BadImage, read_image
from aal.training.loaders import BadImages, evaluation_loader, step_loader, train_loader

__all__ = ["call", "stop_after", "stop_at", "tiny_imagenet", "train", "train_vit"]  # fixtures

ALONE = Worker(torch.device("cpu"))
ADVICE = "; mend or remove it, or give --bad-images skip"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overstate_size(file: Path) -> None:
    """A header of more pixels than any image has."""
    pixels = 1 << 15
    header = b"P6 %d %d 255\n" % (pixels, pixels)
    file.write_bytes(header + bytes(1000))


def break_png(file: Path) -> None:
    """Compressed pixels that are none."""
    Image.new("RGB", (64, 64)).save(file, "PNG")
    content = bytearray(file.read_bytes())
    place = content.index(b"IDAT") + 4
    content[place : place + 8] = bytes(8)
    file.write_bytes(content)


def link(target: str) -> Callable[[Path], None]:
    def replace(file: Path) -> None:
        file.unlink()
        file.symlink_to(target.format(name=file.name))

    return replace


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


# What is done to a file, and what is said of it.
DAMAGES = {
    "truncated": (truncate, "is damaged: image file is truncated"),
    "text": (lambda file: file.write_text("no image"), "is no image of a known format"),
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "dangling": (link("nowhere.JPEG"), "cannot be read: No such file or directory"),
    "loop": (link("{name}"), "cannot be read: Too many levels of symbolic links"),
    "pipe": (pipe, "is no regular file"),
    "device": (link("/dev/zero"), "is no regular file"),
    "folder": (folder, "is no regular file"),
    "bomb": (overstate_size, "is damaged: Image size (1073741824 pixels) exceeds limit"),
    "pixels": (break_png, "is damaged: "),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_file_is_named(tmp_path: Path, kind: str):
    damage, words = DAMAGES[kind]
    file = tmp_path / "image.JPEG"
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(file)
    damage(file)
    with pytest.raises(BadImage) as caught:
        read_image(str(file))
    assert str(caught.value).startswith(f"{file} {words}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path: Path):
    file = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(file)
    file.chmod(0)
    with pytest.raises(BadImage, match="cannot be read: Permission denied"):
        read_image(str(file))


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
# Images of the grey values of ``RAMP``, their format, and how far from them it may be.
MODES = {
    "grey": (Image.fromarray(RAMP), "png", 0),
    "grey-alpha": (Image.fromarray(RAMP).convert("LA"), "png", 0),
    "grey-16-png": (Image.fromarray(RAMP.astype(np.uint16) * 257), "png", 0),
    "grey-16-tiff": (Image.fromarray(RAMP.astype(np.uint16) * 257), "tiff", 0),
    "palette": (Image.fromarray(RAMP).convert("P"), "png", 0),
    "colour-alpha": (Image.fromarray(RAMP).convert("RGBA"), "png", 0),
    "cmyk": (Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "tiff", 0),
    "cmyk-jpeg": (Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "jpg", 12),
    "floats": (Image.fromarray(RAMP.astype(np.float32)), "tiff", 0),
}


@pytest.mark.parametrize("kind", MODES)
def test_other_modes_are_brought_to_colours(tmp_path: Path, kind: str):
    image, ending, tolerance = MODES[kind]
    file = tmp_path / f"image.{ending}"
    image.save(file)
    read = read_image(str(file))
    assert read.mode == "RGB"
    expected = np.repeat(RAMP[:, :, None].astype(int), 3, axis=2)
    np.testing.assert_allclose(np.asarray(read).astype(int), expected, atol=tolerance)


def test_a_palette_with_transparent_colours_is_read_without_a_warning(tmp_path: Path):
    file = tmp_path / "image.png"
    Image.fromarray(RAMP).convert("P").save(file, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(str(file)).mode == "RGB"


def test_black_and_white_is_read(tmp_path: Path):
    file = tmp_path / "image.png"
    Image.fromarray(RAMP > 100).save(file)
    assert np.array_equal(np.asarray(read_image(str(file)))[:, :, 1] == 255, RAMP > 100)


# -----------------------------------------------------------------------------------------------


class Some(Dataset):
    """The numbers below ``count``, without some of them."""

    def __init__(self, count: int, bad: set[int]):
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index in self.bad:
            raise BadImage(f"{index} is bad")
        return torch.tensor(index) + torch.rand(()) / 2


def values(loader: Any, epoch: int = 0, done: int = 0) -> list[list[float]]:
    loader.sampler.set_epoch(epoch, done)
    return [batch.tolist() for batch in loader]


BAD = {0, 1, 5, 11}


@pytest.mark.parametrize("steps", [False, True], ids=["epochs", "steps"])
def test_the_next_good_image_comes_in_place_of_a_bad_one(steps: bool):
    skip = BadImages(are_skipped=True)

    def loader(bad: set[int], worker: Worker = ALONE, workers: int = 0) -> Any:
        shared = (Some(12, bad), 4, workers, 0, worker)
        return step_loader(*shared, 6, 3, skip) if steps else train_loader(*shared, skip)

    whole, found = values(loader(set()), 1), values(loader(BAD), 1)
    for batch, other in zip(whole, found, strict=True):
        for value, replacement in zip(batch, other, strict=True):
            index = int(value)
            while index in BAD:
                index = (index + 1) % 12
            assert int(replacement) == index
            assert replacement % 1 == pytest.approx(value % 1, abs=1e-5)  # of the same seed
    assert values(loader(BAD), 1, done=1) == found[1:]
    assert values(loader(BAD, workers=2), 1) == found
    halves = [values(loader(BAD, Worker(ALONE.device, rank, 2)), 1) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == found


def test_each_bad_image_is_named_once_by_the_process_that_meets_it(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "1")
    loader = train_loader(Some(12, BAD), 4, 0, 0, ALONE, BadImages(are_skipped=True))
    for epoch in range(3):
        values(loader, epoch)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == sorted(f"train.py: warning: {i} is bad; skipped" for i in BAD)


def test_a_bad_image_ends_the_run_unless_it_is_skipped():
    loader = train_loader(Some(12, {7}), 4, 0, 0, ALONE)
    with pytest.raises(UserError, match=f"^7 is bad{ADVICE}$"):
        values(loader)


@pytest.mark.parametrize("count", [12, 1000])
def test_data_without_good_images_end_the_run(count: int, capsys: pytest.CaptureFixture):
    part, skip = Some(count, set(range(count))), BadImages(are_skipped=True)
    with pytest.raises(UserError, match="too many images are bad"):
        values(train_loader(part, 1, 0, 0, ALONE, skip))
    assert capsys.readouterr().err.count("\n") == min(count, 100)
    with pytest.raises(UserError, match="all images that were to be scored are bad"):
        list(evaluation_loader(part, 5, 0, ALONE, skip))


@pytest.mark.parametrize("workers", [0, 1])
def test_scoring_leaves_bad_images_out_and_whole_batches_of_them(workers: int):
    loader = evaluation_loader(Some(10, {0, 1, 4}), 2, workers, ALONE, BadImages(are_skipped=True))
    found = [[int(value) for value in batch] for batch in loader]
    assert found == [[2, 3], [5], [6, 7], [8, 9]]


# -----------------------------------------------------------------------------------------------


@pytest.fixture
def images(tiny_imagenet: Path, tmp_path: Path) -> Path:
    """A copy of the images, to be damaged."""
    copy = tmp_path / "data"
    shutil.copytree(tiny_imagenet, copy)
    return copy / "tiny-imagenet-200"


def train_file(images: Path, number: int = 3) -> Path:
    """One of the sixteen training images; the permutation of the parts leaves these to training."""
    name = CLASSES[1]
    return images / "train" / name / "images" / f"{name}_{number}.JPEG"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_a_bad_image_ended_goes_on_when_it_is_mended(
    train_vit: Callable, stop_after: Callable, images: Path, tmp_path: Path, workers: int
):
    words = ("--data-path", images, "--epochs", 2, "--get-li", "--workers", workers)
    assert train_vit(*words)[0] == 0
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_after(1):
        assert train_vit(*words)[0] == 130
    file = train_file(images)
    before = file.read_bytes()
    truncate(file)
    status, _, err = train_vit(*words, "--resume")
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"train.py: error: {file} is damaged: image file is truncated")
    assert err.endswith(f"{ADVICE}\n")
    file.write_bytes(before)
    status, _, err = train_vit(*words, "--resume")
    assert (status, err) == (0, "")
    assert_same_results(run_folder(tmp_path), tmp_path / "whole")


def test_a_run_that_skips_images_goes_on_as_if_nothing_had_happened(
    train_vit: Callable, stop_at: Callable, images: Path, tmp_path: Path
):
    """With one process that loads data before, and none behind."""
    bad = [train_file(images), images / "val" / "images" / "val_1.JPEG"]
    truncate(bad[0])
    bad[1].write_text("no image")
    words = ("--data-path", images, "--bad-images", "skip", "--epochs", 2, "--batch-size", 4)
    words += ("--get-li", "--test-batch-size", 1)
    status, out, err = train_vit(*words)
    assert status == 0 and "(1 images)" in out
    assert len(err.splitlines()) == 2 and err.count("; skipped\n") == 2
    for file in bad:
        assert err.count(str(file)) == 1
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_at(2):
        assert train_vit(*words, "--workers", 1)[0] == 143
    assert train_vit(*words, "--resume")[0] == 0
    assert_same_results(run_folder(tmp_path), tmp_path / "whole")


def test_a_test_part_without_good_images_is_told(train_vit: Callable, images: Path, tmp_path: Path):
    words = ("--data-path", images, "--epochs", 1)
    assert train_vit(*words)[0] == 0
    for file in (images / "val" / "images").iterdir():
        truncate(file)
    best = run_folder(tmp_path) / "best.pth"
    status, out, err = train_vit(
        "--data-path", images, "--model-path", best, "--bad-images", "skip"
    )
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == "train.py: error: all images that were to be scored are bad"


def test_an_image_of_another_size_is_named(train: Callable, images: Path):
    file = train_file(images)
    Image.new("RGB", (64, 48)).save(file)
    status, _, err = train("--data-path", images, "--epochs", 1)
    words = f"{file} has 64x48 pixels instead of 64x64"
    assert (status, err) == (2, f"train.py: error: {words}{ADVICE}\n")


def sort_validation(images: Path) -> Path:
    """Give val/ a folder for each class, in place of its table."""
    val = images / "val"
    for label, name in enumerate(CLASSES):
        (val / name).mkdir()
        shutil.move(val / "images" / f"val_{label}.JPEG", val / name)
    (val / "images").rmdir()
    (val / "val_annotations.txt").unlink()
    return val


def table(images: Path) -> Path:
    return images / "val" / "val_annotations.txt"


def rename_class(images: Path) -> None:
    val = sort_validation(images)
    (val / CLASSES[0]).rename(val / "n00000000")


# What is done to the folders, and what is said of it.
MISLABELLED = {
    "renamed class": (rename_class, "hold different classes: n00000000 is in one"),
    "class without images": (
        lambda images: (images / "train" / "n9").mkdir(),
        "n9 holds no images (.jpg",
    ),
    "class in val alone": (
        lambda images: shutil.rmtree(images / "train" / CLASSES[0]),
        f"hold different classes: {CLASSES[0]} is in one",
    ),
    "unknown class": (
        lambda images: table(images).write_text("val_0.JPEG\tn5\n"),
        "names class 'n5', which train/ lacks",
    ),
    "absent file": (
        lambda images: table(images).write_text(f"no.JPEG\t{CLASSES[0]}\n"),
        "names no.JPEG, which images/ lacks",
    ),
    "no table": (lambda images: table(images).write_bytes(b"\xff\xfe"), "is not a text file"),
    "empty table": (lambda images: table(images).write_text("\n"), "no images for its test part"),
    "too many classes": (
        lambda images: [
            shutil.copytree(images / "train" / CLASSES[0], images / "train" / f"m{i}")
            for i in range(199)
        ],
        "has 201 classes; the data set has 200",
    ),
    "folder in itself": (
        lambda images: (images / "train" / CLASSES[0] / "again").symlink_to("."),
        "again is a link to a folder that",
    ),
}


@pytest.mark.parametrize("kind", MISLABELLED)
def test_mislabelled_folders_are_refused_before_any_work(
    train_vit: Callable, images: Path, tmp_path: Path, kind: str
):
    mislabel, words = MISLABELLED[kind]
    if kind == "class in val alone":
        sort_validation(images)
    mislabel(images)
    assert_refused(train_vit("--data-path", images), words)
    assert not list(tmp_path.glob("runs/*/*"))
