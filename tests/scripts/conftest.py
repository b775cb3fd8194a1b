"""Real images on disk, and the scripts run in this process."""

import contextlib
import itertools
import os
import pickle
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves
from torchvision import datasets

from aal.training.run_folder import RunFolder
from aal.training.saving import Saver

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


SMALL = {
    "ViT/train.py": "--patch 2 --hidden 8 --head 2 --num-layers 1 --mlp-hidden 16",
    "MLP-Mixer/train.py": "--patch-size 4 --hidden-size 8 --hidden-c 8 --hidden-s 4 --num-layers 1",
}
RULES = ("bp", "aba1", "aba2", "aba3", "aba4", "asa1", "asa2", "asa3", "asa4")


def patch_network(call: Callable, script: str, tiny_imagenet: Path, tmp_path: Path) -> Callable:
    """Run a script of patch networks with a small one on a few images of 8 pixels."""

    def run(*arguments: object) -> tuple[int, str, str]:
        words = ["--dataset", "tiny-imagenet", "--data-path", tiny_imagenet, "--img-size", 8]
        words += ["--batch-size", 6, "--workers", 0, "--output", tmp_path / "runs"]
        return call(script, *words, *SMALL[script].split(), "--device", "cpu", *arguments)

    return run


@pytest.fixture
def train_vit(call: Callable, tiny_imagenet: Path, tmp_path: Path) -> Callable:
    return patch_network(call, "ViT/train.py", tiny_imagenet, tmp_path)


@pytest.fixture
def train_mixer(call: Callable, tiny_imagenet: Path, tmp_path: Path) -> Callable:
    return patch_network(call, "MLP-Mixer/train.py", tiny_imagenet, tmp_path)


@pytest.fixture(params=SMALL)
def train_patches(
    request: pytest.FixtureRequest, call: Callable, tiny_imagenet: Path, tmp_path: Path
) -> Callable:
    """``train_vit`` and ``train_mixer``, one after the other."""
    return patch_network(call, request.param, tiny_imagenet, tmp_path)


SMALL_TRANSFORMER = "--hidden 8 --num-layers 1 --head 2 --mlp-hidden 16"
TRANSLATION_OF_THE_PAPER = (
    "--batch_size 4096 --dataset_name IWSLT --language_direction G2E --learning_rule asa2 "
    "--gcp True --device 0 --get_li True"
)


@pytest.fixture
def train_transformer(call: Callable, texts: Path, tmp_path: Path) -> Callable:
    """Run Transformer/train.py with a small network on a few texts."""

    def run(*arguments: object) -> tuple[int, str, str]:
        words = ["--dataset-name", "parallel", "--data-path", texts]
        if not {"--model-path", "--model_path"} & {*arguments}:
            words += ["--min-freq", 1]
        words += ["--batch-size", 120, "--warmup-steps", 20, "--output", tmp_path / "runs"]
        words += ["--device", "cpu", *SMALL_TRANSFORMER.split()]
        return call("Transformer/train.py", *words, *arguments)

    return run


SMALL_BERT = "--hidden 8 --num-layers 1 --head 2 --mlp-hidden 16"


