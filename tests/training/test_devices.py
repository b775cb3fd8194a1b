"""The ``--device`` flag, and the processes of its devices."""

from pathlib import Path

import pytest
import torch

from aal.training.command_line import UserError
from aal.training.devices import joined, num_processes, parse_devices
from aal.training.launch import launch


def test_cpu_may_be_named_once_per_process():
    assert parse_devices(["cpu"]) == [torch.device("cpu")]
    assert parse_devices(["cpu", "cpu"]) == [torch.device("cpu")] * 2


def test_nothing_means_the_first_gpu_or_the_cpu():
    expected = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    assert parse_devices(None) == [expected]


@pytest.mark.parametrize("words", [["99"], ["-1"], ["cuda"], ["0", "cpu"], ["cpu", "0"], ["1.5"]])
def test_other_words_are_refused(words: list[str]):
    with pytest.raises(UserError, match="--device"):
        parse_devices(words)


PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"])
def test_processes_without_a_number_are_refused(monkeypatch: pytest.MonkeyPatch, name: str):
    for other, value in (PLACE | {name: "x"}).items():
        monkeypatch.setenv(other, value)
    with pytest.raises(UserError, match=f"^{name}, .* is no number"):
        num_processes([torch.device("cpu")])


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    for name, value in (PLACE | {"LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU, of which there are"):
        with joined([torch.device("cuda", 0)]):
            pass


EXCHANGE = """
import fractions
import pickle

import torch

from aal.training.devices import joined, parse_devices


def value(rank):
    return {"texts": [(rank, "ä" * rank)] * 1000 * rank, "tensor": torch.full((rank,), 0.5)}


with joined(parse_devices(["cpu", "cpu"])) as worker:
    for rank, found in enumerate(worker.gather_objects(value(worker.rank))):
        assert found["texts"] == value(rank)["texts"]
        assert torch.equal(found["tensor"], value(rank)["tensor"])
    try:
        worker.gather_objects(fractions.Fraction(1, 2))
    except pickle.UnpicklingError:
        print("refused")
"""


@pytest.mark.slow
def test_processes_exchange_values_and_no_code(tmp_path: Path, capfd: pytest.CaptureFixture):
    script = tmp_path / "script.py"
    script.write_text(EXCHANGE)
    status = launch(str(script), [], 2)
    words = capfd.readouterr().out.replace("\n", "")  # which the two may write between each other
    assert (status, words) == (0, "refused" * 2)


@pytest.mark.gpu
def test_a_gpu_is_named_once():
    assert parse_devices(["0"]) == [torch.device("cuda", 0)]
    with pytest.raises(UserError, match="twice"):
        parse_devices(["0", "0"])
