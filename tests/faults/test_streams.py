"""Runs whose output cannot be written, is read by nobody, or has no place to go."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scripts.conftest import ROOT, SMALL, run_folder, tiny_imagenet

__all__ = ["tiny_imagenet"]  # a fixture

SCRIPT = "ViT/train.py"
SCRIPTS = sorted(ROOT.glob("*/train.py"))


@pytest.fixture
def shell(tiny_imagenet: Path, tmp_path: Path) -> Callable:
    """Run a tiny network as a shell does, with words behind the command line."""

    def run(behind: str, *words: object) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / SCRIPT, "--data-path", tiny_imagenet, "--output"]
        command += [tmp_path / "runs", "--dataset", "tiny-imagenet", "--img-size", 8, "--workers"]
        command += [0, "--batch-size", 6, "--epochs", 1, *SMALL[SCRIPT].split(), *words]
        line = f'"$@" {behind}'
        arguments = ["bash", "-o", "pipefail", "-c", line, "bash", *map(str, command)]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=100)

    return run


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu")], ids=["alone", "two processes"])
def test_output_that_cannot_be_written_is_one_line(
    shell: Callable, tmp_path: Path, devices: tuple[str, ...]
):
    done = shell("> /dev/full", "--device", *devices)
    message = "train.py: error: cannot write the output: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, message)
    assert torch.load(run_folder(tmp_path) / "last.pth", weights_only=True)["epoch"] == 1
    if devices == ("cpu",):
        best = run_folder(tmp_path) / "best.pth"
        for words in (("--model-path", best), ("--dry-run",)):
            done = shell("> /dev/full", "--device", "cpu", *words)
            assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu")], ids=["alone", "two processes"])
def test_a_run_needs_no_stderr(shell: Callable, tmp_path: Path, devices: tuple[str, ...]):
    done = shell("2>&-", "--device", *devices)
    assert (done.returncode, done.stderr) == (0, "")
    epoch, test, folder = done.stdout.splitlines()
    assert epoch.startswith("epoch 1/1") and test.startswith("test accuracy")
    assert folder == f"run folder: {run_folder(tmp_path)}"
    if devices == ("cpu",):
        done = shell("2>&-", "--device", "cpu")  # refused, but not on stdout
        assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
def test_a_run_whose_reader_has_gone_ends_and_can_be_resumed(shell: Callable):
    done = shell("| :", "--device", "cpu")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    done = shell("", "--device", "cpu", "--resume")
    assert (done.returncode, done.stderr) == (0, "")


IMPORTS = """
import importlib.abc, os, runpy, signal, sys

class Interrupted(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)

path, ignored = sys.argv.pop(1), sys.argv.pop(1) == "ignored"
if ignored:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.meta_path.insert(0, Interrupted())
sys.path.insert(0, os.path.dirname(path))
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("*/train.py")), ids=lambda path: path.parent.name
)
def test_an_interrupt_during_imports_ends_the_process_silently(script: Path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for word, status in (("obeyed", -2), ("ignored", 7)):
        command = [sys.executable, "-c", IMPORTS, str(script), word]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