@pytest.fixture
def train_bert(call: Callable, glue: Path, tmp_path: Path) -> Callable:
    """Run BERT/train.py with a small network on a few pairs of sentences."""

    def run(*arguments: object, small: str = SMALL_BERT) -> tuple[int, str, str]:
        words = ["--data-path", glue, "--output", tmp_path / "runs", "--batch-size", 12]
        return call("BERT/train.py", *words, "--device", "cpu", *small.split(), *arguments)

    return run


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLUE's folders of MRPC and MNLI, with 40 pairs to learn from and 10 or 7 to score."""
    folder = tmp_path_factory.mktemp("glue")
    animals, verbs = ("dog", "cat", "child", "man", "bird"), ("sees", "seeks", "likes", "hears")
    sentences = [f"The {animal} {verb} it." for animal, verb in itertools.product(animals, verbs)]
    random = np.random.default_rng(0)

    def write(path: Path, header: str, count: int, row: Callable[[str, str, int], list]) -> None:
        lines = [header.split(",")]
        for number in range(count):
            first, second = random.choice(sentences, 2)
            lines.append(row(first, first if number % 3 == 0 else second, number))
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))

    mrpc = "Quality,#1 ID,#2 ID,#1 String,#2 String"
    for name, count in (("train", 40), ("dev", 10)):
        write(
            folder / "MRPC" / f"{name}.tsv",
            mrpc,
            count,
            lambda first, second, number: [int(number % 3 == 0), number, number, first, second],
        )
    labels = ("entailment", "neutral", "contradiction")
    for name, count in (("train", 40), ("dev_matched", 10), ("dev_mismatched", 7)):
        write(
            folder / "MNLI" / f"{name}.tsv",
            "index,sentence1,sentence2,label1,gold_label",
            count,
            lambda first, second, number: [number, first, second, "-", labels[number % 3]],
        )
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 pairs of sentences to learn from, 8 to validate with and 8 to test with."""
    folder = tmp_path_factory.mktemp("texts")
    subjects = {"Der Hund": "The dog", "Die Katze": "The cat", "Das Kind": "The child"}
    subjects |= {"Der Mann": "The man"}
    verbs = {"sieht": "sees", "sucht": "seeks", "mag": "likes", "malt": "paints"}
    objects = {"das Haus": "the house", "zwei Bäume": "two trees", "Äpfel": "apples"}
    objects |= {"den Mond": "the moon"}
    pairs = [
        (f"{subject} {verb} {thing}.", f"{subjects[subject]} {verbs[verb]} {objects[thing]}.")
        for subject, verb, thing in itertools.product(subjects, verbs, objects)
    ]
    order = np.random.default_rng(0).permutation(len(pairs))
    for part, places in zip(
        ("train", "validation", "test"), np.split(order, [48, 56]), strict=True
    ):
        for side, language in enumerate(("de", "en")):
            lines = "".join(f"{pairs[place][side]}\n" for place in places)
            (folder / f"{part}.{language}").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight training and four test images in CIFAR-10's own files, whose sums are not checked."""
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (("data_batch_1", 8), ("test_batch", 4)):
        pixels = random.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        content = {"data": pixels, "labels": [i % 10 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [("data_batch_1", None)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [("test_batch", None)])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": None})
    return folder.parent


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


def _write_image(path: Path, random: np.random.Generator, label: int) -> None:
    pixels = random.integers(0, 128, (64, 64, 3)) + 127 * label
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Interrupt runs once the records of some epoch are written, inside a ``with`` block."""

    @contextlib.contextmanager
    def interrupted(epoch: int):
        finish_epoch = RunFolder.finish_epoch

        def stop(self, row, *rest):
            finish_epoch(self, row, *rest)
            if row["epoch"] == epoch:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "finish_epoch", stop)
            yield

    return interrupted


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Send a signal to this process after some optimiser step, inside a ``with`` block."""

    @contextlib.contextmanager
    def signalled(step: int, number: int = signal.SIGTERM):
        after_step = Saver.after_step

        def send(self, now):
            if now == step:
                os.kill(os.getpid(), number)
            after_step(self, now)

        with monkeypatch.context() as patch:
            patch.setattr(Saver, "after_step", send)
            yield

    return signalled


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


def assert_refused(result: tuple[int, str, str], words: str) -> None:
    """A call of a script ended before any work, with one line that holds ``words``."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("train.py: error: ") and words in err


def spellings(flag: str) -> list[tuple[str, ...]]:
    """Ways to give a flag."""
    return [(flag,), (flag.replace("-", "_").replace("__", "--", 1), "7"), (f"{flag}=7",)]


def flags_of(help: str) -> set[str]:
    """Every flag that --help names."""
    return set(re.findall(r"--[A-Za-z][A-Za-z0-9-]*", help.split("options:")[1]))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of a run."""
    return torch.load(folder / "last.pth", weights_only=True)["model"]


def assert_same_results(folder: Path, other: Path) -> None:
    """The two runs of one name came to the same numbers, apart from times."""
    for file in ("last.pth", "best.pth"):
        states = [torch.load(place / file, weights_only=True) for place in (folder, other)]
        for ours, theirs in zip(*map(tree_leaves, states), strict=True):
            same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
            assert same, (file, ours, theirs)
    for name in (f"{folder.name}.npy", f"{folder.name}_li.npy"):
        np.testing.assert_array_equal(np.load(folder / name), np.load(other / name))
    assert (folder / "test.json").read_text() == (other / "test.json").read_text()
