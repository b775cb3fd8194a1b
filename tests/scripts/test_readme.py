"""The README's code and commands run."""

import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import code_blocks, run_code
from scripts.conftest import SMALL, SMALL_TRANSFORMER, TRANSLATION_OF_THE_PAPER

from aal.training import report

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return code_blocks(README, language)


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.chdir(ROOT)
    names = run_code(_blocks("python"), tmp_path)
    assert "resnet" in names and names["y"].shape == (8, 65, 64)
    assert "LinearASA" in capsys.readouterr().out


def test_its_report_is_what_the_code_prints(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    blocks = _blocks("python")
    last = next(i for i, block in enumerate(blocks) if "print(report(" in block)
    run_code(blocks[: last + 1], tmp_path)
    assert capsys.readouterr().out.strip().endswith(_blocks("text")[0].strip())


def _commands() -> list[tuple[str, list[str]]]:
    """Folder and arguments of every ``python train.py``, what it reads set aside."""
    found = []
    for block in _blocks("sh"):
        folder = ""
        for line in block.splitlines():
            if line.startswith("cd "):
                folder = line.removeprefix("cd ").removeprefix("../")
            elif "python train.py" in line:
                found.append((folder, shlex.split(line.partition("python train.py")[2])))
    return found


SMALL_RESNET = "--model resnet18"
FIXTURES = {"ResNet": "train", "ViT": "train_vit", "MLP-Mixer": "train_mixer"}


@pytest.mark.parametrize("folder", FIXTURES)
def test_its_commands_train_and_score(folder: str, request, tmp_path: Path):
    train = request.getfixturevalue(FIXTURES[folder])
    small = SMALL.get(f"{folder}/train.py", SMALL_RESNET).split()
    shorter = ["--dataset", "tiny-imagenet", "--epochs", "1", *small]
    commands = [words for name, words in _commands() if name == folder and "digits" in words]
    training, scoring = commands
    status, _, err = train(*training, *shorter)
    assert status == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    place = scoring.index("--model_path") + 1
    assert Path(scoring[place]).parent.name == run.name or "--name" not in training
    scoring[place] = str(run / Path(scoring[place]).name)
    status, out, err = train(*scoring, *shorter)
    assert status == 0, err
    assert out.startswith("test accuracy")


def test_its_commands_train_score_and_translate(
    train_transformer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    few = ["--dataset-name", "parallel", "--epochs", "1", *SMALL_TRANSFORMER.split()]
    commands = [w for folder, w in _commands() if folder == "Transformer" and "cldr" in w]
    training, *others = commands
    status, _, err = train_transformer(*training, *few)
    assert status == 0, err
    starts = []
    for words in others:
        place = words.index("--model_path") + 1
        words[place] = str(tmp_path / "runs" / Path(words[place]).relative_to("results"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Der Hund\n")))
        status, out, err = train_transformer(*words, *few)
        assert (status, err) == (0, "")
        starts.append(out.partition(" BLEU")[0])
    assert starts[0] == "test" and starts[1].count("\n") == 1


def test_its_commands_for_bert_train_and_score(train_bert: Callable, tmp_path: Path):
    training, scoring = (words for folder, words in _commands() if folder == "BERT")
    status, _, err = train_bert(*training, "--task", "mrpc", "--epochs", "1")
    assert status == 0, err
    place = scoring.index("--model_path") + 1
    scoring[place] = str(tmp_path / "runs" / Path(scoring[place]).relative_to("results"))
    status, out, err = train_bert(*scoring, "--task", "mrpc")
    assert status == 0, err
    assert out.startswith("test accuracy")


def test_its_report_draws_runs(
    train_vit: Callable, train_mixer: Callable, tmp_path: Path, capfd: pytest.CaptureFixture
):
    (line,) = re.findall(r"^python -m aal.training.report (.*)$", README, flags=re.MULTILINE)
    words = shlex.split(line)
    for train, place, folder in ((train_vit, 0, "ViT"), (train_mixer, 1, "MLP-Mixer")):
        assert words[place] == f"{'' if place == 0 else '../MLP-Mixer/'}results/small"
        words[place] = str(tmp_path / folder / "results" / "small")
        output = Path(words[place]).parent
        assert train("--epochs", 1, "--name", "small", "--output", output)[0] == 0
    words[-1] = str(tmp_path / words[-1])
    capfd.readouterr()
    assert report.main(words) == 0
    assert (tmp_path / "small.png").is_file()
    names = [row.split()[0] for row in capfd.readouterr().out.splitlines()]
    assert names == ["run", "ViT", "MLP-Mixer", "picture:"]


def test_the_papers_command_for_translation_is_the_tested_one():
    assert f"python train.py {TRANSLATION_OF_THE_PAPER}\n" in README


@pytest.mark.parametrize("folder", SMALL)
def test_the_papers_commands_run_as_printed(
    call: Callable, cifar10: Path, tmp_path: Path, folder: str
):
    (words,) = [w for name, w in _commands() if f"{name}/train.py" == folder and "c10" in w]
    place = ["--device", "cpu", "--workers", "0", "--data-path", cifar10, "--output", tmp_path]
    shorter = [*SMALL[folder].split(), "--epochs", "1", "--batch-size", "4"]
    status, _, err = call(folder, *words, *place, *shorter)
    assert (status, err) == (0, "")


def test_its_make_targets_exist():
    targets = re.findall(r"^make (\S+)", "\n".join(_blocks("sh")), flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "bench-cpu", "bench-gpu"} == set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_its_numbers_have_records():
    records = re.findall(r"\((results/[^)]+)\)", README)
    assert len(set(records)) >= 6
    assert not [record for record in records if not (ROOT / record).is_file()]
    assert not re.findall(r"^[A-Z]+$", README, flags=re.MULTILINE)  # a table yet to come


def _record(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def _table(header: str) -> list[list[str]]:
    """The cells of the table whose first line begins so, without emphasis and headings."""
    lines = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def test_its_bytes_are_the_recorded_ones():
    record = _record("patch_memory")
    blocks, *networks = list(record.values())[1:]
    rows = _table("| rule | block |")
    assert len(rows) == 9
    for label, block, *cells in rows:
        key = label.removesuffix(", lean off").removesuffix(" (torchvision's ViT)")
        assert block == f"{blocks[key]:.2f}"
        for network, (mib, times, _) in zip(networks, (cells[:3], cells[3:]), strict=True):
            is_torchvision = key == "bp" and "torchvision" in network
            row = network["torchvision" if is_torchvision else key]
            assert float(mib) == pytest.approx(row["mib_per_image"], abs=0.0501)
            assert float(times) == pytest.approx(row["times_less"], abs=0.00501)


def test_its_times_are_the_recorded_ones():
    networks = _record("patch_speed_cpu")["training_step"].values()
    rows = _table("| rule | ViT | MLP-Mixer |")
    assert len(rows) == 12
    for label, *ratios in rows:
        recorded = [network[label]["median_ratio"] for network in networks]
        assert [float(ratio) for ratio in ratios] == pytest.approx(recorded, abs=0.00501)


@pytest.mark.parametrize(("label", "network"), [("ViT", "vit"), ("ResNet-50", "ResNet-50")])
def test_its_times_beside_pytorch_are_the_recorded_ones(label: str, network: str):
    recorded = [row for row in _record("speed_cpu")["rows"] if row["network"] == network]
    rows = _table(f"| {label}, beside PyTorch |")
    assert [name for name, *_ in rows] == [row["setting"] for row in recorded]
    for row, (_, mib, times, ratio) in zip(recorded, rows, strict=True):
        assert mib == f"{row['saved_mib']:.1f}" and times == f"{row['saved_times_less']:.2f}"
        assert ratio == f"{row['ratio']:.2f}"


def test_its_accuracies_are_the_recorded_ones():
    networks = _record("patch_accuracy")["rules"].values()
    rows = _table("| rule | ViT, test accuracy % |")
    names = [label for label, *_ in rows[:11]]
    approx = "asa1, GELU, lean approx"
    names += [approx, f"{approx}, mean scale", f"{approx}, published derivative"]
    for name, (_, *cells) in zip(names, rows, strict=True):
        for network, (accuracy, mib, indicator) in zip(
            networks, (cells[:3], cells[3:]), strict=True
        ):
            row = network[name]
            assert accuracy == f"{row['accuracy_mean']:.1f} ± {row['accuracy_sd']:.1f}"
            assert mib == f"{row['saved_mib']:.1f}"
            found = float(indicator.replace("−", "-"))
            assert found == pytest.approx(row["median_learning_indicator"], abs=0.000501)


def test_its_bytes_of_translation_are_the_recorded_ones():
    tables = [_record("translation_memory")[f"dropout {dropout}"] for dropout in (0.1, 0.0)]
    rows = _table("| rule | saved MiB, dropout 0.1 |")
    assert len(rows) == 13
    for label, mib, times, _, *without in rows:
        for table, found in zip(tables, ((mib, times), without), strict=True):
            row = table[label.removesuffix(", lean off")]
            assert float(found[0]) == pytest.approx(row["mib"], abs=0.501)
            assert float(found[1]) == pytest.approx(row["times_less"], abs=0.00501)


def test_its_times_of_translation_are_the_recorded_ones():
    record = _record("translation_speed_cpu")
    rows = _table("| rule | Transformer |")
    assert len(rows) == len(record["training_step"])
    for label, ratio in rows:
        recorded = record["training_step"][label]["median_ratio"]
        assert float(ratio) == pytest.approx(recorded, abs=0.00501)
    rows = _table("| 1000 texts |")
    for loops, (_, *ratios) in zip(record["beam_search"].values(), rows, strict=True):
        names = ("uncached", "uncached, sources encoded once")
        recorded = [loops[name]["median_ratio"] for name in names]
        assert [float(ratio) for ratio in ratios] == pytest.approx(recorded, abs=0.0501)
        assert {loop["same_translations"] for loop in loops.values()} == {"1000 of 1000"}


def test_its_scores_of_translation_are_the_recorded_ones():
    record = _record("translation_accuracy")["rules"]
    rows = _table("| rule | BLEU |")
    assert len(rows) == len(record)
    for label, bleu, mib, indicator in rows:
        row = record[label]
        assert bleu == f"{row['bleu_mean']:.1f} ± {row['bleu_sd']:.1f}"
        assert mib == f"{row['saved_mib']:.1f}"
        found = float(indicator.replace("−", "-"))
        assert found == pytest.approx(row["median_learning_indicator"], abs=0.000501)


def test_its_bytes_of_compressors_are_the_recorded_ones():
    record = _record("compression_memory")
    rows = _table("| compressor | ResNet-50 |")
    assert len(rows) == 14
    for label, *cells in rows:
        key = label.removesuffix(" PyTorch").replace("; no convolutions", "")
        for network, (mib, times, _) in (("ResNet-50", cells[:3]), ("ViT-B_16", cells[3:])):
            if mib != "–":
                row = record[network][key]
                assert float(mib) == pytest.approx(row["mib_per_image"], abs=0.0501)
                assert float(times) == pytest.approx(row["times_less"], abs=0.00501)
    blocks = record["block_bytes_per_token_and_hidden_unit"]
    words = README[README.index("In bfloat16 one interior") :].split("\n\n")[0]
    keys = ("plain", "asa1, lean approx", "asa1, lean approx + adaptive 4 bit")
    for key in (*keys, "checkpoint + adaptive 4 bit"):
        assert f"{blocks[key]:.2f}" in words
    bottlenecks = record["bottleneck_bytes_per_pixel_and_inner_channel"]
    for key in ("plain", "ara(2), lean exact + adaptive 4 bit"):
        assert f"{bottlenecks[key]:.2f}" in words


def test_its_errors_of_compressors_are_the_recorded_ones():
    networks = _record("compression_quality")["networks"].values()
    rows = _table("| at the bytes of |")
    assert len(rows) == len(_record("compression_quality")["networks"]["ViT"])
    for label, *cells in rows:
        for network, found in zip(networks, (cells[:3], cells[3:]), strict=True):
            published, adaptive = network[label]["published"], network[label]["adaptive"]
            assert adaptive["mib"] <= published["mib"]
            recorded = [published["mib"], published["error"], adaptive["error"]]
            assert found[0] == f"{recorded[0]:.1f}"
            assert [float(error) for error in found[1:]] == pytest.approx(recorded[1:], rel=0.05)


def test_its_times_of_compressors_are_the_recorded_ones():
    record = _record("compression_speed_cpu")
    rows = _table("| compressor | step of ResNet-18 |")
    assert len(rows) == len(record["training_step"])
    for label, ratio in rows:
        recorded = record["training_step"][label]["median_ratio"]
        assert ratio == f"{recorded:.2f}"
    for label, *ratios in _table("| quantise and restore |"):
        recorded = [dtype[label]["median_ratio"] for dtype in record["quantiser"].values()]
        assert ratios == [f"{ratio:.1f}" for ratio in recorded]


def test_its_accuracies_of_compressors_are_the_recorded_ones():
    networks = _record("compression_accuracy")["networks"].values()
    rows = _table("| compressor | ResNet-18, test accuracy % |")
    for row, *records in zip(rows, *(network.values() for network in networks), strict=True):
        expected = [f"{r['accuracy_mean']:.1f} ± {r['accuracy_sd']:.1f}" for r in records]
        assert row[1:] == expected


def test_its_bytes_of_bert_are_the_recorded_ones():
    record = _record("conversion_memory")
    tables = [record[f"BERT-Large, dropout {dropout}"] for dropout in ("0.1", "0")]
    rows = _table("| BERT-Large |")
    assert len(rows) == len(tables[0])
    for label, mib, times, _, *without in rows:
        for table, found in zip(tables, ((mib, times), without), strict=True):
            row = table[label.removesuffix(", lean off")]
            assert float(found[0]) == pytest.approx(row["mib_per_pair"], abs=0.0501)
            assert float(found[1]) == pytest.approx(row["times_less"], abs=0.00501)


def test_its_bytes_of_other_models_are_the_recorded_ones():
    record = _record("conversion_memory")["others, per sample"]
    rows = _table("| model | as it comes |")
    assert len(rows) == len(record)
    for name, plain, exact, times_exact, setting, mib, times in rows:
        row = record[name]
        found = [(plain, 1), (exact, times_exact), (mib, times)]
        for key, (own, ratio) in zip(("bp", "bp, lean exact", setting), found, strict=True):
            assert float(own) == pytest.approx(row[key]["mib"], abs=0.0501)
            assert float(ratio) == pytest.approx(row[key]["times_less"], abs=0.00501)


def test_its_times_of_converted_models_are_the_recorded_ones():
    networks = _record("conversion_speed_cpu")["training_step"].values()
    for label, *ratios in _table("| setting | BERT-Base |"):
        for network, ratio in zip(networks, ratios, strict=True):
            assert (ratio == "–") == (label not in network)
            if label in network:
                assert ratio == f"{network[label]['median_ratio']:.2f}"


def test_its_accuracies_of_pairs_are_the_recorded_ones():
    record = _record("pair_accuracy")["rules"]
    rows = _table("| setting | accuracy % |")
    assert [label for label, *_ in rows] == list(record)
    for label, accuracy, mib, indicator in rows:
        row = record[label]
        assert accuracy == f"{row['accuracy_mean']:.1f} ± {row['accuracy_sd']:.1f}"
        assert mib == f"{row['saved_mib']:.1f}"
        found = float(indicator.replace("−", "-"))
        assert found == pytest.approx(row["median_learning_indicator"], abs=0.000501)
