"""ViT: torchvision's network, the authors' archives, and both scales of attention."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from models.patch_networks import images, small
from torch import Tensor, nn
from torchvision.models import VisionTransformer, vit_b_16, vit_b_32
from vit import build, load_pretrained, load_weights

from aal.memory import report

TINY = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 12}


def torchvision_network(num_classes: int = 5) -> VisionTransformer:
    """torchvision's network of the size of ``small("vit")``, with no parameter left at zero."""
    model = VisionTransformer(**TINY, mlp_dim=20, num_classes=num_classes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def archive_of(model: VisionTransformer, path: Path) -> Path:
    """The weights of torchvision's network as the authors' archives hold them."""
    width = model.hidden_dim
    heads = model.encoder.layers[0].num_heads
    arrays = {
        "cls": model.class_token,
        "embedding/kernel": model.conv_proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": model.conv_proj.bias,
        "Transformer/posembed_input/pos_embedding": model.encoder.pos_embedding,
        "Transformer/encoder_norm/scale": model.encoder.ln.weight,
        "Transformer/encoder_norm/bias": model.encoder.ln.bias,
        "head/kernel": model.heads.head.weight.T,
        "head/bias": model.heads.head.bias,
    }
    for i, block in enumerate(model.encoder.layers):
        place, attention = f"Transformer/encoderblock_{i}", block.self_attention
        for name, norm in (("LayerNorm_0", block.ln_1), ("LayerNorm_2", block.ln_2)):
            arrays[f"{place}/{name}/scale"] = norm.weight
            arrays[f"{place}/{name}/bias"] = norm.bias
        for name, layer in (("Dense_0", block.mlp[0]), ("Dense_1", block.mlp[3])):
            arrays[f"{place}/MlpBlock_3/{name}/kernel"] = layer.weight.T
            arrays[f"{place}/MlpBlock_3/{name}/bias"] = layer.bias
        place += "/MultiHeadDotProductAttention_1"
        weights = attention.in_proj_weight.chunk(3)
        biases = attention.in_proj_bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{place}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{place}/{name}/bias"] = bias.reshape(heads, -1)
        out = attention.out_proj
        arrays[f"{place}/out/kernel"] = out.weight.T.reshape(heads, -1, width)
        arrays[f"{place}/out/bias"] = out.bias
    np.savez(path, **{name: array.detach().numpy() for name, array in arrays.items()})
    return path


@pytest.fixture
def archive(tmp_path: Path) -> tuple[VisionTransformer, Path]:
    model = torchvision_network()
    return model, archive_of(model, tmp_path / "weights.npz")


def published(**options) -> nn.Module:
    return small("vit", "ViT-B_16", **options).eval()


@pytest.mark.parametrize("lean", ["off", "exact", "approx"])
def test_is_the_network_of_torchvision(lean):
    theirs, ours = torchvision_network().double(), published(lean=lean).double()
    load_weights(ours, theirs.state_dict())
    x = images().double()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs"), [("ViT-B_16", vit_b_16), ("ViT-B_32", vit_b_32)], ids=["B_16", "B_32"]
)
def test_is_the_network_of_torchvision_in_full_size(name, theirs):
    theirs = theirs(weights=None, num_classes=7).eval()
    nn.init.normal_(theirs.heads.head.weight, std=0.02)
    ours = build(name, num_classes=7).eval()
    load_weights(ours, theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["bp", "asa4", "aba4"])
def test_an_archive_gives_the_same_network_with_a_zero_head(archive, rule):
    theirs, path = archive
    ours = published(rule=rule)
    load_pretrained(ours, path)
    assert not ours.head.weight.any() and not ours.head.bias.any()
    expected = published(rule=rule)
    load_weights(expected, theirs.state_dict())
    own = {n: p for n, p in ours.state_dict().items() if "head" not in n and "aux" not in n}
    assert_same_bits(own, {name: expected.state_dict()[name] for name in own})


def test_an_archive_fits_another_number_of_classes(archive):
    load_pretrained(published(num_classes=3), archive[1])


