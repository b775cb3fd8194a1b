"""DIVISION: which codec is for what, the published bytes of a ResNet, and no bias."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hazard_models import gradient, parameter_gradients, resnet, vit
from torch import Tensor, nn

import aal
from aal.compression.session import Session

MIB = 2**20


class After(nn.Module):
    """A layer behind an operation that saves nothing, so that its input is not the model's."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 1)


def codecs_of_inputs(layer: nn.Module, *shape: int, **options) -> set[str]:
    session = aal.compress("division", model=After(layer), smallest=1, **options)
    parameter_gradients(session, torch.randn(shape))
    return {row.codec for row in session.report().rows if row.note not in ("small", "sign")}


@pytest.mark.parametrize(
    ("layer", "shape", "mended", "faithful"),
    [
        (nn.Conv2d(4, 6, 3), (2, 4, 20, 12), "blocks", "blocks"),
        (nn.Conv2d(4, 6, 3), (2, 4, 8, 8), "blocks", "blocks"),
        (nn.Conv2d(4, 6, 3), (2, 4, 7, 7), "ranges", "blocks"),
        (nn.Conv2d(4, 6, 3), (2, 4, 12, 5), "ranges", "kept"),  # has no block as released
        (nn.Conv2d(4, 6, 3), (2, 4, 5, 12), "ranges", "blocks"),
        (nn.Conv2d(4, 6, 1), (8, 4, 1, 9), "ranges", "kept"),
        (nn.Conv1d(4, 6, 3), (2, 4, 30), "ranges", "kept"),
        (nn.ConvTranspose2d(4, 6, 3), (2, 4, 9, 9), "blocks", "blocks"),
        (nn.BatchNorm2d(4), (2, 4, 9, 9), "blocks", "blocks"),
        (nn.GroupNorm(2, 4), (2, 4, 9, 9), "blocks", "kept"),
        (nn.LayerNorm(40), (2, 9, 40), "ranges", "kept"),
        (nn.Linear(40, 3), (9, 40), "ranges", "kept"),
        (nn.Linear(40, 3), (2, 9, 9, 40), "ranges", "kept"),
    ],
    ids=str,
)
def test_maps_have_blocks_and_the_rest_has_groups(layer, shape, mended, faithful):
    assert mended in codecs_of_inputs(layer, *shape)
    found = codecs_of_inputs(layer, *shape, faithful=True)
    assert faithful in found and (faithful != "kept" or "blocks" not in found)


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 9}, {"bits": 2.5}, {"block": 0}])
def test_what_options_do_not_take(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        aal.compress("division", **options)


# --------------------------------------------------------------------------------------------------
# Bytes


def block_bits(channels: int, height: int, width: int, released: bool) -> int:
    """Of a sample: means, codes of two bits, and two ends per map."""
    sides = (min(8, height), min(8, height if released else width))
    rounded = math.floor if released else math.ceil
    means = rounded(height / sides[0]) * rounded(width / sides[1])
    return channels * (16 * means + 2 * height * width + 2 * 16)


@pytest.mark.parametrize("released", [False, True], ids=["aligned", "released"])
@pytest.mark.parametrize("side", [224, 112, 56, 28, 14, 7, 32, 20, 12])
def test_bits_of_a_map(side, released):
    layer = After(nn.Conv2d(3, 2, 1))
    session = aal.compress("division", model=layer, faithful=released, smallest=1)
    with torch.device("meta"):
        x = torch.empty(2, 3, side, side)
    with session:
        layer.to("meta")(x)
    (row,) = (row for row in session.report().rows if row.codec in ("blocks", "ranges"))
    if row.codec == "blocks":
        assert row.stored_bytes == math.ceil(2 * block_bits(3, side, side, released) / 8)
    else:
        elements = 2 * 3 * side**2
        assert row.stored_bytes == math.ceil(elements / 4) + 4 * math.ceil(elements / 256)


def resnet50() -> tuple[nn.Module, Tensor]:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):  # nothing is computed
        return torchvision.models.resnet50(), torch.empty(1, 3, 224, 224)


def bytes_of_codes(session: Session, model: nn.Module, x: Tensor) -> int:
    """Of a forward pass; statistics of norms, and the input of the last layer, are not counted."""
    with session:
        model(x)
    return sum(row.stored_bytes for row in session.report().rows if row.codec != "kept")


def test_a_resnet_takes_the_published_bytes():
    model, x = resnet50()
    session = aal.compress("division", faithful=True)  # no model: its argument is compressed too
    session.method.shares = False
    pool_indices = 64 * 56 * 56 / 2  # bytes that four bits save over the eight of the release
    published = 7.24 * MIB - pool_indices
    assert bytes_of_codes(session, model, x) == pytest.approx(published, rel=0.005)


