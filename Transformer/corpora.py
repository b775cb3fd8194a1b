"""Corpora of German and English texts: pairs to learn from, to validate with and to test with."""

import hashlib
import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO

import numpy as np

from aal.training.command_line import UserError, note

Pair = tuple[str, str]  # German, English

NAMES = ("IWSLT", "WMT14", "parallel", "gettext", "cldr")
LANGUAGES = ("de", "en")  # of the texts of a pair

_STEMS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "newstest2013"),
    "test": ("test", "newstest2014"),
}
_TALKS = {"validation": ("tst2013", "dev2010"), "test": ("tst2014", "tst2010")}  # of IWSLT
_HELD_OUT_SHARE, _MAX_HELD_OUT = 0.05, 3000  # of the German texts, for a part without files

_TAG = re.compile(  # begins the lines of IWSLT's training files that are no sentences
    rb"\s*</?(url|keywords|talkid|title|description|speaker|reviewer|translator|doc)\b", re.I
)
_SEGMENT = re.compile(r"<seg\b[^>]*>(.*?)</seg>", re.S | re.I)
_LANGUAGE_HEADER = re.compile(rb'(?:^|["\n\0])Language:[ \t]*([A-Za-z]+)')
_CHARSET_HEADER = re.compile(rb"Content-Type:[^\n]*charset=([\w-]+)")
_UTF_8 = (b"utf-8", b"utf8", b"us-ascii", b"ascii")
_LOCALE = re.compile(r"([a-z]{2,3})([_@.-].*)?", re.I)


@dataclass(frozen=True)
class Files:
    """Which files the parts of a corpus are read from.

    Every part is (German, English), or empty where it is cut from the training texts. ``train`` of
    gettext are its catalogues, and cldr needs no files.
    """

    dataset: str
    train: tuple[Path, ...] = ()
    validation: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[Path]:
        return iter((*self.train, *self.validation, *self.test))

    @property
    def cuts_test(self) -> bool:
        """Is the test part cut from the training texts, so that other texts give another?"""
        return bool(self.train) and not self.test


@dataclass(frozen=True)
class Texts:
    """The three parts of a corpus; ``train`` can be gone through more than once."""

    train: Iterable[Pair]
    validation: list[Pair]
    test: list[Pair]


def find(dataset: str, direction: str, path: Path) -> Files:
    """Find the files of a corpus.

    Args:
        dataset: one of ``NAMES``.
        direction: "G2E" or "E2G"; IWSLT has files for each.
        path: folder to look in.

    Raises:
        UserError: files are missing or unreadable; the text says what to put where.
    """
    if dataset == "cldr":
        return Files(dataset)
    try:
        return _find(dataset, direction, path)
    except OSError as error:  # such as a folder that may not be searched
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _find(dataset: str, direction: str, path: Path) -> Files:
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; name that of {dataset} with --data-path")
    if dataset == "IWSLT":
        return _find_iwslt(path, direction)
    if dataset == "gettext":
        return Files(dataset, _german_catalogues(path))
    return _find_lines(dataset, path)


def read(files: Files) -> Texts:
    """Read a corpus: NFC, one space where there was any white space, no empty texts.

    If both validation and test have their own files, all parts stay as they are. A part without is
    cut from the training texts by a hash of the German text, so that the order of the files does
    not matter; then no text of the test part occurs in another part, none of the validation part in
    the training part, and no training pair occurs twice.

    Raises:
        UserError: a file is damaged, or two files do not belong together.
    """
    if files.dataset == "cldr":
        import cldr  # imports Babel

        return cldr.texts()
    if files.dataset == "gettext":
        texts = _cut([pair for path in files.train for pair in _translated(path)], {})
    else:
        given = {part: list(_pairs(files, part)) for part in _TALKS if getattr(files, part)}
        train = _Stream(lambda: _pairs(files, "train"))
        texts = Texts(train, **given) if len(given) == 2 else _cut(train, given)
    for part, pairs in vars(texts).items():
        _check(pairs, part, files)
    return texts


def read_test(files: Files) -> list[Pair]:
    """The test part of ``read``, without reading more than it takes."""
    if not files.test:
        return read(files).test
    pairs = list(_pairs(files, "test"))
    _check(pairs, "test", files)
    return pairs


