"""The train scripts with compressors, as their users call them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts.conftest import assert_refused, assert_same_results, run_folder, weights_of

from aal.compression.codecs import Codec, Groups
from aal.compression.compress import METHODS
from aal.compression.method import Method, Use

# Small networks, but with tensors that are large enough to be compressed.
SCRIPTS = {
    "ResNet": "--dataset digits --model resnet18 --batch-size 4",
    "ViT": "--dataset digits --num-layers 1 --hidden 32 --head 2 --mlp-hidden 64 --batch-size 24",
    "MLP-Mixer": "--dataset digits --num-layers 1 --hidden-size 64 --batch-size 24",
    "Transformer": "--dataset-name cldr --hidden 32 --head 2 --num-layers 1 "
    "--mlp-hidden 64 --batch-size 600",
}
EXACT = ("exact", "offload")
LOSSY = [method for method in METHODS if method not in ("none", *EXACT)]


@pytest.fixture
def run(call: Callable, tmp_path: Path) -> Callable:
    """Run the script in a folder, with run folders below ``tmp_path / "runs"``."""

    def run(folder: str, *words: object) -> tuple[int, str, str]:
        place = ("--device", "cpu", "--output", tmp_path / "runs")
        return call(f"{folder}/train.py", *SCRIPTS[folder].split(), *place, *words)

    return run


def saved_and_losses(result: tuple[int, str, str]) -> tuple[float, str]:
    """Saved MiB of a dry run, and its losses."""
    status, out, err = result
    assert status == 0 and "error" not in err, err
    losses, saved = re.match(r"dry run: 2 steps.*, loss (.*); saved (\S+) MiB", out).groups()
    return float(saved), losses


RULES = {
    "ResNet": ("bp", "ara"),
    "ViT": ("bp", "asa1"),
    "MLP-Mixer": ("bp", "asa4"),
    "Transformer": ("bp", "asa2"),
}
CASES = [(folder, rule) for folder, rules in RULES.items() for rule in rules]


@pytest.mark.parametrize("folder, rule", CASES, ids=["-".join(case) for case in CASES])
def test_scripts_train_under_every_compressor(run: Callable, folder: str, rule: str):
    words = (folder, "--dry-run", "--learning-rule", rule)
    plain, losses = saved_and_losses(run(*words))
    for method in EXACT:
        saved, exact_losses = saved_and_losses(run(*words, "--compress", method))
        assert saved <= 1.02 * plain and exact_losses == losses, method
    for method in LOSSY:
        # Finding bits takes hundreds of passes; a level that does not is enough here.
        level = ("--compress-level", "L1") if method == "gact" else ()
        saved, _ = saved_and_losses(run(*words, "--compress", method, *level))
        assert saved < 0.8 * plain, method


COMBINATIONS = {
    "aba": ("ResNet", "--learning-rule", "aba", "--compress", "adaptive"),
    "asa": ("ResNet", "--learning-rule", "asa", "--compress", "adaptive"),
    "ara gcp": ("ResNet", "--learning-rule", "ara", "--gcp", "--actnn"),
    "gact": ("ViT", "--learning-rule", "aba2", "--compress", "gact"),
    "bf16": ("ViT", "--learning-rule", "asa3", "--amp", "bf16", "--compress", "gact"),
    "gcp": ("ViT", "--gcp", "--mesa"),
    "dropout": ("ViT", "--dropout", 0.1, "--compress", "division"),
    "parts": ("MLP-Mixer", "--gradient-accumulation-steps", 2, "--compress", "adaptive"),
    "approximate": ("MLP-Mixer", "--learning-rule", "asa1", "--lean", "approx", "--actnn"),
    "indicators": ("MLP-Mixer", "--learning-rule", "aba4", "--get-li", "--compress", "fp8"),
    "gcp of asa": ("Transformer", "--learning-rule", "asa4", "--gcp", "--get-li", "--mesa"),
    "bits": ("Transformer", "--compress", "adaptive", "--compress-bits", 2.5, "--amp", "bf16"),
}


@pytest.mark.parametrize("words", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_other_flags_go_with_compressors(run: Callable, words: tuple):
    saved, losses = saved_and_losses(run(*words, "--dry-run"))
    others = [word for word in words if word not in ("--actnn", "--mesa")]
    if "--compress" in others:
        del others[others.index("--compress") :]
        others += words[words.index("--amp") :] if "--compress-bits" in words else ()
    plain, _ = saved_and_losses(run(*others, "--dry-run"))
    assert saved < 0.9 * plain and "nan" not in losses


STEPS = ("--num-steps", 4, "--eval-every", 2)


def test_a_run_records_its_compressor(run: Callable, tmp_path: Path):
    words = ("ViT", "--learning-rule", "asa1", "--get-li")
    status, out, err = run(*words, "--actnn", *STEPS)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 4  # two stretches, the test and the folder
    folder = run_folder(tmp_path)
    assert "_asa1_" in folder.name and "_actnn-L3_" in folder.name
    config = json.loads((folder / "config.json").read_text())
    expected = {"compress": "actnn", "compress_level": "L3", "compress_bits": None}
    assert {name: config[name] for name in expected} == expected and config["mesa_policy"] is None
    report = (folder / "compression.txt").read_text()
    assert report.startswith("site ") and report.splitlines()[-1].startswith("total ")
    saved = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["saved_mib"]
    assert f"saved {saved:.1f} MiB" in out
    # A compressor does not change what the network computes.
    status, scored, err = run(*words, "--model-path", folder / "best.pth")
    assert (status, err) == (0, "") and scored.strip() in out


@pytest.mark.parametrize("rule", ["bp", "asa1"])
@pytest.mark.parametrize("folder", ["ViT", "MLP-Mixer"])
def test_indicators_of_what_is_compressed_are_recorded(
    run: Callable, tmp_path: Path, folder: str, rule: str
):
    words = ("--learning-rule", rule, "--get-li", "--compress", "adaptive")
    status, _, err = run(folder, *words, *STEPS)
    assert (status, err) == (0, "")
    runs = run_folder(tmp_path)
    lines = (runs / "metrics.jsonl").read_text().splitlines()
    names = [list(json.loads(line)["indicator"]) for line in lines]
    layers = [name for name in names[0] if "[" not in name]
    assert names[1][: len(names[0])] == names[0] and layers == names[0][: len(layers)]
    assert len(names[0]) > len(layers) and bool(layers) == (rule != "bp")
    indicators = np.load(runs / f"{runs.name}_li.npy")
    assert indicators.shape[:2] == (2, len(names[1]))
    sites = indicators[:, len(layers) :]
    recorded = sites[~np.isnan(sites)]
    assert recorded.size and recorded.max() <= 1 and np.median(recorded) > 0.9


def test_indicators_under_an_exact_compressor_are_1(run: Callable, tmp_path: Path):
    assert run("ViT", "--get-li", "--compress", "exact", *STEPS)[::2] == (0, "")
    folder = run_folder(tmp_path)
    assert (np.load(folder / f"{folder.name}_li.npy") == 1).all()


class FourBits(Method):
    """Does not learn."""

    name = "four"

    def values(self, use: Use) -> Codec:
        return Groups(4)


@pytest.mark.parametrize("rule", ["bp", "asa2"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    run: Callable,
    tmp_path: Path,
    stop_after: Callable,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
):
    monkeypatch.setitem(METHODS, "four", (__name__, "FourBits"))
    words = ("ViT", "--learning-rule", rule, "--dropout", 0.2, "--get-li", "--compress", "four")
    run(*words, *STEPS)
    report = (run_folder(tmp_path) / "compression.txt").read_text()
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_after(1):
        assert run(*words, *STEPS)[0] == 130
    status, _, err = run(*words, *STEPS, "--resume")
    assert (status, err) == (0, "")
    assert_same_results(run_folder(tmp_path), tmp_path / "whole")
    assert (run_folder(tmp_path) / "compression.txt").read_text() == report


@pytest.mark.parametrize("folder", ["MLP-Mixer", "ViT"])
def test_a_run_goes_on_though_bits_are_learned_again(
    run: Callable, tmp_path: Path, stop_after: Callable, folder: str
):
    words = (folder, "--get-li", "--compress", "adaptive", "--num-steps", 6, "--eval-every", 2)
    with stop_after(2):
        assert run(*words)[0] == 130
    status, out, err = run(*words, "--resume")
    assert (status, err) == (0, "") and out.startswith("step 6/6")
    runs = run_folder(tmp_path)
    lines = (runs / "metrics.jsonl").read_text().splitlines()
    names = [list(json.loads(line)["indicator"]) for line in lines]
    assert len(names) == 3 and names[2][: len(names[1])] == names[1]
    assert np.load(runs / f"{runs.name}_li.npy").shape[:2] == (3, len(names[2]))


def test_a_run_does_not_go_on_with_another_compressor(
    run: Callable, tmp_path: Path, stop_after: Callable
):
    words = ("ViT", "--name", "mine", "--compress", "adaptive", *STEPS)
    with stop_after(1):
        run(*words)
    assert_refused(run(*words, "--compress", "exact", "--resume"), "--compress adaptive, not exact")
    assert_refused(run(*words, "--compress-bits", 2, "--resume"), "--compress-bits 4, not 2")
    (run_folder(tmp_path) / "last.pth").unlink()  # as if it had been stopped before
    assert run(*words)[::2] == (0, "")


def test_a_policy_is_part_of_a_run(run: Callable, tmp_path: Path, stop_after: Callable):
    """Flags as the paper's release spells them."""
    policy = tmp_path / "tight.txt"
    policy.write_text("on fc:\n    by_index: all\n        enable: True\n        level: 16\n")
    words = ("ViT", "--mesa", "True", "--mesa_policy", policy, *STEPS)
    with stop_after(1):
        run(*words)
    folder = run_folder(tmp_path)
    assert "_mesa-tight_" in folder.name
    assert json.loads((folder / "config.json").read_text())["mesa_policy"] == policy.read_text()
    policy.write_text(policy.read_text().replace("16", "64"))
    assert_refused(run(*words, "--resume"), "level: 16, not on fc:")


