"""One run of a network that classifies texts, from its command line."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import batches
import bert
import labelled
import numpy as np
import torch
import wordpiece
from architecture import Architecture
from batches import Batches, Part
from labelled import Source
from text_task import Scoring, TextClassification, f1_score
from torch import nn
from transformers import PreTrainedConfig

from aal.training import run
from aal.training.command_line import UserError, note
from aal.training.devices import Worker
from aal.training.evaluation import evaluate
from aal.training.files import read_checkpoint

_SCORING_SIZE = 64  # texts per batch and process
_RANDOM_LENGTH = 32  # tokens of a text in a dry run
_RANDOM_CLASSES = 2


@dataclass
class TextRun(run.Run):
    """A run of a network that classifies texts.

    A checkpoint carries its tokeniser, its labels and the network's configuration, so that scoring
    needs no more than the texts to be scored.

    Args:
        source: where the texts are; tells nothing in a dry run.
        sizes: of a network with new weights.
        ruled: gives a network its learning rule, or raises ``ValueError``.
    """

    source: Source
    sizes: Architecture
    ruled: Callable[[nn.Module], nn.Module]

    metric = "accuracy"
    columns = ("train_accuracy", "val_accuracy", "val_f1", "train_loss", "val_loss")
    frees_blocks = False  # layers read the norm of the block before in backward

    def __post_init__(self) -> None:
        args = self.args
        super().__post_init__()
        self.pretrained = None if "model_path" in args else vars(args).get("pretrained")
        self._check_parts()
        if "model_path" in args:
            self._continue_checkpoint(args.model_path)
        elif args.dry_run:
            self.network_config = self._config(args.vocab_size, _RANDOM_CLASSES)
            part = self._random_part(min(_RANDOM_LENGTH, args.max_length))
            self.train_part = self.validation_part = part
        else:
            self._read_texts()
        if "model_path" not in args:
            batches.check_fits(self.train_part, self.settings.batch_size, self.processes)
        self.make_model()
        self.has_segments = bert.has_segments(self.model)

    def build(self) -> nn.Module:
        if self.pretrained is None:
            model = bert.new(self.network_config)
        else:
            model, has_new_pooler = bert.pretrained(self.pretrained, self.network_config)
            if has_new_pooler:
                note(f"{self.pretrained} has no weights of a pooler, which begins with random ones")
        if self.args.gcp:
            bert.replay_layers(model)
        return self.ruled(model)

    def task(self) -> TextClassification:
        return TextClassification(self.has_segments)

    def train_loader(self, worker: Worker) -> tuple[Batches, int]:
        settings, length = self.settings, None
        if self.args.pad_to_max_length:
            length = self.args.max_length
        loader = Batches(
            self.train_part,
            settings.batch_size,
            self.network_config.pad_token_id,
            length,
            settings.seed,
            worker.rank,
            worker.world_size,
        )
        return loader, len(loader)

    def begin_epoch(self, loader: Batches, epoch: int, done: int) -> None:
        loader.set_epoch(epoch, done)

    def validate(self, worker: Worker, title: str) -> dict[str, float]:
        return self._score(self.validation_part, worker, title)

    def test(self, worker: Worker) -> dict[str, Any]:
        """The scores; of a task with several parts to be tested, by the names of these."""
        scores = {name: self._score(part, worker, "test") for name, part in self.tests.items()}
        return scores.get("", scores)

    def scores_text(self, row: Mapping[str, Any]) -> str:
        return (
            f"train loss {row['train_loss']:.4f}, {row['train_accuracy']:.2f} %  "
            f"validation loss {row['val_loss']:.4f}, {row['val_accuracy']:.2f} %, "
            f"F1 {row['val_f1']:.2f} %"
        )

    def test_text(self, test: Mapping[str, Any]) -> str:
        parts = {"": test} if "accuracy" in test else test
        return "\n".join(
            f"{f'test {name}'.strip()} accuracy {scores['accuracy']:.2f} %, "
            f"F1 {scores['f1']:.2f} %, loss {scores['loss']:.4f} ({scores['samples']:.0f} texts)"
            for name, scores in parts.items()
        )

    def extras(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.to_str(),
            "labels": list(self.labels),
            "architecture": self.network_config.to_json_string(use_diff=False),
            "fingerprint": self.fingerprint,
        }

    def check_extras(self, state: Mapping[str, Any]) -> None:
        if state.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"{self.folder.last} was made with other texts or another tokeniser than those of "
                "this run"
            )

    def check_checkpoint(self, path: Path, state: Mapping[str, Any]) -> None:
        if not {"model", "function", "tokenizer", "labels", "architecture"} <= set(state):
            raise UserError(f"{path} is no checkpoint of a BERT of this project")
        super().check_checkpoint(path, state)

    def trial_flags(self) -> Sequence[object]:
        return () if self.pretrained else ("--vocab-size", self.network_config.vocab_size)

    def data_size(self) -> tuple[int, int, int]:
        """Ids, classes, and tokens of the longest training text."""
        config = self.network_config
        return config.vocab_size, config.num_labels, int(self.train_part.lengths.max())

    def resemble(self, size: tuple[int, int, int]) -> None:
        vocabulary, classes, longest = size
        self.network_config = self._config(vocabulary, classes)
        self.train_part = self.validation_part = self._random_part(longest)
        self.make_model()

    def trial_text(self) -> str:
        return f" with texts of {self.train_part.lengths.max()} tokens"

    def _check_parts(self) -> None:
        parts = self.settings.gradient_accumulation_steps
        own_size = self.settings.batch_size // self.processes
        if parts > max(1, own_size):
            raise UserError(
                f"--gradient-accumulation-steps {parts} is more than the {own_size} texts per step "
                "and device"
            )

    def _continue_checkpoint(self, path: Path) -> None:
        """Take everything but the texts to be scored from a checkpoint."""
        state = read_checkpoint(path)
        self.check_checkpoint(path, state)
        try:
            self.tokenizer = wordpiece.from_state(state["tokenizer"])
            self.network_config = bert.config_from(state["architecture"])
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        self.tests = self._encoded(labelled.load_tests(self.source, state["labels"]))

    def _read_texts(self) -> None:
        args = self.args
        self._config(1, 1)  # what is impossible is found before texts are read
        if self.pretrained is not None:
            try:
                self.tokenizer = wordpiece.pretrained(self.pretrained)
            except ValueError as error:
                raise UserError(f"--pretrained: {error}") from error
        corpus = labelled.load(self.source)
        if self.pretrained is None:
            texts = (text for texts in corpus.train.texts for text in texts)
            self.tokenizer = wordpiece.learn(texts, args.vocab_size)
        wordpiece.limit(self.tokenizer, args.max_length)
        self.labels = corpus.labels
        vocabulary = self.tokenizer.get_vocab_size()
        self.network_config = self._config(vocabulary, len(corpus.labels))
        if vocabulary > self.network_config.vocab_size:
            raise UserError(
                f"--pretrained: the tokeniser of {self.pretrained} has {vocabulary} ids, the "
                f"network {self.network_config.vocab_size}"
            )
        parts = {"train": corpus.train, "validation": corpus.validation}
        self.train_part, self.validation_part = self._encoded(parts).values()
        self.tests = self._encoded(corpus.tests)
        self.fingerprint = self._fingerprint()

    def _encoded(self, parts: Mapping[str, labelled.Examples]) -> dict[str, Part]:
        return {name: batches.encode(part, self.tokenizer) for name, part in parts.items()}

    def _config(self, vocabulary: int, classes: int) -> PreTrainedConfig:
        """The network's configuration, in which a text of ``--max-length`` has its place."""
        try:
            if self.pretrained is None:
                config = bert.new_config(self.sizes, vocabulary, classes)
            else:
                config = bert.pretrained_config(self.pretrained)
                config.num_labels = classes
        except ValueError as error:
            raise UserError(f"{'--pretrained: ' if self.pretrained else ''}{error}") from error
        longest, positions = self.args.max_length, bert.longest_text(config)
        if longest > positions:
            raise UserError(f"--max-length {longest} is more than the network's {positions}")
        return config

    def _fingerprint(self) -> str:
        """Of the texts to learn from and to validate with, as ids, and of what these mean."""
        digest = hashlib.sha256(json.dumps([self.tokenizer.to_str(), self.labels]).encode())
        for part in (self.train_part, self.validation_part):
            for array in vars(part).values():
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def _random_part(self, length: int) -> Part:
        """Texts of so many random ids for two batches."""
        count = 2 * self.settings.batch_size
        random = np.random.default_rng(self.settings.seed)
        try:
            ids = random.integers(
                self.network_config.vocab_size, size=count * length, dtype=np.int32
            )
            segments = np.zeros(count * length, np.int8)
            classes = random.integers(_RANDOM_CLASSES, size=count)
        except MemoryError as error:
            raise UserError(f"cannot make the texts for want of memory: {error}") from error
        return Part(ids, segments, np.arange(count + 1) * length, classes)

    def _score(self, part: Part, worker: Worker, title: str) -> dict[str, float]:
        """Loss, accuracy and F1, over all processes."""
        size = _SCORING_SIZE * worker.world_size
        place = {"rank": worker.rank, "world_size": worker.world_size}
        loader = Batches(part, size, self.network_config.pad_token_id, **place)
        classes = self.network_config.num_labels
        confusion = torch.zeros(classes, classes, dtype=torch.long, device=worker.device)
        task = Scoring(self.has_segments, confusion)
        scores = evaluate(task, self.model, loader, worker, self.settings.amp, title)
        return scores | {"f1": f1_score(worker.sum(confusion))}
