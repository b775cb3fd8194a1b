"""MLP-Mixer: the published network spelled out, and the authors' archives."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from mlp_mixer import load_pretrained, load_weights
from models.patch_networks import images, small
from torch import Tensor, nn


def published(**options) -> nn.Module:
    return small("mixer", "Mixer-B_16", **options).eval()


def spelled_out(arrays: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published network, from its archive."""

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ arrays[f"{name}/kernel"] + arrays[f"{name}/bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        scale, bias = arrays[f"{name}/scale"], arrays[f"{name}/bias"]
        return F.layer_norm(x, (12,), scale, bias, 1e-6)

    def mlp(name: str, x: Tensor) -> Tensor:
        return dense(f"{name}/Dense_1", F.gelu(dense(f"{name}/Dense_0", x)))

    patches = x.unflatten(-1, (2, 8)).unflatten(-3, (2, 8)).permute(0, 2, 4, 3, 5, 1)
    kernel = arrays["stem/kernel"]  # (8, 8, 3, 12)
    x = torch.einsum("bijhwc,hwcd->bijd", patches, kernel).flatten(1, 2) + arrays["stem/bias"]
    for i in range(2):
        block = f"MixerBlock_{i}"
        y = norm(f"{block}/LayerNorm_0", x).transpose(1, 2)
        x = x + mlp(f"{block}/token_mixing", y).transpose(1, 2)
        x = x + mlp(f"{block}/channel_mixing", norm(f"{block}/LayerNorm_1", x))
    return dense("head", norm("pre_head_layer_norm", x).mean(1))


def random_arrays() -> dict[str, Tensor]:
    shapes = {"stem/kernel": (8, 8, 3, 12), "stem/bias": (12,)}
    shapes |= {"head/kernel": (12, 5), "head/bias": (5,)}
    norms = ["pre_head_layer_norm"]
    for i in range(2):
        block = f"MixerBlock_{i}"
        norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_1"]
        for part, width, hidden in (("token_mixing", 4, 10), ("channel_mixing", 12, 20)):
            shapes[f"{block}/{part}/Dense_0/kernel"] = (width, hidden)
            shapes[f"{block}/{part}/Dense_0/bias"] = (hidden,)
            shapes[f"{block}/{part}/Dense_1/kernel"] = (hidden, width)
            shapes[f"{block}/{part}/Dense_1/bias"] = (width,)
    for name in norms:
        shapes[f"{name}/scale"] = shapes[f"{name}/bias"] = (12,)
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def archive(tmp_path: Path) -> tuple[dict[str, Tensor], Path]:
    arrays, path = random_arrays(), tmp_path / "weights.npz"
    np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    return arrays, path


@pytest.mark.parametrize("lean", ["off", "exact", "approx"])
def test_an_archive_gives_the_published_network(archive, lean):
    arrays, path = archive
    model, x = published(lean=lean), images()
    load_pretrained(model, path)
    assert not model.head.weight.any() and not model.head.bias.any()
    with torch.no_grad():
        model.head.weight.copy_(arrays["head/kernel"].T)
        model.head.bias.copy_(arrays["head/bias"])
    torch.testing.assert_close(model(x), spelled_out(arrays, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["asa4", "aba4"])
def test_an_archive_fits_every_rule(archive, rule):
    plain, model = published(), published(rule=rule)
    load_pretrained(plain, archive[1])
    load_pretrained(model, archive[1])
    state = model.state_dict()
    assert_same_bits({name: state[name] for name in plain.state_dict()}, dict(plain.state_dict()))


def test_an_archive_that_does_not_fit_is_refused(archive):
    path = archive[1]
    with pytest.raises(ValueError, match="another shape of stem.proj.weight"):
        load_pretrained(published(width=24), path)
    with pytest.raises(ValueError, match="lacks MixerBlock_2/LayerNorm_0/scale"):
        load_pretrained(published(depth=3), path)
    with pytest.raises(ValueError, match="has unknown MixerBlock_1/"):
        load_pretrained(published(depth=1), path)


def test_an_archive_of_something_else_is_refused(archive, tmp_path):
    arrays = {name: array.numpy() for name, array in archive[0].items()}
    np.savez(tmp_path / "odd.npz", **(arrays | {"stem/kernel": np.ones(3)}))
    with pytest.raises(ValueError, match="odd.npz holds no MLP-Mixer of this kind"):
        load_pretrained(published(), tmp_path / "odd.npz")


def test_head_reads_the_class_token_where_there_is_one():
    model = small("mixer", class_token=True)
    model.blocks = nn.Identity()
    expected = model.head(model.norm(model.cls_token[:, 0])).expand(3, 5)
    torch.testing.assert_close(model(images()), expected)


def test_weights_of_a_network_with_class_token_do_not_fit_one_without():
    with pytest.raises(ValueError, match="has unknown cls_token"):
        load_weights(small("mixer"), small("mixer", class_token=True).state_dict())
