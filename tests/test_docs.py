"""The method cards: their code and commands run, and what they state is so."""

import ast
import inspect
import json
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest
import resnet
import torch
from helpers import code_blocks, run_code
from torch import nn

import aal
from aal.compression.compress import METHODS
from aal.rules import placement
from aal.training import patch_network
from aal.training.compression_flags import compression_of

ROOT = Path(__file__).parent.parent
CARDS = {path.stem: path.read_text() for path in sorted((ROOT / "docs/methods").glob("*.md"))}
TUTORIAL = (ROOT / "docs/tutorials/hugging_face.md").read_text()
LONG_RUNS = (ROOT / "docs/tutorials/long_runs.md").read_text()
INDEX = (ROOT / "docs/README.md").read_text()
PAGES = {"methods/" + name: text for name, text in CARDS.items()}
PAGES |= {"README": INDEX, "tutorials/hugging_face": TUTORIAL}
TEXTS = PAGES | {"tutorials/long_runs": LONG_RUNS}
HEADINGS = (
    "What is kept",
    "What is exact",
    "When it helps",
    "What it costs",
    "Defaults",
    "Use",
    "Source",
)
COMPRESSORS = METHODS.keys() - {"none"}
RULES = {rule.rstrip("1234") for rule in (*placement.RULES, *resnet.RULES)} - {"bp"}
OTHERS = {"lean", "gcp"}  # flags that go with a rule

every_card = pytest.mark.parametrize("name", CARDS)
every_page = pytest.mark.parametrize("name", PAGES)
every_text = pytest.mark.parametrize("name", TEXTS)


def _section(card: str, heading: str) -> str:
    return CARDS[card].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_every_method_has_a_card_and_every_card_a_method():
    assert set(CARDS) == COMPRESSORS | RULES | OTHERS


def test_every_card_is_in_the_index():
    assert set(re.findall(r"\]\(methods/(.+?)\.md\)", INDEX)) == set(CARDS)


@every_card
def test_a_card_is_short_and_has_all_headings_in_order(name: str):
    assert tuple(re.findall(r"^## (.+)$", CARDS[name], flags=re.MULTILINE)) == HEADINGS
    assert CARDS[name].count("\n") <= 72
    assert all(_section(name, heading).strip() for heading in HEADINGS)


@every_card
def test_its_code_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    blocks = code_blocks(_section(name, "Use"), "python")
    assert blocks
    run_code(blocks, tmp_path)


@every_card
def test_its_command_is_understood_and_has_the_flag(name: str, capsys):
    (block,) = code_blocks(_section(name, "Use"), "sh")
    folder, command = re.fullmatch(r"cd (\S+)\npython train.py (.+)\n", block).groups()
    script = runpy.run_path(str(ROOT / folder / "train.py"))
    if "FAMILY" in script:
        args = patch_network.parse_args(script["FAMILY"], "", shlex.split(command))
    else:
        args = script["parse_args"](shlex.split(command))
    compression = compression_of(args, torch.device("cuda"))
    if name in COMPRESSORS:
        assert compression.method == name
    elif name in RULES:
        assert args.learning_rule.startswith(name)
    else:
        assert f"--{name}" in command and getattr(args, name)
    assert capsys.readouterr() == ("", "")  # no flag does nothing


@every_text
def test_its_links_resolve(name: str):
    folder = (ROOT / "docs" / name).parent
    links = re.findall(r"\]\(([^)]+)\)", TEXTS[name])
    assert links
    assert not [link for link in links if not (folder / link).exists()]


def _defaults(page: str) -> list[tuple[str, dict[str, object]]]:
    """What the items of a list say of each function or class: the defaults by name."""
    items = re.findall(r"^- `([\w.]+)`: (.+(?:\n  .+)*)$", page, flags=re.MULTILINE)
    return [
        (path, {k: ast.literal_eval(v) for k, v in re.findall(r"`(\w+)=([^`]+)`", stated)})
        for path, stated in items
    ]


