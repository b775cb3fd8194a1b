"""What ViT/train.py and MLP-Mixer/train.py have in common, as their users call them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts.conftest import (
    RULES,
    SMALL,
    assert_refused,
    assert_same_results,
    files_of,
    run_folder,
    spellings,
    weights_of,
)

STEPS = ("--num-steps", 4, "--eval-every", 2)


def test_a_run_leaves_everything_in_its_folder(train_patches: Callable, tmp_path: Path):
    status, out, err = train_patches("--learning-rule", "asa1", "--get-li", "--epochs", 2)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    name = folder.name
    assert re.match(r"tiny-imagenet_(vit|mlp_mixer)_asa1_.*epochs-2_batch-size-6_img-size-8$", name)
    expected = ["best.pth", "config.json", "environment.json", f"{name}.npy", f"{name}_li.npy"]
    expected += ["last.pth", "last-1.pth", "metrics.jsonl", "test.json", ".lock"]
    assert sorted(files_of(folder)) == sorted(expected)
    assert re.search(r"epoch 2/2 .* saved \d+\.\d MiB .* samples/s", out)
    assert re.search(r"test accuracy \d+\.\d\d %, loss .* \(2 images\)", out)
    config = json.loads((folder / "config.json").read_text())
    assert config["optimizer"] == "adam" and config["lr"] == 1e-3 and config["weight_decay"] == 5e-5
    assert np.load(folder / f"{name}.npy").shape == (2, 4)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_and_scores_its_checkpoint_alike(
    train_patches: Callable, tmp_path: Path, rule: str
):
    words = ("--learning-rule", rule, "--get-li", "--epochs", 1)
    status, out, err = train_patches(*words)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    indicators = np.load(folder / f"{folder.name}_li.npy")
    epochs, layers, samples = indicators.shape
    assert epochs == 1 and layers >= 1 and samples >= 2
    recorded = ~np.isnan(indicators)  # a layer of few samples has NaN behind them
    assert recorded.any(axis=2).all() and np.isfinite(indicators[recorded]).all()
    assert (indicators[recorded] == 1).all() == (rule == "bp")
    row = json.loads((folder / "metrics.jsonl").read_text())
    assert len(row["indicator"]) == layers
    status, scored, err = train_patches(*words, "--model_path", folder / "best.pth")
    assert (status, err) == (0, "")
    assert scored.splitlines() == [line for line in out.splitlines() if line.startswith("test")]


@pytest.mark.parametrize("rule", ["bp", "asa3"])
def test_lean_and_gcp_train_to_the_same_weights(train_patches: Callable, tmp_path: Path, rule: str):
    states = []
    for extra in (("--lean", "off"), ("--lean", "exact"), ("--gcp",)):
        words = ("--learning-rule", rule, "--epochs", 1, "--dropout", 0.3, "--lr", 0.01)
        status, _, err = train_patches(*words, *extra)
        assert status == 0, err
        states.append(weights_of(run_folder(tmp_path)))
        shutil.rmtree(run_folder(tmp_path))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    torch.testing.assert_close(states[2], states[0], rtol=0, atol=0)


@pytest.mark.parametrize("derivative", ["fitted", "published"])
def test_approximate_layers_train(train_patches: Callable, derivative: str):
    words = ("--learning-rule", "asa1", "--lean", "approx", "--derivative", derivative)
    words += ("--activation", "gelu", "--asa-scale", "mean")
    status, _, err = train_patches(*words, "--epochs", 1)
    assert (status, err) == (0, "")


def test_attention_is_replayed_between_approximate_layers(train_vit: Callable):
    words = ("--learning-rule", "asa1", "--lean", "approx", "--gcp")
    assert train_vit(*words, "--epochs", 1)[::2] == (0, "")


def test_an_accumulated_batch_equals_the_whole(train_patches: Callable, tmp_path: Path):
    states = []
    for extra in ((), ("--gradient-accumulation-steps", 4)):
        words = ("--optimizer", "sgd", "--lr", 0.5, "--warmup-steps", 0, "--max-grad-norm", 1)
        status, _, err = train_patches("--epochs", 1, *words, *extra)
        assert (status, err) == (0, "")
        folder = run_folder(tmp_path)
        states.append(weights_of(folder))
        row = json.loads((folder / "metrics.jsonl").read_text())
        states[-1]["loss"] = torch.tensor(row["train_loss"])
        shutil.rmtree(folder)
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)


LENGTHS = {
    "epochs": ("--epochs", 3),
    "steps": ("--num-steps", 5, "--eval-every", 2),  # the last stretch is shorter
    "epochs, bf16": ("--epochs", 3, "--amp", "bf16"),
}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
def test_a_resumed_run_equals_an_uninterrupted_one(
    train_patches: Callable, tmp_path: Path, stop_after: Callable, length: tuple
):
    arguments = ("--learning-rule", "asa2", "--get-li", "--autoaugment", "--dropout", 0.2, *length)
    train_patches(*arguments)
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_after(2):
        status, _, err = train_patches(*arguments)
    assert status == 130 and "--resume" in err
    status, out, err = train_patches(*arguments, "--resume")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 3  # one stretch, the test and the folder
    assert_same_results(run_folder(tmp_path), tmp_path / "whole")


def test_a_run_in_steps_is_validated_every_so_many(train_patches: Callable, tmp_path: Path):
    status, out, err = train_patches("--num-steps", 5, "--eval-every", 2)
    assert (status, err) == (0, "")
    assert re.findall(r"^step (\d)/5 ", out, flags=re.MULTILINE) == ["2", "4", "5"]
    lines = (run_folder(tmp_path) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (2, 4), (3, 5)]


@pytest.mark.parametrize("arguments", [("--epochs", 1), STEPS], ids=["epochs", "steps"])
def test_a_dry_run_writes_nothing(train_patches: Callable, tmp_path: Path, arguments: tuple):
    status, out, err = train_patches("--dry-run", "--learning-rule", "asa4", *arguments)
    assert (status, err) == (0, "")
    assert out.startswith("dry run: 2 steps")
    assert not (tmp_path / "runs").exists()


def test_a_run_may_be_named(train_patches: Callable, tmp_path: Path):
    status, _, err = train_patches("--name", "first try", *STEPS)
    assert (status, err) == (0, "")
    assert (tmp_path / "runs" / "first try" / "first try.npy").is_file()


def test_runs_of_different_settings_have_different_folders(train_patches: Callable):
    variants = [(), ("--seed", 1), ("--optimizer", "sgd"), ("--amp", "bf16"), ("--lean", "exact")]
    variants += [("--scheduler", "linear"), ("--lr", 0.02), ("--gcp",), ("--lean", "approx")]
    variants += [("--gcp", "--lean", "approx"), ("--num-steps", 9), ("--warmup-steps", 3)]
    variants += [("--learning-rule", "asa1"), ("--learning-rule", "asa1", "--asa-scale", "mean")]
    variants += [("--lean", "approx", "--derivative", "published"), ("--autoaugment",)]
    variants += [("--label-smoothing", 0.2), ("--max-grad-norm", 2), ("--num-layers", 3)]
    missing = {train_patches("--resume", *extra)[2] for extra in variants}  # each names its folder
    assert all("nothing to resume" in line for line in missing)
    assert len(missing) == len(variants)


def test_weights_of_one_rule_are_scored_under_another(train_patches: Callable, tmp_path: Path):
    train_patches("--epochs", 1)
    torch.save(weights_of(run_folder(tmp_path)), tmp_path / "bare.pth")
    for rule in ("bp", "asa1", "aba4"):
        words = ("--learning-rule", rule, "--model_path", tmp_path / "bare.pth")
        status, out, err = train_patches(*words)
        assert (status, err) == (0, "") and out.startswith("test accuracy")


def test_a_checkpoint_of_another_function_is_refused(train_patches: Callable, tmp_path: Path):
    train_patches("--learning-rule", "asa1", "--epochs", 1)
    best = run_folder(tmp_path) / "best.pth"
    for arguments, words in (
        (("--learning-rule", "bp"), "--learning-rule asa1, not bp"),
        (("--learning-rule", "asa2"), "--learning-rule asa1, not asa2"),
        (("--learning-rule", "asa1", "--num-layers", 2), "--num-layers 1, not 2"),
        (("--learning-rule", "asa1", "--img-size", 16), "--img-size 8, not 16"),
    ):
        status, _, err = train_patches(*arguments, "--model_path", best)
        assert status == 2 and err.count("\n") == 1 and words in err
    same = ("--lean", "approx", "--gcp", "--asa-scale", "mean", "--derivative", "published")
    same += ("--dropout", 0.5, "--label-smoothing", 0.2)
    status, out, err = train_patches("--learning-rule", "asa1", *same, "--model_path", best)
    assert status == 0 and "error" not in err and out.startswith("test accuracy")


GELU = ("--activation", "gelu")
NOTES = {
    "scale of ASA's code": (("--asa-scale", "mean"), "--asa-scale does nothing under"),
    "derivative": (("--derivative", "published"), "--derivative does nothing without"),
    "derivative of ReLU": (
        ("--learning-rule", "asa1", "--lean", "approx", "--derivative", "published"),
        "--derivative does nothing for ReLU",
    ),
    "exact GELU": (("--learning-rule", "asa1", *GELU), "asa1 keeps no less than bp does"),
    "replayed ReLU": (("--learning-rule", "asa4", "--gcp"), "asa4 keeps no less than bp does"),
    "approximate bp": ((*GELU, "--lean", "approx"), "keeps more than --lean exact"),
    "beta of sgd": (("--optimizer", "sgd", "--beta1", "0.8"), "--beta1 does nothing under"),
    "momentum of adam": (("--momentum", "0.8"), "--momentum does nothing under --optimizer adam"),
    "factor of cosine": (("--gamma", "0.5"), "--gamma does nothing under --scheduler cosine"),
    "end of steps": (("--scheduler", "step", "--min-lr", "0"), "--min-lr does nothing under"),
}


@pytest.mark.parametrize("arguments, words", NOTES.values(), ids=NOTES.keys())
def test_a_flag_that_does_nothing_gets_a_note(
    train_patches: Callable, arguments: tuple[str, ...], words: str
):
    status, out, err = train_patches("--dry-run", *arguments)
    assert status == 0 and out.startswith("dry run")
    assert err.count("\n") == 1 and err.startswith("train.py: note: ") and words in err


BAD_COMMANDS = {
    "unknown dataset": (("--dataset", "cifar11"), "cifar11"),
    "unknown model": (("--model", "R50-ViT-B_16"), "R50-ViT-B_16"),
    "unknown rule": (("--learning-rule", "ara"), "ara"),
    "unknown flag": (("--ARA-stride", "2"), "--ARA-stride"),
    "abbreviated flag": (("--learn", "bp"), "--learn"),
    "batch size of 0": (("--batch-size", "0"), "--batch-size"),
    "rate in words": (("--lr", "fast"), "--lr"),
    "least rate above the largest": (("--lr", "1e-7", "--min-lr", "1e-6"), "--min-lr"),
    "smoothing of 1": (("--label-smoothing", "1"), "--label-smoothing"),
    "dropout of 1": (("--dropout", "1"), "--dropout"),
    "beta of 1": (("--beta1", "1"), "--beta1"),
    "negative norm": (("--clip-grad", "-1"), "--max-grad-norm"),
    "negative warm-up": (("--warmup-epochs", "-1"), "--warmup-epoch"),
    "epochs and steps": (("--epochs", "1", "--num-steps", "1"), "exclude each other"),
    "two warm-ups": (("--warmup-epoch", "1", "--warmup-steps", "1"), "exclude each other"),
    "stretches of epochs": (("--epochs", "1", "--eval-every", "5"), "--num-steps"),
    "more parts than images": (("--gradient-accumulation-steps", "7"), "7 is more than the 6"),
    "uneven split": (("--batch-size", "7", "--device", "cpu", "cpu"), "7"),
    "scheduler of ResNet": (("--scheduler", "cos"), "cos"),
    "GPU that is not there": (("--device", "97"), "97"),
    "switch in words": (("--gcp", "maybe"), "maybe"),
    "gcp without lean": (("--gcp", "--lean", "off"), "--lean"),
    "image that patches do not fill": (("--img-size", "9"), "9"),
    "folder below another": (("--name", "a/b"), "a/b"),
    "folder of no name": (("--name", ""), "--name"),
    "folder above": (("--name", ".."), "--name"),
    "missing checkpoint": (("--model_path", "nowhere.pth"), "nowhere.pth"),
    "missing weights": (("--pretrained", "nowhere.npz"), "nowhere.npz"),
    "weights that are none": (("--pretrained", __file__), Path(__file__).name),
    "nothing to resume": (("--resume",), "nothing to resume"),
    "missing data": (("--data-path", "nowhere"), "nowhere"),
    "long name": (("--name", "x" * 300), "xxx"),
    "score and try": (("--model_path", "x.pth", "--dry-run"), "exclude each other"),
}


@pytest.mark.parametrize("arguments, words", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_a_mistake_gets_one_line_and_status_2(
    train_patches: Callable, tmp_path: Path, arguments: tuple[str, ...], words: str
):
    assert_refused(train_patches(*arguments), words)
    assert not (tmp_path / "runs").exists()


REJECTED = {"--local-rank": "--device or torchrun"}


@pytest.mark.parametrize("flag, hint", REJECTED.items())
def test_a_flag_of_old_releases_gets_its_own_hint(train_patches: Callable, flag: str, hint: str):
    for words in spellings(flag):
        result = train_patches(*words)
        assert_refused(result, hint)
        assert result[2].startswith(f"train.py: error: {flag} ")


def test_a_name_of_many_settings_is_refused_before_any_work(
    train_patches: Callable, tmp_path: Path
):
    words = ["--beta1", 0.8, "--beta2", 0.9, "--weight-decay", 0.1, "--max-grad-norm", 2]
    words += ["--gamma", 0.3, "--min-lr", 1e-9, "--momentum", 0.7, "--scheduler", "linear"]
    words += ["--gradient-accumulation-steps", 2, "--optimizer", "sgd", "--num-steps", 8]
    status, _, err = train_patches(*words)
    *notes, error = err.splitlines()
    assert status == 2 and "--name" in error and all(": note: " in line for line in notes)
    status, _, err = train_patches(*words, "--name", "short", "--dry-run")
    assert status == 0 and err.splitlines() == notes


@pytest.mark.parametrize("extra", [(), ("--get-li",)], ids=["plain", "get-li"])
def test_a_dry_run_of_a_run_of_one_step_works(train_patches: Callable, extra: tuple[str, ...]):
    status, out, err = train_patches("--dry-run", "--num-steps", 1, *extra)
    assert (status, err) == (0, "") and out.startswith("dry run: 2 steps")


def test_a_small_step_size_needs_no_other_flag(train_patches: Callable):
    status, _, err = train_patches("--dry-run", "--lr", 1e-7)
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    "words",
    [("--batch-size", 2**31 - 1), ("--num-layers", 1, "--activation", "relu", "--img-size", 2**20)],
    ids=["batch", "image"],
)
def test_what_does_not_fit_into_memory_gets_one_line(train_patches: Callable, words: tuple):
    status, out, err = train_patches("--dry-run", *words)
    assert (status, out) == (2, "") and err.count("\n") == 1 and "memory" in err


def test_a_folder_of_somebody_else_is_left_alone(train_patches: Callable, tmp_path: Path):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    for files in (
        {"config.json": '{"model_type": "bert"}'},
        {"config.json": '{"dataset": "glue"}', "model.bin": "weights"},
        {"config.json": "not JSON"},
        {"notes.txt": "precious"},
    ):
        for name, text in files.items():
            (folder / name).write_text(text)
        status, _, err = train_patches("--epochs", 1, "--name", "mine")
        assert status == 2 and err.count("\n") == 1 and "holds other files" in err
        assert {path.name: path.read_text() for path in folder.iterdir()} == files
        for name in files:
            (folder / name).unlink()


def test_a_name_is_measured_as_the_disk_does(train_patches: Callable, tmp_path: Path):
    status, _, err = train_patches("--name", "\u00e9" * 126)
    assert status == 2 and "too long" in err and not (tmp_path / "runs").exists()


def _digits(call: Callable, script: str, output: Path, *arguments: object) -> dict:
    """The weights after three steps on images that are not changed at random."""
    words = ("--dataset", "digits", "--optimizer", "sgd", "--lr", 0.1, "--warmup-steps", 0)
    words += ("--num-steps", 3, "--device", "cpu", "--output", output, *SMALL[script].split())
    status, out, err = call(script, *words, *arguments)
    assert status == 0, err
    assert out.count("step 3/3") == 1 and out.count("test accuracy") == 1
    (folder,) = output.iterdir()
    return weights_of(folder)


@pytest.mark.parametrize("script", SMALL)
def test_what_is_learned_does_not_depend_on_validations(
    call: Callable, tmp_path: Path, script: str
):
    states = [
        _digits(call, script, tmp_path / f"{every}", "--eval-every", every) for every in (1, 2, 9)
    ]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    torch.testing.assert_close(states[2], states[0], rtol=0, atol=0)


@pytest.mark.parametrize("script", SMALL)
def test_images_of_their_own_size_are_not_scored_as_resized_ones(
    call: Callable, tmp_path: Path, script: str
):
    _digits(call, script, tmp_path / "runs")
    best = run_folder(tmp_path) / "best.pth"
    words = ("--dataset", "digits", *SMALL[script].split(), "--model-path", best)
    assert call(script, *words)[0] == 0
    status, _, err = call(script, *words, "--img-size", 32)
    assert status == 2 and "--img-size of the data, not 32" in err


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_two_processes_train_as_one(call: Callable, tmp_path: Path, script: str):
    parts = ("--gradient-accumulation-steps", 2, "--max-grad-norm", 0.5)
    alone = _digits(call, script, tmp_path / "1", *parts)
    together = _digits(call, script, tmp_path / "2", *parts, "--device", "cpu", "cpu")
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
