"""Losses and gradients that are not finite: what is said of them, and what is learned meanwhile."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aal.training import finite
from aal.training.classification import Classification
from aal.training.command_line import UserError
from aal.training.devices import Worker
from aal.training.loop import Trainer
from aal.training.precision import MAX_SKIPPED, LossScaler

CPU = Worker(torch.device("cpu"))


class Log(nn.Module):
    """Its logarithm is not finite where its input is not positive."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Steep(torch.autograd.Function):
    """Forward: the input. Backward: a gradient that overflows in float16, and in float32 does not.

    Nothing is saved; the gradient is 1e30 times the exact one.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 1e30


class Cliff(nn.Module):
    """Applies ``Steep`` to as many batches as it is told."""

    def __init__(self, batches: int):
        super().__init__()
        self.left = batches

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        return Steep.apply(Steep.apply(x)) if self.left >= 0 else x


def _loader(count: int = 12) -> DataLoader:
    """Batches of two."""
    return DataLoader(TensorDataset(torch.randn(count, 4), torch.randint(3, (count,))), 2)


def _trainer(*layers: nn.Module, amp: str = "off", lr: float = 0.1, **kwargs) -> Trainer:
    model = nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return Trainer(Classification(), model, optimizer, lambda step: lr, CPU, amp, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_module_whose_output_is_not_finite_is_named(accumulation: int):
    trainer = _trainer(nn.Sequential(nn.Tanh(), Log()), nn.ReLU(), accumulation=accumulation)
    before = [weights.clone() for weights in trainer.model.parameters()]
    message = r"the loss is nan at step 1 \(one\); the first output .* is that of 1\.1 \(Log\); try"
    with pytest.raises(UserError, match=message):
        trainer.train_epoch(_loader(), "one")
    for ours, theirs in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)  # nothing was learned from it


def test_batches_that_are_not_finite_are_blamed():
    images = torch.randn(6, 4)
    images[4, 2] = math.inf
    loader = DataLoader(TensorDataset(images, torch.zeros(6, dtype=torch.long)), 2)
    with pytest.raises(UserError, match="the loss is nan at step 3 .one., as the batch itself"):
        _trainer().train_epoch(loader, "one")


def test_weights_that_are_not_finite_are_blamed():
    message = "the loss is nan at step 2 .one., as 0.weight and 1 more are not finite since"
    with pytest.raises(UserError, match=message):  # the last layer's gradient is as it should be
        _trainer(Cliff(1), lr=1e10).train_epoch(_loader(), "one")


def test_nothing_is_said_of_what_is_not_found():
    model = nn.Linear(2, 2)
    batch = torch.randn(3, 2)
    assert finite.origin(model, batch, lambda: model(batch)) == ""
    model.num_batches = nn.BatchNorm1d(2)
    buffers = [buffer.clone() for buffer in model.buffers()]
    finite.origin(model, batch, lambda: model.num_batches(batch))
    for ours, theirs in zip(model.buffers(), buffers, strict=True):
        assert torch.equal(ours, theirs)


def test_integers_and_shapes_do_not_matter():
    model = nn.Embedding(3, 2)
    batch = {"ids": torch.tensor([0, 2]), "words": ["one", None], "empty": torch.empty(0)}
    assert finite.origin(model, batch, lambda: model(batch["ids"])) == ""
    assert finite.weights_not_finite(model) is None
    model.weight.grad = torch.tensor([[0.0, 1], [math.nan, 1], [0, 1]])
    assert finite.gradient_not_finite(model) == "weight"


def test_steps_whose_gradients_overflow_are_skipped_and_counted():
    batches, learned = list(_loader(12)), []
    for number, layer in ((0, Cliff(3)), (3, nn.Identity())):
        torch.manual_seed(1)
        trainer = _trainer(layer, amp="fp16")
        found = trainer.train_epoch(batches[number:], "one")
        assert found["skipped_steps"] == 3 - number
        learned.append(trainer.model.state_dict())
    for ours, theirs in zip(*(state.values() for state in learned), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)  # of float16


def test_losses_that_are_not_finite_do_not_spoil_the_mean_under_fp16():
    images, labels = torch.randn(8, 4), torch.randint(3, (8,))
    spoiled = images.clone()
    spoiled[2:4] = math.nan
    found = []
    for given in (images, spoiled):
        torch.manual_seed(1)
        trainer = _trainer(amp="fp16", lr=0.0)
        found.append(trainer.train_epoch(DataLoader(TensorDataset(given, labels), 2), "one"))
    whole, partial = found
    assert (whole["skipped_steps"], partial["skipped_steps"]) == (0, 1)
    assert math.isfinite(partial["loss"]) and partial["loss"] != whole["loss"]


def test_too_many_skipped_steps_in_a_row_stop_the_run():
    trainer = _trainer(Cliff(10**6), amp="fp16")
    message = f"^{MAX_SKIPPED} steps in a row .* up to step {MAX_SKIPPED} .* that of 0.weight does"
    with pytest.raises(UserError, match=message):
        trainer.train_epoch(_loader(100), "one")


def test_an_epoch_of_skipped_steps_stops_the_run():
    with pytest.raises(UserError, match="all steps of one were skipped"):
        _trainer(Cliff(10**6), amp="fp16").train_epoch(_loader(6), "one")


def test_skipped_steps_are_counted_across_a_stop():
    trainer = _trainer(Cliff(2), amp="fp16")
    batches = list(_loader(12))

    class Enough(Exception):
        pass

    def stop() -> None:
        if trainer.step == 3:
            raise Enough

    with pytest.raises(Enough):
        trainer.train_epoch(batches, "one", stop)
    other = _trainer(nn.Identity(), amp="fp16")
    other.load_state(trainer.state())

    class Rest(list):
        def __len__(self) -> int:
            return 6

    found = other.train_epoch(Rest(batches[3:]), "one")
    assert found["skipped_steps"] == 2


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_scale_is_that_of_one_process(processes: int):
    """Losses are multiplied by the number of processes, whose mean gradient is taken."""
    loss = torch.tensor(0.5)
    scaler = LossScaler(CPU.device, "fp16", processes)
    assert scaler.scaled(loss * processes).item() == 0.5 * 65536 == 0.5 * scaler.scale
    other = LossScaler(CPU.device, "fp16")
    other.load_state_dict(scaler.state_dict())
    assert other.scaled(loss).item() == 0.5 * 65536


def test_a_row_of_skipped_steps_goes_on_behind_a_stop():
    trainer, batches = _trainer(Cliff(10**6), amp="fp16"), list(_loader(20))
    with pytest.raises(UserError, match="all steps of one were skipped"):
        trainer.train_epoch(batches, "one")
    trainer.end_epoch()
    other = _trainer(Cliff(10**6), amp="fp16")
    other.load_state(trainer.state())
    with pytest.raises(UserError, match="all steps of two were skipped|20 steps in a row"):
        other.train_epoch(batches, "two")
    assert other.scaler.skipped_in_row == MAX_SKIPPED
