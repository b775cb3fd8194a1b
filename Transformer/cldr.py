"""German and English phrases that Babel renders from the Unicode locale data (CLDR).

Dates, amounts, units, names and lists of them: short, but with the word order, the number formats
and the plurals of real text. Babel brings all of it, so nothing has to be downloaded.
"""

import datetime
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, product
from typing import Any

from babel import Locale, dates, lists, numbers, units
from corpora import Pair, Texts, normalise

_SEED = 1
_GERMAN, _ENGLISH = Locale("de"), Locale("en")
_SHARE = {"train": 40, "validation": 1, "test": 2}  # pairs; every kind has a number of shares

# Few numbers that occur often: a vocabulary of words has to hold every one of them. There is no 1,
# because each singular would occur once.
_YEARS = range(1990, 2030)
_TIMES = [datetime.time(hour, minute) for hour in range(24) for minute in range(0, 60, 5)]
_DAYS_IN_FIGURES = (1, 5, 10, 15, 20, 25, 28)
_ROUND = (*range(30, 100, 10), *range(100, 1000, 100), 1000, 1500, 2000, 5000, 10_000)
_WHOLE = (*range(2, 26), *_ROUND)
_COUNTS = (*_WHOLE, *(n + 0.5 for n in range(10)))
_PRICES = (*range(2, 21), *(n + cents for n in range(1, 11) for cents in (0.5, 0.99)), *_ROUND)
_SPANS = {1: 45, 60: 45, 3600: 20, 86_400: 5, 7 * 86_400: 3, 365 * 86_400: 40}  # seconds: times
_CURRENCIES = (
    "EUR USD GBP JPY CHF CAD AUD NZD CNY INR KRW BRL MXN ARS CLP COP PEN ZAR EGP MAD NGN KES TRY "
    "ILS SAR RUB UAH PLN CZK HUF RON BGN SEK NOK DKK ISK THB VND IDR PHP"
).split()
_SYMBOLS = ("EUR", "USD", "GBP", "JPY", "INR", "KRW")  # words of their own in both languages
_TERRITORIES = [
    code
    for code in sorted({*_GERMAN.territories} & {*_ENGLISH.territories})
    if len(code) == 2 and code.isalpha() and code not in ("XA", "XB", "ZZ")  # no places
]
_LANGUAGES = [
    code
    for code in sorted({*_GERMAN.languages} & {*_ENGLISH.languages})
    if len(code) == 2 and "(" not in _GERMAN.languages[code] + _ENGLISH.languages[code]
]
_QUANTITIES = (
    "area digital duration electric energy frequency length mass power pressure speed temperature "
    "volume"
).split()
_RARE = re.compile(
    "person|imperial|metric|solar|earth|dunam|furlong|fathom|scandinavian|foodcalorie|generic|light-speed"
)
_UNITS = [
    code
    for code in sorted({*_GERMAN.unit_display_names} & {*_ENGLISH.unit_display_names})
    if code.split("-")[0] in _QUANTITIES and not _RARE.search(code)
]


def texts() -> Texts:
    """20,000 pairs to learn from, 500 to validate with and 1,000 to test with, the same each time.

    Every kind has its share of each part. No text occurs twice, and a text that could be
    translated in two ways is left out.
    """
    kind_of: dict[Pair, str] = {}
    for kind, (pairs, _) in _KINDS.items():
        for pair in pairs():
            kind_of.setdefault(pair, kind)
    german, english = (Counter(side) for side in zip(*kind_of, strict=True))
    clear = [pair for pair in kind_of if german[pair[0]] == english[pair[1]] == 1]
    parts: dict[str, list[Pair]] = {part: [] for part in _SHARE}
    for kind, (_, shares) in _KINDS.items():
        order = iter(sorted((pair for pair in clear if kind_of[pair] == kind), key=_number))
        for part, pairs_per_share in _SHARE.items():
            parts[part] += islice(order, shares * pairs_per_share)
    return Texts(**parts)


