"""Runs that are stopped between two validations, and go on as if nothing had happened."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts.conftest import assert_same_results, run_folder

AUGMENTED = "--img-size 8 --cutmix-prob 0.5 --cutmix --mixup --dropout 0.2 --get-li"


def assert_goes_on(run: Callable, tmp_path: Path, stop_at: Callable, step: int, *words) -> None:
    """A run that is stopped after a step and resumed ends as one that is not."""
    status, _, err = run(*words)
    assert status == 0, err
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_at(step):
        status, _, err = run(*words)
    hint = f"train.py: terminated at step {step}; --resume continues there\n"
    assert (status, err) == (143, hint)
    status, _, err = run(*words, "--resume")
    assert (status, err) == (0, "")
    assert_same_results(run_folder(tmp_path), tmp_path / "whole")


@pytest.mark.parametrize("step", [1, 3])
def test_a_resnet_goes_on_within_an_epoch(
    train: Callable, tmp_path: Path, stop_at: Callable, step: int
):
    words = ("--learning-rule", "ara", "--get-li", "--epochs", 2)
    assert_goes_on(train, tmp_path, stop_at, step, *words)
