"""Flags as people type them."""

import sys

import pytest

from aal.training.command_line import (
    NOTED,
    Parser,
    Stopped,
    UserError,
    at_most,
    note,
    positive_float,
    positive_int,
    print_line,
    run,
    write_output,
)


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="train.py")
    parser.add_argument("--ARA-stride", type=positive_int, nargs="+")
    parser.add_argument("--model-path", "--weights")
    parser.add_argument("--lr", type=positive_float)
    parser.add_argument("--beam", type=at_most(9, positive_int))
    parser.add_switch("--get-li", help="record")
    return parser


@pytest.mark.parametrize("flag", ["--model-path", "--model_path", "--weights", "--Model_Path"])
def test_spellings_of_a_flag_are_one_flag(parser: Parser, flag: str):
    assert parser.parse_args([flag, "a_b-c"]).model_path == "a_b-c"
    assert parser.parse_args([f"{flag}=a_b-c"]).model_path == "a_b-c"


@pytest.mark.parametrize(
    "words, value",
    [
        ([], False),
        (["--get-li"], True),
        (["--get_li", "True"], True),
        (["--get-li", "false"], False),
        (["--get-li=False"], False),
        (["--no-get-li"], False),
        (["--get-li", "--no_get_li"], False),
    ],
    ids=str,
)
def test_a_switch_takes_nothing_a_truth_value_or_no(parser: Parser, words: list, value: bool):
    assert parser.parse_args(words).get_li is value


@pytest.mark.parametrize(
    "words, text",
    [
        (["--lr", "0"], "above 0"),
        (["--lr", "nan"], "above 0"),
        (["--lr=--"], "does not take the value --"),
        (["--lr", "1e300"], "up to 1e30"),
        (["--ara-stride", "2", "0"], "at least 1"),
        (["--ara-stride", "9" * 400], "below 2"),
        (["--beam", "0"], "at least 1"),
        (["--beam", "10"], "at most 9, got '10'"),
        (["--ara-stride", "2.5"], "'2.5'"),
        (["--ara-stride", "1_0"], "'1_0'"),
        (["--get-li", "perhaps"], "'perhaps'"),
        (["--mod", "x"], "--mod"),
        (["stray"], "stray"),
    ],
    ids=str,
)
def test_a_mistake_is_a_user_error_that_names_it(parser: Parser, words: list, text: str):
    with pytest.raises(UserError, match=text):
        parser.parse_args(words)


def test_output_of_a_process_without_one_goes_nowhere(monkeypatch: pytest.MonkeyPatch):
    """As of ``train.py ... >&-``."""
    monkeypatch.setattr(sys, "stdout", None)

    def main(arguments):
        print_line("text")
        write_output(b"bytes")
        return 3

    assert run(main, [], "train.py") == 3


def test_a_user_error_becomes_one_line_and_status_2(capsys: pytest.CaptureFixture):
    def main(arguments):
        raise UserError("no such thing;\n  try another")

    assert run(main, [], "train.py") == 2
    assert capsys.readouterr().err == "train.py: error: no such thing; try another\n"


def test_a_line_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch):
    """Those of several processes would mix."""
    pieces = []

    class Stderr:
        def write(self, text: str) -> None:
            pieces.append(text)

    def main(arguments):
        note("this stops nothing")
        raise UserError("no such thing")

    monkeypatch.setattr(sys, "stderr", Stderr())
    run(main, [], "train.py")
    lines = ["train.py: note: this stops nothing\n", "train.py: error: no such thing\n"]
    assert [piece for piece in pieces if piece] == lines


@pytest.mark.parametrize("variable, value", [("RANK", "1"), (NOTED, "1")])
def test_one_of_several_processes_makes_notes(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
):
    monkeypatch.setenv("RANK", "0")
    note("first")
    monkeypatch.setenv(variable, value)
    note("second")
    assert capsys.readouterr().err == "train.py: note: first\n"


@pytest.mark.parametrize(
    "hints, words", [((), ""), (("--resume continues",), "; --resume continues")]
)
def test_an_interrupted_run_says_what_can_be_done(
    capsys: pytest.CaptureFixture, hints: tuple[str, ...], words: str
):
    def main(arguments):
        raise KeyboardInterrupt(*hints)

    assert run(main, [], "train.py") == 130
    assert capsys.readouterr().err == f"train.py: interrupted{words}\n"


def test_flags_of_old_releases_are_answered_with_what_became_of_them(parser: Parser):
    parser.reject({"--precision": "is gone; use --amp"})
    for words in (["--precision"], ["--Precision=16"], ["--precision", "16"]):
        with pytest.raises(UserError, match="^--precision is gone; use --amp$"):
            parser.parse_args(words)
    assert "--precision" not in parser.format_help()


def test_a_stopped_run_says_so_once(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def main(arguments):
        raise Stopped(15, "terminated at step 3")

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run(main, [], "train.py") == 143
    assert capsys.readouterr().err == "train.py: terminated at step 3\n"


def test_a_switch_may_take_a_word(parser: Parser):
    parser.add_switch("--continue", help="", word="auto")
    cases = {(): False, ("--continue",): True, ("--continue", "auto"): "auto"}
    cases |= {("--continue=False",): False, ("--no-continue",): False}
    for words, value in cases.items():
        assert vars(parser.parse_args(words))["continue"] == value
    with pytest.raises(UserError, match="True, False or auto, got 'car'"):
        parser.parse_args(["--continue", "car"])
