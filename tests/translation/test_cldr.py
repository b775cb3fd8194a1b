"""Phrases from Babel: enough, clear, and the same each time."""

from collections import Counter

import cldr
import pytest
from corpora import Texts, normalise


@pytest.fixture(scope="module")
def texts() -> Texts:
    return cldr.texts()


def test_parts_have_their_sizes_and_share_no_text(texts: Texts):
    parts = [texts.train, texts.validation, texts.test]
    assert [len(part) for part in parts] == [20_000, 500, 1_000]
    for side in range(2):
        every = [pair[side] for part in parts for pair in part]
        assert len(set(every)) == len(every)
        assert every == [normalise(text) for text in every] and all(every)


def test_phrases_are_the_same_each_time(texts: Texts):
    assert cldr.texts() == texts


def test_every_kind_is_in_every_part(texts: Texts):
    kinds = {pair: kind for kind, (pairs, _) in cldr._KINDS.items() for pair in pairs()}
    shares = {kind: count for kind, (_, count) in cldr._KINDS.items()}
    for part, size in (("train", 40), ("validation", 1), ("test", 2)):
        found = Counter(kinds[pair] for pair in getattr(texts, part))
        assert found == {kind: count * size for kind, count in shares.items()}


def test_languages_differ_in_more_than_words(texts: Texts):
    pairs = dict(texts.train + texts.validation + texts.test)
    assert pairs["1. Quartal 2021"] == "1st quarter 2021"
    assert pairs["in 3 Stunden"] == "in 3 hours" and pairs["vor 3 Stunden"] == "3 hours ago"
    assert pairs["2,5 Millionen"] == "2.5 million"
    assert sum(german == english for german, english in pairs.items()) < 0.1 * len(pairs)
