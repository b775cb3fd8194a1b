"""What only MLP-Mixer/train.py has, as its users call it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scripts.conftest import SMALL, assert_refused, assert_same_results, flags_of, run_folder

README = "--model mlp_mixer --autoaugment --cutmix-prob 0.5 --learning-rule asa4 --get-li".split()


def test_the_command_of_the_paper_runs(call: Callable, cifar10: Path, tmp_path: Path):
    place = ("--data-path", cifar10, "--output", tmp_path / "runs", "--workers", 0)
    short = (*SMALL["MLP-Mixer/train.py"].split(), "--epochs", 1, "--batch-size", 4)
    words = ("--dataset", "c10", *README, "--device", "cpu")
    status, _, err = call("MLP-Mixer/train.py", *words, *place, *short)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    assert folder.name.startswith("cifar10_mlp_mixer_asa4_")
    config = json.loads((folder / "config.json").read_text())
    assert config["dataset"] == "cifar10" and config["label_smoothing"] == 0.1
    assert config["cutmix"] and config["cutmix_prob"] == 0.5 and config["cutmix_beta"] == 1
    assert config["autoaugment"] and config["seed"] == 3047 and config["beta2"] == 0.99
    assert np.load(folder / f"{folder.name}_li.npy").shape[0] == 1


@pytest.mark.slow
def test_the_command_of_the_paper_learns_the_bundled_digits(call: Callable, tmp_path: Path):
    sizes = ("--hidden-size", 32, "--hidden-c", 64, "--num-layers", 2, "--epochs", 3)
    words = ("--dataset", "digits", *README, "--no-autoaugment", "--device", "cpu", *sizes)
    status, out, err = call("MLP-Mixer/train.py", *words, "--warmup-epoch", 1, "--output", tmp_path)
    assert (status, err) == (0, "")
    assert float(out.split("test accuracy ")[1].split()[0]) > 60


def test_a_resumed_run_mixes_as_an_uninterrupted_one(
    train_mixer: Callable, tmp_path: Path, stop_after: Callable
):
    arguments = ("--cutmix-prob", 0.7, "--cutmix-beta", 0.4, "--autoaugment", "--get-li")
    arguments += ("--epochs", 3)
    train_mixer(*arguments)
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_after(1):
        train_mixer(*arguments)
    status, _, err = train_mixer(*arguments, "--resume")
    assert (status, err) == (0, "")
    assert_same_results(run_folder(tmp_path), tmp_path / "whole")


@pytest.mark.parametrize("model", ["Mixer-B_16", "Mixer-L_16"])
def test_published_networks_follow_their_own_recipe(
    train_mixer: Callable, tmp_path: Path, model: str
):
    status, _, err = train_mixer("--model_type", model, "--num-steps", 1)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    assert folder.name.startswith(f"tiny-imagenet_{model}_bp_patch-size-4_")
    config = json.loads((folder / "config.json").read_text())
    expected = {"optimizer": "sgd", "lr": 0.1, "min_lr": 0.0, "weight_decay": 0.0}
    expected |= {"max_grad_norm": 1.0, "warmup_steps": 200, "label_smoothing": 0.0}
    assert {name: config[name] for name in expected} == expected


def _archive(path: Path) -> None:
    """Weights of the tests' network, named and shaped as the authors published theirs."""
    random = np.random.default_rng(0)
    shapes = {"stem/kernel": (4, 4, 3, 8), "stem/bias": (8,)}
    shapes |= {f"pre_head_layer_norm/{name}": (8,) for name in ("scale", "bias")}
    for part, size in (("token_mixing", 4), ("channel_mixing", 8)):
        for layer in (f"MixerBlock_0/{part}/Dense_0", f"MixerBlock_0/{part}/Dense_1"):
            shapes |= {f"{layer}/kernel": (size, size), f"{layer}/bias": (size,)}
    for norm in ("MixerBlock_0/LayerNorm_0", "MixerBlock_0/LayerNorm_1"):
        shapes |= {f"{norm}/scale": (8,), f"{norm}/bias": (8,)}
    np.savez(path, **{name: random.normal(size=shape) for name, shape in shapes.items()})


def test_a_run_starts_from_published_weights_and_resumes_without_them(
    train_mixer: Callable, tmp_path: Path, stop_after: Callable
):
    _archive(tmp_path / "Mixer.npz")
    words = ("--pretrained_dir", tmp_path / "Mixer.npz", "--num-steps", 2, "--eval-every", 1)
    with stop_after(1):
        train_mixer(*words, "--learning-rule", "asa1")
    folder = run_folder(tmp_path)
    row = json.loads((folder / "metrics.jsonl").read_text())
    assert row["train_loss"] == pytest.approx(np.log(200))  # the head was zero
    assert "pretrained" in folder.name
    assert json.loads((folder / "config.json").read_text())["pretrained"] == "Mixer.npz"
    (tmp_path / "Mixer.npz").unlink()
    status, _, err = train_mixer(*words, "--learning-rule", "asa1", "--resume")
    assert (status, err) == (0, "")


