"""Training steps whose saved tensors are compressed."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import aal
from aal.compression.codecs import Codec, Groups
from aal.compression.method import Method, Use
from aal.compression.session import Session
from aal.indicator import IndicatorRecorder
from aal.training.classification import Classification
from aal.training.devices import Worker
from aal.training.evaluation import evaluate
from aal.training.loop import Trainer

CPU = Worker(torch.device("cpu"))


class FourBits(Method):
    """Four bits for everything, and a note of every step."""

    name = "four"
    smallest = 16

    def __init__(self, needs_closure: bool = False):
        self.needs_closure = needs_closure
        self.steps: list[Any] = []

    def values(self, use: Use) -> Codec:
        return Groups(4)

    def step(self, session: Session, closure: Callable[[], Any] | None) -> None:
        self.steps.append(closure and closure())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(48, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 5)]
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.fixture
def loader() -> DataLoader:
    """Two batches of 24 samples, and one of 6."""
    return DataLoader(TensorDataset(torch.randn(54, 3, 4, 4), torch.randint(5, (54,))), 24)


def trainer_of(model: nn.Module, method: str | Method | None, **options: Any) -> Trainer:
    compress = None
    if isinstance(method, str):
        compress = functools.partial(aal.compress, method, model, smallest=16)
    elif method is not None:
        compress = functools.partial(Session, method, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return Trainer(
        Classification(), model, optimizer, lambda step: 0.1, CPU, compress=compress, **options
    )


@pytest.mark.parametrize("method", ["exact", "offload"])
@pytest.mark.parametrize("options", [{}, {"accumulation": 3}, {"amp": "bf16"}], ids=str)
def test_exact_compressors_change_no_bit(
    model: nn.Module, loader: DataLoader, method: str, options: dict
):
    states = []
    for name in (None, method):
        trainer = trainer_of(copy.deepcopy(model), name, **options)
        torch.manual_seed(2)  # of dropout
        found = [trainer.train_epoch(loader, "")["loss"], trainer.state()["model"]]
        states.append([*found, torch.get_rng_state()])
    assert_same_bits(states[1], states[0])


def test_a_batch_in_parts_is_compressed_part_by_part(model: nn.Module, loader: DataLoader):
    trainer = trainer_of(model, "adaptive", accumulation=4)
    trainer.train_epoch(loader, "")
    assert trainer.compression.forwards == 4 + 4 + 3


def test_only_training_is_compressed(model: nn.Module, loader: DataLoader):
    trainer = trainer_of(model, FourBits())
    evaluate(Classification(), model, loader, CPU, "off", "")
    trainer.measure_saved_mib(loader)
    assert trainer.compression.forwards == 0
    trainer.train_epoch(loader, "")
    assert trainer.compression.forwards == 3
    assert trainer.compression.method.steps == [None] * 3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_saved_memory_is_measured_with_the_compressor(
    model: nn.Module, loader: DataLoader, accumulation: int
):
    rng, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
    plain, four = (
        trainer_of(model, method, accumulation=accumulation).measure_saved_mib(loader)
        for method in (None, FourBits())
    )
    assert 0 < four < 0.4 * plain
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same_bits(list(model.buffers()), buffers)


def test_the_report_is_of_the_last_batch(model: nn.Module, loader: DataLoader):
    trainer = trainer_of(model, FourBits())
    trainer.train_epoch(loader, "")
    (first,) = (row for row in trainer.compression_report.rows if row.site == "2[0]")
    assert first.codec == "groups" and first.raw_bytes == 6 * 64 * 4


class Probing(FourBits):
    """Calls the closure, and notes how many samples the model was given and the gradient."""

    def step(self, session: Session, closure: Callable[[], Any]) -> None:
        sizes, before = [], [p.grad.clone() for p in session.model.parameters()]
        with session.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))):
            closure()
        after = [p.grad for p in session.model.parameters()]
        moved = any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
        self.steps.append((*sizes, moved))
        session.model.zero_grad()


@pytest.mark.parametrize("options", [{}, {"accumulation": 3}, {"amp": "bf16"}], ids=str)
def test_a_method_that_probes_has_a_few_samples_of_the_batch(
    model: nn.Module, loader: DataLoader, options: dict
):
    trainer = trainer_of(model, Probing(needs_closure=True), **options)
    trainer.train_epoch(loader, "")
    assert trainer.compression.method.steps == [(8, True), (8, True), (6, True)]
    (first,) = (row for row in trainer.compression_report.rows if row.site == "2[0]")
    samples = 6 // options.get("accumulation", 1)  # of the last part, and not those of the probe
    assert first.raw_bytes == samples * 64 * (2 if "amp" in options else 4)


def test_gact_finds_its_bits(model: nn.Module, loader: DataLoader):
    trainer = trainer_of(model, "gact", accumulation=2)
    trainer.train_epoch(loader, "")
    assert any("bits" in site.state for site in trainer.compression.sites)
    assert model[2].num_batches_tracked == 6  # its probes do not count


def test_a_state_continues_the_noise(model: nn.Module, loader: DataLoader):
    """Two epochs are what one and another one of a new trainer are."""
    whole = trainer_of(copy.deepcopy(model), FourBits())
    torch.manual_seed(2)
    whole.train_epoch(loader, "")
    whole.end_epoch()
    state = copy.deepcopy(whole.state())
    whole.train_epoch(loader, "")
    other = trainer_of(model, FourBits())
    other.load_state(state)
    other.train_epoch(loader, "")
    assert_same_bits(other.state()["model"], whole.state()["model"])
    fresh = trainer_of(model, FourBits())
    fresh.load_state(state | {"compression": [state["compression"][0] | {"forwards": 0}]})
    fresh.train_epoch(loader, "")
    assert not torch.equal(fresh.state()["model"]["5.weight"], whole.state()["model"]["5.weight"])


@pytest.mark.parametrize("method", ["adaptive", "actnn", "gact", "mesa"])
def test_a_state_continues_what_a_compressor_learned(
    model: nn.Module, loader: DataLoader, method: str
):
    whole = trainer_of(copy.deepcopy(model), method)
    torch.manual_seed(2)
    whole.train_epoch(loader, "")
    whole.end_epoch()
    state = copy.deepcopy(whole.state())
    (learned,) = state["compression"]
    assert any("bits" in own or "ranges" in own for *_, own in learned["sites"])
    whole.train_epoch(loader, "")
    other, fresh = trainer_of(copy.deepcopy(model), method), trainer_of(model, method)
    other.load_state(state)
    again = other.compression.state()
    assert again["method"] == learned["method"]
    for ours, theirs in zip(
        *(sorted(own["sites"], key=str) for own in (again, learned)), strict=True
    ):
        assert str(ours) == str(theirs)
    other.train_epoch(loader, "")
    assert_same_bits(other.state()["model"], whole.state()["model"])
    ignorant = [fresh.compression.state() | {"forwards": learned["forwards"]}]
    fresh.load_state(state | {"compression": ignorant})
    fresh.train_epoch(loader, "")
    assert not torch.equal(fresh.state()["model"]["5.weight"], whole.state()["model"]["5.weight"])


def test_indicators_of_what_is_compressed_are_recorded(model: nn.Module, loader: DataLoader):
    recorder = IndicatorRecorder(model)
    trainer = trainer_of(model, FourBits(), recorder=recorder)
    trainer.train_epoch(loader, "")
    values = recorder.take()
    names = list(recorder.summary(values))
    assert "1[0]" not in names  # the argument of the model is not the compressor's to keep
    assert {"2[0]", "5[0]"} <= set(names)
    recorded = values[~values.isnan()]
    assert (recorded > 0.9).all() and (recorded < 1).any()


def test_indicators_of_exact_compressors_are_those_of_backpropagation(
    model: nn.Module, loader: DataLoader
):
    recorder = IndicatorRecorder(model)
    trainer_of(model, "exact", recorder=recorder).train_epoch(loader, "")
    values = recorder.take()
    assert list(recorder.summary(values)) == ["1", "5"] and (values == 1).all()
