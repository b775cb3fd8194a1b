"""Texts as ids: prepared once, kept in a cache, and served in batches of like lengths."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path

import corpora
import numpy as np
import tokens
import torch
from corpora import Files, Pair
from tokens import Tokenizer, WordCollector
from torch import Tensor
from transformer import END, MAX_LENGTH, PAD, START

from aal.training.command_line import UserError, note
from aal.training.files import write_whole

_FORMAT = 1  # of the cache, and of how texts are read: raised whenever either changes
_CHUNK = 10_000  # texts that are held as strings at a time
_POOL = 20_000  # pairs that are sorted by length at a time


@dataclass(frozen=True)
class Settings:
    """What decides how texts become ids."""

    dataset: str  # one of corpora.NAMES
    direction: str = "G2E"  # or E2G
    tokenizer: str = "words"  # or bpe
    min_freq: int = 2  # of words
    vocab_size: int = 16_000  # of bpe, for each language
    max_length: int = 100  # tokens; longer training pairs are left out


@dataclass(frozen=True)
class Sequences:
    """The ids of many texts in one array: text ``i`` is ``flat[offsets[i]:offsets[i + 1]]``."""

    flat: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (texts + 1,) int64

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Part:
    """Pairs of texts as ids, without START and END; ``references`` are the texts to be reached."""

    source: Sequences
    target: Sequences
    references: list[str] | None = None  # of the validation and the test part

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each pair's longer text, of the target with one special token."""
        return np.maximum(self.source.lengths, self.target.lengths + 1)

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Corpus:
    """The parts of a corpus and the tokenisers learnt from its training part."""

    source: Tokenizer
    target: Tokenizer
    train: Part
    validation: Part
    test: Part
    fingerprint: str  # of the settings, the source files and the packages that read them
    train_files: str  # digest of the files of the training part


_Parts = tuple[Tokenizer, Tokenizer, Part, Part, Part]  # what a corpus begins with


def load(settings: Settings, path: Path) -> Corpus:
    """Read and tokenise a corpus, or take it from the cache in ``path``.

    The cache is used as long as the settings, the source files and the packages that read them
    are those it was made from.

    Raises:
        UserError: files are missing or damaged, or a text is too long to be scored; the text says
            what to put where.
    """
    files = corpora.find(settings.dataset, settings.direction, path)
    contents = {file: _size_and_digest(file) for file in files}
    made_from = _made_from(settings, contents, path)
    digests = _digest(made_from), _train_digest([contents[file] for file in files.train])
    name = f"{settings.dataset}-{_digest(json.dumps(asdict(settings)))}.npz"
    parts = _read_cache(path / "cache" / name, made_from)
    if parts is not None:
        return Corpus(*parts, *digests)
    corpus = Corpus(*_prepare(settings, files), *digests)
    _write_cache(path / "cache" / name, made_from, corpus)
    return corpus


def load_test(
    settings: Settings, path: Path, source: Tokenizer, target: Tokenizer, train_files: str | None
) -> Part:
    """The test part, in the ids of given tokenisers, such as those of a checkpoint.

    Raises:
        UserError: as ``load``, or the part is cut from other texts than those that were learned,
            whose ``Corpus.train_files`` is given.
    """
    files = corpora.find(settings.dataset, settings.direction, path)
    if files.cuts_test and _train_digest(map(_size_and_digest, files.train)) != train_files:
        raise UserError(
            f"the texts in {path} are not those that the network learned, so that the test part "
            "cut from them is no longer held out; name the folder of those with --data-path"
        )
    return _scored_part(corpora.read_test(files), "test", settings, source, target)


def _prepare(settings: Settings, files: Files) -> _Parts:
    texts = corpora.read(files)
    source, target, train = _learn(texts.train, settings)
    validation = _scored_part(texts.validation, "validation", settings, source, target)
    test = _scored_part(texts.test, "test", settings, source, target)
    return source, target, train, validation, test


def _learn(pairs: Iterable[Pair], settings: Settings) -> tuple[Tokenizer, Tokenizer, Part]:
    """Both tokenisers and the training part; texts are held as strings a chunk at a time."""
    languages = [corpora.LANGUAGES[side] for side in _sides(settings)]
    if settings.tokenizer == "bpe":
        source, target = (
            tokens.learn_byte_pairs((pair[side] for pair in pairs), settings.vocab_size)
            for side in _sides(settings)
        )
        return source, target, Part(*_encode(pairs, settings, source, target, is_training=True))
    collectors = [tokens.WordCollector(language) for language in languages]
    numbered = _encode(pairs, settings, *collectors, is_training=True)
    tokenizers, sequences = [], []
    for collector, side in zip(collectors, numbered, strict=True):
        tokenizer, ids = collector.vocabulary(side.flat, settings.min_freq)
        tokenizers.append(tokenizer)
        sequences.append(Sequences(ids[side.flat], side.offsets))
    return *tokenizers, Part(*sequences)