def _dates() -> Iterator[Pair]:
    """Mo., 4. Jan. 2021 = Mon, Jan 4, 2021; and four more formats."""
    for day in _days("dates", 1300):
        yield _both(dates.format_date, day, "full")
        yield _both(dates.format_date, day, "long")
        for skeleton in ("MMMMd", "MMMEd", "yMMMEd"):
            yield _both(dates.format_skeleton, skeleton, day)


def _dates_in_figures() -> Iterator[Pair]:
    """Mo., 4.1. = Mon, 1/4."""
    for year, month, day in product(range(2020, 2027), range(1, 13), _DAYS_IN_FIGURES):
        yield _both(dates.format_skeleton, "MEd", datetime.date(year, month, day))


def _months() -> Iterator[Pair]:
    """Januar 2021 = January 2021; 1. Quartal 2021 = 1st quarter 2021."""
    for year, month, skeleton in product(_YEARS, range(1, 13), ("yMMMM", "yQQQQ")):
        yield _both(dates.format_skeleton, skeleton, datetime.date(year, month, 1))


def _times() -> Iterator[Pair]:
    """14:05 = 2:05 PM."""
    for time in _TIMES:
        yield _both(dates.format_time, time, "short")


def _dates_with_times() -> Iterator[Pair]:
    """4. Januar 2021, 14:05 = January 4, 2021, 2:05 PM; with and without the weekday."""
    for number, day in enumerate(_days("dates with times", 3200)):
        time = _pick(_TIMES, "time of day", number)
        yield _both(_date_with_time, day, time, _pick(("full", "long"), "format of date", number))


def _date_with_time(day: datetime.date, time: datetime.time, style: str, locale: Locale) -> str:
    pattern = str(dates.get_datetime_format(style, locale))
    of_time = dates.format_time(time, "short", locale=locale)
    return pattern.replace("{1}", dates.format_date(day, style, locale)).replace("{0}", of_time)


def _intervals() -> Iterator[Pair]:
    """Mo., 4. Jan. – Fr., 5. Feb. 2021 = Mon, Jan 4 – Fri, Feb 5, 2021; with and without a year."""
    for number, start in enumerate(_days("intervals", 3200)):
        end = start + datetime.timedelta(days=1 + _number(("days", number)) % 150)
        skeleton = _pick(("MMMEd", "yMMMEd"), "format of interval", number)
        yield _both(dates.format_interval, start, end, skeleton)


def _numbers() -> Iterator[Pair]:
    """2,5 Millionen = 2.5 million."""
    options = {"format_type": "long", "fraction_digits": 1}
    counts = [count for count in _COUNTS if count < 1000]
    for count, power in product(counts, (1_000, 1_000_000, 1_000_000_000)):
        yield _both(numbers.format_compact_decimal, count * power, **options)


def _percents() -> Iterator[Pair]:
    """1.500 % = 1,500%."""
    for count in _WHOLE:
        yield _both(numbers.format_percent, count / 100)


def _prices() -> Iterator[Pair]:
    """12,50 € = €12.50; 12,50 Mexikanische Pesos = 12.50 Mexican pesos."""
    for amount, currency in product(_PRICES, _CURRENCIES):
        yield _both(numbers.format_currency, amount, currency, format_type="name")
    for amount, currency in product(_PRICES, _SYMBOLS):
        yield _both(numbers.format_currency, amount, currency)


def _measures() -> Iterator[Pair]:
    """2,5 Kilometer pro Stunde = 2.5 kilometers per hour; 2,5 km/h = 2.5 km/h."""
    for count, unit, length in product(_COUNTS, _UNITS, ("long", "short")):
        yield _both(units.format_unit, count, unit, length)


def _time_spans() -> Iterator[Pair]:
    """vor 3 Tagen = 3 days ago; in 3 Tagen = in 3 days."""
    for seconds, most in _SPANS.items():
        for count, sign in product(range(2, most), (1, -1)):
            span = datetime.timedelta(seconds=sign * count * seconds)
            yield _both(dates.format_timedelta, span, add_direction=True)


