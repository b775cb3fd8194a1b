"""Archives of published weights: shapes as PyTorch has them, and files that are none."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from torch import Tensor, nn

from aal.pretrained import (
    convolution_from,
    linear_from,
    norm_from,
    prefixed,
    read_archive,
    refuse_rest,
)


def archive(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ">f4", np.int32], ids=str)
def test_arrays_are_read_as_float32(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    found = read_archive(archive(tmp_path / "weights.npz", **{"block/kernel": array}))
    assert_same_bits(found, {"block/kernel": torch.arange(6.0).view(2, 3)})


def test_numbers_without_dimensions_are_read_too(tmp_path):
    found = read_archive(archive(tmp_path / "weights.npz", step=np.int64(7)))
    assert_same_bits(found, {"step": torch.tensor(7.0)})


def test_path_may_be_a_string(tmp_path):
    path = archive(tmp_path / "weights.npz", a=np.ones(3))
    assert_same_bits(read_archive(str(path)), {"a": torch.ones(3)})


def missing(path: Path) -> None:
    pass


def folder(path: Path) -> None:
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>")


def truncated(path: Path) -> None:
    archive(path, a=np.random.default_rng(0).random(1000))
    path.write_bytes(path.read_bytes()[:-100])


def damaged(path: Path) -> None:
    np.savez_compressed(path, a=np.random.default_rng(0).random(1000))
    content = bytearray(path.read_bytes())
    content[1000:1100] = bytes(100)
    path.write_bytes(content)


def pickled(path: Path) -> None:
    archive(path, a=np.array([{"weights": 1}], dtype=object))


def a_checkpoint(path: Path) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), path)


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def complex_numbers(path: Path) -> None:
    archive(path, a=np.array([1j]))


def words(path: Path) -> None:
    archive(path, a=np.array(["1.5"]))


BROKEN = (
    folder,
    empty,
    text,
    truncated,
    damaged,
    pickled,
    a_checkpoint,
    one_array,
    complex_numbers,
    words,
)


@pytest.mark.parametrize("write", BROKEN, ids=lambda write: write.__name__)
def test_file_that_is_no_archive_of_numbers_is_refused_by_name(tmp_path, write):
    path = tmp_path / "weights.npz"
    write(path)
    message = re.escape(f"{path} is damaged or not an archive of real numbers (.npz)")
    with pytest.raises(ValueError, match=message):
        read_archive(path)


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "weights.npz"
    with pytest.raises(ValueError, match=re.escape(f"there is no file {path}")):
        read_archive(path)


def fits(layer: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """The layer with these parameters, each of them present and of the right shape."""
    layer.load_state_dict(parameters)
    return layer


def test_dense_layer_multiplies_as_it_did_there():
    kernel, bias, x = torch.randn(7, 4), torch.randn(4), torch.randn(3, 7)
    layer = fits(nn.Linear(7, 4), linear_from({"fc/kernel": kernel, "fc/bias": bias}, "fc"))
    torch.testing.assert_close(layer(x), x @ kernel + bias)


def test_outputs_counted_by_head_are_flattened():
    kernel, bias, x = torch.randn(7, 2, 3), torch.randn(2, 3), torch.randn(5, 7)
    layer = fits(nn.Linear(7, 6), linear_from({"q/kernel": kernel, "q/bias": bias}, "q"))
    expected = torch.einsum("nc,chd->nhd", x, kernel) + bias
    torch.testing.assert_close(layer(x).view(5, 2, 3), expected)


def test_inputs_counted_by_head_are_flattened():
    kernel, bias, x = torch.randn(2, 3, 7), torch.randn(7), torch.randn(5, 2, 3)
    arrays = {"out/kernel": kernel, "out/bias": bias}
    layer = fits(nn.Linear(6, 7), linear_from(arrays, "out", input_dims=2))
    expected = torch.einsum("nhd,hdc->nc", x, kernel) + bias
    torch.testing.assert_close(layer(x.flatten(1)), expected)


def test_convolution_slides_as_it_did_there():
    kernel, bias = torch.randn(2, 3, 4, 5), torch.randn(5)  # height, width, inputs, outputs
    arrays = {"stem/kernel": kernel, "stem/bias": bias}
    layer = fits(nn.Conv2d(4, 5, (2, 3)), convolution_from(arrays, "stem"))
    x = torch.randn(1, 4, 2, 3)
    expected = torch.einsum("ncij,ijcd->nd", x, kernel) + bias
    torch.testing.assert_close(layer(x).flatten(1), expected)


def test_norm_scales_as_it_did_there():
    scale, bias, x = torch.randn(7), torch.randn(7), torch.randn(3, 7)
    layer = fits(nn.LayerNorm(7), norm_from({"ln/scale": scale, "ln/bias": bias}, "ln"))
    torch.testing.assert_close(layer(x), F.layer_norm(x, (7,)) * scale + bias)


def test_parameters_get_the_name_of_their_layer():
    found = prefixed("blocks.0.fc1", {"weight": torch.ones(2), "bias": torch.zeros(1)})
    assert_same_bits(
        found, {"blocks.0.fc1.weight": torch.ones(2), "blocks.0.fc1.bias": torch.zeros(1)}
    )


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (linear_from, ("kernel", "bias")),
        (convolution_from, ("kernel", "bias")),
        (norm_from, ("scale", "bias")),
    ],
    ids=["linear", "convolution", "norm"],
)
def test_missing_array_is_named(read, names):
    arrays = {f"block/{name}": torch.randn(2, 2, 2, 2) for name in names}
    for name in names:
        rest = {other: array for other, array in arrays.items() if other != f"block/{name}"}
        with pytest.raises(ValueError, match=f"the archive lacks block/{name}"):
            read(rest, "block")


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (linear_from, ("kernel", "bias")),
        (convolution_from, ("kernel", "bias")),
        (norm_from, ("scale", "bias")),
    ],
    ids=["linear", "convolution", "norm"],
)
def test_arrays_that_are_taken_leave_the_archive(read, names):
    arrays = {f"block/{name}": torch.randn(2, 2, 2, 2) for name in (*names, "other")}
    read(arrays, "block")
    assert arrays.keys() == {"block/other"}


def test_arrays_that_nobody_took_are_refused():
    arrays = dict.fromkeys(("head/bias", "pre_logits/bias", "b/scale", "a/scale"), torch.ones(1))
    with pytest.raises(ValueError, match=r"the archive has unknown a/scale \(2 in all\)"):
        refuse_rest(arrays)


def test_head_may_be_left_in_the_archive():
    arrays = {"head/kernel": torch.ones(1), "pre_logits/bias": torch.ones(1)}
    refuse_rest(arrays)
    assert len(arrays) == 2
