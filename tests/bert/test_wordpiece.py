"""Tokenisers: what is learnt, how pairs are framed and cut, and what a state is."""

import pytest
import wordpiece

from aal.training.command_line import UserError

TEXTS = ["The dog, the cat.", "the Dog 12", "the cat 1", "Müller's dog"] * 3


@pytest.fixture
def tokenizer():
    tokenizer = wordpiece.learn(TEXTS, 100)
    wordpiece.limit(tokenizer, 12)
    return tokenizer


def pieces(tokenizer, *texts: str) -> list[str]:
    return wordpiece.encode(tokenizer, [texts])[0].tokens


def test_frequent_words_are_ids_and_others_are_spelled(tokenizer):
    assert pieces(tokenizer, "The DOG 12") == ["[CLS]", "the", "dog", "1", "2", "[SEP]"]
    assert pieces(tokenizer, "tog") == ["[CLS]", "t", "##o", "##g", "[SEP]"]
    assert pieces(tokenizer, "müller") == ["[CLS]", "muller", "[SEP]"]  # without accents
    assert pieces(tokenizer, "x cat") == ["[CLS]", "[UNK]", "cat", "[SEP]"]


def test_frequent_words_come_first():
    small = wordpiece.learn(TEXTS, len(wordpiece.learn(TEXTS, 100).get_vocab()) - 2)
    assert "muller" not in small.get_vocab() and "dog" in small.get_vocab()
    with pytest.raises(UserError, match="--vocab-size 9 is too small; the characters need"):
        wordpiece.learn(TEXTS, 9)
    assert "rare" not in wordpiece.learn([*TEXTS, "rare rare"], 100).get_vocab()


def test_special_tokens_have_the_first_ids(tokenizer):
    assert [tokenizer.token_to_id(token) for token in wordpiece.SPECIAL] == [0, 1, 2, 3]


def test_a_pair_is_framed_and_has_two_segments(tokenizer):
    (encoding,) = wordpiece.encode(tokenizer, [("the dog", "cat")])
    assert encoding.tokens == ["[CLS]", "the", "dog", "[SEP]", "cat", "[SEP]"]
    assert encoding.type_ids == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("first, second", [(20, 2), (2, 20), (20, 20), (5, 4), (5, 5), (7, 3)])
def test_the_longer_text_is_cut_first(tokenizer, first: int, second: int):
    """One token after the other is taken off whichever text is longer."""
    (encoding,) = wordpiece.encode(tokenizer, [("dog " * first, "cat " * second)])
    left = [first, second]
    while sum(left) > 12 - 3:
        left[left[0] <= left[1]] -= 1
    found = [encoding.tokens.count(word) for word in ("dog", "cat")]
    assert sorted(found) == sorted(left) and sum(found) == min(9, first + second)
    if abs(first - second) > 1:
        assert found == left
    assert encoding.tokens[0] == "[CLS]" and encoding.tokens.count("[SEP]") == 2


def test_a_single_text_is_cut_behind(tokenizer):
    assert pieces(tokenizer, "dog " * 20) == ["[CLS]", *["dog"] * 10, "[SEP]"]


def test_what_is_learnt_depends_on_the_texts_alone():
    states = {wordpiece.learn(texts, 40).to_str() for texts in (TEXTS, TEXTS[::-1], iter(TEXTS))}
    assert len(states) == 1


def test_a_state_restores_the_tokeniser_and_its_limit(tokenizer):
    restored = wordpiece.from_state(tokenizer.to_str())
    for texts in (("the dog", "cat 12"), ("dog " * 30, "cat")):
        assert pieces(restored, *texts) == pieces(tokenizer, *texts)
    for state in ("", "{}", None, 3):
        with pytest.raises(ValueError, match="this is no tokeniser"):
            wordpiece.from_state(state)
