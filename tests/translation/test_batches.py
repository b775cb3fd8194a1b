"""Batches hold every pair once, within the budget, for any number of processes."""

import numpy as np
import pytest
import torch
from data import Batches, Part, Sequences
from transformer import END, PAD, SPECIAL, START

from aal.training.command_line import UserError


def sequences(lengths: np.ndarray) -> Sequences:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32) % 90 + len(SPECIAL)
    return Sequences(ids, offsets)


def part(count: int, seed: int = 0, longest: int = 30) -> Part:
    generator = np.random.default_rng(seed)
    source, target = generator.integers(1, longest + 1, (2, count))
    return Part(sequences(source), sequences(target))


def size(batch) -> int:
    """Tokens that the budget counts: the target is fed to the network without its END."""
    return len(batch.source) * max(batch.source.shape[1], batch.target.shape[1] - 1)


CASES = [
    (count, own_size * world_size, world_size)
    for count in (4, 5, 17, 100, 1001)
    for own_size in (62, 99, 1000)
    for world_size in (1, 2, 3, 4)
]


@pytest.mark.parametrize("count, batch_size, world_size", CASES)
def test_training_batches_hold_every_pair_once(count: int, batch_size: int, world_size: int):
    pairs = part(count, seed=count)
    for seed, epoch in ((0, 0), (0, 3), (7, 1)):
        processes = [
            Batches(pairs, batch_size, seed, rank, world_size) for rank in range(world_size)
        ]
        for one in processes:
            one.set_epoch(epoch)
        assert len({len(one) for one in processes}) == 1
        found = []
        for one in processes:
            batches = list(one)
            assert len(batches) == len(one) > 0
            found += [batch.indices.tolist() for batch in batches]
        assert all(found) and sorted(sum(found, [])) == list(range(count))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_processes_shares_the_same_batches(world_size: int):
    pairs, alone = part(1001), Batches(part(1001), 1000, 0)
    processes = [Batches(pairs, 1000, 0, rank, world_size) for rank in range(world_size)]
    for step, *shares in zip(alone, *processes, strict=True):
        assert 0 < size(step) <= 1000
        assert step.indices.tolist() == sum((share.indices.tolist() for share in shares), [])
        counts = [len(share.indices) for share in shares]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("count, batch_size, world_size", [(1, 9, 3), (5, 40, 4), *CASES])
def test_scoring_batches_hold_every_pair_once(count: int, batch_size: int, world_size: int):
    pairs = part(count, seed=count)
    found = []
    for rank in range(world_size):
        for batch in Batches(pairs, batch_size, rank=rank, world_size=world_size):
            assert size(batch) <= batch_size // world_size or len(batch.indices) == 1
            found += batch.indices.tolist()
    assert sorted(found) == list(range(count))


def test_a_batch_is_padded_and_its_target_has_start_and_end():
    pairs = Part(sequences(np.array([3, 1])), sequences(np.array([2, 4])))
    (batch,) = Batches(pairs, 100)
    assert batch.indices.tolist() == [1, 0]
    source, target = pairs.source, pairs.target
    assert batch.source.tolist() == [[*source[1], PAD, PAD], [*source[0]]]
    assert batch.target.tolist() == [
        [START, *target[1], END],
        [START, *target[0], END, PAD, PAD],
    ]
    assert {t.dtype for t in (batch.source, batch.target, batch.indices)} == {torch.int64}


def order(batches: Batches) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


def test_order_depends_on_seed_and_epoch_alone():
    pairs = part(300)

    def epoch_of(seed: int, *epochs: int) -> list[list[int]]:
        batches = Batches(pairs, 400, seed)
        for epoch in epochs:
            batches.set_epoch(epoch)
        return order(batches)

    assert epoch_of(1, 5) == epoch_of(1, 0, 2, 5)
    assert epoch_of(1, 0) == epoch_of(1)
    orders = [epoch_of(0, 0), epoch_of(0, 1), epoch_of(1, 0), epoch_of(1, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_going_through_the_batches_twice_is_the_same():
    batches = Batches(part(100), 200, seed=3)
    assert order(batches) == order(batches)


def test_scoring_is_in_order_of_length():
    pairs = part(200)
    batches = Batches(pairs, 300)
    lengths = [int(pairs.source.lengths[i]) for indices in order(batches) for i in indices]
    assert lengths == sorted(lengths)
    batches.set_epoch(4)
    assert order(batches) == order(Batches(pairs, 300))


def test_pairs_of_a_batch_and_batches_of_a_step_have_like_lengths():
    pairs = part(2000, longest=60)
    processes = [Batches(pairs, 4000, 0, rank, 2) for rank in range(2)]
    padded = real = 0
    for step in zip(*processes, strict=True):
        longest = [max(batch.source.shape[1], batch.target.shape[1] - 1) for batch in step]
        assert max(longest) - min(longest) <= 6
        for batch in step:
            padded += size(batch)
            real += np.maximum(pairs.source.lengths, pairs.target.lengths + 1)[batch.indices].sum()
    assert real > 0.95 * padded


def test_batches_are_as_large_as_the_budget_allows():
    batches = [size(batch) for batch in Batches(part(2000), 500, seed=0)]
    assert sum(tokens > 400 for tokens in batches) > 0.9 * len(batches)


def test_a_training_pair_that_does_not_fit_is_refused():
    pairs = Part(sequences(np.array([3, 5])), sequences(np.array([2, 9])))
    assert len(Batches(pairs, 10, seed=0)) == 2
    with pytest.raises(UserError, match="--batch-size 9 tokens, 9 in each .* pair of 10; raise"):
        Batches(pairs, 9, seed=0)
    with pytest.raises(UserError, match="--batch-size 19 tokens, 9 in each process"):
        Batches(pairs, 19, seed=0, world_size=2)


def test_fewer_training_pairs_than_processes_are_refused():
    with pytest.raises(UserError, match="2 training pairs are too few for 3 processes"):
        Batches(part(2), 1000, seed=0, world_size=3)


def test_a_rest_that_processes_cannot_share_joins_the_batch_before():
    pairs = Part(sequences(np.full(3, 10)), sequences(np.full(3, 9)))
    assert [len(batch.indices) for batch in Batches(pairs, 20, seed=0)] in ([1, 2], [2, 1])
    shares = [order(Batches(pairs, 20, 0, rank, 2)) for rank in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[2], [1]]


def test_batches_that_are_done_are_left_out():
    batches = Batches(part(100, seed=0), 200, seed=3)
    batches.set_epoch(2)
    whole, length = [batch.indices.tolist() for batch in batches], len(batches)
    batches.set_epoch(2, done=3)
    assert [batch.indices.tolist() for batch in batches] == whole[3:]
    assert len(batches) == length == len(whole)
