"""Transformer/train.py as its users call it."""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts.conftest import (
    RULES,
    SMALL_TRANSFORMER,
    TRANSLATION_OF_THE_PAPER,
    assert_refused,
    assert_same_results,
    files_of,
    flags_of,
    run_folder,
    spellings,
    weights_of,
)

from aal.training.loop import Trainer


@pytest.fixture
def iwslt(texts: Path, tmp_path: Path) -> Path:
    """The few texts in the files of IWSLT."""
    folder = tmp_path / "iwslt" / "de-en"
    folder.mkdir(parents=True)
    for language in ("de", "en"):
        train = (texts / f"train.{language}").read_text()
        (folder / f"train.tags.de-en.{language}").write_text(f"<title>A talk</title>\n{train}")
        for part, talks in (("validation", "tst2013"), ("test", "tst2014")):
            lines = (texts / f"{part}.{language}").read_text().splitlines()
            segments = [f'<seg id="{i}"> {line} </seg>' for i, line in enumerate(lines, 1)]
            file = f"IWSLT16.TED.{talks}.de-en.{language}.xml"
            (folder / file).write_text("\n".join(["<doc>", *segments, "</doc>"]))
    return folder.parent


def test_the_command_of_the_paper_runs(call: Callable, iwslt: Path, tmp_path: Path):
    place = ("--data-path", iwslt, "--output", tmp_path / "runs", "--device", "cpu")
    short = (*SMALL_TRANSFORMER.split(), "--num-of-epochs", 1)
    status, _, err = call("Transformer/train.py", *TRANSLATION_OF_THE_PAPER.split(), *place, *short)
    assert status == 0 and err.count("\n") == 1 and "asa2 keeps no less than bp does" in err
    folder = run_folder(tmp_path)
    assert folder.name.startswith("IWSLT_G2E_baseline_asa2_gcp_hidden-8_")
    config = json.loads((folder / "config.json").read_text())
    expected = {"optimizer": "adam", "beta1": 0.9, "beta2": 0.98, "adam_epsilon": 1e-9}
    expected |= {"scheduler": "noam", "warmup_steps": 4000, "label_smoothing": 0.1, "seed": 1234}
    assert {name: config[name] for name in expected} == expected
    assert config["lr"] == pytest.approx((8 * 4000) ** -0.5)


def test_a_run_leaves_everything_in_its_folder(train_transformer: Callable, tmp_path: Path):
    status, out, err = train_transformer("--learning-rule", "asa1", "--get-li", "--epochs", 2)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    name = folder.name
    assert re.match(r"parallel_E2G_baseline_asa1_hidden-8_.*min-freq-1_epochs-2_batch-size", name)
    expected = ["best.pth", "config.json", "environment.json", f"{name}.npy", f"{name}_li.npy"]
    expected += ["last.pth", "last-1.pth", "metrics.jsonl", "test.json", ".lock"]
    assert sorted(files_of(folder)) == sorted(expected)
    line = r"epoch 2/2  train loss \S+  validation loss \S+, BLEU \S+  saved \S+ MiB  \S+ tokens/s"
    assert re.search(line, out)
    test = json.loads((folder / "test.json").read_text())
    assert set(test) == {"bleu", "signature", "loss"} and "tok:13a" in test["signature"]
    assert f"test BLEU {test['bleu']:.2f} (signature {test['signature']})" in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    columns = ("train_loss", "val_loss", "val_bleu")
    table = np.load(folder / f"{name}.npy")
    assert table.tolist() == [[row[column] for column in columns] for row in rows]
    best = torch.load(folder / "best.pth", weights_only=True)
    assert best["val_bleu"] == max(row["val_bleu"] for row in rows)
    assert best["source"]["kind"] == "words" and best["source"]["language"] == "en"


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_and_scores_its_checkpoint_alike(
    train_transformer: Callable, tmp_path: Path, rule: str
):
    words = ("--learning-rule", rule, "--get-li")
    status, out, err = train_transformer(*words, "--epochs", 1)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    indicators = np.load(folder / f"{folder.name}_li.npy")
    epochs, layers, samples = indicators.shape
    assert epochs == 1 and layers >= 2 and samples >= 2
    recorded = ~np.isnan(indicators)
    assert recorded.any(axis=2).all() and np.isfinite(indicators[recorded]).all()
    assert (indicators[recorded] == 1).all() == (rule == "bp")
    # The tokenisers are those of the checkpoint, whatever this corpus would make of --min-freq.
    status, scored, err = train_transformer(
        *words, "--min-freq", 2, "--model_path", folder / "best.pth"
    )
    assert (status, err) == (0, "")
    assert scored.splitlines() == [line for line in out.splitlines() if line.startswith("test")]


