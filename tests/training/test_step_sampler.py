"""The order of images in runs that count steps."""

import pytest
import torch
from torch.utils.data import TensorDataset

from aal.training.data import StepSampler, step_loader
from aal.training.devices import Worker

CPU = torch.device("cpu")


def _order(count: int, batch: int, steps: int, every: int, seed: int = 0, worker=None) -> list[int]:
    """The images of all stretches of a run, one after the other."""
    sampler = StepSampler(count, batch, seed, worker or Worker(CPU), steps, every)
    indices = []
    for stretch in range(-(-steps // every)):
        sampler.set_epoch(stretch)
        part = list(sampler)
        assert len(part) == len(sampler)
        indices += part
    return indices


def test_every_image_comes_once_before_one_comes_again():
    order = _order(count=10, batch=4, steps=10, every=10)
    assert len(order) == 40
    for start in range(0, 40, 10):
        assert sorted(order[start : start + 10]) == list(range(10))
    assert order[:10] != order[10:20]


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_the_order_does_not_depend_on_validations(every: int):
    assert _order(10, 4, 9, every) == _order(10, 4, 9, 9)


def test_the_order_depends_on_the_seed():
    assert _order(10, 4, 9, 9, seed=1) != _order(10, 4, 9, 9)


def test_a_stretch_may_be_taken_up_without_those_before():
    sampler = StepSampler(10, 4, 0, Worker(CPU), 9, 2)
    sampler.set_epoch(3)
    assert list(sampler) == _order(10, 4, 9, 9)[24:32]
    sampler.set_epoch(4)
    assert list(sampler) == _order(10, 4, 9, 9)[32:]  # the last stretch has one step


def test_a_batch_may_be_larger_than_the_data():
    order = _order(count=3, batch=8, steps=3, every=2)
    assert [order.count(i) for i in range(3)] == [8, 8, 8]


def test_processes_share_every_batch():
    whole = _order(10, 4, 6, 6)
    halves = [_order(10, 4, 6, 6, worker=Worker(CPU, rank, 2)) for rank in range(2)]
    for step in range(6):
        parts = [half[2 * step : 2 * step + 2] for half in halves]
        assert parts[0] + parts[1] == whole[4 * step : 4 * step + 4]


def test_the_loader_gives_whole_batches():
    part = TensorDataset(torch.arange(10))
    loader = step_loader(part, 4, 0, 0, Worker(CPU), 5, 3)
    assert [len(batch) for (batch,) in loader] == [4, 4, 4]
    loader.sampler.set_epoch(1)
    assert len(loader) == 2
    assert [value for (batch,) in loader for value in batch.tolist()] == _order(10, 4, 5, 5)[12:]
