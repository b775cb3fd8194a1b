"""One training step: parts of batches, clipping, unequal weights, smoothed and mixed labels."""

import contextlib
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aal.training.classification import Classification
from aal.training.command_line import UserError
from aal.training.devices import Worker
from aal.training.evaluation import evaluate
from aal.training.loop import Trainer

CPU = Worker(torch.device("cpu"))
TASK, SMOOTHED = Classification(), Classification(label_smoothing=0.1)


def _loader(count: int) -> DataLoader:
    """Batches of ten samples, and of what is left."""
    images = torch.randn(count, 3, 4, 4, dtype=torch.float64)
    return DataLoader(TensorDataset(images, torch.randint(5, (count,))), 10)


def _trained(
    loader: DataLoader, lr: float = 0.1, task: Classification = SMOOTHED, **kwargs
) -> tuple[nn.Module, dict]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    trainer = Trainer(task, model, optimizer, lambda step: lr, CPU, **kwargs)
    return model, trainer.train_epoch(loader, "")


@pytest.mark.parametrize("parts", [2, 3, 10])
def test_parts_of_a_batch_have_its_loss_and_gradient(parts: int):
    loader = _loader(17)  # the last seven do not divide into equal parts
    whole, expected = _trained(loader, max_grad_norm=0.3)
    split, found = _trained(loader, max_grad_norm=0.3, accumulation=parts)
    for ours, theirs in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    assert found["accuracy"] == expected["accuracy"]


@pytest.mark.parametrize("largest", [1e-3, 1e3])
def test_the_gradient_is_clipped_to_a_norm(largest: float):
    loader = _loader(10)
    before, _ = _trained(loader, lr=0.0)
    free, _ = _trained(loader, lr=1.0)
    clipped, _ = _trained(loader, lr=1.0, max_grad_norm=largest)
    steps = [
        nn.utils.parameters_to_vector(before.parameters())
        - nn.utils.parameters_to_vector(model.parameters())
        for model in (free, clipped)
    ]
    scale = min(1, largest / steps[0].norm())
    torch.testing.assert_close(steps[1], scale * steps[0], rtol=1e-3, atol=1e-12)


def test_the_loss_of_smoothed_and_mixed_labels():
    loader = _loader(10)
    images, labels = next(iter(loader))
    mixed = torch.full((10, 5), 0.1, dtype=torch.float64)
    mixed[torch.arange(10), labels] = 0.6
    task = Classification(label_smoothing=0.2, mix=lambda x, y: (x, mixed))
    model, found = _trained(loader, lr=0.0, task=task)
    log = model(images).log_softmax(1)
    targets = 0.8 * mixed + 0.2 / 5
    assert found["loss"] == pytest.approx(-(targets * log).sum(1).mean().item(), rel=1e-12)
    correct = (log.argmax(1) == labels).double().mean().item()  # the larger label counts
    assert found["accuracy"] == pytest.approx(100 * correct)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_continues_with_its_own_random_state(rank: int):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = Trainer(TASK, model, optimizer, lambda step: 0.1, CPU).state()
    state["rng"] = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        state["rng"].append({"cpu": torch.get_rng_state()})
    worker = Worker(torch.device("cpu"), rank, world_size=2)
    Trainer(TASK, model, optimizer, lambda step: 0.1, worker).load_state(state)
    assert torch.equal(torch.get_rng_state(), state["rng"][rank]["cpu"])


def test_another_number_of_processes_draws_its_own_random_numbers():
    model = nn.Linear(2, 2)
    trainer = Trainer(TASK, model, torch.optim.SGD(model.parameters(), 0.1), lambda step: 0.1, CPU)
    state = trainer.state()
    state["rng"] *= 2
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trainer.load_state(state)
    assert torch.equal(torch.get_rng_state(), before)


