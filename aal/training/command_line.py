"""Command lines that take dashes or underscores and answer a mistake with one clear line."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


class UserError(Exception):
    """Something that the user can put right; its text says what is wrong and what to do."""


def run(main: Callable[[Sequence[str]], int], arguments: Sequence[str], program: str) -> int:
    """Return ``main``'s exit status, 2 after a ``UserError``, or 130 when interrupted.

    It is 1 when the reader of our output has gone, as in ``train.py ... | head -1``.
    """
    try:
        return main(arguments)
    except UserError as error:
        one_line = " ".join(str(error).split())
        print(f"{program}: error: {one_line}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(
            f"{program}: interrupted; --resume continues after the last validation",
            file=sys.stderr,
        )
        return 130


class Parser(argparse.ArgumentParser):
    """An argument parser in which ``--learning_rule`` and ``--learning-rule`` are one flag.

    Flags are spelled with dashes here and are never abbreviated. Letters of flags are compared
    without regard to case. Mistakes raise ``UserError``.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )
        self._rejected: dict[str, str] = {}

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        known = {flag.lower(): flag for flag in [*self._option_string_actions, *self._rejected]}
        words = [_canonical(word, known) for word in args]
        for flag in (word.partition("=")[0] for word in words):
            if flag in self._rejected:
                raise UserError(f"{flag} {self._rejected[flag]}")
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def add_switch(self, flag: str, help: str, default: Any = False) -> None:
        """Add a switch: ``--flag``, ``--flag True``, ``--flag False`` or ``--no-flag``."""
        self.add_argument(flag, nargs="?", const=True, default=default, type=_truth, help=help)
        negative, name = flag.replace("--", "--no-", 1), flag[2:].replace("-", "_")
        hidden = argparse.SUPPRESS
        self.add_argument(negative, dest=name, action="store_false", default=hidden, help=hidden)

    def reject(self, hints: Mapping[str, str]) -> None:
        """Answer flags of old releases, by name, with what became of them."""
        self._rejected.update(hints)


def note(text: str) -> None:
    """Tell the user something that stops nothing, on stderr."""
    print(f"train.py: note: {text}", file=sys.stderr)


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """An integer of at least 0 that fits 63 bits."""
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def probability(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def fraction(text: str) -> float:
    """A number of at least 0 and below 1."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def _number(text: str, kind: type, valid: Callable[[Any], bool], wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return value


def _truth(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return text.lower() in _TRUE


def _canonical(word: str, known: dict[str, str]) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    flag = flag.replace("_", "-")
    return known.get(flag.lower(), flag) + equals + value