def test_positions_are_resized_between_the_corners_of_the_grid(archive):
    theirs, path = archive
    model = published(image_size=40)  # 5 x 5 patches instead of 2 x 2
    load_pretrained(model, path)
    token, before = theirs.encoder.pos_embedding[0].split([1, 4])
    own_token, after = model.pos_embed[0].split([1, 25])
    assert_same_bits(own_token, token)
    before, after = before.view(2, 2, 12), after.view(5, 5, 12)
    for i in range(5):
        for j in range(5):
            top, bottom = (torch.lerp(before[r, 0], before[r, 1], j / 4) for r in (0, 1))
            torch.testing.assert_close(after[i, j], torch.lerp(top, bottom, i / 4))
    model(torch.randn(1, 3, 40, 40))


def test_an_archive_fits_a_network_without_class_token(archive):
    model = published(class_token=False)
    load_pretrained(model, archive[1])
    assert_same_bits(model.pos_embed, archive[0].encoder.pos_embedding[:, 1:])


def test_an_archive_that_does_not_fit_is_refused(archive, tmp_path):
    path = archive[1]
    with pytest.raises(ValueError, match="another shape of patch_embed.proj.weight"):
        load_pretrained(published(width=24), path)
    with pytest.raises(ValueError, match="lacks Transformer/encoderblock_2/"):
        load_pretrained(published(depth=3), path)
    with pytest.raises(ValueError, match="has unknown Transformer/encoderblock_1/"):
        load_pretrained(published(depth=1), path)
    arrays = dict(np.load(path))
    arrays["Transformer/posembed_input/pos_embedding"] = np.ones((1, 4, 12))  # no square
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ValueError, match="odd.npz holds no Vision Transformer of this kind"):
        load_pretrained(published(), tmp_path / "odd.npz")
    del arrays["cls"]
    np.savez(tmp_path / "mixer.npz", **arrays)
    with pytest.raises(ValueError, match="the archive lacks cls"):
        load_pretrained(published(), tmp_path / "mixer.npz")


@pytest.mark.parametrize(("scale", "features"), [("head", 4), ("width", 12)])
def test_attention_is_scaled_by_the_chosen_width(scale, features):
    attention = published(attention_scale=scale).blocks[0].attn
    x, norm = torch.randn(2, 5, 12), nn.Identity()
    q, k, v = attention.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(features)).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(attention(x, norm), expected)


def test_the_papers_network_has_a_relu_behind_both_layers():
    part = small("vit").blocks[0].mlp
    x, norm = torch.randn(2, 5, 12), nn.Identity()
    expected = F.relu(part.fc2(F.relu(part.fc1(x))))
    torch.testing.assert_close(part(x, norm), expected)


@pytest.mark.parametrize("class_token", [True, False], ids=["class-token", "mean"])
def test_head_reads_the_class_token_or_the_mean(class_token):
    model = small("vit", class_token=class_token)
    model.blocks, model.pos_drop = nn.Identity(), nn.Identity()
    x = images()
    tokens = model.patch_embed(x)
    if class_token:
        pooled = (model.cls_token + model.pos_embed[:, :1]).expand(3, 1, 12)[:, 0]
    else:
        pooled = (tokens + model.pos_embed).mean(1)
    torch.testing.assert_close(model(x), model.head(model.norm(pooled)))


def test_a_checkpoint_of_other_things_is_refused():
    with pytest.raises(ValueError, match="other things than named tensors"):
        load_weights(published(), {"conv_proj.weight": torch.ones(1), 3: 4})


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="5 heads do not divide a width of 12"):
        small("vit", heads=5)


def test_unknown_scale_of_attention_is_refused():
    with pytest.raises(ValueError, match="attention_scale is head or width, not 'token'"):
        small("vit", attention_scale="token")


def rows_of(rule: str) -> dict[str, tuple[int, int]]:
    """Bytes that each module keeps, and that it would keep under backpropagation."""
    rows = report(small("vit", "ViT-B_16", rule=rule, dropout=0.0), images()).rows
    return {row.name: (row.saved_bytes, row.stock_bytes) for row in rows}


def test_report_shows_that_a_rule_on_the_projection_saves_nothing():
    second, third = rows_of("asa2"), rows_of("asa3")
    bits = -(-3 * 5 * 12 // 8)
    for block in ("blocks.0", "blocks.1"):
        assert f"{block}.attn.proj" not in second  # attention has kept its output already
        assert third[f"{block}.attn.proj"] == (bits, 0)
        assert third[f"{block}.attn"] == second[f"{block}.attn"]


def test_number_of_channels_is_free():
    model = small("vit", in_channels=1)
    x: Tensor = torch.randn(2, 1, 16, 16)
    assert model(x).shape == (2, 5)
