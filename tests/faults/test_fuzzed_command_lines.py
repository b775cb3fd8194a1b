"""Command lines by the thousand, most of them nonsense: each ends in a run or in one clear line.

What would only take long is left out: networks and images are tiny, nothing is downloaded, no
process is started, and numbers are either small or too large for any machine.
"""

import argparse
import contextlib
import io
import runpy
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scripts.conftest import (
    ROOT,
    SMALL,
    SMALL_BERT,
    SMALL_TRANSFORMER,
    glue,
    texts,
    tiny_imagenet,
)
from scripts.test_bert_train import published

from aal.training.command_line import Parser

__all__ = ["glue", "published", "texts", "tiny_imagenet"]  # fixtures

BASES = {
    "ResNet/train.py": "--model resnet18 --batch-size 2",
    "ViT/train.py": f"{SMALL['ViT/train.py']} --img-size 8 --batch-size 6",
    "MLP-Mixer/train.py": f"{SMALL['MLP-Mixer/train.py']} --img-size 8 --batch-size 6",
    "Transformer/train.py": f"{SMALL_TRANSFORMER} --batch-size 120 --vocab-size 20 --min-freq 1",
    "BERT/train.py": f"{SMALL_BERT} --batch-size 12 --vocab-size 100",
}
# Fixtures with what a script reads.
DATA = dict.fromkeys(BASES, "tiny_imagenet")
DATA |= {"Transformer/train.py": "texts", "BERT/train.py": "glue"}
# How many lines each script gets, some of them twice: most where a run is quickest.
LINES = {
    "ResNet/train.py": 240,
    "ViT/train.py": 1100,
    "MLP-Mixer/train.py": 850,
    "Transformer/train.py": 330,
    "BERT/train.py": 300,
}
DISTINCT = 2000 / (sum(LINES.values()) - LINES["BERT/train.py"])  # share, for 2000 beside BERT's
IMAGES = ("tiny-imagenet", "imagenet")  # which are never downloaded
NEAR = {"dataset": IMAGES, "task": ("mrpc", "mnli", "tsv")}  # data that is there, and little
TABLE = ("--text-columns", "first", "second", "--label-column", "label")
# Values that a script takes and that keep a run small, by the flag's place among the arguments.
TAKEN = {
    "epochs": ["1", "2"],
    "num_steps": ["1", "3"],
    "eval_every": ["1", "2"],
    "warmup_epoch": ["0", "1"],
    "warmup_steps": ["0", "2"],
    "batch_size": ["2", "6", "60"],
    "test_batch_size": ["1", "64"],
    "gradient_accumulation_steps": ["1", "2"],
    "workers": ["0"],
    "resume": ["True", "false", "auto"],
    "seed": ["0", "7"],
    "img_size": ["8", "9", "16"],
    "patch": ["1", "2", "3"],
    "patch_size": ["2", "4", "5"],
    "head": ["1", "2", "3"],
    "num_layers": ["1", "2"],
    **dict.fromkeys(("hidden", "hidden_size", "mlp_hidden", "hidden_c", "hidden_s"), ["2", "6"]),
    "vocab_size": ["5", "20", "300"],
    "min_freq": ["1", "3"],
    "max_length": ["3", "20"],
    "beam": ["1", "3"],
    "length_penalty": ["0", "1"],
    "ARA_stride": ["2 2 2 2", "1 9 1 1", "2 2"],
    "lr": ["0.01", "1e30", "1e-30"],
    **dict.fromkeys(("min_lr", "weight_decay", "max_grad_norm"), ["0", "1e-5", "1e30"]),
    **dict.fromkeys(("gamma", "cutmix_prob", "warmup_share"), ["0", "0.5", "1"]),
    "cutmix_beta": ["1e-5", "1", "1e30"],
    **dict.fromkeys(("beta1", "beta2", "momentum", "dropout", "label_smoothing"), ["0", "0.5"]),
    "device": ["cpu"],
    "compress_level": ["L0", "L1", "L3", "L3.1", "swap"],
    "compress_bits": ["1", "2", "3.5", "8"],
    "output": ["here", "here/below"],
    "name": ["small", "ä", "two words"],
    "model": ["resnet18", "vit", "mlp_mixer", "small", "bert-base"],
    "text_columns": ["first", "first second", "second label", "first second third"],
    "label_column": ["label", "first"],
}
ODD = ["", "0", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "0.5", "9" * 40, str(2**62)]
ODD += ["1_0", "0x10", "\u0663", "True", "no", "None", "x", "two words", "line\nend", "ä", "\udcff"]
ODD += ["..", "../nowhere", "/dev/null", "/proc/nowhere/x", "x" * 300, "%s", "{}", "--", "-", "="]
SLOW = {"ResNet/train.py": {"compress": {"gact"}, "dataset": {"imagenet"}}}  # takes seconds
LENGTHS = {"epochs", "num_steps"}
NEVER = {"dry_run", "dataset_name"}  # which lines have at their ends
ENDLESS = {"find_batch_size"}  # fills the memory, unless it is refused beside another flag


