"""The flags of compressors: what they mean, and what cannot be meant."""

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

from aal.compression import actnn, gact
from aal.compression.compress import METHODS
from aal.compression.mesa_policy import MesaPolicy
from aal.compression.method import Method
from aal.training.command_line import Parser, UserError
from aal.training.compression_flags import Compression, add_compression_flags, compression_of

CPU = torch.device("cpu")
POLICY = "on fc:\n    by_index: 0 2\n        enable: True\n        level: 16\n"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text(POLICY)
    return path


def parsed(*words: object) -> argparse.Namespace:
    parser = Parser(prog="train.py")
    add_compression_flags(parser)
    parser.add_argument("--model-path", default=argparse.SUPPRESS)
    return parser.parse_args([str(word) for word in words])


def chosen(*words: object) -> Compression:
    return compression_of(parsed(*words), CPU)


COMMANDS = {
    "nothing": ((), ("none", None, None), []),
    "none": (("--compress", "none"), ("none", None, None), []),
    "switches that are off": (("--actnn", "False", "--no-mesa"), ("none", None, None), []),
    "exact": (("--compress", "exact"), ("exact", None, None), ["exact"]),
    "adaptive": (("--compress", "adaptive"), ("adaptive", None, 4), ["adaptive-4bit"]),
    "half a bit": (
        ("--compress=adaptive", "--compress_bits", "2.5"),
        ("adaptive", None, 2.5),
        ["adaptive-2.5bit"],
    ),
    "actnn": (("--actnn",), ("actnn", "L3", None), ["actnn-L3"]),
    "the same twice": (("--actnn", "--compress", "actnn"), ("actnn", "L3", None), ["actnn-L3"]),
    "a level of actnn": (
        ("--actnn", "True", "--compress-level", "L2"),
        ("actnn", "L2", None),
        ["actnn-L2"],
    ),
    "gact": (("--compress", "gact"), ("gact", "L2", None), ["gact-L2"]),
    "bits of gact": (
        ("--compress", "gact", "--compress-level", "L2.1", "--compress-bits", "3"),
        ("gact", "L2.1", 3),
        ["gact-L2.1-3bit"],
    ),
    "mesa": (("--mesa",), ("mesa", None, None), ["mesa"]),
    "division": (("--compress", "division"), ("division", None, 2), ["division-2bit"]),
    "fp8": (("--compress", "fp8"), ("fp8", None, None), ["fp8"]),
}


@pytest.mark.parametrize("words, expected, name", COMMANDS.values(), ids=COMMANDS.keys())
def test_flags_choose_a_method_and_name_the_run(words: tuple, expected: tuple, name: list[str]):
    found = chosen(*words)
    assert (found.method, found.level, found.bits) == expected
    assert found.words() == name
    assert found.config() == {
        "compress": expected[0],
        "compress_level": expected[1],
        "compress_bits": expected[2],
        "mesa_policy": None,
    }
    make = found.sessions_for(nn.Linear(2, 2), seed=3)
    if expected[0] == "none":
        assert make is None
    else:
        assert make().method.name == expected[0] and make().seed == 3 and make() is not make()


def test_whole_bits_are_whole():
    assert repr(chosen("--compress", "adaptive", "--compress-bits", "3.0").bits) == "3"


@pytest.mark.parametrize("flag", ["--mesa-policy", "--mesa_policy", "--Mesa_Policy"])
def test_a_policy_is_read_named_and_recorded(policy: Path, flag: str):
    found = chosen("--mesa", flag, policy)
    assert found.policy == MesaPolicy.parse(POLICY)
    assert found.words() == ["mesa-mine"]
    assert found.config()["mesa_policy"] == POLICY


