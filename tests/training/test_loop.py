"""One training step: parts of batches, clipping, smoothed and mixed labels."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aal.training.devices import Worker
from aal.training.loop import Trainer

CPU = Worker(torch.device("cpu"))


def _loader(count: int) -> DataLoader:
    """Batches of ten samples, and of what is left."""
    images = torch.randn(count, 3, 4, 4, dtype=torch.float64)
    return DataLoader(TensorDataset(images, torch.randint(5, (count,))), 10)


def _trained(loader: DataLoader, lr: float = 0.1, **kwargs) -> tuple[nn.Module, dict]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    trainer = Trainer(model, optimizer, lambda step: lr, CPU, **kwargs)
    return model, trainer.train_epoch(loader, "")


@pytest.mark.parametrize("parts", [2, 3, 10])
def test_parts_of_a_batch_have_its_loss_and_gradient(parts: int):
    loader = _loader(17)  # the last seven do not divide into equal parts
    whole, expected = _trained(loader, label_smoothing=0.1, max_grad_norm=0.3)
    split, found = _trained(loader, label_smoothing=0.1, max_grad_norm=0.3, accumulation=parts)
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
    model, found = _trained(loader, lr=0.0, label_smoothing=0.2, mix=lambda x, y: (x, mixed))
    log = model(images).log_softmax(1)
    targets = 0.8 * mixed + 0.2 / 5
    assert found["loss"] == pytest.approx(-(targets * log).sum(1).mean().item(), rel=1e-12)
    correct = (log.argmax(1) == labels).double().mean().item()  # the larger label counts
    assert found["accuracy"] == pytest.approx(100 * correct)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_continues_with_its_own_random_state(rank: int):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = Trainer(model, optimizer, lambda step: 0.1, CPU).state()
    state["rng"] = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        state["rng"].append({"cpu": torch.get_rng_state()})
    worker = Worker(torch.device("cpu"), rank, world_size=2)
    Trainer(model, optimizer, lambda step: 0.1, worker).load_state(state)
    assert torch.equal(torch.get_rng_state(), state["rng"][rank]["cpu"])


def test_another_number_of_processes_draws_its_own_random_numbers():
    model = nn.Linear(2, 2)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), lambda step: 0.1, CPU)
    state = trainer.state()
    state["rng"] *= 2
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trainer.load_state(state)
    assert torch.equal(torch.get_rng_state(), before)