def _scored_part(
    pairs: Sequence[Pair], name: str, settings: Settings, source: Tokenizer, target: Tokenizer
) -> Part:
    sequences = _encode(pairs, settings, source, target, is_training=False)
    part = Part(*sequences, [pair[_sides(settings)[1]] for pair in pairs])
    if (longest := part.sizes.max()) > MAX_LENGTH:
        raise UserError(
            f"the {name} part of {settings.dataset} has a text of {longest} tokens, but the "
            f"networks read {MAX_LENGTH}; shorten or remove it"
        )
    return part


def _encode(
    pairs: Iterable[Pair],
    settings: Settings,
    source: Tokenizer | WordCollector,
    target: Tokenizer | WordCollector,
    *,
    is_training: bool,
) -> tuple[Sequences, Sequences]:
    """Both sides of pairs as ids; of training pairs only those that are short enough."""
    flat, offsets = (array("i"), array("i")), (array("q", [0]), array("q", [0]))
    iterator = iter(pairs)
    while chunk := list(islice(iterator, _CHUNK)):
        sides = zip(*chunk, strict=True)
        texts = [list(side) for side in sides]
        encoded = (
            tokenizer.encode_all(texts[side])
            for tokenizer, side in zip((source, target), _sides(settings), strict=True)
        )
        for pair in zip(*encoded, strict=True):
            if not is_training or max(map(len, pair)) <= settings.max_length:
                for ids, all_ids, ends in zip(pair, flat, offsets, strict=True):
                    all_ids.extend(ids)
                    ends.append(len(all_ids))
    if len(offsets[0]) == 1:
        raise UserError(f"no training pair has at most --max-length {settings.max_length} tokens")
    return tuple(
        Sequences(np.array(all_ids, np.int32), np.array(ends, np.int64))
        for all_ids, ends in zip(flat, offsets, strict=True)
    )


def _sides(settings: Settings) -> tuple[int, int]:
    """Which text of a pair is the source and which the target."""
    return (0, 1) if settings.direction == "G2E" else (1, 0)


def _made_from(settings: Settings, contents: Mapping[Path, tuple[int, str]], path: Path) -> str:
    """What the prepared data depend on, as JSON."""
    sources = [[str(file.relative_to(path)), *content] for file, content in contents.items()]
    packages = [tokens.package_of(settings.tokenizer)]
    if settings.dataset in ("cldr", "gettext"):
        packages.append(f"babel {metadata.version('babel')}")
    return json.dumps([_FORMAT, asdict(settings), packages, sources])


