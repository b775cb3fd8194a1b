"""The pairs that Babel renders: what they mean, how they are balanced, what their parts share."""

from collections import Counter, defaultdict
from itertools import islice, product

import babel_pairs
import pytest
from babel_pairs import COUNTS, KINDS, part_of


@pytest.fixture(scope="module")
def parts() -> dict[str, list[babel_pairs.Pair]]:
    return {part: list(islice(babel_pairs.pairs(part), 2000)) for part in COUNTS}


@pytest.fixture(scope="module")
def meanings() -> dict[str, dict[str, set]]:
    """By kind, the values that each text stands for."""
    found: dict[str, dict[str, set]] = {name: defaultdict(set) for name in KINDS}
    for name, kind in KINDS.items():
        for value, write in product(product(*kind.domains), kind.formats):
            found[name][write(value)].add(value)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_stands_for_one_value(meanings, kind: str):
    assert all(len(values) == 1 for values in meanings[kind].values())


def test_the_label_tells_whether_the_values_are_the_same(parts, meanings):
    kinds = list(KINDS)
    for pairs in parts.values():
        for number, (first, second, is_same) in enumerate(pairs):
            texts = meanings[kinds[number // 2 % len(kinds)]]
            assert (texts[first] == texts[second]) == is_same, (first, second)


def test_labels_are_balanced_and_say_nothing_about_the_form(parts):
    """Both labels have the same first texts, and formats go with them alike."""
    for pairs in parts.values():
        by_label = [[pair for pair in pairs if pair[2] is label] for label in (False, True)]
        assert [len(some) for some in by_label] == [len(pairs) / 2] * 2
        firsts = [Counter(first for first, *_ in some) for some in by_label]
        assert firsts[0] == firsts[1]
        forms = [Counter(map(_form, some)) for some in by_label]
        for form in forms[0] | forms[1]:
            assert abs(forms[0][form] - forms[1][form]) <= 0.3 * len(pairs) / 10, form


def _form(pair: babel_pairs.Pair) -> str:
    """The second text with every digit replaced, and what is no digit kept where short."""
    return "".join("9" if c.isdigit() else "a" if c.isalpha() else c for c in pair[1])[:6]


def test_no_value_is_in_two_parts(parts, meanings):
    kinds = list(KINDS)
    for part, pairs in parts.items():
        for number, (*texts, _) in enumerate(pairs):
            kind = kinds[number // 2 % len(kinds)]
            for text in texts:
                (value,) = meanings[kind][text]
                assert part_of(kind, value) == part


def test_pairs_are_the_same_each_time(parts):
    assert list(islice(babel_pairs.pairs("test"), 8)) == parts["test"][:8]
    assert [part_of("date", (2021, 1, day)) for day in range(1, 9)] == PARTS_OF_JANUARY


def test_many_others_differ_in_one_component(parts, meanings):
    """So that a network has to read all of a text."""
    kinds, differences = list(KINDS), Counter()
    for number, (first, second, is_same) in enumerate(parts["train"]):
        texts = meanings[kinds[number // 2 % len(kinds)]]
        if not is_same:
            (one,), (other,) = texts[first], texts[second]
            differences[sum(a != b for a, b in zip(one, other, strict=True))] += 1
    assert differences[1] > 0.3 * sum(differences.values()) and not differences[0]


def test_the_parts_are_as_large_as_they_say():
    assert sum(1 for _ in babel_pairs.pairs("validation")) == COUNTS["validation"]


PARTS_OF_JANUARY = [
    "train",
    "train",
    "train",
    "validation",
    "train",
    "validation",
    "train",
    "train",
]