@pytest.mark.parametrize("rule", ["bp", "asa4"])
def test_lean_and_gcp_train_to_the_same_weights(
    train_transformer: Callable, tmp_path: Path, rule: str
):
    states = []
    for extra in (("--lean", "off"), ("--lean", "exact"), ("--gcp",)):
        words = ("--learning-rule", rule, "--epochs", 1, "--dropout", 0.3)
        status, _, err = train_transformer(*words, *extra)
        assert (status, err) == (0, "")
        states.append(weights_of(run_folder(tmp_path)))
        shutil.rmtree(run_folder(tmp_path))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    torch.testing.assert_close(states[2], states[0], rtol=1e-4, atol=1e-6)


def test_attention_is_replayed_between_approximate_layers(train_transformer: Callable):
    words = ("--learning-rule", "asa1", "--lean", "approx", "--gcp", "--activation", "gelu")
    assert train_transformer(*words, "--epochs", 1)[::2] == (0, "")


def test_a_resumed_run_equals_an_uninterrupted_one(
    train_transformer: Callable, tmp_path: Path, stop_after: Callable
):
    arguments = ("--learning-rule", "asa2", "--get-li", "--epochs", 3, "--max-grad-norm", 1)
    train_transformer(*arguments)
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_after(2):
        status, _, err = train_transformer(*arguments)
    assert status == 130 and "--resume" in err
    status, out, err = train_transformer(*arguments, "--resume")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 3  # one epoch, the test and the folder
    assert_same_results(run_folder(tmp_path), tmp_path / "whole")


def test_a_run_does_not_go_on_with_other_texts(
    train_transformer: Callable, tmp_path: Path, texts: Path
):
    train_transformer("--epochs", 1)
    other = shutil.copytree(texts, tmp_path / "other")
    for language in ("de", "en"):
        lines = (texts / f"train.{language}").read_text().splitlines(keepends=True)
        (other / f"train.{language}").write_text("".join(reversed(lines)))
    before = files_of(run_folder(tmp_path))
    status, _, err = train_transformer("--epochs", 1, "--resume", "--data-path", other)
    assert status == 2 and err.count("\n") == 1 and "other texts or vocabularies" in err
    assert files_of(run_folder(tmp_path)) == before


def test_the_loss_is_a_mean_over_tokens(train_transformer: Callable, tmp_path: Path):
    """Its batches have unequal numbers of them."""
    rows = []
    for size in (60, 5000):
        words = ("--epochs", 1, "--lr", 1e-30, "--dropout", 0, "--label-smoothing", 0)
        status, _, err = train_transformer(*words, "--batch-size", size)
        assert (status, err) == (0, "")
        rows.append(json.loads((run_folder(tmp_path) / "metrics.jsonl").read_text()))
        shutil.rmtree(run_folder(tmp_path))
    assert rows[0]["step"] > rows[1]["step"] == 1
    for name in ("train_loss", "val_loss"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_together(train_transformer: Callable, tmp_path: Path):
    devices = ("--device", "cpu", "cpu")
    status, out, err = train_transformer("--get-li", "--epochs", 1, *devices)
    assert status == 0, err
    assert out.count("epoch 1/1") == 1 and out.count("test BLEU") == 1
    status, scored, err = train_transformer("--model-path", run_folder(tmp_path) / "best.pth")
    assert (status, err) == (0, "") and scored.strip() in out


@pytest.mark.slow
def test_two_processes_learn_as_one(train_transformer: Callable, tmp_path: Path):
    """One step on all texts, of which each process has another number of tokens."""
    states = []
    for devices in (("cpu",), ("cpu", "cpu")):
        words = ("--batch-size", 1200, "--epochs", 1, "--dropout", 0, "--max-grad-norm", 0.1)
        status, _, err = train_transformer(*words, "--device", *devices)
        assert status == 0, err
        folder = run_folder(tmp_path)
        row = json.loads((folder / "metrics.jsonl").read_text())
        assert row["step"] == 1
        states.append(torch.load(folder / "last.pth", weights_only=True)["optimizer"]["state"])
        states[-1]["loss"] = torch.tensor(row["train_loss"])
        shutil.rmtree(folder)
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-7)


