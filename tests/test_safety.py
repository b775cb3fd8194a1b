"""No file that a user is given can run code: nothing is unpickled, evaluated or left to a shell.

Checkpoints, data and Learning Indicators are passed from one person to another, and some are
downloaded. Who opens one expects numbers. Pickle, ``eval`` and a shell would run whatever its
author wrote in it.
"""

import ast
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from scripts.conftest import ROOT
from torchvision import datasets

from aal.training.command_line import UserError
from aal.training.data import load
from aal.training.files import read_checkpoint

FILES = sorted(
    path
    for place in ("aal", "benchmarks", *(path.parent.name for path in ROOT.glob("*/train.py")))
    for path in (ROOT / place).rglob("*.py")
) + [ROOT / "learning_indicator.py"]

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
NAMES = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.hub",
    "torch.package",
    "torch.jit.load",
    "pandas.read_pickle",
    # Which pickle what they exchange.
    *(
        f"torch.distributed.{function}"
        for function in (
            "all_gather_object",
            "broadcast_object_list",
            "gather_object",
            "recv_object_list",
            "scatter_object_list",
            "send_object_list",
        )
    ),
}
LOADERS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
# Arguments that no call may have, whatever it calls.
ARGUMENTS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def dangers(source: str) -> Iterator[str]:
    """What in a file's text could run code that is not its own."""
    tree = ast.parse(source)
    imported = dict(_imported(tree))
    checked = set()  # loaders in calls
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                yield node.func.id
            given = {
                word.arg: word.value.value if isinstance(word.value, ast.Constant) else None
                for word in node.keywords
            }
            for argument, value in ARGUMENTS.items():
                if argument in given and given[argument] is not (not value):
                    yield f"{argument} is not {not value}"
            name = _dotted(node.func, imported)
            if name in LOADERS:
                argument, value = LOADERS[name]
                if given.get(argument) is value:
                    checked.add(node.func)
        if isinstance(node, ast.Attribute | ast.Name) and node not in checked:
            name = _dotted(node, imported)
            if name in NAMES or name in LOADERS or name.split(".")[0] in MODULES:
                yield name
    yield from (name for name in imported.values() if name.split(".")[0] in MODULES)


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Names in a file, and what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, alias.name
                else:
                    yield alias.name.split(".")[0], alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _dotted(node: ast.expr, imported: Mapping[str, str]) -> str:
    """The full name of ``np.load`` or ``load``; empty for other expressions and local names."""
    if isinstance(node, ast.Name):
        return imported.get(node.id, "")
    if isinstance(node, ast.Attribute) and (start := _dotted(node.value, imported)):
        return f"{start}.{node.attr}"
    return ""


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle as j",
        "eval('1')",
        "exec(compile('1', '', 'exec'))",
        "import os; os.system('ls')",
        "from os import popen as p; p('ls')",
        "import subprocess as s; s.run('ls', shell=True)",
        "import subprocess as s; s.run('ls', shell=anything)",
        "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=False)",
        "import torch; torch.load('x', weights_only=anything)",
        "from torch import load; load('x')",
        "import torch; read = torch.load",
        "import torch as t; t.load(t.load('x', weights_only=True))",
        "import numpy as np; np.load('x')",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import yaml; yaml.load('x')",
        "import torch.distributed as dist; dist.all_gather_object(a, b)",
        "import torch; torch.distributed.broadcast_object_list(a)",
        "model.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_what_could_run_code_is_found(source: str):
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load('x', weights_only=True)",
        "import numpy as np; np.load('x', allow_pickle=False)",
        "import re; re.compile('x')",
        "model.eval(); model.compile()",
        "import subprocess; subprocess.run(['ls'], shell=False)",
        "import torch.distributed as dist; dist.all_gather(a, b)",
    ],
)
def test_what_cannot_is_left(source: str):
    assert not list(dangers(source))


def test_no_file_of_the_project_could_run_code():
    found = {str(path.relative_to(ROOT)): list(dangers(path.read_text())) for path in FILES}
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}


class Harm:
    """Makes a folder where it is unpickled."""

    def __init__(self, place: Path):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_a_checkpoint_runs_no_code(tmp_path: Path):
    torch.save({"model": {}, "epoch": Harm(tmp_path / "harm")}, tmp_path / "last.pth")
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "last.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_files_of_cifar_are_unpickled_only_with_their_checksum(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    monkeypatch.setattr(kind, "url", f"file://{tmp_path}/nothing")
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    for file, _ in [*kind.train_list, *kind.test_list, (kind.meta["filename"], "")]:
        (folder / file).write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    with pytest.raises(UserError, match=f"{name} in .* is missing or damaged"):
        load(name, tmp_path)
    assert not (tmp_path / "harm").exists()