MISTAKES = {
    "two of the paper's": (("--actnn", "--mesa"), "--actnn and --mesa exclude each other"),
    "two methods": (("--actnn", "--compress", "gact"), "--actnn and --compress gact exclude"),
    "one and none": (("--mesa", "--compress", "none"), "--mesa and --compress none exclude"),
    "unknown method": (("--compress", "zip"), "'zip'"),
    "switch in words": (("--actnn", "perhaps"), "'perhaps'"),
    "levels of none": (("--compress-level", "L1"), "--compress none, which has no levels"),
    "levels of exact": (("--compress", "exact", "--compress-level", "L1"), "no levels"),
    "bits of exact": (("--compress", "exact", "--compress-bits", "4"), "no bits to choose"),
    "no bits": (("--compress", "adaptive", "--compress-bits", "0"), "above 0"),
    "bits in words": (("--compress", "adaptive", "--compress-bits", "few"), "'few'"),
    "endless bits": (("--compress", "adaptive", "--compress-bits", "inf"), "'inf'"),
    "bits of adaptive": (
        ("--compress", "adaptive", "--compress-bits", "33"),
        "--compress adaptive: bits",
    ),
    "bits of actnn": (("--actnn", "--compress-bits", "33"), "--compress actnn: "),
    "bits of gact": (("--compress", "gact", "--compress-bits", "33"), "--compress gact: bits"),
    "bits of division": (("--compress", "division", "--compress-bits", "33"), "division: "),
    "half a bit of division": (("--compress", "division", "--compress-bits", "2.5"), "2.5"),
    "a level of gact": (("--actnn", "--compress-level", "L2.1"), "'L2.1'"),
    "a level of actnn": (("--compress", "gact", "--compress-level", "L5"), "'L5'"),
    "policy of none": (("--mesa-policy", "x.txt"), "--compress none, which has no policy"),
    "policy of exact": (("--compress", "exact", "--mesa-policy", "x.txt"), "has no policy"),
    "policy without mesa": (("--mesa", "False", "--mesa-policy", "x.txt"), "has no policy"),
    "missing policy": (("--mesa", "--mesa-policy", "nowhere.txt"), "cannot read nowhere.txt: No"),
    "policy is a folder": (("--mesa", "--mesa-policy", "."), "cannot read .: Is a directory"),
}


@pytest.mark.parametrize("words, text", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_a_user_error_that_names_it(words: tuple[str, ...], text: str):
    with pytest.raises(UserError) as error:
        chosen(*words)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_in_a_policy_is_an_error_that_names_its_line(policy: Path):
    for content, text in ((b"on fc:\nby_index: some\n", "line 2: "), (b"\xff\xfe", "utf-8")):
        policy.write_bytes(content)
        with pytest.raises(UserError, match=f"^--mesa-policy {policy}: .*{text}"):
            chosen("--mesa", "--mesa-policy", policy)


class Leveled(Method):
    """Is off at one level and offloads at another."""

    name = "leveled"

    def __init__(self, level: str = "L0"):
        self.is_off, self.offloads = level == "L0", level == "L3"


NOTES = {
    "no training": (
        ("--compress", "exact", "--model-path", "x.pth"),
        "--compress exact does nothing with --model-path, which trains nothing",
    ),
    "level": (("--compress", "leveled"), "--compress leveled does nothing at level L0"),
    "offloading": (
        ("--compress", "leveled", "--compress-level", "L3"),
        "--compress leveled moves nothing on cpu, whose tensors are in the host's memory",
    ),
    "none": (("--model-path", "x.pth"), None),
    "another level": (("--compress", "leveled", "--compress-level", "L1"), None),
}


@pytest.mark.parametrize("words, text", NOTES.values(), ids=NOTES.keys())
def test_a_flag_that_does_nothing_gets_a_note(
    words: tuple[str, ...],
    text: str | None,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(METHODS, "leveled", (__name__, "Leveled"))
    chosen(*words)
    assert capsys.readouterr().err == (f"train.py: note: {text}\n" if text else "")


def test_help_tells_every_flag_and_what_it_is_without():
    parser = Parser(prog="train.py")
    add_compression_flags(parser)
    text = " ".join(parser.format_help().split())
    for words in ("if not given, none", "L3 of actnn", "4 for adaptive", "(default: False)"):
        assert words in text
    for levels in (actnn.LEVELS, gact.LEVELS):
        assert f"({', '.join(levels)})" in text
