"""Labelled texts from tables: files of values between tabs, whose first line names the columns."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from aal.training.command_line import UserError


class Row(NamedTuple):
    """One or two texts, their label and where they stand."""

    texts: tuple[str, ...]
    label: str
    place: str  # file and line, for messages


def read(path: Path, text_columns: Sequence[str], label_column: str) -> list[Row]:
    """Read a table. A quotation mark is a character like others, as in GLUE's files.

    Args:
        text_columns: names of one column or two.

    Raises:
        UserError: the file is missing, is empty, is no UTF-8, lacks a column or rows, or a row has
            another number of values than the first line, or no label; the text names file, line
            and column.
    """
    lines = _lines(path)
    _, first = next(lines, (0, ""))
    if not first:
        raise UserError(f"{path} is empty")
    names = first.split("\t")
    columns = [_place(path, names, column) for column in (*text_columns, label_column)]
    rows = []
    for number, line in lines:
        values, place = line.split("\t"), f"{path}, line {number}"
        if len(values) != len(names):
            raise UserError(
                f"{place}: {len(values)} values between tabs, but the first line names {len(names)}"
            )
        *texts, label = (values[column].strip() for column in columns)
        if not label:
            raise UserError(f"{place}: column {label_column!r} is empty")
        rows.append(Row(tuple(texts), label, place))
    if not rows:
        raise UserError(f"{path} has no rows below its first line")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers; only a line feed ends a line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: this is not UTF-8 text") from error
        if text:
            yield number, text


def _place(path: Path, names: Sequence[str], column: str) -> int:
    if names.count(column) > 1:
        raise UserError(f"{path}, line 1: two columns are called {column!r}")
    if column not in names:
        raise UserError(f"{path}, line 1: no column {column!r}, only {', '.join(names)}")
    return names.index(column)
