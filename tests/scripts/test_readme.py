"""The README's code and commands run."""

import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "readme.py").write_text("\n".join(_blocks("python")))
    names = runpy.run_path(str(tmp_path / "readme.py"))
    assert "load_weights" in names
    assert "LinearASA" in capsys.readouterr().out


def test_its_report_is_what_the_code_prints(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "readme.py").write_text("\n".join(_blocks("python")[:2]))
    runpy.run_path(str(tmp_path / "readme.py"))
    printed = capsys.readouterr().out.strip()
    assert printed in _blocks("text")[0]


def test_its_training_commands_run(train: Callable, tmp_path: Path):
    commands = [
        shlex.split(line)[2:]
        for block in _blocks("sh")
        for line in block.splitlines()
        if line.startswith("python train.py")
    ]
    assert len(commands) == 2
    training, scoring = commands
    data = ["--dataset", "tiny-imagenet", "--epochs", "1", "--model", "resnet18"]  # for speed
    status, _, err = train(*training, *data)
    assert status == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    place = scoring.index("--model_path") + 1
    scoring[place] = str(folder / Path(scoring[place]).name)
    status, out, err = train(*scoring, *data)
    assert status == 0, err
    assert out.startswith("test accuracy")


def test_its_make_targets_exist():
    targets = re.findall(r"^make (\S+)", "\n".join(_blocks("sh")), flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "bench-cpu"} == set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
