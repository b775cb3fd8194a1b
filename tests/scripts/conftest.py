"""Real images on disk, and the scripts run in this process."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("n01443537", "n01629819")


@pytest.fixture
def call(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run a script of the project with arguments: (exit status, stdout, stderr)."""

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        path = ROOT / script
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(path), run_name="__main__")
        out, err = capfd.readouterr()
        return exit.value.code or 0, out, err

    return run


@pytest.fixture
def train(call: Callable, tiny_imagenet: Path, tmp_path: Path) -> Callable:
    """Run ResNet/train.py on a few images, with a run folder below ``tmp_path / "runs"``."""

    def run(*arguments: object) -> tuple[int, str, str]:
        words = ["--dataset", "tiny-imagenet", "--data-path", tiny_imagenet, "--model", "resnet18"]
        words += ["--batch-size", 6, "--workers", 0, "--lr", 0.01, "--output", tmp_path / "runs"]
        return call("ResNet/train.py", *words, "--device", "cpu", *arguments)

    return run


@pytest.fixture(scope="session")
def tiny_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images in the official layout of Tiny-ImageNet, validation images in one folder."""
    root = tmp_path_factory.mktemp("data") / "tiny-imagenet-200"
    random = np.random.default_rng(0)
    lines = []
    for label, name in enumerate(CLASSES):
        folder = root / "train" / name / "images"
        folder.mkdir(parents=True)
        for i in range(8):
            _write_image(folder / f"{name}_{i}.JPEG", random, label)
        file = f"val_{label}.JPEG"
        lines.append("\t".join([file, name, "0", "0", "62", "62"]))
    (root / "val" / "images").mkdir(parents=True)
    for label, line in enumerate(lines):
        _write_image(root / "val" / "images" / line.split("\t")[0], random, label)
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root.parent


@pytest.fixture
def finished_run(train: Callable, tmp_path: Path) -> Path:
    """The folder of a run of one epoch with Learning Indicators, below a folder of its own."""
    words = ("--learning-rule", "ara", "--get-li", "--epochs", 1)
    status, _, err = train(*words, "--output", tmp_path / "original")
    assert status == 0, err
    return tmp_path / "original"


def _write_image(path: Path, random: np.random.Generator, label: int) -> None:
    pixels = random.integers(0, 128, (64, 64, 3)) + 127 * label
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def run_folder(tmp_path: Path) -> Path:
    """The only run folder below ``tmp_path / "runs"``."""
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` and what it holds."""
    return {
        os.path.relpath(path, folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
