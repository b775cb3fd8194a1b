"""An epoch that is left and continued, by as many processes or by others."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aal.indicator import IndicatorRecorder
from aal.training.classification import Classification
from aal.training.command_line import UserError
from aal.training.devices import Worker
from aal.training.loop import Trainer
from aal.training.totals import Totals

CPU = Worker(torch.device("cpu"))


class Left(Exception):
    """The epoch is left."""


@pytest.fixture
def part() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(20, 3, 2, 2, generator=generator)
    return TensorDataset(images, torch.randint(5, (20,), generator=generator))


def _trainer(worker: Worker = CPU) -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(12, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    recorder = IndicatorRecorder(model)
    return Trainer(Classification(), model, optimizer, lambda step: 0.1, worker, recorder=recorder)


class Rest:
    """The batches of a loader but the first; its length is that of all."""

    def __init__(self, part: TensorDataset, done: int):
        self.loader, self.done = DataLoader(part, 4), done

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return iter(list(self.loader)[self.done :])


def _left(part: TensorDataset, steps: int) -> dict:
    """The state of an epoch that was left after some steps."""
    trainer = _trainer()

    def leave():
        if trainer.progress.steps == steps:
            raise Left

    with pytest.raises(Left):
        trainer.train_epoch(DataLoader(part, 4), "one", leave)
    return copy.deepcopy(trainer.state())


@pytest.mark.parametrize("steps", [1, 4])
def test_a_continued_epoch_has_the_means_of_all_of_it(part: TensorDataset, steps: int):
    whole, other = _trainer(), _trainer()
    expected, rng = whole.train_epoch(DataLoader(part, 4), "one"), whole.random_state()["cpu"]
    torch.manual_seed(99)
    other.load_state(_left(part, steps))
    found = other.train_epoch(Rest(part, steps), "one")
    for name in ("loss", "accuracy"):
        assert found[name] == expected[name]
    for ours, theirs in zip(other.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(other.random_state()["cpu"], rng)
    assert torch.equal(other.recorder.take(), whole.recorder.take())
    assert found["seconds"] >= other.progress.seconds > 0


def test_the_next_epoch_begins_at_its_first_step(part: TensorDataset):
    trainer = _trainer()
    trainer.train_epoch(DataLoader(part, 4), "one")
    assert trainer.state()["progress"]["steps"] == 5
    trainer.end_epoch()
    assert trainer.state()["progress"] is None
    trainer.train_epoch(DataLoader(part, 4), "two")
    assert trainer.step == 10


def test_an_epoch_of_other_steps_is_refused(part: TensorDataset):
    trainer = _trainer()
    trainer.load_state(_left(part, 2))
    with pytest.raises(UserError, match="epoch of 5 steps, which has 4 now"):
        trainer.train_epoch(DataLoader(part, 5), "one")


def test_what_other_processes_had_goes_to_the_first(part: TensorDataset):
    state = _left(part, 2)
    state["progress"]["processes"] *= 3
    alone = state["progress"]["processes"][0]
    for rank, share in ((0, 3), (1, 0)):
        trainer = _trainer(Worker(torch.device("cpu"), rank, world_size=2))
        trainer.load_state(copy.deepcopy(state))
        assert torch.equal(trainer.progress.totals.state(), share * alone["totals"])
        recorded = trainer.recorder.state()
        assert {name: len(parts) for name, parts in recorded.items()} == (
            {name: share * len(parts) for name, parts in alone["indicators"].items()}
            if share
            else {}
        )


def test_a_state_with_weights_that_are_not_finite_is_not_made(part: TensorDataset):
    trainer = _trainer()
    trainer.train_epoch(DataLoader(part, 4), "one")
    name, weights = list(trainer.model.named_parameters())[1]
    with torch.no_grad():
        weights[-1] = float("inf")
    with pytest.raises(UserError, match=f"^{name} is not finite after step 5; try a lower --lr"):
        trainer.state()


def test_totals_come_back_to_the_bit():
    totals = Totals("samples", ("accuracy",), CPU)
    totals.add(torch.tensor(0.1), 3, [torch.tensor(70.0)])
    other = Totals("samples", ("accuracy",), CPU)
    other.load_state(totals.state())
    for one in (totals, other):
        one.add(torch.tensor(0.7), 4, [torch.tensor(20)])
    assert other.means() == totals.means()
    assert str(other) == str(totals)
