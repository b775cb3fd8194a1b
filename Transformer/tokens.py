"""Tokenisers: texts as ids, and ids as the same texts again."""

import contextlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import metadata
from typing import Any, Protocol

import numpy as np
from corpora import normalise
from transformer import SPECIAL, UNKNOWN

from aal.training.command_line import UserError

KINDS = ("words", "bpe")

_MARK, _LIKE_THE_MARK = "￭", "■"  # no space on this side of a word; what a text gets instead
_SMALLEST = {"words": len(SPECIAL) + 1, "bpe": len(SPECIAL) + 256}  # every byte has an id


class Tokenizer(Protocol):
    """Texts as ids and back; ids below ``len(SPECIAL)`` are the special tokens."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without START and END; a word that is not known is UNKNOWN."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that ``normalise`` has been through."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out."""

    def __len__(self) -> int:
        """How many ids there are, special tokens included."""

    def state(self) -> dict[str, Any]:
        """What ``from_state`` needs, in strings, numbers and lists."""


class Words:
    """The words that spaCy's rules for a language find, each with a mark where no space was.

    ``(Berlin)`` is ``(￭``, ``Berlin``, ``￭)``: the mark goes to the punctuation, so that a word has
    one id wherever it stands.
    """

    def __init__(self, language: str, words: Sequence[str]):
        self.language, self.words = language, list(words)
        self._ids = {word: number for number, word in enumerate(words, len(SPECIAL))}

    def encode(self, text: str) -> list[int]:
        return self.encode_all([normalise(text)])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        ids = self._ids
        return [
            [ids.get(word, UNKNOWN) for word in words] for words in _split(self.language, texts)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        words = [self.words[number - len(SPECIAL)] for number in ids if number >= len(SPECIAL)]
        text = " ".join(words).replace(f" {_MARK}", "").replace(f"{_MARK} ", "")
        return text.replace(_MARK, "")

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.words)

    def state(self) -> dict[str, Any]:
        return {"kind": "words", "language": self.language, "words": self.words}


class WordCollector:
    """Numbers words as they come, so that texts are split once for counting and for their ids."""

    def __init__(self, language: str):
        self.language = language
        self._numbers: dict[str, int] = {}

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The numbers, from 0, of the words of normalised texts."""
        numbers = self._numbers
        return [
            [numbers.setdefault(word, len(numbers)) for word in words]
            for words in _split(self.language, texts)
        ]

    def vocabulary(self, seen: np.ndarray, min_freq: int) -> tuple[Words, np.ndarray]:
        """The tokeniser of the words that are ``min_freq`` times in ``seen``, frequent ones first.

        Returns:
            the tokeniser, and the id (int32) of each number.

        Raises:
            UserError: no word is that frequent.
        """
        counts = np.bincount(seen, minlength=len(self._numbers)).tolist()
        frequent = [word for word, number in self._numbers.items() if counts[number] >= min_freq]
        if not frequent:
            raise UserError(f"no word occurs {min_freq} times; lower --min-freq")
        words = sorted(frequent, key=lambda word: (-counts[self._numbers[word]], word))
        ids = np.full(len(self._numbers), UNKNOWN, np.int32)
        ids[[self._numbers[word] for word in words]] = np.arange(len(words)) + len(SPECIAL)
        return Words(self.language, words), ids


class BytePairs:
    """Byte-level byte-pair encoding: no text is unknown, frequent strings are one token."""

    def __init__(self, model: str):
        self._model = _tokenizers().Tokenizer.from_str(model)

    def encode(self, text: str) -> list[int]:
        return self.encode_all([normalise(text)])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._model.encode_batch_fast(texts)
        return [[number + len(SPECIAL) for number in one.ids] for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([i - len(SPECIAL) for i in ids if i >= len(SPECIAL)])

    def __len__(self) -> int:
        return len(SPECIAL) + self._model.get_vocab_size()

    def state(self) -> dict[str, Any]:
        return {"kind": "bpe", "model": self._model.to_str()}


def learn_byte_pairs(texts: Iterable[str], vocab_size: int) -> BytePairs:
    """The byte pairs that shorten normalised texts most, at most ``vocab_size`` ids in all.

    Raises:
        UserError: fewer ids than there are bytes, or the package is missing.
    """
    check_vocab_size("bpe", vocab_size)
    package = _tokenizers()
    byte_level = package.pre_tokenizers.ByteLevel
    model = package.Tokenizer(package.models.BPE())
    model.pre_tokenizer = byte_level(add_prefix_space=False)
    model.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return BytePairs(model.to_str())


def check_vocab_size(kind: str, vocab_size: int) -> None:
    """Raise ``UserError`` if a kind of tokeniser cannot do with so few ids."""
    if vocab_size < _SMALLEST[kind]:
        raise UserError(f"--vocab-size {vocab_size} is too small; {kind} needs {_SMALLEST[kind]}")


def from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokeniser that ``state`` was taken from.

    Raises:
        UserError: ``state`` is of no tokeniser, or the package is missing.
    """
    match state:
        case {"kind": "words", "language": "de" | "en" as language, "words": list(words)}:
            return Words(language, words)
        case {"kind": "bpe", "model": str(model)}:
            _tokenizers()
            with contextlib.suppress(Exception):  # what the package raises has no type of its own
                return BytePairs(model)
    raise UserError("this is no tokeniser of this version; train anew")


def package_of(kind: str) -> str:
    """Name and version of the package that splits texts; another version may split otherwise."""
    name = _tokenizers().__name__ if kind == "bpe" else "spacy"
    return f"{name} {metadata.version(name)}"


def _split(language: str, texts: Iterable[str]) -> list[list[str]]:
    spacy = _spacy(language)
    with spacy.memory_zone():  # forgets what it has seen: millions of words add up
        return [_marked(spacy.tokenizer(text)) for text in map(_without_mark, texts)]


@cache
def _spacy(language: str) -> Any:
    """spaCy without a model, only the rules of a language; imported when a text comes."""
    import spacy

    return spacy.blank(language)


def _without_mark(text: str) -> str:
    return text.replace(_MARK, _LIKE_THE_MARK)


def _marked(tokens: Iterable[Any]) -> list[str]:
    words: list[str] = []
    is_joined = False
    for token in tokens:
        word = token.text
        if is_joined and word[0].isalnum() and not words[-1][-1].isalnum():
            words[-1] += _MARK
        elif is_joined:
            word = _MARK + word
        words.append(word)
        is_joined = not token.whitespace_
    return words


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError('--tokenizer bpe needs: pip install "aal[bpe]"') from error
    return tokenizers