def _territories() -> Iterator[Pair]:
    """Österreich = Austria."""
    return (_both(_name, "territories", code) for code in _TERRITORIES)


def _languages() -> Iterator[Pair]:
    """Deutsch = German."""
    return (_both(_name, "languages", code) for code in _LANGUAGES)


def _languages_of_territories() -> Iterator[Pair]:
    """Deutsch (Österreich) = German (Austria)."""
    for number in range(2500):
        language = _pick(_LANGUAGES, "language", number)
        yield _both(_language_of_territory, language, _pick(_TERRITORIES, "territory", number))


def _language_of_territory(language: str, territory: str, locale: Locale) -> str:
    return f"{locale.languages[language]} ({locale.territories[territory]})"


def _lists_of_territories() -> Iterator[Pair]:
    """Chile, Peru und Kuba = Chile, Peru, and Cuba."""
    return _lists("territories", [partial(_name, "territories", code) for code in _TERRITORIES])


def _lists_of_languages() -> Iterator[Pair]:
    """Englisch oder Deutsch = English or German."""
    return _lists("languages", [partial(_name, "languages", code) for code in _LANGUAGES])


def _lists_of_amounts() -> Iterator[Pair]:
    """12,50 Euro, 3 Stunden und 2,5 Kilometer = 12.50 euros, 3 hours, and 2.5 kilometers."""
    prices = [
        partial(numbers.format_currency, amount, currency, format_type="name")
        for amount, currency in product(_PRICES, _CURRENCIES)
    ]
    measures = [partial(units.format_unit, *of) for of in product(_COUNTS, _UNITS)]
    return _lists("amounts", prices + measures)


def _lists(title: str, items: Sequence[Callable[..., str]]) -> Iterator[Pair]:
    """Lists of two to four items, in random order."""
    for number in range(4000):
        size = _pick((2, 3, 4), title, number)
        chosen = [_pick(items, title, number, place) for place in range(size)]
        if len({*chosen}) == size:
            yield _both(_list, chosen, _pick(("standard", "or"), title, number, "style"))


def _list(items: Sequence[Callable[..., str]], style: str, locale: Locale) -> str:
    return lists.format_list([item(locale=locale) for item in items], style, locale)


def _name(names: str, code: str, locale: Locale) -> str:
    return getattr(locale, names)[code]


def _both(render: Callable[..., str], *arguments: Any, **options: Any) -> Pair:
    """What ``render`` makes of its arguments in German and in English."""
    german, english = (
        normalise(render(*arguments, locale=locale, **options)) for locale in (_GERMAN, _ENGLISH)
    )
    return german, english


def _days(purpose: str, count: int) -> Iterator[datetime.date]:
    for number in range(count):
        year = datetime.date(_pick(_YEARS, purpose, number), 1, 1)
        yield year + datetime.timedelta(days=_number((purpose, number, "day")) % 365)


def _pick(options: Sequence[Any], *key: Any) -> Any:
    return options[_number(key) % len(options)]


def _number(key: Any) -> int:
    """A number that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr((_SEED, key)).encode()).digest()[:8])


# What makes the pairs of a kind, and how many shares of every part it has; 500 in all.
_KINDS: dict[str, tuple[Callable[[], Iterator[Pair]], int]] = {
    "date": (_dates, 70),
    "date in figures": (_dates_in_figures, 11),
    "month": (_months, 13),
    "time": (_times, 6),
    "date with time": (_dates_with_times, 68),
    "interval": (_intervals, 60),
    "number": (_numbers, 3),
    "percent": (_percents, 1),
    "price": (_prices, 40),
    "measure": (_measures, 50),
    "time span": (_time_spans, 5),
    "territory": (_territories, 5),
    "language": (_languages, 3),
    "language of territory": (_languages_of_territories, 50),
    "list of territories": (_lists_of_territories, 35),
    "list of languages": (_lists_of_languages, 25),
    "list of amounts": (_lists_of_amounts, 55),
}