def test_few_texts_are_learned_and_translated(
    train_transformer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = ("--hidden", 32, "--head", 4, "--mlp-hidden", 64, "--dropout", 0)
    words = (*sizes, "--language-direction", "G2E", "--learning-rule", "asa1")
    status, out, err = train_transformer(*words, "--lr", 0.01, "--epochs", 30)
    assert (status, err) == (0, "")
    assert float(re.search(r"test BLEU (\S+)", out)[1]) > 50
    lines = "Der Hund sieht Äpfel.\n\nDie Katze mag den Mond.\r\n \nunbekannte Wörter".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    best = run_folder(tmp_path) / "best.pth"
    words = (*words, "--translate", "--data-path", "nowhere")
    status, out, err = train_transformer(*words, "--model-path", best)
    assert (status, err) == (0, "")
    translations = out.removesuffix("\n").split("\n")
    assert translations[:2] == ["The dog sees apples.", ""]
    assert translations[2] == "The cat likes the moon." and translations[3] == ""
    assert len(translations) == 5


def test_an_input_that_is_no_text_is_refused(
    train_transformer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The lines before it are translated, as many as there are."""
    train_transformer("--epochs", 1)
    words = ("--translate", "--model-path", run_folder(tmp_path) / "best.pth")
    for line, message in (
        (b"\xff\xfe", "line 68 of the input is not UTF-8 text"),
        (b"apples " * 5001, "line 68 of the input has 5001 tokens, but the network reads 5000"),
    ):
        content = b"apples\n" * 67 + line + b"\napples\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        status, out, err = train_transformer(*words)
        assert out.count("\n") == 67
        assert_refused((status, "", err), message)


class Terminal:
    """A person who waits for each answer before typing the next line; may leave by Ctrl-C."""

    def __init__(self, capfd: pytest.CaptureFixture, leaves: bool = False):
        self.capfd, self.leaves = capfd, leaves
        self.answers: list[str] = []
        self.buffer = self._typed()

    def isatty(self) -> bool:
        return True

    def _typed(self) -> Iterator[bytes]:
        for line in (b"apples\n", b"the moon\n"):
            yield line
            self.answers.append(self.capfd.readouterr().out)
        if self.leaves:
            raise KeyboardInterrupt


def test_a_terminal_is_answered_at_once(
    train_transformer: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
):
    train_transformer("--epochs", 1)
    terminal = Terminal(capfd)
    monkeypatch.setattr(sys, "stdin", terminal)
    best = run_folder(tmp_path) / "best.pth"
    assert train_transformer("--translate", "--model-path", best) == (0, "", "")
    assert [answer.count("\n") for answer in terminal.answers] == [1, 1]


def test_only_a_run_with_a_checkpoint_can_be_resumed(
    train_transformer: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: Callable,
    capfd: pytest.CaptureFixture,
):
    with stop_after(1):
        status, _, err = train_transformer("--epochs", 2)
    hint = "--resume continues from the last saved state"
    assert (status, err) == (130, f"train.py: interrupted; {hint}\n")
    best = run_folder(tmp_path) / "best.pth"
    monkeypatch.setattr(sys, "stdin", Terminal(capfd, leaves=True))
    status, _, err = train_transformer("--translate", "--model-path", best)
    assert (status, err) == (130, "train.py: interrupted\n")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_epoch", interrupt)
    for words in (("--dry-run",), ("--epochs", 3)):
        status, _, err = train_transformer(*words)
        assert (status, err) == (130, "train.py: interrupted\n")


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_translating_needs_both_streams(
    train_transformer: Callable, monkeypatch: pytest.MonkeyPatch, stream: str
):
    monkeypatch.setattr(sys, stream, None)  # as Python does when it is closed
    result = train_transformer("--translate", "--model-path", "x.pth")
    assert_refused(result, "reads stdin and writes stdout")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_translations_that_cannot_be_written_end_in_one_line(
    train_transformer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train_transformer("--epochs", 1)
    best = run_folder(tmp_path) / "best.pth"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"apples\n")))
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        result = train_transformer("--translate", "--model-path", best)
    assert_refused(result, "cannot write the output: No space left on device")


def test_a_checkpoint_of_another_function_is_refused(train_transformer: Callable, tmp_path: Path):
    train_transformer("--learning-rule", "asa1", "--epochs", 1)
    best = run_folder(tmp_path) / "best.pth"
    for arguments, words in (
        (("--learning-rule", "bp"), "--learning-rule asa1, not bp"),
        (("--learning-rule", "asa1", "--model", "big"), "--model baseline, not big"),
        (("--learning-rule", "asa1", "--num-layers", 2), "--num-layers 1, not 2"),
        (("--learning-rule", "asa1", "--language-direction", "G2E"), "E2G, not G2E"),
    ):
        assert_refused(train_transformer(*arguments, "--model_path", best), words)
    same = ("--learning-rule", "asa1", "--lean", "approx", "--gcp", "--dropout", 0.5)
    status, out, err = train_transformer(*same, "--model", "base", "--model_path", best)
    assert (status, err) == (0, "") and out.startswith("test BLEU")
    # It is found before the texts are read.
    result = train_transformer("--model_path", best, "--data-path", "nowhere")
    assert_refused(result, "--learning-rule asa1, not bp")


RESNET = {"function": {"model": "resnet18"}, "model": {"conv1.weight": torch.zeros(1)}}
OTHER_CHECKPOINTS = {
    "another network": (lambda state: RESNET, "is no checkpoint of a Transformer"),
    "bare weights": (lambda state: state["model"], "is no checkpoint of a Transformer"),
    "no function": (lambda state: state | {"function": 3}, "is not a checkpoint"),
    "no tokeniser": (lambda state: state | {"source": {}}, "x.pth: this is no tokeniser"),
    "a list of weights": (lambda state: state | {"model": [1]}, "list instead of weights"),
    "numbers": (lambda state: state | {"model": {"a": 1}}, "other things than named tensors"),
}


@pytest.mark.parametrize("what", OTHER_CHECKPOINTS)
def test_a_checkpoint_of_another_kind_is_refused(
    train_transformer: Callable, tmp_path: Path, what: str
):
    train_transformer("--epochs", 1)
    state = torch.load(run_folder(tmp_path) / "best.pth", weights_only=True)
    del state["checksum"]
    make, words = OTHER_CHECKPOINTS[what]
    torch.save(make(state), tmp_path / "x.pth")
    result = train_transformer("--model-path", tmp_path / "x.pth")
    assert_refused(result, words)
    assert str(tmp_path / "x.pth") in result[2]


def test_learned_texts_are_not_scored(train_transformer: Callable, tmp_path: Path, texts: Path):
    """A test part that is cut from the training texts changes with them."""
    own = tmp_path / "own"
    own.mkdir()
    for language in ("de", "en"):
        shutil.copy(texts / f"train.{language}", own)
    status, out, err = train_transformer("--data-path", own, "--epochs", 1)
    assert (status, err) == (0, "")
    words = ("--data-path", own, "--model-path", run_folder(tmp_path) / "best.pth")
    status, scored, err = train_transformer(*words)
    assert (status, err) == (0, "") and scored.strip() in out
    for language in ("de", "en"):
        lines = (own / f"train.{language}").read_text().splitlines(keepends=True)
        (own / f"train.{language}").write_text("".join(lines[:-1]))
    assert_refused(train_transformer(*words), "no longer held out")


BPE = ("--tokenizer", "bpe", "--vocab-size", 300, "--min-freq", 2)


@pytest.mark.parametrize("extra", [(), BPE], ids=["words", "bpe"])
def test_a_dry_run_needs_no_texts_and_writes_nothing(
    train_transformer: Callable, tmp_path: Path, extra: tuple
):
    words = ("--dry-run", "--learning-rule", "asa4", "--get-li", "--data-path", "nowhere")
    status, out, err = train_transformer(*words, *extra)
    assert (status, err) == (0, "")
    assert out.startswith("dry run: 2 steps")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_a_dry_run_has_as_many_ids_as_it_is_told(train_transformer: Callable, kind: str):
    words = ("--dry-run", "--tokenizer", kind, "--min-freq", 2)
    status, out, err = train_transformer(*words, "--vocab-size", 300)
    assert (status, err) == (0, "") and "2 steps with 300 ids in each language" in out


def test_pairs_of_bytes_are_learned_too(train_transformer: Callable, tmp_path: Path):
    pytest.importorskip("tokenizers")
    status, out, err = train_transformer(*BPE, "--batch-size", 400, "--epochs", 1)
    assert (status, err) == (0, "")
    status, scored, err = train_transformer("--model-path", run_folder(tmp_path) / "best.pth")
    assert (status, err) == (0, "") and scored.strip() in out


def test_runs_of_different_settings_have_different_folders(train_transformer: Callable):
    variants = [(), ("--seed", 1), ("--amp", "bf16"), ("--lean", "exact"), ("--gcp",)]
    variants += [("--lr", 0.02), ("--warmup-steps", 3), ("--epochs", 3), ("--batch-size", 99)]
    variants += [("--learning-rule", "asa1"), ("--learning-rule", "asa1", "--asa-scale", "mean")]
    variants += [("--language-direction", "G2E"), ("--dataset-name", "gettext")]
    variants += [("--model", "big"), ("--num-layers", 3), ("--activation", "gelu")]
    variants += [("--min-freq", 3), ("--max-length", 50), ("--beam", 2), ("--length-penalty", 1)]
    variants += [("--label-smoothing", 0.2), ("--max-grad-norm", 2)]
    missing = {train_transformer("--resume", *extra)[2] for extra in variants}
    assert all("nothing to resume" in line for line in missing)
    assert len(missing) == len(variants)


def test_cldr_has_its_own_usual_settings(train_transformer: Callable):
    cldr = ("--dataset-name", "cldr", "--resume")
    for extra in ((), ("--model", "small")):
        assert "cldr_E2G_small_bp_" in train_transformer(*cldr, *extra)[2]


NOTES = {
    "frequency": (("--tokenizer", "bpe"), "--min-freq does nothing under --tokenizer bpe"),
    "scale of ASA's code": (("--asa-scale", "mean"), "--asa-scale does nothing under"),
    "approximate bp": (("--lean", "approx"), "keeps more than --lean exact"),
    "replayed ReLU": (("--learning-rule", "asa3", "--gcp"), "asa3 keeps no less than bp does"),
    "exact GELU": (
        ("--learning-rule", "asa2", "--activation", "gelu"),
        "asa2 keeps no less than bp does",
    ),
    "nothing dropped": (
        ("--learning-rule", "asa3", "--activation", "gelu", "--dropout", "0"),
        "asa3 keeps no less than bp does",
    ),
}


@pytest.mark.parametrize("arguments, words", NOTES.values(), ids=NOTES.keys())
def test_a_flag_that_does_nothing_gets_a_note(
    train_transformer: Callable, arguments: tuple[str, ...], words: str
):
    status, out, err = train_transformer("--dry-run", *arguments)
    notes = [line for line in err.splitlines() if words in line]
    assert status == 0 and out.startswith("dry run")
    assert len(notes) == 1 and notes[0].startswith("train.py: note: ")


def test_words_are_as_many_as_there_are(train_transformer: Callable):
    err = train_transformer("--vocab-size", 99, "--resume")[2]
    assert err.startswith("train.py: note: --vocab-size does nothing under --tokenizer words\n")


def test_a_checkpoint_has_its_own_tokenisers(train_transformer: Callable, tmp_path: Path):
    train_transformer("--epochs", 1)
    words = ("--tokenizer", "bpe", "--min-freq", 3, "--vocab-size", 300, "--max-length", 6000)
    best = run_folder(tmp_path) / "best.pth"
    status, out, err = train_transformer(*words, "--model-path", best)
    assert status == 0 and out.startswith("test BLEU")
    flags = ("tokenizer", "min-freq", "vocab-size", "max-length")
    notes = [f"train.py: note: --{flag} does nothing with --model-path" for flag in flags]
    assert err.splitlines() == notes


@pytest.mark.parametrize(
    "arguments", [("asa4", "--gcp"), ("asa3", "--activation", "gelu"), ("asa1",)]
)
def test_a_rule_that_saves_something_gets_no_note(
    train_transformer: Callable, arguments: tuple[str, ...]
):
    assert train_transformer("--dry-run", "--learning-rule", *arguments)[2] == ""


BAD_COMMANDS = {
    "unknown dataset": (("--dataset-name", "WMT15"), "WMT15"),
    "unknown direction": (("--language-direction", "G2F"), "G2F"),
    "unknown model": (("--model", "tiny"), "tiny"),
    "unknown rule": (("--learning-rule", "ara"), "ara"),
    "unknown flag": (("--optimizer", "sgd"), "--optimizer"),
    "abbreviated flag": (("--learn", "bp"), "--learn"),
    "unknown tokeniser": (("--tokenizer", "letters"), "letters"),
    "batch size of 0": (("--batch-size", "0"), "--batch-size"),
    "rate in words": (("--lr", "fast"), "--lr"),
    "no warm-up": (("--warmup-steps", "0"), "--warmup-steps"),
    "smoothing of 1": (("--label-smoothing", "1"), "--label-smoothing"),
    "dropout of 1": (("--dropout", "1"), "--dropout"),
    "beam of 0": (("--beam", "0"), "--beam"),
    "penalty beyond sense": (("--length-penalty", "11"), "--length-penalty: must be at most 10"),
    "beam beyond sense": (("--beam", "1001"), "--beam: must be at most 1000"),
    "rate beyond single precision": (("--lr", "1e300"), "--lr"),
    "warm-up beyond 63 bits": (("--warmup-steps", "9" * 400), "--warmup-steps"),
    "width beyond memory": (("--hidden", "1000000000000", "--data-path", "nowhere"), "memory"),
    "negative penalty": (("--length-penalty", "-1"), "--length-penalty"),
    "texts beyond the positions": (("--max-length", "5000"), "--max-length 5000"),
    "heads that do not divide": (("--head", "3", "--data-path", "nowhere"), "3 heads"),
    "GPU that is not there": (("--device", "97"), "97"),
    "gcp without lean": (("--gcp", "--lean", "off"), "--lean"),
    "folder below another": (("--name", "a/b"), "a/b"),
    "missing checkpoint": (("--model-path", "nowhere.pth"), "nowhere.pth"),
    "nothing to resume": (("--resume",), "nothing to resume"),
    "missing data": (("--data-path", "nowhere"), "nowhere"),
    "data that cannot be looked for": (("--data-path", "x" * 300), "cannot read xxx"),
    "checkpoint that cannot be looked for": (("--model-path", "x" * 300), "cannot read xxx"),
    "missing files": (("--dataset-name", "IWSLT"), "IWSLT"),
    "batches below a pair": (("--batch-size", "3"), "--batch-size 3"),
    "batches below a pair in each process": (
        ("--batch-size", "9", "--device", "cpu", "cpu"),
        "--batch-size 9 tokens, 4 in each process",
    ),
    "translate with nothing": (("--translate",), "--model-path"),
    "translate with two": (
        ("--translate", "--model-path", "x.pth", "--device", "cpu", "cpu"),
        "one device",
    ),
    "score and try": (("--model-path", "x.pth", "--dry-run"), "exclude each other"),
    "batches beyond counting": (("--dry-run", "--batch-size", "1000000000000"), "must be at most"),
    "fewer ids than bytes": (("--tokenizer", "bpe", "--vocab-size", "259"), "bpe needs 260"),
    "no ids for words": (("--dry-run", "--vocab-size", "4"), "words needs 5"),
}


@pytest.mark.parametrize("arguments, words", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_a_mistake_gets_one_line_and_status_2(
    train_transformer: Callable, tmp_path: Path, arguments: tuple[str, ...], words: str
):
    if "bpe" in arguments:
        arguments = (*arguments, "--min-freq", "2")
    assert_refused(train_transformer(*arguments), words)
    assert not (tmp_path / "runs").exists()


REJECTED = {
    "--enable-tensorboard": "metrics.jsonl",
    "--console-log-freq": "metrics.jsonl",
    "--checkpoint-freq": "last.pth",
}


@pytest.mark.parametrize("flag, hint", REJECTED.items())
def test_a_flag_of_old_releases_gets_its_own_hint(
    train_transformer: Callable, flag: str, hint: str
):
    for words in spellings(flag):
        result = train_transformer(*words)
        assert_refused(result, hint)
        assert result[2].startswith(f"train.py: error: {flag} ")


def test_the_flags_are_these(call: Callable):
    status, out, _ = call("Transformer/train.py", "--help")
    assert status == 0 and "image" not in out
    assert flags_of(out) == set(
        """--help --dataset-name --language-direction --dataset-path --data-path --tokenizer
        --min-freq --vocab-size --max-length --beam --length-penalty --model --hidden --num-layers
        --head --mlp-hidden --activation --dropout --learning-rule --lean --gcp --asa-scale
        --derivative --name --device --output --output-dir --model-path --get-li --resume
        --compress --compress-level --compress-bits --actnn --mesa --mesa-policy --tensorboard
        --save-every --keep --parallel --checkpoint --dry-run --find-batch-size
        --translate --epochs --num-of-epochs --max-epochs --batch-size --lr
        --learning-rate --warmup-steps --label-smoothing --max-grad-norm --clip-grad --amp
        --seed""".split()
    )
