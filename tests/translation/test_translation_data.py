"""Corpora become ids once, and the cache is used exactly as long as it is right."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import data
import numpy as np
import pytest
import tokens
from data import Corpus, Settings
from transformer import MAX_LENGTH, SPECIAL, UNKNOWN

from aal.training.command_line import UserError

SETTINGS = Settings("parallel", min_freq=1, vocab_size=300)


def write_corpus(folder: Path, count: int = 40) -> None:
    folder.mkdir(exist_ok=True)
    for stem, first in (("train", 0), ("validation", 1000), ("test", 2000)):
        numbers = range(first, first + (count if stem == "train" else 3))
        for language, text in (("de", "Satz Nr. {}, ja!"), ("en", "no. {} sentence (yes)")):
            lines = "".join(text.format(number) + "\n" for number in numbers)
            (folder / f"{stem}.{language}").write_text(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "texts")
    return tmp_path / "texts"


def cache_of(folder: Path) -> Path:
    (path,) = (folder / "cache").iterdir()
    return path


def assert_equal(first: Corpus, second: Corpus) -> None:
    for name in ("train", "validation", "test"):
        one, other = getattr(first, name), getattr(second, name)
        for side in ("source", "target"):
            a, b = getattr(one, side), getattr(other, side)
            assert np.array_equal(a.flat, b.flat) and np.array_equal(a.offsets, b.offsets)
            assert a.flat.dtype == np.int32 and a.offsets.dtype == np.int64
        assert one.references == other.references
    assert first.source.state() == second.source.state()
    assert first.target.state() == second.target.state()
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("kind", tokens.KINDS)
@pytest.mark.parametrize("direction", ["G2E", "E2G"])
def test_ids_are_those_of_the_texts(folder: Path, kind: str, direction: str):
    corpus = data.load(replace(SETTINGS, tokenizer=kind, direction=direction), folder)
    first, second = ("de", "en") if direction == "G2E" else ("en", "de")
    for language, tokenizer, side in (
        (first, corpus.source, "source"),
        (second, corpus.target, "target"),
    ):
        lines = (folder / f"train.{language}").read_text().splitlines()
        ids = getattr(corpus.train, side)
        assert [tokenizer.decode(ids[i]) for i in range(len(ids))] == lines
        assert [tokenizer.encode(line) for line in lines] == [ids[i].tolist() for i in range(40)]
        assert ids.lengths.tolist() == [len(ids[i]) for i in range(40)]
    assert corpus.test.references == (folder / f"test.{second}").read_text().splitlines()
    assert corpus.train.references is None and len(corpus.validation) == 3


def test_words_below_the_minimum_are_unknown_in_training_too(folder: Path):
    corpus = data.load(replace(SETTINGS, min_freq=2), folder)
    assert len(corpus.source) == len(SPECIAL) + 5
    assert (corpus.train.source.flat == UNKNOWN).sum() == 40


@pytest.mark.parametrize("kind", tokens.KINDS)
def test_long_pairs_are_dropped_from_training_alone(folder: Path, kind: str):
    for stem in ("train", "test"):
        for language, text in (("de", "kurz"), ("en", "short and " * 200)):
            with (folder / f"{stem}.{language}").open("a") as file:
                file.write(text + "\n")
    corpus = data.load(replace(SETTINGS, tokenizer=kind), folder)
    assert len(corpus.train) == 40 and len(corpus.test) == 4
    assert corpus.test.target.lengths[-1] >= 400 - 200 * (kind == "bpe")
    assert corpus.train.target.lengths.max() <= 100


def test_a_limit_below_every_text_is_refused(folder: Path):
    with pytest.raises(UserError, match="no training pair has at most --max-length 2 tokens"):
        data.load(replace(SETTINGS, max_length=2), folder)


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("direction, room", [("G2E", 0), ("E2G", 1)])
def test_a_text_that_the_networks_cannot_read_is_refused(
    folder: Path, part: str, direction: str, room: int
):
    """A target stands behind START, which takes a position."""
    settings = replace(SETTINGS, direction=direction)
    corpus = data.load(settings, folder)
    path = folder / f"{part}.de"
    first, *lines = path.read_text().splitlines()
    longest = MAX_LENGTH - room
    path.write_text("\n".join(["ja " * longest, *lines]))
    assert getattr(data.load(settings, folder), part).sizes.max() == MAX_LENGTH
    path.write_text("\n".join(["ja " * (longest + 1), *lines]))
    words = f"the {part} part of parallel has a text of 5001 tokens"
    with pytest.raises(UserError, match=words):
        data.load(settings, folder)
    if part == "test":
        with pytest.raises(UserError, match=words):
            data.load_test(settings, folder, corpus.source, corpus.target, corpus.train_files)


def test_more_texts_than_a_chunk_keep_their_order(folder: Path, monkeypatch: pytest.MonkeyPatch):
    whole = data.load(SETTINGS, folder)
    cache_of(folder).unlink()
    monkeypatch.setattr(data, "_CHUNK", 7)
    assert_equal(data.load(SETTINGS, folder), whole)


@pytest.mark.parametrize("kind", tokens.KINDS)
def test_an_unchanged_corpus_is_taken_from_the_cache(folder: Path, kind: str, capsys):
    settings = replace(SETTINGS, tokenizer=kind)
    first = data.load(settings, folder)
    written = cache_of(folder).stat()
    assert_equal(data.load(settings, folder), first)
    again = cache_of(folder).stat()
    assert (again.st_mtime_ns, again.st_ino) == (written.st_mtime_ns, written.st_ino)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["train.de", "validation.en", "test.de"])
def test_a_changed_file_is_read_anew(folder: Path, name: str):
    first = data.load(SETTINGS, folder)
    path = folder / name
    path.write_text(path.read_text().replace("1", "9", 1))  # the size stays
    second = data.load(SETTINGS, folder)
    assert second.fingerprint != first.fingerprint
    cache_of(folder).unlink()
    assert_equal(data.load(SETTINGS, folder), second)


@pytest.mark.parametrize(
    "change",
    [{"direction": "E2G"}, {"tokenizer": "bpe"}, {"min_freq": 2}, {"max_length": 50}],
    ids=str,
)
def test_settings_have_their_own_caches(folder: Path, change: dict):
    first = data.load(SETTINGS, folder)
    second = data.load(replace(SETTINGS, **change), folder)
    assert first.fingerprint != second.fingerprint
    assert len([*(folder / "cache").iterdir()]) == 2
    assert_equal(data.load(SETTINGS, folder), first)


def test_a_cache_of_another_package_or_format_is_made_anew(folder: Path, monkeypatch):
    first = data.load(SETTINGS, folder)
    monkeypatch.setattr(data, "_FORMAT", data._FORMAT + 1)
    assert data.load(SETTINGS, folder).fingerprint != first.fingerprint
    monkeypatch.setattr(tokens, "package_of", lambda kind: "spacy 99")
    third = data.load(SETTINGS, folder).fingerprint
    assert third == data.load(SETTINGS, folder).fingerprint != first.fingerprint


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def other_archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return file.getvalue()


def lone_array(content: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-1],
    "flipped early": lambda content: flipped(content, 200),
    "flipped in the middle": lambda content: flipped(content, len(content) // 2),
    "not an archive": lambda content: b"hello, this is text",
    "another archive": other_archive,
    "an array": lone_array,
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_cache_is_replaced_with_a_note(folder: Path, what: str, capsys):
    first = data.load(SETTINGS, folder)
    path = cache_of(folder)
    path.write_bytes(DAMAGE[what](path.read_bytes()))
    assert_equal(data.load(SETTINGS, folder), first)
    assert f"{path} is damaged; the data are prepared anew" in capsys.readouterr().err
    assert_equal(data.load(SETTINGS, folder), first)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["cache", "cache/file"])
def test_a_folder_that_cannot_be_written_costs_only_time(folder: Path, place: str, capsys):
    first = data.load(SETTINGS, folder)
    path = cache_of(folder)
    path.unlink()
    if place == "cache":  # a file where the folder should be
        path.parent.rmdir()
        path.parent.write_text("")
    else:  # a folder where the file should be, as root can write everywhere
        path.mkdir()
        (path / "x").write_text("")
    assert_equal(data.load(SETTINGS, folder), first)
    assert "the data are prepared anew each time" in capsys.readouterr().err


def test_a_cache_that_cannot_be_read_costs_only_time(folder: Path, capsys):
    first = data.load(SETTINGS, folder)
    cache_of(folder).unlink()
    (folder / "cache").rmdir()
    (folder / "cache").symlink_to("x" * 300)  # fails for root too
    assert_equal(data.load(SETTINGS, folder), first)
    assert "cannot read" in capsys.readouterr().err


def test_a_test_part_is_read_in_the_ids_of_given_tokenisers(folder: Path, tmp_path: Path):
    corpus = data.load(SETTINGS, folder)
    write_corpus(tmp_path / "other", count=5)
    part = data.load_test(SETTINGS, tmp_path / "other", corpus.source, corpus.target, None)
    assert np.array_equal(part.source.flat, corpus.test.source.flat)
    assert part.references == corpus.test.references
    assert not (tmp_path / "other" / "cache").exists()


def test_a_test_part_that_was_cut_is_cut_alike(tmp_path: Path):
    write_corpus(tmp_path, count=100)
    for stem in ("validation", "test"):
        for language in ("de", "en"):
            (tmp_path / f"{stem}.{language}").unlink()
    corpus = data.load(SETTINGS, tmp_path)
    learned = corpus.source, corpus.target, corpus.train_files
    elsewhere = tmp_path.rename(tmp_path.with_name("elsewhere"))
    part = data.load_test(SETTINGS, elsewhere, *learned)
    assert part.references == corpus.test.references and len(part) == 5
    with (
        (elsewhere / "train.de").open("a") as german,
        (elsewhere / "train.en").open("a") as english,
    ):
        german.write("Noch ein Satz\n")
        english.write("another sentence\n")
    with pytest.raises(UserError, match="test part cut from them is no longer held out"):
        data.load_test(SETTINGS, elsewhere, *learned)


def test_phrases_of_cldr_need_no_files_and_hardly_a_word_is_unknown(tmp_path: Path):
    corpus = data.load(Settings("cldr"), tmp_path / "new")
    sizes = [len(part) for part in (corpus.train, corpus.validation, corpus.test)]
    assert sizes == [20_000, 500, 1_000]
    assert len(corpus.source) < 1500 > len(corpus.target)
    for part in (corpus.validation, corpus.test):
        for side in (part.source, part.target):
            assert (side.flat == UNKNOWN).mean() < 0.001
    decoded = [corpus.target.decode(corpus.test.target[i]) for i in range(1000)]
    assert decoded == corpus.test.references
