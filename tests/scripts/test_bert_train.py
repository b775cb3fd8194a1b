"""BERT/train.py as its users call it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import babel_pairs
import bert
import huggingface_hub.constants
import numpy as np
import pytest
import torch
import wordpiece
from architecture import Architecture
from scripts.conftest import (
    RULES,
    assert_refused,
    assert_same_results,
    files_of,
    flags_of,
    run_folder,
    spellings,
    weights_of,
)
from transformers import DistilBertConfig, PreTrainedTokenizerFast, RobertaConfig

from aal.compression.compress import METHODS


def test_a_run_leaves_everything_in_its_folder(train_bert: Callable, tmp_path: Path):
    status, out, err = train_bert("--learning-rule", "asa4", "--get-li", "--epochs", 2)
    assert (status, err) == (0, "")  # what follows the dropped weights is no longer kept
    folder = run_folder(tmp_path)
    name = folder.name
    assert re.match(r"mrpc_bert-base_asa4_hidden-8_.*_epochs-2_batch-size-12", name)
    expected = ["best.pth", "config.json", "environment.json", f"{name}.npy", f"{name}_li.npy"]
    expected += ["last.pth", "last-1.pth", "metrics.jsonl", "test.json", ".lock"]
    assert sorted(files_of(folder)) == sorted(expected)
    line = r"epoch 2/2  train loss \S+, \S+ %  validation loss \S+, \S+ %, F1 \S+ %  saved \S+ MiB"
    assert re.search(line, out)
    test = json.loads((folder / "test.json").read_text())
    assert set(test) == {"loss", "accuracy", "f1", "samples"} and test["samples"] == 10
    text = f"test accuracy {test['accuracy']:.2f} %, F1 {test['f1']:.2f} %, loss {test['loss']:.4f}"
    assert f"{text} (10 texts)" in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    columns = ("train_accuracy", "val_accuracy", "val_f1", "train_loss", "val_loss")
    table = np.load(folder / f"{name}.npy")
    assert table.tolist() == [[row[column] for column in columns] for row in rows]
    best = torch.load(folder / "best.pth", weights_only=True)
    assert best["val_accuracy"] == max(row["val_accuracy"] for row in rows)
    assert best["labels"] == ["0", "1"]


def test_a_run_is_made_as_published(train_bert: Callable, tmp_path: Path):
    for task, seed in (("mrpc", 315), ("mnli", 345)):
        status, _, err = train_bert("--task", task, "--epochs", 1)
        assert (status, err) == (0, "")
        config = json.loads((run_folder(tmp_path) / "config.json").read_text())
        shutil.rmtree(run_folder(tmp_path))
        expected = {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "adam_epsilon": 1e-6}
        expected |= {"scheduler": "linear", "warmup_share": 0.1, "weight_decay": 0.01}
        expected |= {"max_grad_norm": 1.0, "seed": seed, "max_length": 128, "min_lr": 0.0}
        assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_and_scores_its_checkpoint_alike(
    train_bert: Callable, tmp_path: Path, glue: Path, rule: str
):
    words = ("--learning-rule", rule, "--lean", "off", "--get-li")
    status, out, err = train_bert(*words, "--epochs", 1)
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    indicators = np.load(folder / f"{folder.name}_li.npy")
    recorded = ~np.isnan(indicators)
    assert recorded.any(axis=2).all() and np.isfinite(indicators[recorded]).all()
    assert (indicators[recorded] == 1).all() == (rule == "bp")
    # The texts to be scored are enough; the checkpoint knows the rest.
    place = tmp_path / "scored"
    place.mkdir()
    shutil.copy(glue / "MRPC" / "dev.tsv", place)
    words = ("--learning-rule", rule, "--data-path", place)
    status, scored, err = train_bert(*words, "--model_path", folder / "best.pth", small="")
    assert (status, err) == (0, "") or "keeps no less" in err
    assert scored.splitlines() == [line for line in out.splitlines() if line.startswith("test")]


@pytest.mark.parametrize("rule", ["bp", "asa4"])
def test_lean_and_gcp_train_to_the_same_weights(train_bert: Callable, tmp_path: Path, rule: str):
    states = []
    for extra in (("--lean", "off"), ("--lean", "exact"), ("--gcp",), ("--gcp", "--lean", "exact")):
        words = ("--learning-rule", rule, "--epochs", 1, "--dropout", 0.3)
        status, _, err = train_bert(*words, *extra)
        assert status == 0, err
        states.append(weights_of(run_folder(tmp_path)))
        shutil.rmtree(run_folder(tmp_path))
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-4, atol=1e-6)


def test_gcp_and_rules_save_memory(train_bert: Callable):
    def saved(*words: object) -> float:
        status, out, err = train_bert("--dry-run", "--num-layers", 3, *words)
        assert status == 0, err
        return float(re.search(r"saved (\S+) MiB", out)[1])

    sizes = ("--hidden", 32, "--mlp-hidden", 128, "--dropout", 0)
    plain = saved(*sizes)
    assert saved(*sizes, "--gcp") < 0.4 * plain
    assert saved(*sizes, "--learning-rule", "asa1", "--lean", "approx") < 0.7 * plain


def test_a_resumed_run_equals_an_uninterrupted_one(
    train_bert: Callable, tmp_path: Path, stop_after: Callable
):
    arguments = ("--learning-rule", "asa2", "--lean", "approx", "--get-li", "--epochs", 3)
    train_bert(*arguments)
    shutil.move(run_folder(tmp_path), tmp_path / "whole")
    with stop_after(2):
        status, _, err = train_bert(*arguments)
    assert status == 130 and "--resume" in err
    status, out, err = train_bert(*arguments, "--resume")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 3  # one epoch, the test and the folder
    assert_same_results(run_folder(tmp_path), tmp_path / "whole")


def test_a_run_does_not_go_on_with_other_texts(train_bert: Callable, tmp_path: Path, glue: Path):
    train_bert("--epochs", 1)
    other = shutil.copytree(glue, tmp_path / "other")
    file = other / "MRPC" / "train.tsv"
    file.write_text(file.read_text().replace("dog", "cow"))
    before = files_of(run_folder(tmp_path))
    result = train_bert("--epochs", 1, "--resume", "--data-path", other)
    assert_refused(result, "other texts or another tokeniser")
    assert files_of(run_folder(tmp_path)) == before


@pytest.mark.slow
def test_two_processes_score_as_one(train_bert: Callable, tmp_path: Path):
    """Seven texts in two processes; a rate of next to nothing leaves the weights as they are."""
    found = []
    for devices in (("cpu",), ("cpu", "cpu")):
        words = ("--task", "mnli", "--epochs", 1, "--lr", 1e-30, "--dropout", 0)
        status, _, err = train_bert(*words, "--device", *devices)
        assert status == 0, err
        found.append(json.loads((run_folder(tmp_path) / "test.json").read_text()))
        shutil.rmtree(run_folder(tmp_path))
    assert [part["samples"] for part in found[1].values()] == [10, 7]
    for part, scores in found[0].items():
        assert found[1][part] == pytest.approx(scores, rel=1e-6)


@pytest.mark.slow
def test_uneven_shares_have_as_many_parts(train_bert: Callable):
    """Of the last step's three texts, which two processes that share the weights go through."""
    words = ("--batch-size", 33, "--gradient-accumulation-steps", 2, "--epochs", 1)
    status, _, err = train_bert(*words, "--parallel", "fsdp", "--device", "cpu", "cpu")
    assert (status, err) == (0, "")


