"""What is read from each corpus, how parts are cut, and what is said of broken files."""

import io
import os
from pathlib import Path

import corpora
import pytest
from babel.messages import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import write_po

from aal.training.command_line import UserError


def write_lines(folder: Path, name: str, lines: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_pair(folder: Path, stem: str, pairs: list[tuple[str, str]]) -> None:
    for language, lines in zip(("de", "en"), zip(*pairs, strict=True), strict=True):
        write_lines(folder, f"{stem}.{language}", lines)


def numbered(count: int, title: str = "") -> list[tuple[str, str]]:
    return [(f"{title}Satz {i}", f"{title}sentence {i}") for i in range(count)]


def read(dataset: str, path: Path, direction: str = "G2E") -> corpora.Texts:
    return corpora.read(corpora.find(dataset, direction, path))


def write_parallel(folder: Path) -> None:
    for stem, count in (("train", 5), ("validation", 2), ("test", 3)):
        write_pair(folder, stem, numbered(count, stem))


TRAIN_TAGS = """<url>http://www.ted.com/talks/x</url>
<keywords>talks, Brain & Geist</keywords>
<speaker>Eine Person</speaker>
<talkid>535</talkid>
<title>Ein Titel</title>
<description>TED Talk: kurz</description>
<reviewer href="http://x">Wer</reviewer>
<translator href="http://y">Wer</translator>
{0}  eins
</doc>
<doc docid="2" genre="lectures">
{0} <i>zwei</i>
"""


def write_iwslt(root: Path, languages: str, title: str, years: tuple[str, str]) -> None:
    folder = root / languages
    folder.mkdir(parents=True)
    for language in ("de", "en"):
        text = TRAIN_TAGS.format(f"{title} {language}")
        (folder / f"train.tags.{languages}.{language}").write_text(text)
        for year in years:
            name = f"IWSLT16.TED.{year}.{languages}.{language}.xml"
            (folder / name).write_text(
                f'<?xml version="1.0"?>\n<mteval><doc docid="1"><title>T</title>\n'
                f'<seg id="1"> {year} {language} Q&amp;A </seg>\n<seg id="2"> zwei\n</seg>\n'
                "</doc></mteval>\n"
            )


def test_iwslt_holds_sentences_and_no_tags(tmp_path: Path):
    write_iwslt(tmp_path, "de-en", "hin", ("tst2013", "tst2014", "dev2010", "tst2010"))
    texts = read("IWSLT", tmp_path)
    expected = [("hin de eins", "hin en eins"), ("hin de <i>zwei</i>", "hin en <i>zwei</i>")]
    assert list(texts.train) == expected
    assert texts.validation == [("tst2013 de Q&A", "tst2013 en Q&A"), ("zwei", "zwei")]
    assert texts.test[0] == ("tst2014 de Q&A", "tst2014 en Q&A")


def test_iwslt_2017_is_validated_and_tested_with_the_sets_of_2010(tmp_path: Path):
    write_iwslt(tmp_path, "en-de", "her", ("dev2010", "tst2010"))
    texts = read("IWSLT", tmp_path)
    assert texts.validation[0][0].startswith("dev2010 de")
    assert texts.test[0][1].startswith("tst2010 en")


def test_iwslt_has_files_for_each_direction(tmp_path: Path):
    write_iwslt(tmp_path / "deep" / "down", "de-en", "hin", ("tst2013", "tst2014"))
    write_iwslt(tmp_path / "deep" / "down", "en-de", "her", ("tst2013", "tst2014"))
    assert list(read("IWSLT", tmp_path, "G2E").train)[0][0] == "hin de eins"
    assert list(read("IWSLT", tmp_path, "E2G").train)[0][0] == "her de eins"


@pytest.mark.parametrize("stem", ["validation", "valid", "val", "dev", "newstest2013"])
def test_parallel_files_are_read_as_they_are(tmp_path: Path, stem: str):
    write_pair(tmp_path, "train", [("eins ", "one"), ("eins ", "one"), ("zwei", "two")])
    write_pair(tmp_path, stem, [("drei", "three"), ("", "four"), ("fünf", "five")])
    write_pair(tmp_path, "newstest2014", [("eins", "one")])
    texts = read("parallel", tmp_path)
    assert list(texts.train) == list(texts.train) == [("eins", "one")] * 2 + [("zwei", "two")]
    assert texts.validation == [("drei", "three"), ("fünf", "five")]
    assert texts.test == corpora.read_test(corpora.find("parallel", "G2E", tmp_path))


@pytest.mark.parametrize("folder", [".", "WMT14", "wmt14"])
def test_wmt14_may_lie_in_a_folder_of_its_name(tmp_path: Path, folder: str):
    write_parallel(tmp_path / folder)
    assert len(read("WMT14", tmp_path).test) == 3


def test_texts_are_nfc_with_single_spaces(tmp_path: Path):
    write_parallel(tmp_path)
    write_lines(
        tmp_path, "train.de", ["\ufeffA\u0308pfel\u00a0\u202f und\tBirnen ", "b", "c", "d", "e"]
    )
    assert next(iter(read("parallel", tmp_path).train))[0] == "Äpfel und Birnen"


def test_line_separators_inside_a_line_do_not_shift_the_pairs(tmp_path: Path):
    write_parallel(tmp_path)
    write_lines(tmp_path, "train.de", ["a\u2028b", "c\x0bd\x85e", "f", "g", "h"])
    assert [german for german, _ in read("parallel", tmp_path).train][:2] == ["a b", "c d e"]


def assert_disjoint(texts: corpora.Texts) -> None:
    for side in range(2):
        train, validation, test = (
            {pair[side] for pair in part} for part in (texts.train, texts.validation, texts.test)
        )
        assert not (train & validation or train & test or validation & test)


def test_missing_parts_are_cut_whatever_the_order_of_the_lines(tmp_path: Path):
    pairs = numbered(200) + [("Satz 5", "another"), ("noch einer", "sentence 7")] + numbered(50)
    pairs += [(f"x {i}", f"sentence {i}") for i in range(200)]
    parts = []
    for folder, order in ((tmp_path / "a", pairs), (tmp_path / "b", pairs[::-1])):
        write_pair(folder, "train", order)
        texts = read("parallel", folder)
        assert_disjoint(texts)
        kept = list(texts.train)
        assert len(kept) == len(set(kept)) > 300
        assert len(texts.test) >= len(texts.validation) >= 10
        parts.append((set(kept), set(texts.validation), set(texts.test)))
    assert parts[0] == parts[1]


@pytest.mark.parametrize("given", ["validation", "test"])
def test_one_missing_part_is_cut_and_shares_no_text_with_the_other(tmp_path: Path, given: str):
    write_pair(tmp_path, "train", numbered(100))
    write_pair(tmp_path, given, numbered(40))
    texts = read("parallel", tmp_path)
    assert_disjoint(texts)
    assert all((texts.train, texts.validation, texts.test)) and len(list(texts.train)) >= 50


def catalogue(locale: str | None = "de") -> Catalog:
    catalog = Catalog(locale=locale, charset="utf-8")
    for number in range(60):
        catalog.add(f"Open file {number}", f"Datei {number} öffnen")
    catalog.add(("%(n)d file", "%(n)d files"), ("%(n)d Datei", "%(n)d Dateien"))
    catalog.add("guess", "Vermutung", flags=["fuzzy"])
    catalog.add("untranslated", "")
    catalog.add("GNOME", "GNOME")
    catalog.add("two\nlines", "zwei\nZeilen", context="menu")
    return catalog


def write_catalogue(path: Path, catalog: Catalog) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    (write_mo if path.suffix == ".mo" else write_po)(content, catalog)
    path.write_bytes(content.getvalue())


def all_pairs(texts: corpora.Texts) -> set[tuple[str, str]]:
    return {*texts.train, *texts.validation, *texts.test}


@pytest.mark.parametrize("suffix", [".po", ".mo"])
def test_catalogues_give_what_is_translated(tmp_path: Path, suffix: str):
    write_catalogue(tmp_path / f"app{suffix}", catalogue())
    with (tmp_path / f"app{suffix}").open("ab") as file:
        file.write(b'\n#~ msgid "old"\n#~ msgstr "alt"\n' if suffix == ".po" else b"")
    texts = read("gettext", tmp_path)
    expected = {(f"Datei {i} öffnen", f"Open file {i}") for i in range(60)}
    expected |= {("%(n)d Datei", "%(n)d file"), ("%(n)d Dateien", "%(n)d files")}
    assert all_pairs(texts) == expected | {("zwei Zeilen", "two lines")}
    assert_disjoint(texts)


@pytest.mark.parametrize(
    "place", ["de.po", "de_AT.po", "de/LC_MESSAGES/app.mo", "x/de_DE/app.po", "de@latin/app.mo"]
)
def test_german_catalogues_are_known_by_their_place(tmp_path: Path, place: str):
    write_catalogue(tmp_path / place, catalogue(locale=None))
    write_catalogue(tmp_path / "fr" / "app.po", catalogue(locale="fr"))
    write_catalogue(tmp_path / "fr" / "other.mo", catalogue(locale=None))
    assert corpora.find("gettext", "G2E", tmp_path).train == (tmp_path / place,)


def test_a_pair_of_two_catalogues_is_read_once(tmp_path: Path):
    for name in ("de/a.po", "de/a.mo"):
        write_catalogue(tmp_path / name, catalogue())
    texts = read("gettext", tmp_path)
    assert len(list(texts.train)) + len(texts.validation) + len(texts.test) == 63


def test_a_compiled_catalogue_of_another_character_set_is_left_out_with_a_note(tmp_path, capsys):
    write_catalogue(tmp_path / "de" / "new.mo", catalogue())
    old = tmp_path / "de" / "old.mo"
    write_catalogue(old, catalogue())
    old.write_bytes(old.read_bytes().replace(b"charset=utf-8", b"charset=latin"))
    assert corpora.find("gettext", "G2E", tmp_path).train == (tmp_path / "de" / "new.mo",)
    assert "old.mo is left out" in capsys.readouterr().err


def damage(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# What is broken, in a folder of good files, and what is said of it.
BROKEN = {
    "a side is missing": (lambda p: (p / "train.en").unlink(), "no .*train.en, which train.de"),
    "a test side is missing": (lambda p: (p / "test.de").unlink(), "no .*test.de, which test.en"),
    "all is missing": (lambda p: [file.unlink() for file in p.iterdir()], "no train.de and train"),
    "lines differ": (
        lambda p: write_lines(p, "train.en", ["one"]),
        "train.de has 5 sentences, but .*train.en has 1;",
    ),
    "test lines differ": (
        lambda p: write_lines(p, "test.en", ["x"] * 7),
        "test.de has 3 sentences, but .*test.en has 7;",
    ),
    "bytes": (lambda p: damage(p / "train.de", b"gut\nsch\xf6n\n"), "train.de, line 2, is not UTF"),
    "a side is empty": (lambda p: damage(p / "validation.en", b""), "validation.en is empty"),
    "no text": (lambda p: damage(p / "test.de", b"\n \n\n"), "no pairs of texts for its test part"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_parallel_files_are_named(tmp_path: Path, what: str):
    write_parallel(tmp_path)
    break_it, message = BROKEN[what]
    break_it(tmp_path)
    with pytest.raises(UserError, match=message):
        list(read("parallel", tmp_path).train)


def xml(folder: Path, name: str) -> Path:
    return folder / "de-en" / f"IWSLT16.TED.{name}.xml"


BROKEN_IWSLT = {
    "archive": (
        lambda p: [file.unlink() for file in (p / "de-en").iterdir()],
        "no train.tags.de-en.de in .*unpack",
    ),
    "test": (
        lambda p: xml(p, "tst2014.de-en.de").unlink(),
        r"no \*.tst2014.de-en.de.xml or \*.tst2010",
    ),
    "a side": (lambda p: xml(p, "tst2013.de-en.en").unlink(), "no .*en.xml, which .*de.xml"),
    "segments": (
        lambda p: damage(xml(p, "tst2013.de-en.en"), b"<seg>one</seg>"),
        "de.xml has 2 sentences, but .*en.xml has 1;",
    ),
    "bytes": (lambda p: damage(xml(p, "tst2013.de-en.en"), b"\n\n\xff"), "line 3, is not UTF-8"),
}


@pytest.mark.parametrize("what", BROKEN_IWSLT)
def test_broken_files_of_iwslt_are_named(tmp_path: Path, what: str):
    write_iwslt(tmp_path, "de-en", "hin", ("tst2013", "tst2014"))
    break_it, message = BROKEN_IWSLT[what]
    break_it(tmp_path)
    with pytest.raises(UserError, match=message):
        read("IWSLT", tmp_path)


def test_files_of_tags_alone_are_named(tmp_path: Path):
    write_iwslt(tmp_path, "de-en", "hin", ("tst2013", "tst2014"))
    for language in ("de", "en"):
        damage(tmp_path / "de-en" / f"train.tags.de-en.{language}", b"<url>x</url>\n")
    with pytest.raises(UserError, match="hold no sentences"):
        read("IWSLT", tmp_path)


BROKEN_CATALOGUES = {
    "none": (lambda p: (p / "de.po").unlink(), "no .po or .mo files in"),
    "not German": (
        lambda p: (p / "de.po").unlink() or write_catalogue(p / "fr.po", catalogue("fr")),
        r"holds 1 catalogues, but none to read in German \(found: fr\)",
    ),
    "no catalogue": (lambda p: damage(p / "de.po", b"hello\nmsgid\n"), "de.po is damaged"),
    "compiled": (lambda p: damage(p / "de" / "a.mo", b"\xde\x12\x04\x95cut"), "a.mo is damaged"),
    "bytes": (lambda p: damage(p / "de.po", b'msgid "a"\nmsgstr "\xff"\n'), "de.po is damaged"),
    "empty": (lambda p: damage(p / "de.po", b""), "de.po is empty"),
    "few": (lambda p: damage(p / "de.po", b'msgid "a"\nmsgstr "b"\n'), "1 different .* too few"),
}


@pytest.mark.parametrize("what", BROKEN_CATALOGUES)
def test_broken_catalogues_are_named(tmp_path: Path, what: str):
    write_catalogue(tmp_path / "de.po", catalogue())
    break_it, message = BROKEN_CATALOGUES[what]
    break_it(tmp_path)
    with pytest.raises(UserError, match=message):
        read("gettext", tmp_path)


@pytest.mark.parametrize("dataset", [name for name in corpora.NAMES if name != "cldr"])
def test_a_missing_folder_is_named(tmp_path: Path, dataset: str):
    with pytest.raises(UserError, match="there is no folder .*nowhere; .*--data-path"):
        corpora.find(dataset, "G2E", tmp_path / "nowhere")


@pytest.mark.parametrize("dataset", [name for name in corpora.NAMES if name != "cldr"])
def test_a_folder_that_cannot_be_looked_for_is_named(dataset: str):
    with pytest.raises(UserError, match="cannot read xxx.*: "):
        corpora.find(dataset, "G2E", Path("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path):
    write_parallel(tmp_path)
    (tmp_path / "train.de").chmod(0)
    with pytest.raises(UserError, match="cannot read .*train.de"):
        read("parallel", tmp_path)
