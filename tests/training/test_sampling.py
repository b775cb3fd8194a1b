"""The order of images, and the seeds of their random changes."""

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from aal.training.devices import Worker
from aal.training.loaders import step_loader, train_loader
from aal.training.sampling import EpochSampler, Seeded, StepSampler

CPU = torch.device("cpu")


def _indices(sampler: Sampler) -> list[int]:
    return [index for index, _ in sampler]


def _order(count: int, batch: int, steps: int, every: int, seed: int = 0, worker=None) -> list[int]:
    """The images of all stretches of a run, one after the other."""
    sampler = StepSampler(count, batch, seed, worker or Worker(CPU), steps, every)
    indices = []
    for stretch in range(-(-steps // every)):
        sampler.set_epoch(stretch)
        part = _indices(sampler)
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
    assert _indices(sampler) == _order(10, 4, 9, 9)[24:32]
    sampler.set_epoch(4)
    assert _indices(sampler) == _order(10, 4, 9, 9)[32:]  # the last stretch has one step


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


SAMPLERS = {
    "steps": lambda worker: StepSampler(10, 4, 0, worker, 9, 5),
    "epochs": lambda worker: EpochSampler(10, 4 // worker.world_size, 0, worker),
}


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_that_are_done_are_left_out(kind: str, world_size: int):
    sampler = SAMPLERS[kind](Worker(CPU, world_size - 1, world_size))
    sampler.set_epoch(1)
    whole, length = list(sampler), len(sampler)
    sampler.set_epoch(1, done=2)
    assert list(sampler) == whole[2 * 4 // world_size :]
    assert len(sampler) == length


def test_an_epoch_is_that_of_pytorchs_sampler_in_whole_batches():
    theirs = DistributedSampler(range(10), 1, 0, seed=5)
    ours = EpochSampler(10, 4, 5, Worker(CPU))
    for epoch in range(2):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert _indices(ours) == list(theirs)[:8]


@pytest.mark.parametrize("count", [12, 13, 15, 31])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_an_epoch_has_the_same_batches_in_any_number_of_processes(count: int, world_size: int):
    whole, own_size = _indices(EpochSampler(count, 12, 0, Worker(CPU))), 12 // world_size
    shares = [
        _indices(EpochSampler(count, own_size, 0, Worker(CPU, rank, world_size)))
        for rank in range(world_size)
    ]
    starts = range(0, len(shares[0]), own_size)
    assert [i for start in starts for own in shares for i in own[start : start + own_size]] == whole


def test_images_that_are_fewer_than_a_batch_are_shared():
    shares = [_indices(EpochSampler(5, 4, 0, Worker(CPU, rank, 2))) for rank in range(2)]
    whole = _indices(EpochSampler(5, 8, 0, Worker(CPU)))
    assert sorted(whole) == list(range(5)) and shares[0] + shares[1] == [*whole, whole[0]]


class Noisy(Dataset):
    """Items that are random."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(())


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_random_in_an_image_depends_on_its_seed_alone(workers: int):
    loader = train_loader(Noisy(), 4, workers, 0, Worker(CPU))
    loader.sampler.set_epoch(3)
    torch.manual_seed(workers)
    iterator = iter(loader)
    before = torch.get_rng_state()
    whole = list(iterator)
    assert torch.equal(torch.get_rng_state(), before)
    loader.sampler.set_epoch(3, done=1)
    (rest,) = loader
    assert torch.equal(rest, whole[1])
    loader.sampler.set_epoch(4)
    fractions = [torch.cat(batches).frac().sort().values for batches in (whole, list(loader))]
    assert not torch.isin(*fractions).any()  # in another epoch the images are others


def test_items_are_the_same_whoever_loads_them():
    draws = list(EpochSampler(10, 10, 0, Worker(CPU)))
    assert len({seed for _, seed in draws}) == 10
    items = Seeded(Noisy())
    assert [items[draw] for draw in draws] == [items[draw] for draw in draws]
    halves = [dict(EpochSampler(10, 5, 0, Worker(CPU, rank, 2))) for rank in range(2)]
    assert halves[0] | halves[1] == dict(draws)
