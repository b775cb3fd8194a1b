"""Tables of labelled texts: what is read, and what is said of damaged ones."""

from pathlib import Path

import pytest
import tsv

from aal.training.command_line import UserError

COLUMNS = (("a", "b"), "label")


def write(path: Path, *lines: str, end: str = "\n") -> Path:
    path.write_bytes("".join(f"{line}{end}" for line in lines).encode())
    return path


def test_columns_are_found_by_their_names(tmp_path: Path):
    path = write(tmp_path / "x.tsv", "label\tid\tb\ta", "yes\t7\tsecond\tfirst")
    (row,) = tsv.read(path, *COLUMNS)
    assert (row.texts, row.label) == (("first", "second"), "yes")
    assert tsv.read(path, ("b",), "label")[0].texts == ("second",)
    assert tsv.read(path, ("b",), "id")[0].label == "7"


def test_a_quotation_mark_is_a_character(tmp_path: Path):
    path = write(tmp_path / "x.tsv", "a\tb\tlabel", '"He said\tso.\t1', 'She "too"\t""\t0')
    assert [row.texts for row in tsv.read(path, *COLUMNS)] == [
        ('"He said', "so."),
        ('She "too"', '""'),
    ]


def test_byte_order_mark_carriage_returns_and_empty_lines_are_no_text(tmp_path: Path):
    path = write(tmp_path / "x.tsv", "\ufeffa\tb\tlabel", "x\ty\t1", "", end="\r\n")
    assert [(row.texts, row.label) for row in tsv.read(path, *COLUMNS)] == [(("x", "y"), "1")]


def test_only_a_line_feed_ends_a_line(tmp_path: Path):
    text = "one\x85two\u2028three\x0cfour"
    path = write(tmp_path / "x.tsv", "a\tb\tlabel", f"{text}\ty\t1")
    assert tsv.read(path, *COLUMNS)[0].texts[0] == text


ERRORS = {
    "no rows": (b"a\tb\tlabel\n", "x.tsv has no rows"),
    "nothing": (b"", "x.tsv is empty"),
    "nothing but empty lines": (b"\xef\xbb\xbf\r\n\n", "x.tsv is empty"),
    "other columns": (b"a\tlabel\nx\t1\n", "x.tsv, line 1: no column 'b', only a, label"),
    "two columns of a name": (b"a\tb\ta\tlabel\n", "line 1: two columns are called 'a'"),
    "too few values": (b"a\tb\tlabel\nx\ty\t1\nx\t1\n", "x.tsv, line 3: 2 values between tabs"),
    "too many values": (b"a\tb\tlabel\nx\ty\tz\t1\n", "x.tsv, line 2: 4 values between tabs"),
    "no label": (b"a\tb\tlabel\n\nx\ty\t \n", "x.tsv, line 3: column 'label' is empty"),
    "other encoding": (b"a\tb\tlabel\nx\xff\ty\t1\n", "x.tsv, line 2: this is not UTF-8 text"),
}


@pytest.mark.parametrize("content, words", ERRORS.values(), ids=ERRORS.keys())
def test_a_damaged_table_is_refused(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "x.tsv").write_bytes(content)
    with pytest.raises(UserError) as error:
        tsv.read(tmp_path / "x.tsv", *COLUMNS)
    assert words in str(error.value) and str(tmp_path / "x.tsv") in str(error.value)


def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="there is no file"):
        tsv.read(tmp_path / "x.tsv", *COLUMNS)
    with pytest.raises(UserError, match="cannot read"):
        tsv.read(tmp_path, *COLUMNS)