@pytest.mark.slow
def test_two_processes_learn_as_one(train_bert: Callable, tmp_path: Path):
    """One step on all 36 texts, which do not divide by accumulation and processes.

    Layers are replayed too, of which Hugging Face's library says nothing.
    """
    states = []
    for extra in (("cpu",), ("cpu", "cpu", "--gradient-accumulation-steps", 5, "--gcp")):
        words = ("--batch-size", 37, "--epochs", 1, "--dropout", 0, "--max-grad-norm", 0.1)
        status, _, err = train_bert(*words, "--device", *extra)
        assert status == 0 and "transformers" not in err, err
        state = torch.load(run_folder(tmp_path) / "last.pth", weights_only=True)
        assert state["step"] == 1
        states.append(state["optimizer"]["state"])
        shutil.rmtree(run_folder(tmp_path))
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-7)


def test_mnli_is_scored_on_both_of_its_parts(train_bert: Callable, tmp_path: Path):
    status, out, err = train_bert("--task", "mnli", "--epochs", 1)
    assert (status, err) == (0, "")
    test = json.loads((run_folder(tmp_path) / "test.json").read_text())
    assert {part: scores["samples"] for part, scores in test.items()} == {
        "matched": 10,
        "mismatched": 7,
    }
    lines = [line for line in out.splitlines() if line.startswith("test")]
    assert [line.split(" accuracy")[0] for line in lines] == ["test matched", "test mismatched"]


