"""Batches of texts: what they hold, in which order, and how processes share them."""

import numpy as np
import pytest
import torch
import wordpiece
from batches import Batches, Part, encode
from labelled import Examples

from aal.training.command_line import UserError


def part_of(count: int) -> Part:
    """Text ``i`` has ``1 + i % 5`` tokens, all of which are ``10 + i``, and is of class ``i``."""
    lengths = 1 + np.arange(count) % 5
    ids = np.repeat(10 + np.arange(count, dtype=np.int32), lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Part(ids, (ids % 2).astype(np.int8), offsets, np.arange(count))


def seen(loaders: list[Batches]) -> list[int]:
    return [number for loader in loaders for batch in loader for number in batch.classes.tolist()]


def test_texts_keep_their_ids_segments_and_classes():
    examples = Examples([("the dog", "cat"), ("cat", "the dog")], np.array([1, 0]))
    tokenizer = wordpiece.learn(["the dog cat"] * 3, 50)
    (batch,) = Batches(encode(examples, tokenizer), 4, pad=0)
    the, dog, cat = (tokenizer.token_to_id(word) for word in ("the", "dog", "cat"))
    assert batch.ids.tolist() == [[2, the, dog, 3, cat, 3], [2, cat, 3, the, dog, 3]]
    assert batch.segments.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert batch.classes.tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch} == {torch.int64}


@pytest.mark.parametrize("length", [None, 9])
def test_texts_are_filled_up_on_the_right(length: int | None):
    for batch in Batches(part_of(13), 4, pad=7, length=length, seed=0):
        lengths = 1 + batch.classes % 5
        assert batch.ids.shape[1] == (length or lengths.max())
        places = torch.arange(batch.ids.shape[1])
        torch.testing.assert_close(batch.mask, (places < lengths[:, None]).long())
        expected = torch.where(batch.mask == 1, 10 + batch.classes[:, None], 7)
        torch.testing.assert_close(batch.ids, expected)
        torch.testing.assert_close(batch.segments, batch.mask * (batch.classes[:, None] % 2))


def test_the_order_depends_on_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        loader = Batches(part_of(20), 6, pad=0, seed=seed)
        loader.set_epoch(epoch)
        return seen([loader])

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(*of)) for of in ((1, 0), (1, 1), (2, 0), (2, 1))}) == 4
    assert sorted(order(1, 5)) == list(range(20))


@pytest.mark.parametrize("count", [20, 21, 22, 23])
def test_processes_share_every_step(count: int):
    """Together they see what one would, but for a last step with less than a text for each."""
    loaders = [Batches(part_of(count), 10, 0, None, 3, rank, 3) for rank in range(3)]
    assert len({len(loader) for loader in loaders}) == 1
    alone = list(Batches(part_of(count), 10, 0, None, 3))
    for step, shares in enumerate(zip(*loaders, strict=True)):
        together = sorted(number for share in shares for number in share.classes.tolist())
        assert together == sorted(alone[step].classes.tolist())
    assert len(seen(loaders)) == (count if count % 10 not in (1, 2) else 20)


@pytest.mark.parametrize("count", [1, 2, 20])
def test_processes_score_each_text_once(count: int):
    loaders = [Batches(part_of(count), 6, pad=0, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(seen(loaders)) == list(range(count))
    lengths = [batch.ids.shape[1] for batch in loaders[0]]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("count, size", [(2, 10), (10, 2)])
def test_fewer_texts_than_processes_are_refused(count: int, size: int):
    with pytest.raises(UserError, match="too few for 3 processes"):
        Batches(part_of(count), size, pad=0, seed=0, world_size=3)


def test_batches_that_are_done_are_left_out():
    loader = Batches(part_of(20), 6, pad=0, seed=1)
    loader.set_epoch(2)
    whole, length = seen([loader]), len(loader)
    loader.set_epoch(2, done=2)
    assert seen([loader]) == whole[12:] and len(loader) == length == 4
