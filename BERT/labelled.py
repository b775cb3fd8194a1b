"""The tasks: which labelled texts are learned, validated and tested."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tsv

from aal.training.command_line import UserError

NAMES = ("babel", "mrpc", "mnli", "tsv")

_BABEL_LABELS = ("0", "1")  # for another value, and for the same
_VALIDATION_SHARE, _MAX_VALIDATION = 0.1, 10_000  # of the training texts
_SPLIT_SEED = 0  # the same for every run
_MOST_LABELS = 1000


@dataclass(frozen=True)
class Source:
    """Where the texts of a task come from.

    Args:
        task: one of ``NAMES``.
        train: table to learn from; None for babel, and where nothing is learned.
        tests: tables to score, by name; the only one of a task has no name.
        text_columns, label_column: names of columns of the tables.
        labels: in the order of their classes; empty for those of the training table.
    """

    task: str
    train: Path | None = None
    tests: dict[str, Path] = field(default_factory=dict)
    text_columns: Sequence[str] = ()
    label_column: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examples:
    """Texts, one or two at a time, and the numbers of their classes."""

    texts: list[tuple[str, ...]]
    classes: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.texts)

    def chosen(self, places: np.ndarray) -> "Examples":
        return Examples([self.texts[place] for place in places], self.classes[places])


@dataclass(frozen=True)
class Corpus:
    """The parts of a task, and its labels in the order of their classes."""

    labels: tuple[str, ...]
    train: Examples
    validation: Examples
    tests: dict[str, Examples]


def find(task: str, path: Path, *, learns: bool) -> Source:
    """The source of babel, or of a task of GLUE.

    Args:
        task: one of ``NAMES`` but tsv.
        path: folder that holds GLUE's folder of the task, or that folder.
        learns: the training table is wanted.

    Raises:
        UserError: a table is not there.
    """
    if task == "babel":
        return Source(task, labels=_BABEL_LABELS)
    folder = path / task.upper()
    folder = folder if folder.is_dir() else path
    if task == "mrpc":
        tests = {"": folder / "dev.tsv"}
        columns = (("#1 String", "#2 String"), "Quality", ("0", "1"))
    else:
        tests = {part: folder / f"dev_{part}.tsv" for part in ("matched", "mismatched")}
        labels = ("contradiction", "entailment", "neutral")
        columns = (("sentence1", "sentence2"), "gold_label", labels)
    train = folder / "train.tsv" if learns else None
    for file in filter(None, (train, *tests.values())):
        if not file.is_file():
            raise UserError(
                f"there is no {file}; put GLUE's files of {task.upper()} there or name their "
                "folder with --data-path"
            )
    return Source(task, train, tests, *columns)


def load(source: Source) -> Corpus:
    """Read all parts.

    The tables of GLUE that are to be tested have secret labels. So what GLUE calls dev is tested
    here, and chooses nothing: the validation part is cut from the training table.

    Raises:
        UserError: a table is missing or damaged, or has a label that the training table lacks.
    """
    if source.task == "babel":
        parts = {part: _babel(part) for part in ("train", "validation", "test")}
        return Corpus(source.labels, parts["train"], parts["validation"], {"": parts["test"]})
    rows = tsv.read(source.train, source.text_columns, source.label_column)
    labels = source.labels or _labels_of(source, rows)
    examples = _examples(rows, labels, source.label_column)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(rows))
    count = max(1, min(_MAX_VALIDATION, int(len(rows) * _VALIDATION_SHARE)))
    if count == len(rows):
        raise UserError(f"{source.train} has one row, too few to learn from and to validate with")
    train, validation = examples.chosen(order[count:]), examples.chosen(order[:count])
    return Corpus(labels, train, validation, load_tests(source, labels))


def load_tests(source: Source, labels: Sequence[str]) -> dict[str, Examples]:
    """Read the parts to be scored, for given labels, such as those of a checkpoint.

    Raises:
        UserError: as ``load``.
    """
    if source.task == "babel":
        return {"": _babel("test")}
    return {
        name: _examples(
            tsv.read(path, source.text_columns, source.label_column), labels, source.label_column
        )
        for name, path in source.tests.items()
    }


def _babel(part: str) -> Examples:
    import babel_pairs  # imports Babel

    pairs = list(babel_pairs.pairs(part))
    classes = np.array([is_same for *_, is_same in pairs], np.int64)
    return Examples([(first, second) for first, second, _ in pairs], classes)


def _labels_of(source: Source, rows: Iterable[tsv.Row]) -> tuple[str, ...]:
    labels = sorted({row.label for row in rows})
    if not 2 <= len(labels) <= _MOST_LABELS:
        raise UserError(
            f"column {source.label_column!r} of {source.train} holds {len(labels)} different "
            f"labels; there must be 2 to {_MOST_LABELS}"
        )
    return tuple(labels)


def _examples(rows: Sequence[tsv.Row], labels: Sequence[str], label_column: str) -> Examples:
    numbers = {label: number for number, label in enumerate(labels)}
    for row in rows:
        if row.label not in numbers:
            some = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
            raise UserError(
                f"{row.place}: column {label_column!r} holds {row.label!r}, none of {some}"
            )
    classes = np.array([numbers[row.label] for row in rows], np.int64)
    return Examples([row.texts for row in rows], classes)