def test_published_weights_must_fit(train_mixer: Callable, tmp_path: Path):
    _archive(tmp_path / "Mixer.npz")
    status, _, err = train_mixer("--pretrained", tmp_path / "Mixer.npz", "--hidden-size", 16)
    assert status == 2 and err.count("\n") == 1 and "stem" in err


def test_nesterov_is_used_unless_it_is_off(train_mixer: Callable, tmp_path: Path):
    losses = []
    for extra in ((), ("--off-nesterov",), ("--momentum", 0)):
        words = ("--optimizer", "sgd", "--lr", 0.5, "--warmup-steps", 0, "--epochs", 2)
        status, _, err = train_mixer(*words, *extra)
        assert (status, err) == (0, "")
        losses.append((run_folder(tmp_path) / f"{run_folder(tmp_path).name}.npy").read_bytes())
        shutil.rmtree(run_folder(tmp_path))
    assert len(set(losses)) == 3


def test_the_network_may_have_a_class_token(train_mixer: Callable, tmp_path: Path):
    status, _, err = train_mixer("--is-cls-token", "--drop-p", 0.1, "--epochs", 1)
    assert (status, err) == (0, "")
    name = run_folder(tmp_path).name
    assert "is-cls-token" in name and "dropout-0.1" in name
    status, _, err = train_mixer("--model_path", run_folder(tmp_path) / "best.pth")
    assert status == 2 and "--is-cls-token True, not False" in err


BAD_COMMANDS = {
    "patches that do not divide": (("--patch-size", "3"), "3"),
    "probability above 1": (("--cutmix-prob", "1.5"), "--cutmix-prob"),
    "beta of 0": (("--cutmix-beta", "0"), "--cutmix-beta"),
    "flag of ViT": (("--cutmix",), "--cutmix"),
}


@pytest.mark.parametrize("arguments, words", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_a_mistake_gets_one_line_and_status_2(
    train_mixer: Callable, tmp_path: Path, arguments: tuple[str, ...], words: str
):
    assert_refused(train_mixer(*arguments), words)
    assert not (tmp_path / "runs").exists()


def test_a_flag_of_old_releases_gets_its_own_hint(train_mixer: Callable):
    assert_refused(train_mixer("--off-act", "7"), "--off-act did nothing")


def test_the_flags_are_these(call: Callable):
    status, out, _ = call("MLP-Mixer/train.py", "--help")
    assert status == 0
    assert flags_of(out) == set(
        """--help --model --model-type --patch-size --hidden-size --hidden-c --hidden-s --activation
        --num-layers --dropout --drop-p --is-cls-token --learning-rule --lean --gcp --asa-scale
        --derivative --pretrained --pretrained-dir --name --dataset --data-path
        --imagenet-data-path --tiny-imagenet-data-path --img-size --image-size --autoaugment
        --cutmix-beta --cutmix-prob --optimizer --lr --learning-rate --min-lr --scheduler
        --decay-type --gamma --warmup-epoch --warmup-epochs --warmup-steps --epochs --max-epochs
        --num-steps --eval-every --batch-size --train-batch-size --gradient-accumulation-steps
        --beta1 --beta2 --momentum --off-nesterov --weight-decay --max-grad-norm --clip-grad
        --label-smoothing --test-batch-size --eval-batch-size --amp --device --workers
        --num-workers --seed --output --output-dir --model-path --get-li --resume --checkpoint
        --dry-run --find-batch-size --compress --compress-level --compress-bits --actnn --mesa
        --mesa-policy --tensorboard --bad-images --save-every --keep --parallel""".split()
    )


def test_a_mixer_has_nothing_to_replay_between_approximate_layers(train_mixer: Callable):
    words = ("--learning-rule", "asa1", "--lean", "approx", "--gcp")
    status, _, err = train_mixer("--dry-run", *words)
    assert (
        status == 0
        and err == "train.py: note: --gcp does nothing under --lean approx without attention\n"
    )


def test_a_share_without_mixing_gets_a_note(train_mixer: Callable):
    status, _, err = train_mixer("--dry-run", "--cutmix-beta", 0.3)
    assert (
        status == 0 and err == "train.py: note: --cutmix-beta does nothing without --cutmix-prob\n"
    )