def run(script: str, words: Sequence[str]) -> tuple[int, str, str]:
    """Run a script in this process, as a shell would: (exit status, stdout, stderr)."""
    path = ROOT / script
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    before = sys.argv, sys.path, sys.stdin
    sys.argv, sys.path = [str(path), *words], [str(path.parent), *sys.path]
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"Der Hund\n"))
    status: Any = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as exit:
        status = exit.code or 0
    finally:
        sys.argv, sys.path, sys.stdin = before
    return status, *(stream.buffer.getvalue().decode() for stream in (out, err))


def actions_of(script: str) -> list[argparse.Action]:
    """Every flag of a script, as its parser knows it."""
    found: list[argparse.Action] = []
    parse = Parser.parse_args

    def look(self: Parser, *rest: Any) -> Any:
        found.extend(self._actions)
        return parse(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", look)
        assert run(script, ["--help"])[0] == 0
    return found


def is_refused_or_small(text: str, dest: str, is_dry: bool) -> bool:
    """Would a flag with this value neither start processes nor train for days?"""
    if dest == "workers":
        return is_dry or text in TAKEN[dest] or not text.isdecimal()
    return is_dry or dest not in LENGTHS or text != str(2**62)


@st.composite
def flags(
    draw: st.DrawFn, script: str, actions: Sequence[argparse.Action], files: Mapping, is_dry: bool
) -> list[str]:
    """One flag in some spelling with its value, or without, or a word that is no flag."""
    kind = draw(st.integers(0, 19))
    if kind == 0:
        junk = ["word", "--bogus", "--bogus=1", "-x", "--", "-", "", "-h", "--help", "---", "@file"]
        return [draw(st.sampled_from(junk))]
    action = draw(st.sampled_from(actions))
    flag = draw(st.sampled_from(action.option_strings))
    spelling = draw(st.integers(0, 7))
    if spelling == 0:
        flag = "--" + flag[2:].replace("-", "_")
    elif spelling == 1:
        flag = flag.upper()
    elif spelling == 2 and kind == 1:
        flag = flag[:-1]
    if action.dest == "help" or kind == 2 or action.nargs == 0:
        return [flag]
    taken = list(action.choices or TAKEN.get(action.dest, []))
    taken = [word for word in taken if word not in SLOW.get(script, {}).get(action.dest, ())]
    if action.dest in TAKEN:
        taken = TAKEN[action.dest]
    elif action.dest in NEAR and not is_dry:
        taken = list(NEAR[action.dest])
    elif action.nargs == "?":
        taken = ["True", "false"]
    elif action.type is Path or action.dest == "pretrained":
        taken = list(map(str, files.values()))
    odd = [text for text in ODD if is_refused_or_small(text, action.dest, is_dry)]
    value = draw(st.sampled_from(taken if taken and kind < 13 else odd))
    if draw(st.booleans()):
        return [f"{flag}={value}"]
    return [flag, *(value.split(" ") if action.nargs == "+" else [value])]


def base(script: str, data: Path) -> list[str]:
    """Words that make a small run of one epoch."""
    words = [*BASES[script].split(), "--device", "cpu", "--epochs", "1", "--data-path", str(data)]
    if script == "Transformer/train.py":
        return [*words, "--dataset-name", "parallel"]
    if script == "BERT/train.py":
        return [*words, "--task", "mrpc"]
    return [*words, "--dataset", IMAGES[0], "--workers", "0"]


def other_texts_and_networks(words: list[str], files: Mapping) -> list[list[str]]:
    """BERT's words for a table of texts, and for a published network, which tells its sizes."""
    table, network = str(files["table"]), str(files["published"])
    without_sizes = words[len(SMALL_BERT.split()) :]
    return [
        [*words, "--task", "tsv", "--train-file", table, "--test-file", table, *TABLE],
        [*without_sizes, "--pretrained", network],
    ]


@st.composite
def lines(
    draw: st.DrawFn, script: str, actions: Sequence[argparse.Action], files: Mapping, data: Path
) -> list[str]:
    """A command line that would try out, train, score or resume a small network."""
    goal = draw(st.sampled_from(["try", "try", "train", "score", "resume"]))
    if script == "ResNet/train.py" and goal in ("train", "resume"):
        goal = "try"  # its checkpoints are large
    words = base(script, data)
    if script == "BERT/train.py":
        words = draw(st.sampled_from([words, *other_texts_and_networks(words, files)]))
    if goal == "try" and "--dataset" in words:
        words += ["--dataset", "cifar10"]  # which is never read, and whose images are small
    if goal == "train":
        actions = [action for action in actions if action.dest not in ENDLESS]
    several = st.lists(flags(script, actions, files, goal == "try"), min_size=1, max_size=6)
    words += [word for part in draw(several) for word in part]
    if goal == "try":
        words += ["--dry-run"]
    elif goal == "score":
        words += ["--model-path", str(draw(st.sampled_from(list(files.values()))))]
    elif goal == "resume":
        words += ["--resume"]
    return words


@pytest.fixture
def files(tmp_path: Path, published: Path) -> dict[str, Path]:
    """Paths that are no checkpoints, and a place for one that is."""
    names = ("text", "empty", "folder", "missing", "half", "table")
    found = {name: tmp_path / name for name in names} | {"published": published}
    found["text"].write_text("some words\n")
    rows = "".join(f"{n % 2}\tword {n}\tother {n}\n" for n in range(20))
    found["table"].write_text(f"label\tfirst\tsecond\n{rows}")
    found["empty"].touch()
    found["folder"].mkdir()
    return found


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of networks are not looked up."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.slow
@pytest.mark.parametrize("script", BASES)
def test_every_line_ends_in_a_run_or_in_one_clear_line(
    script: str,
    files: dict[str, Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    figures: dict[str, Any],
):
    data = request.getfixturevalue(DATA[script])
    actions = actions_of(script)
    actions = [action for action in actions if action.dest not in NEVER]
    place = tmp_path / "place" / "of the run"  # so that ".." is emptied too
    made, seen = tmp_path / "made", {}
    status, _, err = run(script, [*base(script, data), "--output", str(made)])
    assert status == 0, err
    (folder,) = made.iterdir()
    files["best"] = folder / "best.pth"
    files["half"].write_bytes(files["best"].read_bytes()[:1000])
    drawn = 0

    @settings(
        max_examples=LINES[script],
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(words=lines(script, actions, files, data))
    def check(words: list[str]) -> None:
        nonlocal drawn
        drawn += 1
        if tuple(words) in seen:
            return
        shutil.rmtree(place.parent, ignore_errors=True)
        place.mkdir(parents=True)
        if words[-1] == "--resume":
            shutil.copytree(made, place / "results")
        with contextlib.chdir(place):
            status, out, err = run(script, words)
        assert_is_clear(status, out, err, trained="--dry-run" not in words)
        if "--dry-run" in words:
            assert not any(place.iterdir()) and list(place.parent.iterdir()) == [place]
        seen[tuple(words)] = status

    check()
    assert len(seen) >= LINES[script] * DISTINCT
    finished = list(seen.values()).count(0)
    assert 20 <= finished <= len(seen) - 20
    counts = {"lines": drawn, "distinct": len(seen), "runs": finished}
    counts |= {"refused": len(seen) - finished, "tracebacks": 0}  # of which the first ends the test
    figures.setdefault("fuzzed command lines", {})[script] = counts


FOUND = {
    "ResNet/train.py": ("--lr=--", f"--batch-size={2**62}"),
    "ViT/train.py": ("--dataset=--", f"--num-layers={2**62}", f"--batch-size={2**62}"),
    "MLP-Mixer/train.py": (f"--num-layers={2**62}", f"--img-size={2**62}"),
    "Transformer/train.py": (
        "--language-direction=--",
        *(f"--{flag}={2**62}" for flag in ("num-layers", "batch-size", "vocab-size")),
    ),
}


@pytest.mark.parametrize("script", FOUND)
def test_what_ended_otherwise_once_is_refused(script: str, tmp_path: Path):
    for word in FOUND[script]:
        status, out, err = run(script, [*base(script, tmp_path), word, "--dry-run"])
        assert status == 2, word
        assert_is_clear(status, out, err, trained=False)


def test_names_that_are_no_text_are_printed(tiny_imagenet: Path, tmp_path: Path):
    words = [*base("ViT/train.py", tiny_imagenet), "--output", str(tmp_path), "--name", "\udcff"]
    status, out, err = run("ViT/train.py", words)
    assert (status, err) == (0, "") and out.endswith("\\udcff\n")


def assert_is_clear(status: int, out: str, err: str, trained: bool) -> None:
    """The script ended well, or said in one line what was wrong, beside notes."""
    lines = [line for line in err.splitlines() if not line.startswith("train.py: note: ")]
    if status == 0:
        assert not lines and out
    else:
        assert status == 2 and (trained or not out)
        assert len(lines) == 1 and lines[0].startswith("train.py: error: "), err
        assert len(lines[0]) > len("train.py: error: ") + 10
