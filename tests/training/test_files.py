"""Files that are whole or absent."""

import os
import resource
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from aal.training.command_line import UserError
from aal.training.files import (
    checksum,
    read_checkpoint,
    remove_leftovers,
    write_checkpoint,
    write_text,
    write_whole,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_text(path, "old")

    def fail(file):
        file.write(b"half of the new")
        raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        write_whole(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="cannot write .*nowhere"):
        write_text(tmp_path / "nowhere" / "file", "text")


def test_a_checkpoint_comes_back(tmp_path: Path):
    state = {"model": {"weight": torch.randn(3)}, "epoch": 2, "config": {"rule": "ara"}}
    write_checkpoint(tmp_path / "x.pth", state)
    loaded = read_checkpoint(tmp_path / "x.pth")
    torch.testing.assert_close(loaded["model"], state["model"], rtol=0, atol=0)
    assert loaded["config"] == state["config"]


class Harmful:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_a_checkpoint_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.save({"model": Harmful()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "x.pth")
    assert capsys.readouterr().out == ""


def test_a_checkpoint_that_cannot_be_looked_for_is_named():
    with pytest.raises(UserError, match="cannot read .*xx.pth: "):
        read_checkpoint(Path("x" * 300 + ".pth"))


def test_a_checkpoint_must_be_a_dictionary(tmp_path: Path):
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(UserError, match="list, not a checkpoint"):
        read_checkpoint(tmp_path / "x.pth")


STATE = {
    "model": OrderedDict(
        weight=torch.arange(12.0).reshape(3, 4).t(),
        half=torch.tensor(1.5, dtype=torch.bfloat16),
        mask=torch.tensor([True, False]),
        none=torch.empty(0, 3),
        waves=torch.tensor([1 + 2j]),
    ),
    "plain": [1, 2.5, None, True, ("text", b"bytes"), float("nan"), float("-inf")],
}


def test_a_checkpoint_carries_its_checksum(tmp_path: Path):
    write_checkpoint(tmp_path / "x.pth", STATE)
    raw = torch.load(tmp_path / "x.pth", weights_only=True)
    assert raw.pop("checksum") == checksum(STATE) == checksum(raw)
    assert list(read_checkpoint(tmp_path / "x.pth")) == list(STATE)


OTHERS = {
    "a bit": {"a": torch.tensor([1.0, 2.0000002])},
    "type": {"a": torch.tensor([1.0, 2.0]).double()},
    "shape": {"a": torch.tensor([[1.0, 2.0]])},
    "name": {"b": torch.tensor([1.0, 2.0])},
    "more": {"a": torch.tensor([1.0, 2.0]), "b": 1},
    "list": {"a": [1.0, 2.0]},
}


def test_checksums_tell_states_apart():
    state = {"a": torch.tensor([1.0, 2.0])}
    assert checksum(state) == checksum({"a": torch.tensor([1.0, 2.0])})
    assert len({checksum(other) for other in (state, *OTHERS.values())}) == 1 + len(OTHERS)
    pairs = [(["ab", "c"], ["a", "bc"]), ([1], (1,)), ([1], [True]), ([[1], 2], [[1, 2]])]
    assert all(checksum(one) != checksum(other) for one, other in pairs)
    with pytest.raises(TypeError, match="cannot hold a set"):
        checksum({1, 2})


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path: Path):
    write_checkpoint(tmp_path / "x.pth", STATE)
    content = (tmp_path / "x.pth").read_bytes()
    expected, found = checksum(STATE), 0
    for place in range(0, len(content), 11):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (tmp_path / "x.pth").write_bytes(flipped)
        try:
            state = read_checkpoint(tmp_path / "x.pth")
        except UserError:
            found += 1
        else:  # padding, or the name of the checksum itself
            assert checksum({name: state[name] for name in STATE}) == expected
    assert found > 50


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99, -1e-9])
def test_a_truncated_checkpoint_is_found(tmp_path: Path, share: float):
    write_checkpoint(tmp_path / "x.pth", STATE)
    content = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(content[: int(share * len(content)) or -1])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(tmp_path / "x.pth")


def test_a_checkpoint_without_checksum_is_read(tmp_path: Path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "x.pth")
    assert torch.equal(read_checkpoint(tmp_path / "x.pth")["weight"], torch.ones(2))


@pytest.mark.parametrize("size", [10, 5_000, 700_000])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, size: int):
    """Wherever in the file there is no more room."""
    write_checkpoint(tmp_path / "x.pth", STATE)
    before = (tmp_path / "x.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*x.pth: File too large"):
            write_checkpoint(
                tmp_path / "x.pth", {"a": torch.ones(100_000), "b": torch.ones(90_000)}
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "x.pth").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path):
    code = (
        "import os, pathlib, aal.training.files as files; "
        "files.write_whole(pathlib.Path('last.pth'), lambda file: os._exit(7))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 7 and len(list(tmp_path.iterdir())) == 1
    left = {".last.pth", ".last.pth.swp", "last.pth", ".other.pth.ab12.part", "last.pth.part"}
    for name in left:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, {"last.pth"})
    assert {file.name for file in tmp_path.iterdir()} == left
