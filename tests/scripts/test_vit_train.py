"""What only ViT/train.py has, as its users call it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scripts.conftest import (
    SMALL,
    assert_refused,
    assert_same_results,
    flags_of,
    run_folder,
    spellings,
)

README = "--label-smoothing --autoaugment --get-li --device cpu --learning-rule asa1".split()


def test_the_command_of_the_paper_runs(call: Callable, cifar10: Path, tmp_path: Path):
    place = ("--data-path", cifar10, "--output", tmp_path / "runs", "--workers", 0)
    short = (*SMALL["ViT/train.py"].split(), "--epochs", 1, "--batch-size", 4)
    status, _, err = call("ViT/train.py", "--dataset", "c10", *README, *place, *short)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    assert folder.name.startswith("cifar10_vit_asa1_")
    config = json.loads((folder / "config.json").read_text())
    assert config["dataset"] == "cifar10" and config["label_smoothing"] == 0.1
    assert config["autoaugment"] and config["seed"] == 42 and config["beta2"] == 0.999
    assert np.load(folder / f"{folder.name}_li.npy").shape[0] == 1


@pytest.mark.slow
def test_the_command_of_the_paper_learns_the_bundled_digits(call: Callable, tmp_path: Path):
    sizes = ("--patch", 4, "--hidden", 32, "--head", 4, "--num-layers", 2, "--mlp-hidden", 64)
    words = ("--dataset", "digits", *README, *sizes, "--no-autoaugment", "--epochs", 6)
    status, out, err = call("ViT/train.py", *words, "--warmup-epoch", 1, "--output", tmp_path)
    assert (status, err) == (0, "")
    assert float(out.split("test accuracy ")[1].split()[0]) > 60


@pytest.mark.parametrize("mixed", [("--cutmix",), ("--mixup",), ("--cutmix", "--mixup")], ids=str)
def test_a_resumed_run_mixes_as_an_uninterrupted_one(
    train_vit: Callable, tmp_path: Path, stop_after: Callable, mixed: tuple[str, ...]
):
    arguments = (*mixed, "--autoaugment", "--get-li", "--num-steps", 6, "--eval-every", 2)
    train_vit(*arguments)
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_after(1):
        train_vit(*arguments)
    status, _, err = train_vit(*arguments, "--resume")
    assert (status, err) == (0, "")
    assert_same_results(run_folder(tmp_path), tmp_path / "whole")


@pytest.mark.parametrize("model", ["ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14"])
def test_published_networks_follow_their_own_recipe(
    train_vit: Callable, tmp_path: Path, model: str
):
    status, _, err = train_vit("--model_type", model, "--num-steps", 1)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    assert folder.name.startswith(f"tiny-imagenet_{model}_bp_patch-2_")
    config = json.loads((folder / "config.json").read_text())
    expected = {"optimizer": "sgd", "lr": 0.1, "min_lr": 0.0, "weight_decay": 0.0}
    expected |= {"max_grad_norm": 1.0, "warmup_steps": 100, "eval_every": 1, "dropout": 0.1}
    assert {name: config[name] for name in expected} == expected


def test_the_network_may_be_changed(train_vit: Callable, tmp_path: Path):
    words = ("--off-cls-token", "--attention-scale", "width", "--dropout", 0.1)
    status, _, err = train_vit(*words, "--epochs", 1)
    assert (status, err) == (0, "")
    name = run_folder(tmp_path).name
    assert "off-cls-token" in name and "attention-scale-width" in name and "dropout-0.1" in name
    best = run_folder(tmp_path) / "best.pth"
    status, _, err = train_vit("--off-cls-token", "--model_path", best)
    assert status == 2 and "--attention-scale width, not head" in err


BAD_COMMANDS = {
    "heads that do not divide": (("--head", "3"), "3"),
    "patches that do not divide": (("--patch", "3"), "--patch 3"),
    "patches of whole numbers": (("--patch", "2.5"), "--patch"),
    "attention scale": (("--attention-scale", "none"), "none"),
    "flag of Mixer": (("--hidden-s", "8"), "--hidden-s"),
}
REJECTED = {
    "--api-key": "did nothing",
    "--num-classes": "--dataset",
    "--model-name": "--model-type",
    "--off-benchmark": "did nothing",
    "--precision": "--amp",
    "--criterion": "cross entropy",
    "--smoothing": "--label-smoothing",
    "--project-name": "did nothing",
    "--rcpaste": "--cutmix",
}


@pytest.mark.parametrize("arguments, words", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_a_mistake_gets_one_line_and_status_2(
    train_vit: Callable, tmp_path: Path, arguments: tuple[str, ...], words: str
):
    assert_refused(train_vit(*arguments), words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag, hint", REJECTED.items())
def test_a_flag_of_old_releases_gets_its_own_hint(train_vit: Callable, flag: str, hint: str):
    for words in spellings(flag):
        result = train_vit(*words)
        assert_refused(result, hint)
        assert result[2].startswith(f"train.py: error: {flag} ")


def test_the_flags_are_these(call: Callable):
    status, out, _ = call("ViT/train.py", "--help")
    assert status == 0
    assert flags_of(out) == set(
        """--help --model-type --model --patch --head --num-layers --hidden --mlp-hidden --dropout
        --attention-scale --off-cls-token --activation --learning-rule --lean --gcp --asa-scale
        --derivative --pretrained --pretrained-dir --name --dataset --data-path --imagenet-data-path
        --tiny-imagenet-data-path --img-size --image-size --autoaugment --cutmix --mixup
        --optimizer --lr --learning-rate --min-lr --scheduler --decay-type --gamma --warmup-epoch
        --warmup-epochs --warmup-steps --epochs --max-epochs --num-steps --eval-every --batch-size
        --train-batch-size --gradient-accumulation-steps --beta1 --beta2 --momentum --weight-decay
        --max-grad-norm --clip-grad --label-smoothing --test-batch-size --eval-batch-size --amp
        --device --workers --num-workers --seed --output --output-dir --model-path --get-li
        --resume --checkpoint --dry-run --find-batch-size --tensorboard
        --bad-images --save-every --keep --parallel --compress --compress-level --compress-bits
        --actnn --mesa --mesa-policy""".split()
    )


def test_weights_to_start_from_do_nothing_for_a_score(train_vit: Callable, tmp_path: Path):
    train_vit("--epochs", 1)
    best = run_folder(tmp_path) / "best.pth"
    status, _, err = train_vit("--model_path", best, "--pretrained", "nowhere.npz")
    assert status == 0 and "--pretrained does nothing with --model-path" in err