@pytest.fixture
def reviews(tmp_path: Path) -> tuple[object, ...]:
    """Flags for a table of one text and a label in words, which any network can learn."""
    for name, count in (("train", 60), ("dev", 12)):
        lines = ["label\tid\tsentence"]
        for number in range(count):
            label, word = (("good", "lovely"), ("bad", "awful"))[number % 2]
            lines.append(f'{label}\t{number}\tA {word} film, "no {number % 5}".')
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines))
    files = ("--train-file", tmp_path / "train.tsv", "--test-file", tmp_path / "dev.tsv")
    return ("--task", "tsv", *files, "--text-columns", "sentence", "--label-column", "label")


def test_any_table_is_learned_by_its_columns(train_bert: Callable, tmp_path: Path, reviews: tuple):
    sizes = "--model small --hidden 32 --num-layers 1 --mlp-hidden 64"
    words = (*reviews, "--learning-rule", "asa1", "--lean", "approx", "--lr", 0.01)
    status, out, err = train_bert(*words, "--epochs", 12, small=sizes)
    assert (status, err) == (0, "")
    assert "test accuracy 100.00 %, F1 100.00 %" in out
    folder = run_folder(tmp_path)
    assert torch.load(folder / "best.pth", weights_only=True)["labels"] == ["bad", "good"]
    scoring = [*reviews[:2], *reviews[4:]]  # without the training table
    words = ("--learning-rule", "asa1", "--model-path", folder / "best.pth")
    status, scored, err = train_bert(*scoring, *words, "--lean", "off", small="")
    assert (status, err) == (0, "") and scored.strip() in out


def test_babel_needs_no_files(
    train_bert: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for part, count in (("train", 80), ("validation", 16), ("test", 16)):
        monkeypatch.setitem(babel_pairs.COUNTS, part, count)
    status, out, err = train_bert("--task", "babel", "--data-path", "nowhere", "--epochs", 1)
    assert (status, err) == (0, "") and "(16 texts)" in out
    assert run_folder(tmp_path).name.startswith("babel_small_bp_hidden-8")
    config = json.loads((run_folder(tmp_path) / "config.json").read_text())
    assert (config["lr"], config["dropout"], config["seed"]) == (1e-3, 0.0, 42)


@pytest.mark.parametrize("rule", ["bp", "asa1"])
def test_every_compressor_trains(train_bert: Callable, rule: str):
    def saved(*words: object) -> float:
        sizes = ("--hidden", 32, "--mlp-hidden", 64, "--learning-rule", rule, "--lean", "approx")
        status, out, err = train_bert("--dry-run", *sizes, *words)
        assert status == 0 and "error" not in err, err
        return float(re.search(r"saved (\S+) MiB", out)[1])

    plain = saved()
    for method in METHODS:
        level = ("--compress-level", "L1") if method == "gact" else ()
        share = 1.02 if method in ("none", "exact", "offload") else 0.9
        assert saved("--compress", method, *level) < share * plain, method


@pytest.fixture
def published(tmp_path: Path, glue: Path) -> Path:
    """A folder with a network and a tokeniser, as transformers saves them."""
    folder = tmp_path / "tiny-bert"
    texts = (glue / "MRPC" / "train.tsv").read_text().split("\t")
    tokenizer = wordpiece.learn(texts, 500)
    ids = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ids).save_pretrained(folder)
    sizes = Architecture(depth=1, width=8, heads=2, mlp_width=16)
    bert.new(bert.new_config(sizes, tokenizer.get_vocab_size(), 5)).save_pretrained(folder)
    return folder