def _size_and_digest(path: Path) -> tuple[int, str]:
    try:
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _train_digest(contents: Iterable[tuple[int, str]]) -> str:
    """A digest of what the training files hold, wherever they lie, and of how they are read."""
    return _digest(json.dumps([_FORMAT, *contents]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_cache(path: Path, made_from: str) -> _Parts | None:
    """What was kept, unless it was made from something else or is damaged."""
    try:
        opened = path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        note(f"cannot read {path}: {error.strerror}; the data are prepared anew")
        return None
    try:
        with opened, np.load(opened, allow_pickle=False) as file:
            kept = json.loads(file["about"].tobytes())
            if kept["made_from"] != made_from:
                return None
            parts = [
                Part(
                    *(
                        Sequences(file[f"{name}_{side}"], file[f"{name}_{side}_offsets"])
                        for side in ("source", "target")
                    ),
                    kept["references"][name],
                )
                for name in ("train", "validation", "test")
            ]
        source, target = (tokens.from_state(kept[side]) for side in ("source", "target"))
    except Exception:  # a damaged archive fails in a dozen ways
        note(f"{path} is damaged; the data are prepared anew")
        return None
    return source, target, *parts


def _write_cache(path: Path, made_from: str, corpus: Corpus) -> None:
    parts = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    about = {
        "made_from": made_from,
        "source": corpus.source.state(),
        "target": corpus.target.state(),
        "references": {name: part.references for name, part in parts.items()},
    }
    arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    for name, part in parts.items():
        for side, sequences in (("source", part.source), ("target", part.target)):
            arrays[f"{name}_{side}"] = sequences.flat
            arrays[f"{name}_{side}_offsets"] = sequences.offsets
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: np.savez(file, **arrays))
    except OSError as error:
        note(f"cannot write {path}: {error.strerror}; the data are prepared anew each time")
    except UserError as error:
        note(f"{error}; the data are prepared anew each time")


@dataclass(frozen=True)
class Batch:
    """Pairs of like lengths, filled up with PAD on the right."""

    source: Tensor  # (B, S) int64
    target: Tensor  # (B, T) int64, START first and END last
    indices: Tensor  # (B,) int64, the places of the pairs in their part


def check_fits(part: Part, batch_size: int, world_size: int) -> None:
    """Raise ``UserError`` if processes cannot learn pairs in batches of so many tokens together."""
    if len(part) < world_size:
        raise UserError(
            f"{len(part)} training pairs are too few for {world_size} processes; name fewer devices"
        )
    budget = batch_size // world_size
    if (longest := part.sizes.max()) > budget:
        raise UserError(
            f"--batch-size {batch_size} tokens, {budget} in each process, do not hold a training "
            f"pair of {longest}; raise it or lower --max-length"
        )


class Batches:
    """The batches of one process, each pair of the part once in all processes together.

    The size of a batch is the number of pairs times the longest source, or target with one special
    token. With a seed, pairs are in an order that depends on it and on ``set_epoch`` alone. Batches
    of at most ``batch_size`` and of like lengths are cut from it, the same for any number of
    processes, each of which has its share of every batch. One that holds fewer pairs than there are
    processes, the rest of the pairs, joins the one before. The number of batches differs a little
    between epochs.

    Without a seed the order is by length, a process has batches of at most ``batch_size`` divided
    by the number of processes, or of one pair, and not all have equally many.

    Args:
        part: the pairs.
        batch_size: tokens, padding included, of all processes together.
        seed: None to go through the pairs for scoring.
        rank, world_size: this process's place among the processes.

    Raises:
        UserError: with a seed, a pair does not fit into a share, or a process would have none.
    """

    def __init__(
        self,
        part: Part,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.part, self.seed, self.rank, self.world_size = part, seed, rank, world_size
        self.batch_size = batch_size
        self._sizes = part.sizes
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
            order = np.lexsort((self.part.target.lengths, self.part.source.lengths))
            own = self._cut(order, self.batch_size // self.world_size)
            self._batches = own[self.rank :: self.world_size]
            return
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.part))
        steps: list[np.ndarray] = []
        for start in range(0, len(order), _POOL):
            pool = order[start : start + _POOL]
            by_length = np.lexsort((self.part.source.lengths[pool], self._sizes[pool]))
            for step in self._cut(pool[by_length], self.batch_size):
                if len(step) < self.world_size and steps:
                    step = np.concatenate([steps.pop(), step])
                steps.append(step)
        shares = [np.array_split(step, self.world_size)[self.rank] for step in steps]
        self._batches = [shares[i] for i in generator.permutation(len(shares))]

    def __len__(self) -> int:
        """Of the whole epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for indices in self._batches[self.done :]:
            source = [self.part.source[index] for index in indices]
            target = [self.part.target[index] for index in indices]
            framed = _padded(target, before=[START], behind=[END])
            yield Batch(_padded(source), framed, torch.from_numpy(indices))

    def _cut(self, order: np.ndarray, budget: int) -> list[np.ndarray]:
        """Cut pairs in this order into batches of at most so many tokens, or of one pair."""
        starts, longest = [0], 0
        for place, size in enumerate(self._sizes[order].tolist()):
            longest = max(longest, size)
            if place > starts[-1] and (place + 1 - starts[-1]) * longest > budget:
                starts.append(place)
                longest = size
        return np.split(order, starts[1:])


def _padded(
    rows: Sequence[np.ndarray], before: Sequence[int] = (), behind: Sequence[int] = ()
) -> Tensor:
    """Rows of ids as one (rows, longest) int64 tensor, each between ``before`` and ``behind``."""
    extra = len(before) + len(behind)
    ids = np.full((len(rows), extra + max(map(len, rows))), PAD, np.int64)
    for padded, row in zip(ids, rows, strict=True):
        padded[: extra + len(row)] = [*before, *row, *behind]
    return torch.from_numpy(ids)
