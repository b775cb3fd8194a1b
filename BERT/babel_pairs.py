"""Pairs of texts that mean the same or not: Babel renders one value in two formats, or two values.

Dates, times, numbers and amounts of money in English, German, French and Danish formats, from the
Unicode locale data that Babel brings, so that nothing has to be downloaded. "January 4, 2021" and
"04.01.21" are the same; "January 4, 2021" and "04.02.21" are not.
"""

import datetime
import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from babel import dates, numbers

COUNTS = {"train": 32_000, "validation": 1_000, "test": 2_000}  # pairs

_SEED = 1
_MOST_CHANGES = 4
_SHARES = {"train": range(8), "validation": (8,), "test": (9,)}  # tenths of the values
_CURRENCIES = ("EUR", "USD", "GBP", "JPY", "INR", "KRW", "BRL", "ILS")
_DAYS = range(1, 29)  # that every month has

Value = tuple[Any, ...]
Pair = tuple[str, str, bool]  # two texts, and whether they stand for the same value


@dataclass(frozen=True)
class Kind:
    """Values that are written alike.

    Args:
        domains: what each component of a value is one of.
        formats: each writes a value; no text stands for two values, whatever the formats.
    """

    domains: Sequence[Sequence[Any]]
    formats: Sequence[Callable[[Value], str]]


def pairs(part: str) -> Iterator[Pair]:
    """The pairs of a part, a key of ``COUNTS``; the same each time.

    They come in twos that differ in the second value alone: a text, and another format of its
    value, or of a value that differs in a component or some. Every value belongs to one part, with
    all its texts.
    """
    kinds = list(KINDS)
    for number in range(COUNTS[part] // 2):
        name = kinds[number % len(kinds)]
        formats = KINDS[name].formats
        value, other = _values(part, name, number)
        first = _draw((part, number, "first")) % len(formats)
        second = (first + 1 + _draw((part, number, "second")) % (len(formats) - 1)) % len(formats)
        text = formats[first](value)
        yield text, formats[second](other), False
        yield text, formats[second](value), True


def part_of(kind: str, value: Value) -> str:
    """The only part in which a value occurs."""
    tenth = _draw((kind, value)) % 10
    return next(part for part, tenths in _SHARES.items() if tenth in tenths)


def _values(part: str, name: str, number: int) -> tuple[Value, Value]:
    """Two values of a part, the second with one component or some drawn again."""
    domains, attempt = KINDS[name].domains, 0
    while True:
        key = (part, name, number, attempt)
        value = tuple(_pick(domain, key, place) for place, domain in enumerate(domains))
        count = 1 + _draw((key, "how many")) % _MOST_CHANGES
        changed = {_draw((key, "where", i)) % len(domains) for i in range(count)}
        other = tuple(
            _pick(domain, key, place, "again") if place in changed else value[place]
            for place, domain in enumerate(domains)
        )
        if value != other and part_of(name, value) == part_of(name, other) == part:
            return value, other
        attempt += 1


def _date(style: str, locale: str, value: Value) -> str:
    return _plain(dates.format_date(datetime.date(*value), style, locale))


def _time(locale: str, value: Value) -> str:
    return _plain(dates.format_time(datetime.time(*value), "short", locale=locale))


def _decimal(pattern: str, locale: str, value: Value) -> str:
    return _plain(numbers.format_decimal(_number_of(value) / 100, pattern, locale))


def _money(locale: str, value: Value, **options: Any) -> str:
    *digits, currency = value
    options |= {"locale": locale, "currency_digits": False}  # cents of yen, too
    return _plain(numbers.format_currency(_number_of(digits) / 100, currency, **options))


def _number_of(digits: Sequence[int]) -> int:
    return int("".join(map(str, digits)))


def _plain(text: str) -> str:
    """The text with ordinary spaces."""
    return unicodedata.normalize("NFKC", text)


def _pick(options: Sequence[Any], *key: Any) -> Any:
    return options[_draw(key) % len(options)]


def _draw(key: Any) -> int:
    """A number that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr((_SEED, key)).encode()).digest()[:8])


_STYLES = {
    "en": ("long", "medium", "short"),
    "de": ("long", "short"),
    "fr": ("long", "medium", "short"),
}
_FIRST, _DIGIT = range(1, 10), range(10)
KINDS = {
    "date": Kind(
        (range(1990, 2030), range(1, 13), _DAYS),
        [partial(_date, style, locale) for locale, styles in _STYLES.items() for style in styles],
    ),
    "time": Kind(
        (range(24), range(60)), [partial(_time, locale) for locale in ("en", "de", "fr_CA", "da")]
    ),
    "number": Kind(
        (_FIRST, *[_DIGIT] * 3),
        [partial(_decimal, "#,##0.00", locale) for locale in ("en", "de")]
        + [partial(_decimal, "0.000E0", "en")],
    ),
    "money": Kind(
        (_FIRST, *[_DIGIT] * 2, _CURRENCIES),
        [partial(_money, locale) for locale in ("en", "de")]
        + [partial(_money, locale, format_type="name") for locale in ("en", "de", "fr")]
        + [partial(_money, "en", format="¤¤ #,##0.00")],
    ),
}
