"""Runs that are killed at any moment, which no handler sees, go on to the same end."""

import gc
import multiprocessing
import os
import random
import runpy
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts.conftest import ROOT, SMALL, assert_same_results, tiny_imagenet
from tqdm import tqdm

from aal.compression.compress import METHODS
from aal.training.files import PART

__all__ = ["tiny_imagenet"]  # a fixture

KILLS = 30
EPOCHS = 2
SCRIPT = "ViT/train.py"
# Everything that is random; a state is written after every step.
WORDS = ("--cutmix", "--mixup", "--dropout", "0.2", "--get-li", "--learning-rule", "asa1")
WORDS += ("--compress", "four", "--epochs", str(EPOCHS), "--batch-size", "3", "--save-every", "1")
WORDS += ("--keep", "2", "--resume", "auto", "--name", "run")


def train(words: Sequence[str], errors: Path, started: Connection) -> None:
    """Run the script in this process, as a shell would."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    gc.freeze()  # measuring memory collects garbage, which is slow on a large heap
    tqdm.set_lock(threading.RLock())  # its own outlives a process that is killed
    METHODS["four"] = ("scripts.test_interrupted_train", "FourBits")  # rounds at random
    path = ROOT / SCRIPT
    sys.argv = [str(path), *words]
    sys.path.insert(0, str(path.parent))
    started.send(None)
    runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Processes that are copies of one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aal.training.patch_network", "scripts.test_interrupted_train"])
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)  # the server takes no notice of our sys.path
    return context


def moment(folder: Path) -> str:
    """What a killed run was doing, by what it left."""
    if list(folder.glob(f".*{PART}")):
        return "while a file was written"
    if not (folder / "last.pth").exists():
        return "before the first state"
    state = torch.load(folder / "last.pth", weights_only=True)
    if state["epoch"] == EPOCHS:
        return "after the last epoch"
    return "between epochs" if state["progress"] is None else "within an epoch"


@pytest.mark.slow
def test_runs_killed_at_any_moment_come_to_the_same_end(
    processes: Any, tiny_imagenet: Path, tmp_path: Path, figures: dict[str, Any]
):
    words = ["--dataset", "tiny-imagenet", "--data-path", str(tiny_imagenet), "--img-size", "8"]
    words += ["--workers", "0", "--device", "cpu", *SMALL[SCRIPT].split(), *WORDS]

    def start(output: Path) -> Any:
        """A process whose script is about to begin."""
        ours, theirs = processes.Pipe()
        arguments = [*words, "--output", str(output)], tmp_path / "errors", theirs
        process = processes.Process(target=train, args=arguments)
        process.start()
        assert ours.poll(100)
        return process

    def finish(output: Path) -> float:
        """Run to the end; returns seconds."""
        process, begin = start(output), time.perf_counter()
        process.join(100)
        assert process.exitcode == 0, (tmp_path / "errors").read_text()
        return time.perf_counter() - begin

    duration = finish(tmp_path / "whole")
    draw, moments = random.Random(0), Counter()
    while moments.total() < KILLS:
        output = tmp_path / "killed"
        process = start(output)
        process.join(draw.uniform(0, duration))
        process.kill()
        process.join()
        if process.exitcode != 0:  # it was not done before
            moments[moment(output / "run")] += 1
            finish(output)
            assert_same_results(output / "run", tmp_path / "whole" / "run")
        shutil.rmtree(output, ignore_errors=True)
    assert len(moments) > 2
    resumed = moments.total()  # or else a comparison has failed
    figures["kills"] = {
        "killed": KILLS,
        "resumed to identical weights": resumed,
        "moments": moments,
    }