class Words:
    """A task of rows that hold unequal numbers of words: the mean over words of a row's loss."""

    unit, is_even, measures = "words", False, ("output",)

    def on_device(self, batch: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
        return batch

    def changed(self, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        return batch

    def split(self, batch: Sequence[Tensor], count: int) -> Sequence[Sequence[Tensor]]:
        count = min(count, len(batch[0]))
        return list(zip(*(tensor.tensor_split(count) for tensor in batch), strict=True))

    def weight(self, batch: Sequence[Tensor]) -> int:
        return int(batch[1].sum())

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        rows, words = batch
        outputs = model(rows)[:, 0] * words
        return outputs.square().sum() / words.sum(), [outputs.detach().sum()]


ROWS = torch.arange(21, dtype=torch.float64).reshape(7, 3).sin()
WORDS = torch.tensor([5, 1, 9, 2, 2, 7, 30])


class OfTwo(nn.Linear):
    """What a process sees of the wrapper for two processes, which halves the sum of gradients."""

    def no_sync(self):
        return contextlib.nullcontext()


def _words_model(kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    model = kind(3, 1).double()
    nn.init.constant_(model.weight, 0.3)
    nn.init.constant_(model.bias, -0.1)
    return model


def _gradient_of_words(worker: Worker, rows: slice, accumulation: int) -> tuple[Tensor, float, int]:
    """Of one process's rows, the mean loss that it reports, and the number of forward passes."""
    model, passes = _words_model(OfTwo), []
    model.register_forward_hook(lambda *_: passes.append(1))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    trainer = Trainer(Words(), model, optimizer, lambda step: 0.0, worker)
    trainer.accumulation = accumulation
    found = trainer.train_epoch([(ROWS[rows], WORDS[rows])], "")
    assert "words_per_s" in found
    gradient = nn.utils.parameters_to_vector(p.grad for p in model.parameters())
    return gradient, found["loss"], len(passes)


@pytest.mark.parametrize("accumulation", [1, 2, 3, 7])
def test_the_gradient_is_that_of_the_mean_over_all_units(accumulation: int, monkeypatch):
    model = _words_model()
    loss, _ = Words().loss(model, (ROWS, WORDS))
    expected = nn.utils.parameters_to_vector(torch.autograd.grad(loss, model.parameters()))
    alone, mean, passes = _gradient_of_words(CPU, slice(None), accumulation)
    assert passes == accumulation
    torch.testing.assert_close(alone, expected, rtol=1e-12, atol=0)
    assert mean == pytest.approx(loss.item(), rel=1e-12)
    # Two processes, whose wrapper takes the mean of their gradients.
    monkeypatch.setattr(Worker, "sum", _sum_of_two())
    fewest = min(accumulation, 2)  # of two rows
    monkeypatch.setattr(Worker, "largest", lambda self, values: [max(*values, -fewest)])
    first, second = (
        _gradient_of_words(Worker(torch.device("cpu"), rank, world_size=2), rows, accumulation)
        for rank, rows in enumerate((slice(0, 5), slice(5, 7)))
    )
    torch.testing.assert_close((first[0] + second[0]) / 2, expected, rtol=1e-12, atol=0)
    assert first[2] == second[2] == fewest  # else shares of FSDP2 would wait for each other


def _sum_of_two() -> Callable[[Worker, Tensor], Tensor]:
    """``Worker.sum`` that knows the other process's words."""

    def total(self: Worker, values: Tensor) -> Tensor:
        return WORDS.sum() if values.dim() == 0 else values

    return total


def test_scores_are_means_over_units():
    model = _words_model()
    loader = [(ROWS[:3], WORDS[:3]), (ROWS[3:], WORDS[3:])]
    found = evaluate(Words(), model, loader, CPU, "off", "")
    loss, (outputs,) = Words().loss(model, (ROWS, WORDS))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert found["output"] == pytest.approx(outputs.item() / 56, rel=1e-12)
    assert found["words"] == 56


class Small(nn.Linear):
    """Has no memory for more than a few samples, as PyTorch says it on CPU."""

    most, seen = 3, 0

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if len(x) > self.most:
            torch.empty(2**62, dtype=torch.int8)
        self.seen += len(x)
        return super().forward(x)


def test_batches_that_do_not_fit_are_scored_in_parts():
    loader, model = _loader(17), Small(48, 5).double()
    found = evaluate(TASK, model, loader, CPU, "off", "one")
    assert model.seen == 17
    model.most = 20
    expected = evaluate(TASK, model, loader, CPU, "off", "one")
    assert found == pytest.approx(expected, rel=1e-12) and found["samples"] == 17
    model.most = 1  # of the last batch, 7, whose halves are odd
    assert evaluate(TASK, model, loader, CPU, "off", "one") == pytest.approx(expected, rel=1e-12)
    model.most = 0
    with pytest.raises(UserError, match="out of memory .one., even for one sample"):
        evaluate(TASK, model, loader, CPU, "off", "one")
