"""The table of ``speed.py``: its rows, comparisons and errors."""

import csv
import io

import bandwidth
import fused_kernels
import memory
import pytest
import speed
import torch
from settings import (
    ALTERNATIVE,
    CHECKPOINT,
    OURS,
    PLAIN,
    Setting,
    alternative,
    ours,
    vision_transformer,
)
from torch.utils._pytree import tree_leaves

from aal.ops.group_quantise import GROUP, SUPERBLOCK, stored_bits
from aal.training.command_line import run

NAMES = (PLAIN, "asa4", CHECKPOINT.name, "broken")


def broken(*_) -> None:
    raise torch.OutOfMemoryError("no memory\nis left")


SETTINGS = (
    alternative(PLAIN),
    ours("asa4", rule="asa4"),
    CHECKPOINT,
    Setting("broken", ALTERNATIVE, broken),
)


def rows(seconds: float) -> list[dict]:
    network = vision_transformer(
        "vit", batch=2, dtype=torch.float32, classes=5, image_size=8, width=64, depth=2, heads=2
    )
    return speed.measure(network, SETTINGS, torch.device("cpu"), seconds)


def test_every_setting_has_a_row_and_a_failure_has_its_error():
    table = rows(3600.0)
    assert [row["setting"] for row in table] == list(NAMES)
    plain, asa4, checkpoint, failed = table
    assert plain["ratio"] == plain["saved_times_less"] == 1
    assert plain["alternatives_ratio"] is None and asa4["group"] == OURS
    for row in table[:3]:
        assert row["error"] is None and row["rounds"] == speed.ROUNDS.most
        assert row["step_ms_20_percent"] <= row["step_ms"] <= row["step_ms_80_percent"]
        assert row["saved_times_less"] == pytest.approx(
            plain["saved_mib"] / row["saved_mib"], abs=1e-3
        )
    assert checkpoint["saved_mib"] < asa4["saved_mib"] < plain["saved_mib"]
    assert failed["error"] == "OutOfMemoryError: no memory is left"
    assert failed["step_ms"] is None and failed["ratio"] is None


def test_without_time_every_row_says_so():
    table = rows(0.0)
    assert [row["setting"] for row in table] == list(NAMES)
    assert {row["error"] for row in table} == {"not measured: it takes more --minutes"}
    assert {row["ratio"] for row in table} == {None}


def test_ours_are_compared_with_the_curve_of_the_others():
    known = {"group": ALTERNATIVE, "peak_mib": None}
    table = [
        {**known, "setting": PLAIN, "ratio": 1.0, "saved_mib": 8.0},
        {**known, "setting": "checkpoint", "ratio": 1.4, "saved_mib": 4.0},
        {**known, "setting": "asa1", "ratio": 1.1, "saved_mib": 6.0, "group": OURS},
        {**known, "setting": "least", "ratio": 1.1, "saved_mib": 2.0, "group": OURS},
    ]
    table = [{**dict.fromkeys(speed.COLUMNS), **row} for row in table]
    speed.add_comparison(table, "saved_mib")
    assert [row["alternatives_ratio"] for row in table] == [None, None, 1.2, None]
    assert [row["saved_times_less"] for row in table] == [1.0, 2.0, 1.333, 4.0]


def test_csv_has_the_rows_and_what_they_were_measured_on():
    where = {"gpus": [], "processor": "Xeon", "torch": "2.14", "commit": "abc"}
    row = {**dict.fromkeys(speed.COLUMNS), "setting": "a, b", "ratio": 1.5}
    (read,) = csv.DictReader(io.StringIO(speed.table([row], where)))
    assert (read["setting"], read["ratio"], read["error"]) == ("a, b", "1.5", "")
    assert (read["machine"], read["torch"], read["commit"]) == ("Xeon", "2.14", "abc")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be used")
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (speed.main, ["--device", "cuda"]),
        (speed.main, ["--minutes", "0"]),
        (memory.main, []),
        (bandwidth.main, []),
        (fused_kernels.main, []),
    ],
)
def test_mistakes_are_told_in_one_line(main, arguments, capsys):
    assert run(main, arguments, "benchmark") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("benchmark: error: ") and err.count("\n") == 1


def test_kernels_move_their_input_and_output():
    numel = 2 * SUPERBLOCK * GROUP
    kernels = bandwidth.kernels(torch.randn(numel).bfloat16())
    moved = {name: moved for name, (_, moved) in kernels.items()}
    for name, (kernel, _) in kernels.items():
        assert kernel() is not None, name
    signs = 2 * numel + numel / 8
    assert moved["pack signs"] == moved["unpack signs"] == signs
    for bits in (2, 4, 8):
        expected = 2 * numel + numel * stored_bits(bits, GROUP) / 8
        assert moved[f"quantise, {bits} bit"] == moved[f"dequantise, {bits} bit"] == expected


def test_fused_passes_compute_what_they_stand_for():
    passes = fused_kernels.passes(torch.device("cpu"), scale=256)
    for name, (fused, one_by_one, num_bytes) in passes.items():
        if name == "gradient of GELU from its code":  # in four steps
            assert fused().shape == one_by_one().shape
            continue
        found, expected = tree_leaves(fused())[:2], tree_leaves(one_by_one())[:2]
        found = [tensor for tensor in found if tensor.is_floating_point()]
        for tensor, stock in zip(found, expected, strict=False):
            torch.testing.assert_close(tensor, stock, rtol=2**-6, atol=2**-5)
        assert num_bytes >= 2 * found[0].nbytes
