"""Files that are whole or absent."""

from pathlib import Path

import pytest
import torch

from aal.training.command_line import UserError
from aal.training.files import read_checkpoint, write_checkpoint, write_text, write_whole


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
