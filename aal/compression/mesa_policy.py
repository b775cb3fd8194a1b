"""Mesa's policy files: which layers are compressed, and how.

A policy is lines of text. ``#`` starts a comment, and blank lines do not count::

    on TAG: [epochs]            a section for the layers of one kind, see TAGS
    by_index: all | indices     a rule for all of them, or for those that the indices name
    KEY: VALUE                  settings of these layers: enable, level, ema_decay

Lists are separated by spaces or commas. The layers of a tag are counted from 0, in the order in
which they first run; one whose tensors are too small to be compressed does not count. A section
takes effect at each of its epochs, or before training if it has none; of two settings of a layer
the later one counts, and of those that take effect together the lower one in the file. What no rule
sets is as in ``Settings()``: not compressed.

Source: the policy files of Mesa (Pan et al., 2021, arXiv:2111.11124). Unlike there, a line that
is not understood is an error and not the end of the file.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

TAGS = ("fc", "conv", "gelu", "bn", "relu", "softmax", "matmul", "layernorm")


@dataclass(frozen=True)
class Settings:
    """How the tensors that a layer keeps are compressed.

    Args:
        enable: whether they are compressed at all.
        level: levels between the ends of the range, 2 to 256.
        ema_decay: what remains of the running range at each step, 0 to below 1.

    Raises:
        ValueError: a value is out of its range.
    """

    enable: bool = False
    level: int = 256
    ema_decay: float = 0.9

    def __post_init__(self):
        if not 2 <= self.level <= 256:
            raise ValueError(f"level is {self.level}, expected 2 to 256")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected 0 or more and below 1")


@dataclass(frozen=True)
class Rule:
    """Settings for some layers of a tag; ``indices`` is None for all of them."""

    indices: frozenset[int] | None
    changes: tuple[tuple[str, bool | int | float], ...]


@dataclass(frozen=True)
class Section:
    """Rules for a tag that take effect at ``epochs``, or before training if there are none."""

    tag: str
    epochs: tuple[int, ...]
    rules: tuple[Rule, ...]

    def latest(self, epoch: int) -> int | None:
        """When it took effect last, up to ``epoch``: -1 is before training, None is not yet."""
        return max((e for e in self.epochs if e <= epoch), default=None) if self.epochs else -1


@dataclass(frozen=True)
class MesaPolicy:
    """What a policy file says; make one with ``parse`` or ``read``."""

    sections: tuple[Section, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """The policy that ``text`` describes, see the top of this file.

        Raises:
            ValueError: a line is not understood, or a value is out of its range. The message
                has the number of the line, what was found there and what was expected.
        """
        return cls(_sections(text))

    @classmethod
    def read(cls, path: str | os.PathLike) -> Self:
        """The policy in a file.

        Raises:
            OSError: the file can not be read.
            ValueError: see ``parse``; the message starts with the path.
        """
        try:
            return cls.parse(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def settings(self, tag: str, index: int, epoch: int = 0) -> Settings:
        """The settings of layer ``index`` of ``tag`` in ``epoch``; both count from 0.

        Raises:
            ValueError: ``tag`` is none of ``TAGS``.
        """
        _check_tag(tag)
        dated = [(s.latest(epoch), s) for s in self.sections if s.tag == tag]
        in_effect = [(when, section) for when, section in dated if when is not None]
        settings = Settings()
        for _, section in sorted(in_effect, key=lambda pair: pair[0]):
            for rule in section.rules:
                if rule.indices is None or index in rule.indices:
                    settings = replace(settings, **dict(rule.changes))
        return settings


_FORMS = {
    "on": "'on TAG: [epochs]'",
    "by_index": "'by_index: all' or 'by_index: INDICES'",
    "setting": "'enable: VALUE', 'level: VALUE' or 'ema_decay: VALUE'",
}
_MAY_FOLLOW = {
    "start": ("on",),
    "on": ("by_index",),
    "by_index": ("setting",),
    "setting": ("setting", "by_index", "on"),
}


def _sections(text: str) -> tuple[Section, ...]:
    sections: list[tuple[str, tuple[int, ...], list]] = []  # tag, epochs, rules
    last = "start"
    number = 0
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        kind = _kind(line)
        if kind not in _MAY_FOLLOW[last]:
            raise ValueError(f"line {number}: found {line!r}, expected {_what_may_follow(last)}")
        head, _, value = (part.strip() for part in line.partition(":"))
        try:
            if kind == "on":
                tag = head.split()[1]
                _check_tag(tag)
                sections.append((tag, tuple(_numbers(value)), []))
            elif kind == "by_index":
                sections[-1][2].append((_indices(value), []))
            else:
                sections[-1][2][-1][1].append((head, _setting(head, value)))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        last = kind
    if last in ("on", "by_index"):
        raise ValueError(f"line {number}: found the end, expected {_what_may_follow(last)}")
    return tuple(
        Section(tag, epochs, tuple(Rule(indices, tuple(changes)) for indices, changes in rules))
        for tag, epochs, rules in sections
    )


def _kind(line: str) -> str | None:
    head, colon, _ = line.partition(":")
    words = head.split()
    if len(words) == 2 and words[0] == "on":
        return "on"  # also without a colon
    if not colon or len(words) != 1:
        return None
    if words[0] == "by_index":
        return "by_index"
    return "setting" if words[0] in ("enable", "level", "ema_decay") else None


def _what_may_follow(kind: str) -> str:
    return " or ".join(_FORMS[following] for following in _MAY_FOLLOW[kind])


def _check_tag(tag: str) -> None:
    if tag not in TAGS:
        raise ValueError(f"tag is {tag!r}, expected one of {', '.join(TAGS)}")


def _numbers(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"found {word!r}, expected a whole number from 0 up")
    return [int(word) for word in words]


def _indices(text: str) -> frozenset[int] | None:
    if text == "all":
        return None
    numbers = _numbers(text)
    if not numbers:
        raise ValueError("found no indices, expected 'all' or a whole number from 0 up")
    return frozenset(numbers)


def _setting(key: str, text: str) -> bool | int | float:
    if key == "enable":
        if text not in ("True", "False"):
            raise ValueError(f"enable is {text!r}, expected True or False")
        return text == "True"
    number, expected = (int, "a whole number") if key == "level" else (float, "a number")
    try:
        value = number(text)
    except ValueError:
        raise ValueError(f"{key} is {text!r}, expected {expected}") from None
    Settings(**{key: value})  # checks the range
    return value


DEFAULT_POLICY = MesaPolicy.parse("""
# Everything but convolutions: 256 levels in a running range that keeps 9/10 of itself.

on fc:
    by_index: all
        enable: True
        level: 256
        ema_decay: 0.9

on gelu:
    by_index: all
        enable: True
        level: 256
        ema_decay: 0.9

on bn:
    by_index: all
        enable: True
        level: 256
        ema_decay: 0.9

on relu:
    by_index: all
        enable: True
        level: 256
        ema_decay: 0.9

on softmax:
    by_index: all
        enable: True
        level: 256
        ema_decay: 0.9

on matmul:
    by_index: all
        enable: True
        level: 256
        ema_decay: 0.9

on layernorm:
    by_index: all
        enable: True
        level: 256
        ema_decay: 0.9
""")
