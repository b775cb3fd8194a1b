"""learning_indicator.py as its users call it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import learning_indicator


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    paths = [tmp_path / "ara_li.npy", tmp_path / "aba_li.npy"]
    np.save(paths[0], random.uniform(0.3, 0.9, (2, 5, 64)).astype(np.float32))
    np.save(paths[1], random.normal(0, 0.01, (3, 4, 100)))
    return paths


def test_draws_a_panel_per_file_and_prints_their_statistics(call: Callable, files: list[Path]):
    status, out, err = call("learning_indicator.py", "--li_path", *files)
    assert (status, err) == (0, "")
    values = np.load(files[0])
    assert f"median {np.median(values):.4f}, 5 % quantile {np.quantile(values, 0.05):.4f}" in out
    assert "100.00 % above 0 (640 values)" in out
    picture = np.asarray(Image.open(files[0].with_suffix(".png")).convert("RGB"))
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3)}
    for colour in (learning_indicator.WARM, learning_indicator.COOL):
        assert tuple(bytes.fromhex(colour[1:])) in colours


def test_writes_where_it_is_told(call: Callable, files: list[Path], tmp_path: Path):
    status, out, _ = call(
        "learning_indicator.py", "--li-path", files[0], "--output", tmp_path / "picture.svg"
    )
    assert status == 0 and (tmp_path / "picture.svg").read_text().startswith("<?xml")


def test_limits_hold_zero_and_nearly_all_values():
    low, high = learning_indicator.limits([np.linspace(0.2, 0.4, 1000), np.full(10, 0.3)])
    assert low < 0 < 0.399 < high < 0.45
    assert learning_indicator.limits([np.zeros(3)]) == (-1.0, 1.0)


def test_values_that_are_not_finite_are_left_out(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.array([0.5, np.nan, np.inf]))
    assert learning_indicator.load(tmp_path / "x.npy").tolist() == [0.5]


BAD_FILES = {
    "missing": None,
    "text": b"no array",
    "truncated": b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'",
    "empty file": b"",
}


def npy_header(text: str) -> bytes:
    """The beginning of an .npy file that says ``text`` of its array."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


_HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"
BAD_FILES |= {
    "half an archive": b"PK\x03\x04",
    "header that is no Python": npy_header("{'descr': '<f4"),
    "more than memory": npy_header(_HEADER % 10**14),
    "more than addresses": npy_header(_HEADER % 10**23),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_gets_one_line_and_status_2(
    call: Callable, tmp_path: Path, content: bytes | None
):
    path = tmp_path / "bad_li.npy"
    if content is not None:
        path.write_bytes(content)
    status, out, err = call("learning_indicator.py", "--li_path", path)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and "bad_li.npy" in err
    assert not path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    "arguments",
    [(), ("--li_path",), ("--output", "x.png"), ("--li_path", "a.npy", "--colour", "red")],
    ids=str,
)
def test_a_bad_command_gets_one_line_and_status_2(call: Callable, arguments: tuple[str, ...]):
    status, _, err = call("learning_indicator.py", *arguments)
    assert status == 2 and err.count("\n") == 1


@pytest.mark.parametrize("output", ["picture.xyz", "nowhere/picture.png", "two lines.jpg"])
def test_a_bad_output_gets_one_line_and_status_2(
    call: Callable, files: list[Path], tmp_path: Path, output: str
):
    status, _, err = call(
        "learning_indicator.py", "--li_path", files[0], "--output", tmp_path / output
    )
    assert status == 2 and err.count("\n") == 1 and output in err


def test_what_is_drawn_is_not_overwritten(call: Callable, files: list[Path]):
    path = files[0].rename(files[0].with_suffix(".png"))
    before = path.read_bytes()
    status, _, err = call("learning_indicator.py", "--li_path", path)
    assert status == 2 and err.count("\n") == 1 and "overwrite" in err
    assert path.read_bytes() == before


def test_values_must_be_real_numbers(call: Callable, tmp_path: Path):
    for number, values in enumerate((np.array([1j]), np.array(["a"]), np.array([np.nan]))):
        np.save(tmp_path / f"{number}.npy", values)
        status, _, err = call("learning_indicator.py", "--li_path", tmp_path / f"{number}.npy")
        assert status == 2 and err.count("\n") == 1