MISTAKES = {
    "both": (("--actnn", "--mesa"), "--actnn and --mesa exclude each other"),
    "two methods": (("--actnn", "--compress", "gact"), "--actnn and --compress gact exclude"),
    "levels of none": (("--compress_level", "L1"), "has no levels"),
    "unknown level": (("--actnn", "--compress-level", "L7"), "'L7'"),
    "bits": (("--compress", "adaptive", "--compress-bits", "33"), "--compress adaptive: bits"),
    "policy without mesa": (("--mesa-policy", __file__), "has no policy"),
    "no policy": (("--mesa", "--mesa-policy", "nowhere.txt"), "cannot read nowhere.txt"),
    "bad policy": (("--mesa", "--mesa-policy", __file__), "test_compressed_train.py: line 1: "),
}


@pytest.mark.parametrize("folder", SCRIPTS)
@pytest.mark.parametrize("words, text", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_line_and_status_2(
    run: Callable, tmp_path: Path, folder: str, words: tuple[str, ...], text: str
):
    assert_refused(run(folder, *words, "--data-path", "nowhere"), text)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "gact"])
def test_two_processes_train_together(run: Callable, tmp_path: Path, method: str):
    states = []
    words = ("ViT", "--learning-rule", "asa1", "--gradient-accumulation-steps", 2, "--get-li")
    for own in ("none", method):
        status, _, err = run(*words, *STEPS, "--compress", own, "--device", "cpu", "cpu")
        assert status == 0, err
        states.append(weights_of(run_folder(tmp_path)))
        if method == "gact" and own == method:
            (indicators,) = run_folder(tmp_path).glob("*_li.npy")
            assert np.load(indicators).shape[:2][0] == 2
        shutil.rmtree(run_folder(tmp_path))
    if method == "exact":
        torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_policy_may_begin_with_a_later_epoch(run: Callable, tmp_path: Path):
    policy = tmp_path / "later.txt"
    policy.write_text("on fc: 1\n    by_index: all\n        enable: True\n")
    run("ViT", "--mesa", "--mesa-policy", policy, "--get-li", *STEPS)
    lines = (run_folder(tmp_path) / "metrics.jsonl").read_text().splitlines()
    places = [{name for name in json.loads(line)["indicator"] if "[" in name} for line in lines]
    assert len(places) == 2 and not places[0] and places[1]
