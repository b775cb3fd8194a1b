"""Runs in several processes, of which torchrun starts some, and that go on in other numbers."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts.conftest import ROOT, SMALL, assert_refused, run_folder, weights_of

from aal.training.parallel import KINDS

WORDS = ("--learning-rule", "asa4", "--lean", "exact", "--compress", "exact", "--get-li")
WORDS += ("--cutmix", "False", "--max-grad-norm", 0.5, "--epochs", 3, "--name", "run")
SCRIPT = "ViT/train.py"


def torchrun(tiny_imagenet: Path, tmp_path: Path, machines: int, *arguments: object) -> str:
    """What two processes on a few images of 8 pixels say, on this machine alone or on two."""
    words = ["--dataset", "tiny-imagenet", "--data-path", tiny_imagenet, "--img-size", 8]
    words += ["--batch-size", 6, "--workers", 0, "--output", tmp_path / "runs", "--device", "cpu"]
    words += [*SMALL[SCRIPT].split(), *WORDS, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    if machines == 1:
        launchers = [[*launcher, "--standalone", "--nproc-per-node=2"]]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += [f"--nnodes={machines}", "--nproc-per-node=1"]
        launcher += ["--master-addr=127.0.0.1", f"--master-port={port}"]
        launchers = [[*launcher, f"--node-rank={rank}"] for rank in range(machines)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [[*launcher, str(ROOT / SCRIPT), *map(str, words)] for launcher in launchers]
    agents = [subprocess.Popen(command, **pipes) for command in commands]
    said = [agent.communicate(timeout=300) for agent in agents]
    assert not any(agent.returncode for agent in agents), said
    return "".join(out for out, _ in said)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "machines"), [("ddp", 2), ("fsdp", 1)])
def test_processes_of_torchrun_take_over_from_one(
    train_vit: Callable,
    stop_after: Callable,
    tiny_imagenet: Path,
    tmp_path: Path,
    kind: str,
    machines: int,
):
    """They end where one process comes to, which scores their best weights."""
    folder, alone = tmp_path / "runs" / "run", tmp_path / "alone"
    assert train_vit(*WORDS)[0] == 0
    shutil.move(folder, alone)
    with stop_after(1):
        assert train_vit(*WORDS)[0] == 130
    out = torchrun(tiny_imagenet, tmp_path, machines, "--resume", "--parallel", kind)
    assert "epoch 1/3" not in out and out.count("epoch 3/3") == out.count("test accuracy") == 1

    rows, expected = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, alone)
    )
    for row, other in zip(rows, expected, strict=True):
        for name in ("step", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert row[name] == pytest.approx(other[name], abs=1e-6), name
            print(name, row[name] - other[name])
    ours, theirs = (np.load(place / "run_li.npy") for place in (folder, alone))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    ours, theirs = map(weights_of, (folder, alone))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

    status, scored, err = train_vit(*WORDS, "--model-path", folder / "best.pth")
    assert status == 0, err
    assert scored.strip() in out


@pytest.mark.slow
def test_four_processes_write_the_learning_indicators_of_one(
    train_vit: Callable, tmp_path: Path, figures: dict[str, Any]
):
    words = (*WORDS, "--num-layers", 2, "--batch-size", 4, "--epochs", 2)
    found = []
    for processes in (["cpu"], ["cpu"] * 4):
        status, _, err = train_vit(*words, "--device", *processes)
        assert status == 0, err
        found.append(np.load(tmp_path / "runs" / "run" / "run_li.npy"))
        shutil.rmtree(tmp_path / "runs")
    alone, together = found
    assert alone.shape[1] >= 8 and np.isfinite(alone).all()
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    largest = float(np.abs(together - alone).max())
    figures["learning indicators of 4 processes"] = {"largest difference": largest}


def test_kinds_without_their_needs_are_refused(train: Callable, train_vit: Callable):
    processes = ("--device", "cpu", "cpu")
    assert_refused(train(*processes, "--sync-batchnorm"), "--sync-batchnorm needs GPUs")
    words = ("--parallel", "fsdp", "--compress", "gact")
    assert_refused(train_vit(*processes, *words), "--parallel ddp")
    assert train_vit("--parallel", "fsdp", "--dry-run")[::2] == (
        0,
        "train.py: note: --parallel does nothing in one process\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_translate_as_one(train_transformer: Callable, tmp_path: Path, kind: str):
    """Each has other numbers of tokens, and of texts to translate."""
    words = ("--learning-rule", "asa1", "--gcp", "--dropout", 0, "--epochs", 2, "--lr", 0.003)
    curves = []
    for processes in (("cpu",), ("cpu", "cpu", "--parallel", kind)):
        status, _, err = train_transformer(*words, "--device", *processes)
        assert status == 0, err
        lines = (run_folder(tmp_path) / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
        curves[-1].append(json.loads((run_folder(tmp_path) / "test.json").read_text()))
        shutil.rmtree(run_folder(tmp_path))
    for alone, together in zip(*curves, strict=True):
        for name in {"step", "train_loss", "val_loss", "val_bleu", "loss", "bleu"} & set(alone):
            assert together[name] == pytest.approx(alone[name], abs=1e-6), name