def _check(pairs: Iterable[Pair], part: str, files: Files) -> None:
    if next(iter(pairs), None) is None:
        raise UserError(f"{files.dataset} has no pairs of texts for its {part} part")


def normalise(text: str) -> str:
    """NFC, and one space where there was any white space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class _Stream:
    """Pairs that are read from disk each time they are gone through."""

    def __init__(self, read_anew: Callable[[], Iterator[Pair]]):
        self.read_anew = read_anew

    def __iter__(self) -> Iterator[Pair]:
        return self.read_anew()


def _find_lines(dataset: str, path: Path) -> Files:
    folders = [path, path / "WMT14", path / "wmt14"] if dataset == "WMT14" else [path]
    for folder in folders:
        found = {part: _first_pair(folder, stems) for part, stems in _STEMS.items()}
        if found["train"]:
            return Files(dataset, **found)
    raise UserError(
        f"no train.de and train.en in {path}; put them there, one sentence a line, with "
        "validation.de/.en and test.de/.en if there are any, or name their folder with --data-path"
    )


def _first_pair(folder: Path, stems: Sequence[str]) -> tuple[Path, ...]:
    """The German and the English file of the first stem that is there, or nothing."""
    for stem in stems:
        pair = folder / f"{stem}.de", folder / f"{stem}.en"
        if any(path.is_file() for path in pair):
            return _both_there(pair)
    return ()


def _find_iwslt(path: Path, direction: str) -> Files:
    order = ("de-en", "en-de") if direction == "G2E" else ("en-de", "de-en")
    for languages in order:
        for german in sorted(path.rglob(f"train.tags.{languages}.de")):
            found = {part: _talks(path, german.parent, part, languages) for part in _TALKS}
            return Files("IWSLT", _both_there((german, german.with_suffix(".en"))), **found)
    raise UserError(
        f"no train.tags.{order[0]}.de in {path} or below; unpack the de-en archive of IWSLT 2016 "
        "or 2017 there, or name its folder with --data-path"
    )


def _talks(path: Path, beside: Path, part: str, languages: str) -> tuple[Path, ...]:
    """The files of one part, sooner from the folder ``beside`` than from elsewhere in ``path``."""
    for year in _TALKS[part]:
        found = sorted(path.rglob(f"*{year}.{languages}.de.xml"))
        for german in sorted(found, key=lambda file: file.parent != beside):
            english = german.with_name(german.name.removesuffix(".de.xml") + ".en.xml")
            return _both_there((german, english))
    names = " or ".join(f"*.{year}.{languages}.de.xml" for year in _TALKS[part])
    raise UserError(f"no {names} in {path} or below; it comes in the archive of train.tags")


def _both_there(pair: tuple[Path, Path]) -> tuple[Path, Path]:
    for path, other in (pair, pair[::-1]):
        if not path.is_file():
            raise UserError(f"there is no {path}, which {other.name} needs beside it")
    return pair


def _pairs(files: Files, part: str) -> Iterator[Pair]:
    """The pairs of one part; those with an empty text are left out."""
    german, english = getattr(files, part)
    if german.suffix == ".xml":
        sides = _segments(german), _segments(english)
    else:
        tagged = files.dataset == "IWSLT"
        sides = _lines(german, tagged), _lines(english, tagged)
    count = 0
    for pair in zip_longest(*sides):
        if None in pair:
            counts = [
                count + (text is not None) + sum(1 for _ in side)
                for text, side in zip(pair, sides, strict=True)
            ]
            raise UserError(
                f"{german} has {counts[0]} sentences, but {english} has {counts[1]}; "
                "every line must be the translation of the other file's"
            )
        count += 1
        if all(pair):
            yield pair
    if not count:
        raise UserError(f"{german} and {english} hold no sentences")


def _lines(path: Path, tagged: bool) -> Iterator[str]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not (tagged and _TAG.match(line)):
                yield normalise(_decoded(line, path, number))


def _segments(path: Path) -> Iterator[str]:
    lines = _content(path).splitlines(keepends=True)
    text = "".join(_decoded(line, path, number) for number, line in enumerate(lines, 1))
    return (normalise(html.unescape(segment)) for segment in _SEGMENT.findall(text))


def _opened(path: Path) -> IO[bytes]:
    try:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty")
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}, is not UTF-8; convert the file") from error


def _german_catalogues(path: Path) -> tuple[Path, ...]:
    found = [file for file in sorted(path.rglob("*.[pm]o")) if file.is_file()]
    if not found:
        raise UserError(
            f"no .po or .mo files in {path} or below; name their folder with --data-path"
        )
    languages = {file: _language(file, path) for file in found}
    german = [file for file in found if languages[file] == "de" and _is_readable(file)]
    if not german:
        others = ", ".join(sorted({language or "none stated" for language in languages.values()}))
        raise UserError(
            f"{path} holds {len(found)} catalogues, but none to read in German (found: {others}); "
            "add de.po or a folder de/ with catalogues"
        )
    return tuple(german)


def _language(catalogue: Path, root: Path) -> str:
    """The language that a catalogue states, or else its name or the nearest folder; "" for none."""
    from babel import localedata

    header = _LANGUAGE_HEADER.search(_content(catalogue))
    inside = catalogue.relative_to(root)
    names = [header[1].decode()] if header else []
    for name in (*names, inside.stem, *reversed(inside.parent.parts)):
        locale = _LOCALE.fullmatch(name)
        if locale and localedata.exists(locale[1].lower()):
            return locale[1].lower()
    return ""


def _is_readable(catalogue: Path) -> bool:
    """Babel reads .po files in every character set, but .mo files in UTF-8 alone."""
    charset = _CHARSET_HEADER.search(_content(catalogue))
    if catalogue.suffix == ".po" or charset is None or charset[1].lower() in _UTF_8:
        return True
    note(f"{catalogue} is left out, because it is not UTF-8; msgunfmt makes a .po file of it")
    return False


def _content(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


def _translated(catalogue: Path) -> Iterator[Pair]:
    """What a catalogue translates; the singular and the first plural of plural forms."""
    from babel.messages.mofile import read_mo
    from babel.messages.pofile import read_po

    with _opened(catalogue) as file:
        try:
            if catalogue.suffix == ".mo":
                messages = list(read_mo(file))
            else:
                messages = list(read_po(file, abort_invalid=True))
        except Exception as error:  # Babel raises a dozen types for damaged files
            raise UserError(f"{catalogue} is damaged or not a catalogue; remove it") from error
    for message in messages:
        if not message.fuzzy:
            english, german = (
                text if isinstance(text, tuple | list) else (text,)
                for text in (message.id, message.string)
            )
            for pair in zip(map(normalise, german), map(normalise, english), strict=False):
                if all(pair) and pair[0] != pair[1]:
                    yield pair


def _cut(pairs: Iterable[Pair], given: dict[str, list[Pair]]) -> Texts:
    """Cut the parts that are not ``given`` from ``pairs``."""
    keys = np.unique(np.fromiter((_key(german) for german, _ in pairs), np.uint64))
    size = max(1, min(_MAX_HELD_OUT, int(_HELD_OUT_SHARE * len(keys))))
    missing = [part for part in ("test", "validation") if part not in given]
    if len(keys) <= len(missing) * size:
        raise UserError(
            f"{len(keys)} different German texts are too few to cut a {missing[-1]} part from them"
        )
    parts = dict(given)
    for number, part in enumerate(missing):
        first, end = keys[number * size], keys[(number + 1) * size]
        inside = (pair for pair in pairs if first <= _key(pair[0]) < end)
        parts[part] = list(dict.fromkeys(inside))
    test = parts["test"]
    validation = list(_without(test, parts["validation"]))
    return Texts(_Stream(lambda: _distinct(_without(test + validation, pairs))), validation, test)


def _without(held_out: list[Pair], pairs: Iterable[Pair]) -> Iterator[Pair]:
    """The pairs that share no text with those held out."""
    texts = {text for pair in held_out for text in pair}
    return (pair for pair in pairs if not texts & {*pair})


def _distinct(pairs: Iterable[Pair]) -> Iterator[Pair]:
    seen: set[int] = set()  # numbers take less room than millions of texts
    for pair in pairs:
        key = _key("\n".join(pair))
        if key not in seen:
            seen.add(key)
            yield pair


def _key(text: str) -> int:
    """A number that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
