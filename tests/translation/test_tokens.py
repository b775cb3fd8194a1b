"""Texts survive becoming ids and back, and tokenisers survive a checkpoint."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import tokens
import torch
from corpora import normalise
from transformer import END, PAD, SPECIAL, START, UNKNOWN

from aal.training.command_line import UserError

ROOT = Path(__file__).parent.parent.parent
TEXTS = {
    "de": [
        "Am 3. Mai 2021 um 14:05 Uhr (Berlin) fuhr er z.B. nach Österreich.",
        "„Geht's?“, fragte sie – 12,50 €/h und 3–4 km/h; www.beispiel.de/x?y=1!",
        "a  b\u00a0c\t d",
        "日本語 und русский 👍🏽 :-) ...)))((( -- --",
        "A\u0308pfel, 'n Apfel; usw.; Ein-/Ausgabe",
    ],
    "en": [
        "I can't, won't and shouldn't've (really!) paid $12.50 at 2:05PM.",
        "\"Quotes,\" he said; U.S.A.'s e.g. 3-4 km/h ... o'clock",
        "http://example.com/a_b?c=d, me@x.org #tag @you 50% [x] {y} <z>",
        "(((a)b)c) x-y-z a/b/c I'm we'll",
    ],
}


def words_of(language: str, texts: list[str], min_freq: int = 1) -> tokens.Words:
    collector = tokens.WordCollector(language)
    numbers = [
        number for ids in collector.encode_all(list(map(normalise, texts))) for number in ids
    ]
    return collector.vocabulary(numbers, min_freq)[0]


def tokenizer_of(kind: str, language: str) -> tokens.Tokenizer:
    if kind == "words":
        return words_of(language, TEXTS[language])
    return tokens.learn_byte_pairs(TEXTS[language], 300)


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("kind", tokens.KINDS)
def test_texts_come_back_as_they_were(kind: str, language: str):
    tokenizer = tokenizer_of(kind, language)
    for text in TEXTS[language]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == normalise(text)
        assert all(len(SPECIAL) <= number < len(tokenizer) for number in ids)
        framed = [START, *ids, END, PAD, PAD]
        assert tokenizer.decode(framed) == tokenizer.decode(torch.tensor(framed)) == normalise(text)
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", tokens.KINDS)
def test_one_text_or_many_have_the_same_ids(kind: str):
    tokenizer = tokenizer_of(kind, "de")
    texts = list(map(normalise, TEXTS["de"]))
    assert tokenizer.encode_all(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("kind", tokens.KINDS)
def test_tokenisers_survive_a_checkpoint(kind: str):
    tokenizer, file = tokenizer_of(kind, "en"), io.BytesIO()
    torch.save(tokenizer.state(), file)
    file.seek(0)
    again = tokens.from_state(torch.load(file, weights_only=True))
    assert len(again) == len(tokenizer) and again.state() == tokenizer.state()
    for text in [*TEXTS["en"], "never seen before"]:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_rare_and_new_words_are_unknown_and_left_out_of_the_text():
    tokenizer = words_of("en", ["the cat and the dog", "the cat"], min_freq=2)
    assert tokenizer.words == ["the", "cat"]
    assert tokenizer.encode("the dog") == [len(SPECIAL), UNKNOWN]
    assert tokenizer.decode(tokenizer.encode("the dog the cat")) == "the the cat"


def test_frequent_words_come_first_and_ties_do_not_depend_on_the_order_of_the_texts():
    texts = ["b a c c", "d b a c"]
    assert words_of("de", texts).words == words_of("de", texts[::-1]).words == ["c", "a", "b", "d"]


def test_a_vocabulary_of_no_words_is_refused():
    with pytest.raises(UserError, match="no word occurs 9 times; lower --min-freq"):
        words_of("de", ["a b a"], min_freq=9)


def test_the_mark_goes_to_the_punctuation():
    words = words_of("de", ["Deutsch (Österreich), Österreich"]).words
    assert {"Deutsch", "Österreich", "(￭", "￭)", "￭,"} == {*words}


def test_the_mark_in_a_text_is_replaced():
    tokenizer = words_of("de", ["a ￭ b￭c ￭￭"])
    assert tokenizer.decode(tokenizer.encode("a ￭ b￭c ￭￭")) == "a ■ b■c ■■"


def test_any_order_of_ids_has_a_text():
    tokenizer = words_of("de", ["(a), b"])
    for first in range(len(tokenizer)):
        for second in range(len(tokenizer)):
            text = tokenizer.decode([first, second])
            assert "￭" not in text and text == text.strip()


def test_bytes_leave_nothing_unknown_and_no_text_is_a_special_token():
    tokenizer = tokens.learn_byte_pairs(["nur a b c"], 300)
    for text in ("漢字 ￭ <pad> <s> [UNK] \x00", "ÄÖÜ👍"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == normalise(text)
        assert min(ids) >= len(SPECIAL)


def test_byte_pairs_are_the_same_in_every_process():
    code = (
        "import sys; sys.path[:0] = ['.', 'Transformer'];"
        "import tokens; texts = [f'Wort{i % 7} und {i}er' for i in range(500)];"
        "print(tokens.learn_byte_pairs(texts, 400).state()['model'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    texts = [f"Wort{i % 7} und {i}er" for i in range(500)]
    assert done.stdout.decode().strip() == tokens.learn_byte_pairs(texts, 400).state()["model"]


def test_too_few_byte_pairs_are_refused():
    assert len(tokens.learn_byte_pairs(["a"], 260)) == 260
    with pytest.raises(UserError, match="--vocab-size 259 is too small; bpe needs 260"):
        tokens.learn_byte_pairs(["a"], 259)


@pytest.mark.parametrize(
    "state", [{}, {"kind": "words"}, {"kind": "bpe", "model": "{"}, {"kind": 1}]
)
def test_a_state_of_no_tokeniser_is_refused(state: dict):
    with pytest.raises(UserError, match="no tokeniser of this version"):
        tokens.from_state(state)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    for make in (
        lambda: tokens.package_of("bpe"),
        lambda: tokens.learn_byte_pairs(["a"], 300),
        lambda: tokens.from_state({"kind": "bpe", "model": "{}"}),
    ):
        with pytest.raises(UserError, match=r'needs: pip install "aal\[bpe\]"'):
            make()
