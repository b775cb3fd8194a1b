"""The README's code and commands run."""

import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "readme.py").write_text("\n".join(_blocks("python")))
    names = runpy.run_path(str(tmp_path / "readme.py"))
    assert "resnet" in names and names["y"].shape == (8, 65, 64)
    assert "LinearASA" in capsys.readouterr().out


def test_its_report_is_what_the_code_prints(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "readme.py").write_text("\n".join(_blocks("python")[:2]))
    runpy.run_path(str(tmp_path / "readme.py"))
    printed = capsys.readouterr().out.strip()
    assert printed in _blocks("text")[0]


def _commands() -> list[tuple[str, list[str]]]:
    """Folder and arguments of every ``python train.py``."""
    found = []
    for block in _blocks("sh"):
        folder = ""
        for line in block.splitlines():
            if line.startswith("cd "):
                folder = line.removeprefix("cd ").removeprefix("../")
            elif line.startswith("python train.py"):
                found.append((folder, shlex.split(line)[2:]))
    return found


SMALL_RESNET = "--model resnet18"
FIXTURES = {"ResNet": "train", "ViT": "train_vit", "MLP-Mixer": "train_mixer"}


@pytest.mark.parametrize("folder", FIXTURES)
def test_its_commands_train_and_score(folder: str, request, tmp_path: Path):
    train = request.getfixturevalue(FIXTURES[folder])
    small = SMALL.get(f"{folder}/train.py", SMALL_RESNET).split()
    shorter = ["--dataset", "tiny-imagenet", "--epochs", "1", *small]
    commands = [words for name, words in _commands() if name == folder and "digits" in words]
    training, scoring = commands
    status, _, err = train(*training, *shorter)
    assert status == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    place = scoring.index("--model_path") + 1
    assert Path(scoring[place]).parent.name == run.name or "--name" not in training
    scoring[place] = str(run / Path(scoring[place]).name)
    status, out, err = train(*scoring, *shorter)
    assert status == 0, err
    assert out.startswith("test accuracy")


@pytest.mark.parametrize("folder", SMALL)
def test_the_papers_commands_run_as_printed(
    call: Callable, cifar10: Path, tmp_path: Path, folder: str
):
    (words,) = [w for name, w in _commands() if f"{name}/train.py" == folder and "c10" in w]
    place = ["--device", "cpu", "--workers", "0", "--data-path", cifar10, "--output", tmp_path]
    shorter = [*SMALL[folder].split(), "--epochs", "1", "--batch-size", "4"]
    status, _, err = call(folder, *words, *place, *shorter)
    assert (status, err) == (0, "")


def test_its_make_targets_exist():
    targets = re.findall(r"^make (\S+)", "\n".join(_blocks("sh")), flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "bench-cpu"} == set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_its_numbers_have_records():
    records = re.findall(r"\((results/[^)]+)\)", README)
    assert len(set(records)) >= 6
    assert not [record for record in records if not (ROOT / record).is_file()]
    assert not re.findall(r"^[A-Z]+$", README, flags=re.MULTILINE)  # a table yet to come


def _record(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def _table(header: str) -> list[list[str]]:
    """The cells of the table whose first line begins so, without emphasis and headings."""
    lines = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def test_its_bytes_are_the_recorded_ones():
    record = _record("patch_memory")
    blocks, *networks = list(record.values())[1:]
    rows = _table("| rule | block |")
    assert len(rows) == 9
    for label, block, *cells in rows:
        key = label.removesuffix(", lean off").removesuffix(" (torchvision's ViT)")
        assert block == f"{blocks[key]:.2f}"
        for network, (mib, times, _) in zip(networks, (cells[:3], cells[3:]), strict=True):
            is_torchvision = key == "bp" and "torchvision" in network
            row = network["torchvision" if is_torchvision else key]
            assert float(mib) == pytest.approx(row["mib_per_image"], abs=0.0501)
            assert float(times) == pytest.approx(row["times_less"], abs=0.00501)


def test_its_times_are_the_recorded_ones():
    networks = _record("patch_speed_cpu")["training_step"].values()
    rows = _table("| rule | ViT | MLP-Mixer |")
    assert len(rows) == 12
    for label, *ratios in rows:
        recorded = [network[label]["median_ratio"] for network in networks]
        assert [float(ratio) for ratio in ratios] == pytest.approx(recorded, abs=0.00501)


def test_its_accuracies_are_the_recorded_ones():
    networks = _record("patch_accuracy")["rules"].values()
    rows = _table("| rule | ViT, test accuracy % |")
    names = [label for label, *_ in rows[:11]]
    approx = "asa1, GELU, lean approx"
    names += [approx, f"{approx}, mean scale", f"{approx}, published derivative"]
    for name, (_, *cells) in zip(names, rows, strict=True):
        for network, (accuracy, mib, indicator) in zip(
            networks, (cells[:3], cells[3:]), strict=True
        ):
            row = network[name]
            assert accuracy == f"{row['accuracy_mean']:.1f} ± {row['accuracy_sd']:.1f}"
            assert mib == f"{row['saved_mib']:.1f}"
            found = float(indicator.replace("−", "-"))
            assert found == pytest.approx(row["median_learning_indicator"], abs=0.000501)