def test_bytes_of_a_resnet_are_those_of_the_formula():
    model, x = resnet50()
    shapes = list(inputs_of_convolutions(x.shape[2])) + list(inputs_of_norms(x.shape[2]))
    bits = 0
    for channels, side in shapes:
        count = channels * side**2
        grouped = 2 * count + 32 * math.ceil(count / 256)
        bits += block_bits(channels, side, side, False) if side >= 8 else grouped
    bits += sum(channels * side**2 for channels, side in outputs_of_relu(x.shape[2]))
    bits += 4 * 64 * 56**2
    assert bytes_of_codes(aal.compress("division"), model, x) == pytest.approx(bits / 8, rel=1e-6)
    raw = 81.35 * MIB
    assert raw / (bits / 8) > 11


def stages(side: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Of every block of ResNet-50: channels in, within and out, and sides before and behind."""
    before = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        within = 64 * 2**stage
        for block in range(blocks):
            first = side // 4 // 2 ** max(0, stage - (block == 0))
            yield before, within, 4 * within, first, side // 4 // 2**stage
            before = 4 * within


def inputs_of_convolutions(side: int) -> Iterator[tuple[int, int]]:
    """Channels and side; a tensor that two convolutions read counts once."""
    yield 3, side
    for before, within, _, first, second in stages(side):
        yield from ((before, first), (within, first), (within, second))


def inputs_of_norms(side: int) -> Iterator[tuple[int, int]]:
    yield 64, side // 2
    for before, within, behind, first, second in stages(side):
        yield from ((within, first), (within, second), (behind, second))
        if before != behind:
            yield behind, second  # of the shortcut


def outputs_of_relu(side: int) -> Iterator[tuple[int, int]]:
    yield 64, side // 2
    for _, within, behind, first, second in stages(side):
        yield from ((within, first), (within, second), (behind, second))


# --------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("side", [6, 13])
def test_convolutions_have_no_bias(side, bits):
    layer, x = After(nn.Conv2d(4, 3, 3, bias=False)), torch.randn(4, 4, side, side)
    (exact,) = parameter_gradients(aal.compress("none", model=layer), x)
    session = aal.compress("division", model=layer, bits=bits, smallest=1)
    draws = torch.stack([parameter_gradients(session, x)[0] for _ in range(300)])
    errors = (draws.mean(0) - exact) / (draws.var(0) / len(draws)).sqrt()
    assert errors.square().mean() < 1.4 and errors.abs().max() < 5


def test_input_and_bias_gradients_of_a_convolution_are_exact():
    layer, x = nn.Conv2d(4, 3, 3), torch.randn(2, 4, 13, 13, requires_grad=True)
    found = []
    for method in ("none", "division"):
        with aal.compress(method, smallest=1):
            y = layer(x * 1).sin()
        found.append(torch.autograd.grad(y.sum(), (x, layer.bias, layer.weight)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_layouts_and_dtypes(dtype, channels_last):
    layer, x = After(nn.Conv2d(4, 6, 3)).to(dtype), torch.randn(3, 4, 19, 10, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    exact = parameter_gradients(aal.compress("none", model=layer), x)
    session = aal.compress("division", model=layer, bits=8, smallest=1)
    for own, right in zip(parameter_gradients(session, x), exact, strict=True):
        assert (own - right).norm() <= 0.02 * right.norm()


@pytest.mark.parametrize("faithful", [False, True], ids=["mended", "faithful"])
@pytest.mark.parametrize("make", [resnet, vit], ids=["resnet", "vit"])
def test_eight_bits_are_near_exact(make, faithful):
    model = make()
    x = torch.randn(8, 3, 32, 32) if make is resnet else torch.randn(8, 40, 16)
    exact = torch.cat(
        [g.flatten() for g in parameter_gradients(aal.compress("none", model=model), x)]
    )
    session = aal.compress("division", model=model, bits=8, smallest=1, faithful=faithful)
    found = gradient(session, x)
    assert (found - exact).norm() <= 0.05 * exact.norm()


def test_a_frozen_convolution_keeps_nothing():
    layer = After(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))
    layer.layer[1].weight.requires_grad_(False)
    session = aal.compress("division", model=layer, smallest=1)
    with session:
        F.relu(layer(torch.randn(2, 4, 20, 20)))
    assert [row.codec for row in session.report().rows].count("blocks") == 1