def test_a_published_network_is_fine_tuned(train_bert: Callable, tmp_path: Path, published: Path):
    """All of its weights are loaded, the pooler's too; its classifier of five classes is not."""
    words = ("--pretrained", published, "--learning-rule", "asa1", "--lean", "approx")
    status, out, err = train_bert(*words, "--epochs", 1, "--lr", 1e-30, small="")
    assert (status, err) == (0, "")
    folder = run_folder(tmp_path)
    assert folder.name.startswith("mrpc_tiny-bert_asa1_lean-approx_")
    found = weights_of(folder)
    assert found.pop("classifier.weight").shape == (2, 8)
    expected = bert.pretrained(str(published), bert.pretrained_config(str(published)))[0]
    expected = expected.state_dict()
    for name in [name for name in found if name.startswith("bert.")]:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-20)
    shutil.rmtree(published)  # the checkpoint is enough
    rule = ("--learning-rule", "asa1", "--lean", "off")
    status, scored, err = train_bert(*rule, "--model-path", folder / "best.pth", small="")
    assert (status, err) == (0, "") and scored.strip() in out
    usual = train_bert("--pretrained", "x/tiny-bert", "--resume", small="")[2]
    assert "mrpc_tiny-bert_bp_batch-size-12" in usual


KIN = {
    "DistilBERT": lambda ids: DistilBertConfig(
        vocab_size=ids, dim=8, n_heads=2, n_layers=1, hidden_dim=16
    ),
    "RoBERTa": lambda ids: RobertaConfig(
        vocab_size=ids,
        hidden_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=16,
        type_vocab_size=1,
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("kin", KIN)
def test_kin_of_bert_without_segments_is_fine_tuned(
    train_bert: Callable, tmp_path: Path, published: Path, kin: str
):
    ids = bert.pretrained_config(str(published)).vocab_size
    bert.new(KIN[kin](ids)).save_pretrained(published)
    words = ("--pretrained", published, "--learning-rule", "asa4", "--lean", "approx")
    status, out, err = train_bert(*words, "--epochs", 1, small="")
    assert (status, err) == (0, "")
    words = ("--learning-rule", "asa4", "--model-path", run_folder(tmp_path) / "best.pth")
    status, scored, err = train_bert(*words, "--lean", "off", small="")
    assert (status, err) == (0, "") and scored.strip() in out


def test_a_published_network_is_tried_out(train_bert: Callable, published: Path):
    status, out, err = train_bert("--pretrained", published, "--dry-run", small="")
    assert (status, err) == (0, "") and out.startswith("dry run: 2 steps")


def _without(folder: Path, part: str) -> None:
    model = bert.pretrained(str(folder), bert.pretrained_config(str(folder)))[0]
    state = {name: value for name, value in model.state_dict().items() if part not in name}
    model.save_pretrained(folder, state_dict=state)


def test_a_published_network_without_a_pooler_gets_a_note(train_bert: Callable, published: Path):
    _without(published, "pooler")
    status, _, err = train_bert("--pretrained", published, "--dry-run", small="")
    assert status == 0 and err.count("\n") == 1 and "no weights of a pooler" in err


def test_a_published_network_that_is_damaged_is_refused(train_bert: Callable, published: Path):
    def refused(words: str, name: object = published) -> None:
        assert_refused(train_bert("--pretrained", name, small=""), words)

    _without(published, "intermediate")
    refused("lacks weights of bert.encoder.layer.0.intermediate.dense.bias (2 in all)")
    (published / "model.safetensors").write_bytes(b"x" * 20)
    refused(f"cannot load {published}")
    (published / "tokenizer.json").unlink()
    (published / "tokenizer_config.json").unlink()
    refused("lacks the files of its tokeniser")
    (published / "config.json").write_text('{"model_type": "t5"}')
    refused("is no network like BERT: its configuration has no max_position_embeddings")
    (published / "config.json").write_text("{")
    refused(f"--pretrained: cannot load {published}")
    refused("is no folder and cannot be fetched", published / "nowhere")


def test_a_tokeniser_with_more_ids_than_the_network_is_refused(
    train_bert: Callable, published: Path
):
    sizes = Architecture(depth=1, width=8, heads=2, mlp_width=16)
    bert.new(bert.new_config(sizes, 20, 2)).save_pretrained(published)
    assert_refused(train_bert("--pretrained", published, small=""), "ids, the network 20")


def test_a_name_that_cannot_be_fetched_is_refused(
    train_bert: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = train_bert("--pretrained", "nobody/no-such-bert", small="")
    assert_refused(result, "nobody/no-such-bert is no folder and cannot be fetched")


def test_padding_to_the_longest_text_changes_no_loss(train_bert: Callable, tmp_path: Path):
    rows = []
    for extra in ((), ("--pad-to-max-length",)):
        words = ("--max-length", 40, "--epochs", 1, "--dropout", 0)
        status, _, err = train_bert(*words, *extra)
        assert (status, err) == (0, "")
        rows.append(json.loads((run_folder(tmp_path) / "metrics.jsonl").read_text()))
        shutil.rmtree(run_folder(tmp_path))
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-5)
    assert rows[1]["saved_mib"] > 1.5 * rows[0]["saved_mib"]


def test_a_checkpoint_of_another_function_is_refused(train_bert: Callable, tmp_path: Path):
    train_bert("--learning-rule", "asa1", "--lean", "approx", "--epochs", 1)
    best = run_folder(tmp_path) / "best.pth"
    for arguments, words in (
        (("--learning-rule", "bp"), "--learning-rule asa1, not bp"),
        (("--learning-rule", "asa1", "--lean", "off", "--model", "small"), "bert-base, not small"),
        (("--learning-rule", "asa1", "--lean", "off", "--num-layers", 2), "--num-layers 1, not 2"),
        (("--learning-rule", "asa1", "--lean", "off", "--task", "mnli"), "--task mrpc, not mnli"),
    ):
        assert_refused(train_bert(*arguments, "--model_path", best, small=""), words)


RESNET = {"function": {"model": "resnet18"}, "model": {"conv1.weight": torch.zeros(1)}}
OTHER_CHECKPOINTS = {
    "another network": (lambda state: RESNET, "is no checkpoint of a BERT"),
    "bare weights": (lambda state: state["model"], "is no checkpoint of a BERT"),
    "no function": (lambda state: state | {"function": 3}, "is not a checkpoint"),
    "no tokeniser": (lambda state: state | {"tokenizer": "x"}, "x.pth: this is no tokeniser"),
    "no configuration": (lambda state: state | {"architecture": "{}"}, "none of this version"),
    "a list of weights": (lambda state: state | {"model": [1]}, "list instead of weights"),
    "numbers": (lambda state: state | {"model": {"a": 1}}, "other things than named tensors"),
}


def test_a_checkpoint_of_another_kind_is_refused(train_bert: Callable, tmp_path: Path):
    train_bert("--epochs", 1)
    state = torch.load(run_folder(tmp_path) / "best.pth", weights_only=True)
    del state["checksum"]
    for make, words in OTHER_CHECKPOINTS.values():
        torch.save(make(state), tmp_path / "x.pth")
        result = train_bert("--model-path", tmp_path / "x.pth")
        assert_refused(result, words)
        assert str(tmp_path / "x.pth") in result[2]


@pytest.mark.parametrize("extra", [(), ("--gcp", "--get-li"), ("--amp", "bf16")], ids=str)
def test_a_dry_run_needs_no_texts_and_writes_nothing(
    train_bert: Callable, tmp_path: Path, extra: tuple
):
    for task in ("mrpc", "mnli", "babel", "tsv"):
        words = ("--dry-run", "--task", task, "--data-path", "nowhere")
        status, out, err = train_bert(*words, *extra)
        assert (status, err) == (0, "")
        assert out.startswith("dry run: 2 steps with texts of 32 tokens")
    assert not (tmp_path / "runs").exists()


def test_runs_of_different_settings_have_different_folders(train_bert: Callable, reviews: tuple):
    variants = [(), ("--seed", 1), ("--amp", "bf16"), ("--lean", "exact"), ("--gcp",)]
    variants += [("--lr", 0.02), ("--warmup-share", 0.3), ("--epochs", 4), ("--batch-size", 99)]
    variants += [("--learning-rule", "asa1"), ("--learning-rule", "asa1", "--asa-scale", "mean")]
    variants += [("--learning-rule", "asa1", "--lean", "approx"), ("--task", "mnli"), reviews]
    variants += [("--model", "bert-large"), ("--num-layers", 3), ("--dropout", 0.3)]
    variants += [("--max-length", 50), ("--pad-to-max-length",), ("--vocab-size", 99)]
    variants += [("--weight-decay", 0.2), ("--max-grad-norm", 2), ("--actnn",)]
    missing = {train_bert("--resume", *extra)[2].splitlines()[-1] for extra in variants}
    assert all("nothing to resume" in line for line in missing)
    assert len(missing) == len(variants)


NOTES = {
    "scale of ASA's code": (("--asa-scale", "mean"), "--asa-scale does nothing under"),
    "derivative": (("--derivative", "published"), "--derivative does nothing without"),
    "exact GELU": (("--learning-rule", "asa2"), "asa2 keeps no less than bp does"),
    "nothing dropped": (
        ("--learning-rule", "asa4", "--dropout", "0"),
        "asa4 keeps no less than bp does",
    ),
    "replayed layers": (
        ("--learning-rule", "asa1", "--gcp"),
        "asa1 keeps no less than bp does under --gcp",
    ),
}


@pytest.mark.parametrize("arguments, words", NOTES.values(), ids=NOTES.keys())
def test_a_flag_that_does_nothing_gets_a_note(
    train_bert: Callable, arguments: tuple[str, ...], words: str
):
    status, out, err = train_bert("--dry-run", *arguments)
    assert status == 0 and out.startswith("dry run")
    assert err.count("\n") == 1 and err.startswith("train.py: note: ") and words in err


def test_a_checkpoint_tells_how_texts_become_ids(
    train_bert: Callable, tmp_path: Path, published: Path
):
    train_bert("--epochs", 1)
    words = ("--vocab-size", 300, "--max-length", 9, "--pad-to-max-length", "--pretrained", "x")
    best = run_folder(tmp_path) / "best.pth"
    status, out, err = train_bert(*words, "--model-path", best, small="")
    assert status == 0 and out.startswith("test accuracy")
    flags = ("max-length", "pad-to-max-length", "vocab-size", "pretrained")
    assert err.splitlines() == [
        f"train.py: note: --{f} does nothing with --model-path" for f in flags
    ]
    status, _, err = train_bert("--dry-run", "--pretrained", published, *words[:2], small="")
    assert status == 0 and err == "train.py: note: --vocab-size does nothing with --pretrained\n"


TABLE = ("--train-file", "x.tsv", "--test-file", "y.tsv", "--label-column", "c")
BAD_COMMANDS = {
    "unknown task": (("--task", "cola"), "cola"),
    "unknown model": (("--model", "tiny"), "tiny"),
    "unknown rule": (("--learning-rule", "ara"), "ara"),
    "unknown flag": (("--optimizer", "sgd"), "--optimizer"),
    "abbreviated flag": (("--learn", "bp"), "--learn"),
    "batch size of 0": (("--batch-size", "0"), "--batch-size"),
    "rate in words": (("--lr", "fast"), "--lr"),
    "warm-up of all": (("--warmup-share", "1"), "--warmup-share"),
    "dropout of 1": (("--dropout", "1"), "--dropout"),
    "width beyond memory": (("--hidden", "1000000000000"), "memory"),
    "heads that do not divide": (("--head", "3"), "3 heads"),
    "texts beyond the positions": (("--max-length", "513"), "--max-length 513"),
    "texts of nothing": (("--max-length", "7"), "--max-length 7 is below 8"),
    "fewer ids than characters": (("--vocab-size", "9"), "--vocab-size 9"),
    "GPU that is not there": (("--device", "97"), "97"),
    "folder below another": (("--name", "a/b"), "a/b"),
    "missing checkpoint": (("--model-path", "nowhere.pth"), "nowhere.pth"),
    "nothing to resume": (("--resume",), "nothing to resume"),
    "missing data": (("--data-path", "nowhere"), "there is no nowhere/train.tsv; put GLUE's"),
    "score and try": (("--model-path", "x.pth", "--dry-run"), "exclude each other"),
    "batches below the processes": (
        ("--batch-size", "1", "--device", "cpu", "cpu"),
        "too few for 2 processes",
    ),
    "parts beyond the batch": (
        ("--gradient-accumulation-steps", "13"),
        "--gradient-accumulation-steps 13 is more than the 12 texts",
    ),
    "sizes of what is pretrained": (("--pretrained", "x"), "--hidden does not go with"),
    "table without its columns": (("--task", "tsv", *TABLE), "--task tsv needs --text-columns"),
    "three texts": (
        ("--task", "tsv", *TABLE, "--text-columns", "a", "b", "d"),
        "one column, or two",
    ),
    "label among the texts": (
        ("--task", "tsv", *TABLE, "--text-columns", "a", "c"),
        "--label-column c is one of --text-columns",
    ),
    "missing table": (("--task", "tsv", *TABLE, "--text-columns", "a"), "there is no file x.tsv"),
    "columns of mrpc": (("--label-column", "a"), "--label-column goes with --task tsv, not mrpc"),
}


@pytest.mark.parametrize("arguments, words", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_a_mistake_gets_one_line_and_status_2(
    train_bert: Callable, tmp_path: Path, arguments: tuple[str, ...], words: str
):
    assert_refused(train_bert(*arguments), words)
    assert not (tmp_path / "runs").exists()


REJECTED = {
    "--train-cfg": "--lr",
    "--data-file": "--data-path",
    "--pretrain-file": "--pretrained",
    "--max-len": "--max-length",
    "--mode": "--model-path",
    "--save-steps": "--save-every",
}


@pytest.mark.parametrize("flag, hint", REJECTED.items())
def test_a_flag_of_old_releases_gets_its_own_hint(train_bert: Callable, flag: str, hint: str):
    for words in spellings(flag):
        result = train_bert(*words)
        assert_refused(result, hint)
        assert result[2].startswith(f"train.py: error: {flag} ")


def test_the_flags_are_these(call: Callable):
    status, out, _ = call("BERT/train.py", "--help")
    assert status == 0 and "image" not in out
    assert flags_of(out) == set(
        """--help --task --dataset --data-path --train-file --test-file --dev-file --text-columns
        --label-column --max-length --pad-to-max-length --vocab-size --model --pretrained --hidden
        --num-layers --head --mlp-hidden --dropout --learning-rule --lean --gcp --asa-scale
        --derivative --name --device --output --output-dir --model-path --get-li --resume
        --compress --compress-level --compress-bits --actnn --mesa --mesa-policy --checkpoint
        --tensorboard --save-every --keep --parallel --dry-run --find-batch-size --epochs
        --max-epochs --batch-size --gradient-accumulation-steps --lr --learning-rate
        --warmup-share --warmup-ratio --weight-decay --max-grad-norm --clip-grad --amp
        --seed""".split()
    )
