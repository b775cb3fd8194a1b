"""ResNet/train.py as its users call it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from resnet import build, load_weights
from scripts.conftest import assert_refused, assert_same_results, files_of, flags_of, run_folder

from aal.training import data, loaders
from aal.training.classification import Classification
from aal.training.devices import Worker
from aal.training.evaluation import evaluate

RULES = ["bp", "ara", "aba", "asa"]
ARA = ("--learning-rule", "ara", "--ARA-stride", "2", "2", "2", "2")


def test_a_run_leaves_everything_in_its_folder(train: Callable, tmp_path: Path):
    status, out, err = train(*ARA, "--gcp", "--get-li", "--epochs", 2)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    name = folder.name
    assert name == "tiny-imagenet_resnet18_ara-2-2-2-2_gcp_lr-0.01_epochs-2_batch-size-6"
    expected = ["best.pth", "config.json", "environment.json", f"{name}.npy", f"{name}_li.npy"]
    expected += ["last.pth", "last-1.pth", "metrics.jsonl", "test.json", ".lock"]
    assert sorted(files_of(folder)) == sorted(expected)
    assert re.search(r"epoch 2/2 .* saved \d+\.\d MiB .* samples/s", out)
    assert re.search(r"test accuracy \d+\.\d\d %, loss .* \(2 images\)", out)


def test_metrics_hold_one_object_per_epoch(train: Callable, tmp_path: Path):
    train(*ARA, "--get-li", "--epochs", 2)
    folder = run_folder(tmp_path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["saved_mib"] > 0 and row["samples_per_s"] > 0 and row["peak_mib"] is None
        assert set(row["indicator"]["layer1.1.conv1"]) == {
            "median",
            "quantile_05",
            "positive",
            "scaled_median",
        }
    table = np.load(folder / f"{folder.name}.npy")
    assert table.shape == (2, 4)
    assert table[1, 3] == rows[1]["val_loss"]


def test_indicators_come_from_the_auxiliary_layers_of_every_epoch(train: Callable, tmp_path: Path):
    train(*ARA, "--get-li", "--epochs", 2)
    folder = run_folder(tmp_path)
    indicators = np.load(folder / f"{folder.name}_li.npy")
    # The second blocks of groups are layer1.1, layer3.0 and layer4.0: three first convolutions and
    # two projections. Two batches of six images are recorded.
    assert indicators.shape == (2, 5, 12)
    assert indicators.dtype == np.float32
    assert ((indicators > 0) & (indicators < 1)).all()


def test_indicators_of_bp_are_1(train: Callable, tmp_path: Path):
    status, _, err = train("--get-li", "--epochs", 2)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    indicators = np.load(folder / f"{folder.name}_li.npy")
    assert indicators.shape == (2, 21, 2)  # 20 convolutions and the classifier, 2 sampled steps
    assert (indicators == 1).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gcp", [(), ("--gcp",)], ids=["plain", "gcp"])
def test_every_rule_trains_with_and_without_gcp(train: Callable, rule: str, gcp: tuple[str, ...]):
    status, out, err = train("--learning-rule", rule, *gcp, "--epochs", 1)
    assert (status, err) == (0, "")
    assert "test accuracy" in out


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_scores_as_it_did_after_training(train: Callable, tmp_path: Path, rule: str):
    _, out, _ = train("--learning-rule", rule, "--epochs", 1)
    before = files_of(tmp_path / "runs")
    status, scored, err = train(
        "--learning-rule", rule, "--model_path", run_folder(tmp_path) / "best.pth"
    )
    assert (status, err) == (0, "")
    assert scored.splitlines() == [line for line in out.splitlines() if line.startswith("test")]
    assert files_of(tmp_path / "runs") == before


def test_a_checkpoint_of_ara_scores_alike_under_bp(train: Callable, tmp_path: Path):
    _, out, _ = train(*ARA, "--epochs", 1)
    _, scored, _ = train("--model_path", run_folder(tmp_path) / "last.pth")
    assert scored.strip() in out


def test_a_bare_state_dict_is_scored(train: Callable, tmp_path: Path):
    train("--epochs", 1)
    state = torch.load(run_folder(tmp_path) / "best.pth", weights_only=True)
    torch.save(state["model"], tmp_path / "bare.pth")
    status, out, _ = train("--model_path", tmp_path / "bare.pth")
    assert status == 0 and out.startswith("test accuracy")


@pytest.mark.parametrize(
    "extra",
    [("--gcp",), ("--optimizer", "adam", "--scheduler", "step")],
    ids=["gcp", "adam"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    train: Callable, tmp_path: Path, stop_after: Callable, extra: tuple[str, ...]
):
    arguments = (*ARA, "--get-li", "--epochs", 3, *extra)
    train(*arguments)
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_after(2):
        status, _, err = train(*arguments)
    assert status == 130 and "--resume" in err
    status, out, err = train(*arguments, "--resume")
    assert (status, err) == (0, "")
    assert "epoch 3/3" in out and "epoch 2/3" not in out

    assert_same_results(run_folder(tmp_path), tmp_path / "whole")


def test_recording_indicators_changes_nothing_else(train: Callable, tmp_path: Path):
    states = []
    for extra in ((), ("--get-li",)):
        train(*ARA, "--epochs", 1, *extra)
        folder = run_folder(tmp_path)
        states.append(torch.load(folder / "last.pth", weights_only=True)["model"])
        row = json.loads((folder / "metrics.jsonl").read_text())
        states[-1]["saved_mib"] = torch.tensor(row["saved_mib"])
        shutil.rmtree(folder)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_gcp_trains_to_the_same_weights(train: Callable, tmp_path: Path):
    states = []
    for extra in ((), ("--lean", "exact"), ("--gcp",)):
        train("--epochs", 1, *extra)
        states.append(torch.load(run_folder(tmp_path) / "last.pth", weights_only=True)["model"])
        shutil.rmtree(run_folder(tmp_path))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    torch.testing.assert_close(states[2], states[0], rtol=0, atol=0)


def test_a_dry_run_writes_nothing(train: Callable, tmp_path: Path):
    status, out, err = train(*ARA, "--dry-run")
    assert (status, err) == (0, "")
    assert out.startswith("dry run: 2 steps")
    assert not (tmp_path / "runs").exists()


def test_runs_of_different_settings_have_different_folders(train: Callable):
    variants = [(), ("--seed", 1), ("--optimizer", "adam"), ("--amp", "bf16"), ("--lean", "exact")]
    variants += [("--scheduler", "step"), ("--lr", 0.02), ARA, (*ARA, "--gcp"), ("--gcp",)]
    missing = {train("--resume", *extra)[2] for extra in variants}  # each names its folder
    assert all("nothing to resume" in line for line in missing)
    assert len(missing) == len(variants)


def test_dashes_underscores_and_truth_values_are_understood(train: Callable):
    words = ("--learning_rule", "ara", "--ara_stride", "2", "2", "2", "2", "--gcp", "True")
    status, out, err = train(*words, "--get_li", "False", "--no-resume", "--dry_run")
    assert (status, err) == (0, "")


@pytest.mark.slow
def test_two_processes_train_together(train: Callable, tmp_path: Path, tiny_imagenet: Path):
    status, out, err = train(*ARA, "--get-li", "--epochs", 1, "--device", "cpu", "cpu")
    assert status == 0, err
    assert out.count("epoch 1/1") == 1 and out.count("test accuracy") == 1
    folder = run_folder(tmp_path)
    # each process records its share of the batch
    assert np.load(folder / f"{folder.name}_li.npy").shape == (1, 5, 12)
    # what is validated is what is saved
    row = json.loads((folder / "metrics.jsonl").read_text())
    network = build("resnet18", num_classes=200, stem="medium")
    state = torch.load(folder / "last.pth", weights_only=True)
    load_weights(network, state["model"])
    validation = data.load("tiny-imagenet", tiny_imagenet).validation
    loader = loaders.evaluation_loader(validation, 8, 0, Worker(torch.device("cpu")))
    scored = evaluate(Classification(), network, loader, Worker(torch.device("cpu")), "off", "")
    assert scored["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
    # and each process can continue with its own random numbers
    first, second = (rng["cpu"] for rng in state["rng"])
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_a_process_that_fails_stops_the_other(train: Callable, tmp_path: Path):
    status, _, err = train("--lr", 1e30, "--epochs", 20, "--device", "cpu", "cpu")
    assert status == 2
    assert "the loss is nan" in err or "the loss is inf" in err


@pytest.mark.slow
def test_the_bundled_digits_are_learned(call: Callable, tmp_path: Path):
    words = ("--dataset", "digits", "--model", "resnet18", "--lr", 0.05, "--epochs", 1)
    status, out, _ = call("ResNet/train.py", *words, *ARA, "--output", tmp_path)
    assert status == 0
    assert float(re.search(r"test accuracy (\S+) %", out).group(1)) > 50


BAD_COMMANDS = {
    "unknown dataset": (("--dataset", "cifar11"), "cifar11"),
    "unknown model": (("--model", "shnet"), "shnet"),
    "unknown rule": (("--learning-rule", "asb"), "asb"),
    "unknown flag": (("--momentum", "0.9"), "--momentum"),
    "abbreviated flag": (("--learn", "bp"), "--learn"),
    "three strides": (("--learning-rule", "ara", "--ARA-stride", "2", "2", "2"), "four"),
    "stride of 0": (("--learning-rule", "ara", "--ARA-stride", "2", "0", "2", "2"), "at least 1"),
    "stride in words": (("--learning-rule", "ara", "--ARA-stride", "two"), "two"),
    "batch size of 0": (("--batch-size", "0"), "--batch-size"),
    "negative epochs": (("--epochs", "-1"), "--epochs"),
    "rate in words": (("--lr", "fast"), "--lr"),
    "infinite rate": (("--lr", "inf"), "--lr"),
    "GPU that is not there": (("--device", "97"), "97"),
    "device in words": (("--device", "gpu"), "gpu"),
    "uneven split": (("--batch-size", "7", "--device", "cpu", "cpu"), "7"),
    "switch in words": (("--gcp", "maybe"), "maybe"),
    "gcp without lean": (("--gcp", "--lean", "off"), "--lean"),
    "missing checkpoint": (("--model_path", "nowhere.pth"), "nowhere.pth"),
    "nothing to resume": (("--resume",), "nothing to resume"),
    "missing data": (("--data-path", "nowhere"), "nowhere"),
    "long name": (("--output", "x" * 300), "xxx"),
    "seed beyond 63 bits": (("--seed", "99999999999999999999"), "--seed"),
    "score and try": (("--model_path", "x.pth", "--dry-run"), "exclude each other"),
    "resume and try": (("--resume", "--dry-run"), "exclude each other"),
    "checkpoint is a folder": (("--model_path", "."), "is a folder"),
    "output is a file": (("--output", __file__), "test_resnet_train.py"),
}


@pytest.mark.parametrize("arguments, words", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_a_mistake_gets_one_line_and_status_2(
    train: Callable, tmp_path: Path, arguments: tuple[str, ...], words: str
):
    status, out, err = train(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("train.py: error: ")
    assert words in err
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_overwritten(train: Callable, tmp_path: Path):
    train("--epochs", 1)
    before = files_of(tmp_path)
    status, _, err = train("--epochs", 1)
    assert status == 2 and "already holds a run" in err
    assert files_of(tmp_path) == before


def test_a_loss_that_is_not_finite_stops_the_run(train: Callable, tmp_path: Path):
    status, out, err = train("--lr", 1e30, "--epochs", 3)
    assert status == 2
    assert err.count("\n") == 1 and "the loss is" in err and "--lr" in err
    assert not list(run_folder(tmp_path).glob("*.pth"))


def test_a_loss_that_is_not_finite_at_the_end_is_noticed(train: Callable, tmp_path: Path):
    status, out, err = train("--lr", 1e30, "--epochs", 1, "--batch-size", 14)  # a single step
    assert status == 2 and "test accuracy" not in out
    assert err.count("\n") == 1 and "the loss is nan" in err
    assert not list(run_folder(tmp_path).glob("*.pth"))


def test_a_run_that_was_stopped_in_its_first_epoch_begins_again(train: Callable, tmp_path: Path):
    train("--lr", 1e30, "--epochs", 1, "--batch-size", 14)
    folder = run_folder(tmp_path)
    status, _, err = train("--lr", 1e30, "--epochs", 1, "--batch-size", 14, "--resume")
    assert status == 2 and "nothing to resume" in err
    status, _, err = train("--lr", 1e30, "--epochs", 1, "--batch-size", 14)
    assert status == 2 and "the loss is nan" in err  # it began, as before
    (folder / "config.json").rename(folder / "letter.txt")  # somebody else's folder
    status, _, err = train("--lr", 1e30, "--epochs", 1, "--batch-size", 14)
    assert status == 2 and "already holds" in err


DAMAGES = {
    "metrics lost": ("metrics.jsonl", lambda path: path.unlink()),
    "metrics cut": ("metrics.jsonl", lambda path: path.write_text("")),
    "metrics of numbers": ("metrics.jsonl", lambda path: path.write_text("3\n")),
    "indicators lost": ("*_li.npy", lambda path: path.unlink()),
    "indicators cut": ("*_li.npy", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    "indicators of no epochs": ("*_li.npy", lambda path: np.save(path, np.float32(1))),
    "state of nothing": ("last.pth", lambda path: torch.save({}, path)),
    "best as last": ("last.pth", lambda path: shutil.copy(path.parent / "best.pth", path)),
    "best lost": ("best.pth", lambda path: path.unlink()),
}


@pytest.mark.parametrize("file, damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_records_are_not_continued(
    train_vit: Callable, tmp_path: Path, file: str, damage: Callable
):
    words = ("--get-li", "--epochs", 1)
    train_vit(*words)
    (path,) = run_folder(tmp_path).glob(file)
    damage(path)
    before = files_of(tmp_path)
    assert_refused(train_vit(*words, "--resume"), str(path))
    assert files_of(tmp_path) == before


def test_a_truncated_checkpoint_is_refused(train: Callable, tmp_path: Path):
    train("--epochs", 1)
    last = run_folder(tmp_path) / "last.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    before = files_of(tmp_path)
    for arguments in (("--model_path", last), ("--epochs", 1, "--resume")):
        status, _, err = train(*arguments)
        assert status == 2
        assert err.count("\n") == 1 and "damaged" in err
    assert files_of(tmp_path) == before


def test_a_checkpoint_of_another_model_is_refused(train: Callable, tmp_path: Path):
    train("--learning-rule", "asa", "--epochs", 1)
    best = run_folder(tmp_path) / "best.pth"
    for arguments, words in (
        (("--model", "resnet34", "--learning-rule", "asa"), "--model resnet18, not resnet34"),
        (("--learning-rule", "bp"), "--learning-rule asa, not bp or ara"),
        (("--learning-rule", "asa", "--ARA-stride", 1, 1, 1, 1), "--ARA-stride"),
    ):
        status, _, err = train(*arguments, "--model_path", best)
        assert status == 2 and err.count("\n") == 1 and words in err
    state = torch.load(best, weights_only=True)
    del state["function"], state["model"]["fc.bias"], state["checksum"]
    torch.save(state, tmp_path / "headless.pth")
    status, _, err = train("--learning-rule", "asa", "--model_path", tmp_path / "headless.pth")
    assert status == 2 and err.count("\n") == 1 and "lacks fc.bias" in err


def test_the_flags_are_these(call: Callable):
    status, out, _ = call("ResNet/train.py", "--help")
    assert status == 0
    assert flags_of(out) == set(
        """--help --model --learning-rule --ARA-stride --lean --gcp --compress
        --compress-level --compress-bits --actnn --mesa --mesa-policy --dataset --data-path
        --imagenet-data-path --tiny-imagenet-data-path --optimizer --scheduler --decay-type --lr
        --learning-rate --epochs --max-epochs --batch-size --train-batch-size --test-batch-size
        --eval-batch-size --amp --device --workers --num-workers --seed --output --output-dir
        --model-path --get-li --tensorboard --bad-images
        --save-every --keep --parallel --sync-batchnorm --resume --checkpoint --dry-run
        --find-batch-size""".split()
    )
