"""Texts as ids, in batches that are filled up to their longest text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import wordpiece
from labelled import Examples
from tokenizers import Tokenizer
from torch import Tensor

from aal.training.command_line import UserError

_CHUNK = 10_000  # texts that are held as encodings at a time


@dataclass(frozen=True)
class Part:
    """Texts as ids in one array: text ``i`` is at ``offsets[i]`` to ``offsets[i + 1]``."""

    ids: np.ndarray  # (tokens,) int32
    segments: np.ndarray  # (tokens,) int8, 0 for the first text of a pair and 1 for the second
    offsets: np.ndarray  # (N + 1,) int64
    classes: np.ndarray  # (N,) int64

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.classes)


def encode(examples: Examples, tokenizer: Tokenizer) -> Part:
    """The ids of texts, cut as ``wordpiece.limit`` has told the tokeniser."""
    ids, segments, lengths = [], [], [0]
    for start in range(0, len(examples), _CHUNK):
        encodings = wordpiece.encode(tokenizer, examples.texts[start : start + _CHUNK])
        ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
        segments += [np.array(encoding.type_ids, np.int8) for encoding in encodings]
        lengths += [len(encoding) for encoding in encodings]
    offsets = np.cumsum(lengths, dtype=np.int64)
    return Part(np.concatenate(ids), np.concatenate(segments), offsets, examples.classes)


class Batch(NamedTuple):
    """Some texts and their classes."""

    ids: Tensor  # (B, T) int64
    segments: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 where there is a token
    classes: Tensor  # (B,) int64


def check_fits(part: Part, batch_size: int, world_size: int) -> None:
    """Raise ``UserError`` if processes would have nothing in a step of so many texts together."""
    if min(len(part), batch_size) < world_size:
        raise UserError(
            f"{len(part)} training texts in batches of {batch_size} are too few for {world_size} "
            "processes; name fewer devices or raise --batch-size"
        )


class Batches:
    """The batches of one process.

    With a seed, the order depends on it and on ``set_epoch`` alone. All processes have the same
    number of batches, and each text is in one of them, unless the last ones are too few to share.
    Without a seed, texts are in the order of their lengths, each in exactly one process.

    Args:
        part: the texts.
        batch_size: texts in a step of all processes together.
        pad: id that fills up batches.
        length: tokens to fill up to; None for those of the longest text.
        seed: None to go through the texts for scoring.
        rank, world_size: this process's place among the processes.

    Raises:
        UserError: with a seed, a process would have nothing.
    """

    def __init__(
        self,
        part: Part,
        batch_size: int,
        pad: int,
        length: int | None = None,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.part, self.pad, self.length, self.seed = part, pad, length, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        if seed is not None:
            check_fits(part, batch_size, world_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the order of an epoch; without a seed all are alike.

        Args:
            done: batches that are not yielded, as an earlier run has had them.
        """
        self.done = done
        if self.seed is None:
            order = np.argsort(self.part.lengths, kind="stable")
        else:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.part))
        steps = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.seed is not None and len(steps[-1]) < self.world_size:
            del steps[-1]
        shares = (step[self.rank :: self.world_size] for step in steps)
        self._batches = [share for share in shares if len(share)]

    def __len__(self) -> int:
        """Of the whole epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._batch, self._batches[self.done :])

    def _batch(self, places: Sequence[int]) -> Batch:
        part = self.part
        lengths = part.lengths[places]
        mask = np.arange(self.length or lengths.max()) < lengths[:, None]
        spans = [slice(*part.offsets[place : place + 2]) for place in places]
        ids, segments = np.full(mask.shape, self.pad, np.int64), np.zeros(mask.shape, np.int64)
        ids[mask] = np.concatenate([part.ids[span] for span in spans])
        segments[mask] = np.concatenate([part.segments[span] for span in spans])
        arrays = (ids, segments, mask.astype(np.int64), part.classes[places])
        return Batch(*map(torch.from_numpy, arrays))
