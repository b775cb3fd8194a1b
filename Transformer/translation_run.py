"""The task of translating, and one run of it: cross entropy of tokens, and BLEU of texts."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import data
import decoding
import numpy as np
import tokens
import torch
from sacrebleu.metrics import BLEU
from torch import Tensor, nn
from transformer import MAX_LENGTH, PAD, SPECIAL

from aal.training import run
from aal.training.command_line import UserError, write_output
from aal.training.devices import Worker
from aal.training.evaluation import evaluate, in_parts
from aal.training.files import read_checkpoint
from aal.training.precision import autocast

_SCORING_TOKENS = 4096  # per batch and process, so that a score does not depend on --batch-size
_RANDOM_LENGTH = 24  # tokens of a text in a dry run
_LINES = 64  # that --translate reads from a file or a pipe before it writes


class _Pairs(NamedTuple):
    """What the network learns of some pairs of texts."""

    source: Tensor  # (B, S)
    target: Tensor  # (B, T), START first
    labels: Tensor  # (B, T), END last
    counts: Tensor  # (B,) labels that are not PAD, on the CPU


@dataclass(frozen=True)
class Translation:
    """Pairs of texts, to be learned or scored (see ``aal.training.task.Task``).

    Args:
        label_smoothing: share of each label spread over the vocabulary.
    """

    label_smoothing: float = 0.0

    unit: ClassVar[str] = "tokens"
    is_even: ClassVar[bool] = False
    measures: ClassVar[Sequence[str]] = ()

    def on_device(self, batch: data.Batch, device: torch.device) -> _Pairs:
        labels = batch.target[:, 1:]
        tensors = (batch.source, batch.target[:, :-1], labels)
        moved = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return _Pairs(*moved, (labels != PAD).sum(1))

    def changed(self, batch: _Pairs) -> _Pairs:
        return batch

    def split(self, batch: _Pairs, count: int) -> Sequence[_Pairs]:
        count = min(count, len(batch.source))
        return [_Pairs(*part) for part in zip(*(t.tensor_split(count) for t in batch), strict=True)]

    def first(self, batch: _Pairs, count: int) -> _Pairs:
        return _Pairs(*(tensor[:count] for tensor in batch))

    def weight(self, batch: _Pairs) -> int:
        return int(batch.counts.sum())

    def loss(self, model: nn.Module, batch: _Pairs) -> tuple[Tensor, Sequence[Tensor]]:
        return model(batch.source, batch.target, batch.labels, self.label_smoothing), []


@dataclass
class TranslationRun(run.Run):
    """A run of a network that translates.

    A checkpoint carries its tokenisers, so that translating needs no data set.

    Args:
        data_settings: which texts, and how they become ids.
        build_for: makes the network for the sizes of both vocabularies, or raises ``ValueError``.
    """

    data_settings: data.Settings
    build_for: Callable[[int, int], nn.Module]

    metric = "bleu"
    columns = ("train_loss", "val_loss", "val_bleu")

    def __post_init__(self) -> None:
        args = self.args
        super().__post_init__()
        if args.translate and self.processes > 1:
            raise UserError("--translate runs on one device; name one with --device")
        settings = self.data_settings
        if args.dry_run:
            self.vocabularies = (settings.vocab_size, settings.vocab_size)
            lengths = _RANDOM_LENGTH, settings.max_length
            budget = self.settings.batch_size // self.processes
            part = self._random_part(max(1, min(*lengths, budget - 1)))
            self.train_part = self.validation_part = part
        elif "model_path" in args:
            state = read_checkpoint(args.model_path)
            self.check_checkpoint(args.model_path, state)
            self._use(*_tokenizers_of(args.model_path, state))
            if not args.translate:
                learned = self.source, self.target, state.get("train_files")
                self.test_part = data.load_test(settings, args.data_path, *learned)
        else:
            corpus = data.load(settings, args.data_path)
            self._use(corpus.source, corpus.target)
            self.train_part, self.validation_part = corpus.train, corpus.validation
            self.test_part, self.fingerprint = corpus.test, corpus.fingerprint
            self.train_files = corpus.train_files
        if "model_path" not in args:
            data.check_fits(self.train_part, self.settings.batch_size, self.processes)
        self.make_model()

    def build(self) -> nn.Module:
        return self.build_for(*self.vocabularies)

    def task(self) -> Translation:
        return Translation(self.settings.label_smoothing)

    def train_loader(self, worker: Worker) -> tuple[data.Batches, int]:
        settings, place = self.settings, (worker.rank, worker.world_size)
        loader = data.Batches(self.train_part, settings.batch_size, settings.seed, *place)
        return loader, len(loader)

    def begin_epoch(self, loader: data.Batches, epoch: int, done: int) -> None:
        loader.set_epoch(epoch, done)

    def validate(self, worker: Worker, title: str) -> dict[str, Any]:
        """Loss, and BLEU of greedy translations; a dry run has no texts, and so the loss alone."""
        scores = self._loss(self.validation_part, worker, title)
        if self.args.dry_run:
            return scores
        return scores | self._bleu(self.validation_part, worker, beam=1)

    def test(self, worker: Worker) -> dict[str, Any]:
        scores = self._bleu(self.test_part, worker, self.args.beam)
        return scores | {"loss": self._loss(self.test_part, worker, "test")["loss"]}

    def scores_text(self, row: Mapping[str, Any]) -> str:
        return (
            f"train loss {row['train_loss']:.4f}  "
            f"validation loss {row['val_loss']:.4f}, BLEU {row['val_bleu']:.2f}"
        )

    def test_text(self, test: Mapping[str, Any]) -> str:
        return (
            f"test BLEU {test['bleu']:.2f} (signature {test['signature']}), "
            f"loss {test['loss']:.4f} ({len(self.test_part)} texts)"
        )

    def extras(self) -> dict[str, Any]:
        return {
            "source": self.source.state(),
            "target": self.target.state(),
            "fingerprint": self.fingerprint,
            "train_files": self.train_files,
        }

    def check_extras(self, state: Mapping[str, Any]) -> None:
        if state.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"{self.folder.last} was made with other texts or vocabularies than those in "
                f"{self.args.data_path}"
            )

    def check_checkpoint(self, path: Path, state: Mapping[str, Any]) -> None:
        if not {"model", "function", "source", "target"} <= set(state):
            raise UserError(f"{path} is no checkpoint of a Transformer of this project")
        super().check_checkpoint(path, state)

    def trial_flags(self) -> Sequence[object]:
        return "--vocab-size", max(self.vocabularies)

    def data_size(self) -> tuple[tuple[int, int], int]:
        """Vocabularies, and tokens of the longest training pair."""
        return self.vocabularies, int(self.train_part.sizes.max())

    def resemble(self, size: tuple[tuple[int, int], int]) -> None:
        self.vocabularies, longest = size
        self.train_part = self.validation_part = self._random_part(longest - 1)
        data.check_fits(self.train_part, self.settings.batch_size, self.processes)
        self.make_model()

    def trial_text(self) -> str:
        return f" with {self.data_settings.vocab_size} ids in each language"

    def execute(self, worker: Worker) -> None:
        """As ``Run.execute``, or translate stdin with ``--translate``."""
        if not self.args.translate:
            super().execute(worker)
            return
        self.model.to(worker.device).eval()
        count = 1 if sys.stdin.isatty() else _LINES  # a person waits for each answer
        for lines in self._read(sys.stdin.buffer, count):
            write_output("".join(f"{text}\n" for text in self._translated(lines, worker)).encode())

    def _use(self, source: tokens.Tokenizer, target: tokens.Tokenizer) -> None:
        self.source, self.target = source, target
        self.vocabularies = (len(source), len(target))

    def _random_part(self, length: int) -> data.Part:
        """Texts of so many random ids for two batches of every process."""
        budget = self.settings.batch_size // self.processes
        count = 2 * self.processes * max(1, budget // (length + 1))
        random = np.random.default_rng(self.settings.seed)
        bounds = (len(SPECIAL), min(self.vocabularies))
        try:
            both = random.integers(*bounds, (2, count, length), np.int32)
            return data.Part(*map(_sequences, both))
        except MemoryError as error:
            raise UserError(f"cannot make the texts for want of memory: {error}") from error

    def _batches(self, part: data.Part, worker: Worker) -> data.Batches:
        """This process's share of a part, every pair in exactly one process."""
        place = {"rank": worker.rank, "world_size": worker.world_size}
        return data.Batches(part, _SCORING_TOKENS * worker.world_size, **place)

    def _loss(self, part: data.Part, worker: Worker, title: str) -> dict[str, float]:
        loader = self._batches(part, worker)
        return evaluate(Translation(), self.model, loader, worker, self.settings.amp, title)

    def _bleu(self, part: data.Part, worker: Worker, beam: int) -> dict[str, Any]:
        """BLEU of a part's translations, and how it was computed."""
        own = list(self._translations(part, worker, beam))
        everyone = [item for share in worker.gather_objects(own) for item in share]
        texts = [text for _, text in sorted(everyone)]
        metric = BLEU()
        score = metric.corpus_score(texts, [part.references]).score
        return {"bleu": score, "signature": str(metric.get_signature())}

    @torch.no_grad()
    def _translations(
        self, part: data.Part, worker: Worker, beam: int
    ) -> Iterator[tuple[int, str]]:
        """Places in the part, and translations, of this process's share."""
        self.model.eval()
        options, count = {"beam": beam, "length_penalty": self.args.length_penalty}, 1

        def translate(source: Tensor) -> list[list[int]]:
            with autocast(worker.device, self.settings.amp):
                return decoding.translate(self.model, source, **options)

        for batch in self._batches(part, worker):
            source = batch.source.to(worker.device)
            parts, count = in_parts(source.chunk, translate, "translation", count)
            texts = (self.target.decode(ids) for _, found in parts for ids in found)
            yield from zip(batch.indices.tolist(), texts, strict=True)

    def _read(self, file: Iterable[bytes], count: int) -> Iterator[list[list[int]]]:
        """The ids of lines, ``count`` at a time, or fewer before an error or at the end."""
        lines: list[list[int]] = []
        for number, line in enumerate(file, 1):
            try:
                lines.append(self._ids(line, number))
            except UserError:
                yield lines
                raise
            if len(lines) == count:
                yield lines
                lines = []
        yield lines

    def _ids(self, line: bytes, number: int) -> list[int]:
        try:
            ids = self.source.encode(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of the input is not UTF-8 text") from error
        if len(ids) > MAX_LENGTH:
            raise UserError(
                f"line {number} of the input has {len(ids)} tokens, but the network reads "
                f"{MAX_LENGTH}; split it"
            )
        return ids

    def _translated(self, lines: Sequence[Sequence[int]], worker: Worker) -> list[str]:
        """A translation of each line; none of a line without words."""
        results = [""] * len(lines)
        if places := [place for place, ids in enumerate(lines) if ids]:
            sources = _sequences(lines[place] for place in places)
            part = data.Part(sources, _sequences([[]] * len(places)))
            for index, text in self._translations(part, worker, self.args.beam):
                results[places[index]] = text
        return results


def _sequences(texts: Iterable[Sequence[int]]) -> data.Sequences:
    texts = [np.asarray(text, np.int32) for text in texts]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return data.Sequences(np.concatenate(texts), offsets)


def _tokenizers_of(path: Path, state: Mapping[str, Any]) -> list[tokens.Tokenizer]:
    """Those of the source and of the target in a checkpoint."""
    try:
        return [tokens.from_state(state[name]) for name in ("source", "target")]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