def _default(described: object, name: str) -> object:
    parameters = inspect.signature(described).parameters
    return parameters[name].default if name in parameters else getattr(described, name)


@every_page
def test_its_defaults_are_those_of_the_code(name: str):
    items = _defaults(PAGES[name])
    assert items
    for path, stated in items:
        described = pkgutil.resolve_name(path)
        actual = {option: _default(described, option) for option in stated}
        assert stated and actual == stated, path


@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_every_option_of_a_compressor_is_on_its_card(name: str):
    path = ".".join(METHODS[name])
    options = inspect.signature(pkgutil.resolve_name(path)).parameters
    assert options.keys() <= dict(_defaults(_section(name, "Defaults")))[path].keys()


@every_text
def test_its_numbers_are_the_recorded_ones(name: str):
    rows = re.findall(
        r"^\| .+ \| (.+) \| \[(\w+)\]\(../../results/(\w+)\.json\): `(.+)` \|$",
        TEXTS[name],
        flags=re.MULTILINE,
    )
    for values, label, record, path in rows:
        assert label == record
        recorded = _recorded(json.loads((ROOT / f"results/{record}.json").read_text()), path)
        for text, value in zip(values.split(" vs "), recorded, strict=True):
            decimals = len(text.partition(".")[2])
            assert float(text) == pytest.approx(value, abs=0.501 * 10**-decimals), path
    assert TEXTS[name].count("results/") == len(rows)  # no number is quoted in another way


def _recorded(record: dict, path: str) -> list[float]:
    """The values at "a / b vs c / d": those at a, b, d and at a, c, d."""
    found = [record]
    for part in path.split(" / "):
        found = [values[key] for values in found for key in part.split(" vs ")]
    return found


@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_the_index_has_the_bits_that_are_kept(name: str):
    (cell,) = re.findall(rf"^\| \[`{name}`\]\(.+?\) \| (.+?) \|", INDEX, flags=re.MULTILINE)
    (stated,) = re.findall(r"^[\d.]+", cell)
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    act = aal.compress(name, model=net)
    with act:
        net(torch.randn(512, 64))
    (gelu,) = [row for row in act.report().rows if row.consumer == "GeluBackward0"]
    decimals = len(stated.partition(".")[2])
    assert stated == f"{8 * gelu.stored_bytes / (512 * 256):.{decimals}f}"


# A Trainer on a machine without a GPU asks for memory that only a GPU could use.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_the_tutorial_runs_and_shows_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    pytest.importorskip("transformers", minversion="5.0")
    monkeypatch.chdir(tmp_path)
    names = run_code(code_blocks(TUTORIAL, "python"), tmp_path)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    (table,) = code_blocks(TUTORIAL, "text")
    assert all(line.split() in printed for line in table.splitlines())
    described = aal.describe(names["model"], **names["batch"])
    assert described.saved_bytes < described.stock_bytes / 2
    scores = names["loaded"].eval()(**names["batch"]).logits
    assert torch.equal(scores.argmax(-1), names["batch"]["labels"])
    states = (names[model].state_dict() for model in ("biased", "restored"))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_the_tutorials_are_in_the_index():
    assert "](tutorials/hugging_face.md)" in INDEX and "](tutorials/long_runs.md)" in INDEX


def test_the_commands_of_long_runs_are_understood(capsys):
    commands = [line for block in code_blocks(LONG_RUNS, "sh") for line in block.splitlines()]
    commands = [line.partition("train.py ")[2] for line in commands if "train.py" in line]
    family = runpy.run_path(str(ROOT / "ViT/train.py"))["FAMILY"]
    settings = [patch_network.parse_args(family, "", shlex.split(words)) for words in commands]
    assert [args.resume for args in settings] == [False, True, False, False]
    assert capsys.readouterr() == ("", "")
