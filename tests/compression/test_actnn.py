"""ActNN: no bias, the variance that the formula tells, and bits where rounding matters."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hazard_models import resnet, vit
from torch import Tensor, nn

import aal
from aal.compression.actnn import LEVELS, Rows
from aal.compression.session import Session
from aal.ops.noise import Noise

NOISE = Noise(seed=1, start=777)


class Calls(nn.Module):
    """A model whose argument is a function, so that the function's tensors are no arguments."""

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        return function()


def compress(method: str = "actnn", **options) -> Session:
    return aal.compress(method, model=Calls(), smallest=1, **options)


def one_step(session: Session, forward: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    """Gradients of the leaves, in float64."""
    with session:
        y = session.model(forward)
    torch.manual_seed(5)
    grads = torch.autograd.grad(y, leaves, torch.randn_like(y))
    session.step()
    return [grad.double() for grad in grads]


def assert_unbiased(session: Session, forward: Callable[[], Tensor], weight: Tensor) -> Tensor:
    """The mean of many gradients is the exact one; returns their variance."""
    (exact,) = one_step(compress("none"), forward, weight)
    draws = torch.stack([one_step(session, forward, weight)[0] for _ in range(300)])
    variance = draws.var(0)
    errors = (draws.mean(0) - exact) / (variance / len(draws)).sqrt()
    assert errors.square().mean() < 1.4 and errors.abs().max() < 5
    return variance


def tables(session: Session) -> dict[str, float]:
    return {row.site: row.bits for row in session.report().rows if row.codec == "rows"}


# --------------------------------------------------------------------------------------------------
# The codec


@pytest.mark.parametrize(
    ("dtype", "faithful"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [256, 300, 1000])
def test_rows_of_the_largest_ranges_get_the_most_bits(columns, dtype, faithful, device):
    scale = torch.tensor([1.0, 9.0, 0.1, 100.0, 3.0], device=device)[:, None]
    x = (torch.rand(5, columns, device=device) * scale).to(dtype)
    codec = Rows(((8, 1), (5, 2), (2, 2)), faithful)
    tensors, meta = codec.encode(x.view(-1), NOISE)
    y = codec.decode(tensors, meta)
    assert y.dtype == dtype and y.shape == (5 * columns,)
    error = (y.view(5, -1).double() - x.double()).abs().amax(1)
    for row, bits in enumerate((2, 5, 2, 8, 5)):
        resolution = 2 * torch.finfo(dtype).eps + (0.02 if faithful else 0)
        assert error[row] <= scale[row] * (1.05 / (2**bits - 1) + resolution)
        assert error[row] >= scale[row] * 0.4 / (2**bits - 1)


def test_bytes_are_those_of_codes_side_numbers_and_order():
    codec = Rows(((4, 3), (1, 5)))
    tensors, _ = codec.encode(torch.randn(8 * 512), NOISE)
    codes, sides, order = (3 * 4 + 5) * 512 // 8, 8 * 2 * 4, 8 * 4
    assert sum(tensor.nbytes for tensor in tensors) == codes + sides + order
    assert codec.bits == (3 * 4 + 5) / 8


def test_more_rows_than_a_grid_of_blocks_has():
    x = torch.randn(70_000, 8)
    x[65_535:] *= 3
    for runs in (((6, 70_000),), ((8, 10), (6, 69_990))):
        codec = Rows(runs)
        y = codec.decode(*codec.encode(x.view(-1), NOISE)).view_as(x)
        step = (x.amax(1) - x.amin(1)) / (2**6 - 1)
        assert ((y - x).abs().amax(1) <= 1.02 * step + 1e-6).all()


@pytest.mark.parametrize("faithful", [False, True], ids=["mended", "faithful"])
def test_squared_ranges_are_read_from_the_code(faithful):
    x = torch.randn(6, 512) * torch.arange(1, 7)[:, None]
    groups = x.view(6, 2, 256)
    expected = (groups.amax(2) - groups.amin(2)).square().mean(1)
    for runs in (((4, 6),), ((8, 1), (3, 2), (1, 3))):
        codec = Rows(runs, faithful)
        found = codec.squared_ranges(codec.encode(x.view(-1), NOISE)[0])
        torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=0.03, atol=0)


# --------------------------------------------------------------------------------------------------
# The gradient


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_variance_of_a_linear_layer_is_that_of_the_formula(bits):
    x, weight = torch.rand(32, 256), torch.randn(4, 256, requires_grad=True)
    session = compress(level="L2", bits=bits)
    variance = assert_unbiased(session, lambda: F.linear(x, weight), weight)
    torch.manual_seed(5)
    d = torch.randn(32, 4)
    ranges = x.amax(1) - x.amin(1)
    predicted = (d.square() * (ranges / (2**bits - 1)).square()[:, None] / 6).sum() * 256
    assert float(variance.sum()) == pytest.approx(float(predicted), rel=0.1)


@pytest.mark.parametrize("options", [{"level": "L2"}, {"level": "L3"}, {"bits": 2.5}], ids=str)
def test_convolutions_have_no_bias(options):
    x, weight = torch.randn(8, 4, 10, 10), torch.randn(3, 4, 3, 3, requires_grad=True)
    x *= torch.arange(1, 9).view(8, 1, 1, 1)
    session = compress(**options)
    assert_unbiased(session, lambda: F.conv2d(x, weight), weight)


def test_samples_of_large_ranges_lower_the_variance():
    x, weight = torch.randn(16, 4, 10, 10), torch.randn(3, 4, 3, 3, requires_grad=True)
    x *= torch.logspace(0, 2, 16).view(16, 1, 1, 1)
    uniform, adaptive = (
        assert_unbiased(session, lambda: F.conv2d(x, weight), weight).sum()
        for session in (
            compress(level="L2", bits=2),
            compress(level="L3"),
        )
    )
    assert adaptive < 0.2 * uniform


# --------------------------------------------------------------------------------------------------
# Bits


def layers_of_unequal_sensitivity() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Identity(), nn.Linear(512, 512), nn.Linear(512, 512))
    with torch.no_grad():
        net[2].weight *= 1e-3  # little of the gradient reaches the first layer
    return net, torch.randn(32, 512)


def test_layers_that_matter_get_the_bits():
    net, x = layers_of_unequal_sensitivity()
    session = compress()

    def forward() -> Tensor:
        return net(x)

    one_step(session, forward, *net.parameters())
    assert set(tables(session).values()) == {2}
    one_step(session, forward, *net.parameters())
    first, second = tables(session).values()
    assert first < 2 < second
    assert first + second <= 4


def test_bits_are_found_again_after_the_interval():
    net, x = layers_of_unequal_sensitivity()
    session = compress(interval=3)
    found = []
    for step in range(6):
        if step == 2:  # now the first layer matters
            with torch.no_grad():
                net[1].weight *= 1e-3
                net[2].weight *= 1e6
        one_step(session, lambda: net(x), *net.parameters())
        found.append(list(tables(session).values()))
    assert found[1] == found[2] == found[3]
    assert found[4] == found[5] and found[4][0] > found[3][0]


@pytest.mark.parametrize("make", [resnet, vit], ids=["resnet", "vit"])
@pytest.mark.parametrize("bits", [1, 2, 2.5, 4, 8])
def test_the_average_is_kept(bits, make):
    net = make()
    x = torch.randn(8, 3, 32, 32) if make is resnet else torch.randn(8, 40, 16)
    session = compress(bits=bits)
    for _ in range(3):
        one_step(session, lambda: net(x), *net.parameters())
    rows = [row for row in session.report().rows if row.codec == "rows" and row.raw_bytes]
    mean = sum(row.bits * row.raw_bytes for row in rows) / sum(row.raw_bytes for row in rows)
    scores = [row for row in rows if row.consumer.startswith("ScaledDot") and row.bits >= 4]
    share = sum(row.raw_bytes for row in scores) / sum(row.raw_bytes for row in rows)
    assert 0.75 * bits <= mean <= 1.02 * bits + share * max(0, 4 - bits)


def test_a_tensor_that_two_layers_read_is_kept_once():
    x = torch.randn(8, 4, 16, 16)
    first, second = (torch.randn(5, 4, 3, 3, requires_grad=True) for _ in range(2))
    session = compress()
    for _ in range(3):
        one_step(session, lambda: F.conv2d(x, first) + F.conv2d(x, 9 * second), first, second)
        kept = [row.stored_bytes for row in session.report().rows if row.codec == "rows"]
        assert sorted(kept)[0] == 0 < sorted(kept)[1]


def test_norms_never_get_one_bit():
    net, x = resnet(), torch.randn(8, 3, 32, 32)
    for faithful in (False, True):
        session = compress(faithful=faithful)
        for _ in range(2):
            one_step(session, lambda: net(x), *net.parameters())
        rows = [r for r in session.report().rows if "BatchNorm" in r.consumer and r.codec == "rows"]
        assert (min(row.bits for row in rows) >= 2) != faithful


def test_the_released_allocation_begins_with_eight_two_and_ones():
    x, weight = torch.randn(8, 4, 16, 16), torch.randn(5, 4, 3, 3, requires_grad=True)
    method = compress(faithful=True).method
    assert method._first_plan(8) == [8, 2, 1, 1, 1, 1, 1, 1]
    session = compress(faithful=True)
    one_step(session, lambda: F.conv2d(x, weight), weight)
    assert next(iter(tables(session).values())) == 2
    one_step(session, lambda: F.conv2d(x, weight), weight)
    assert next(iter(tables(session).values())) == 2


def test_a_smaller_last_batch_has_bits_too():
    x, weight = torch.randn(32, 4, 10, 10), torch.randn(3, 4, 3, 3, requires_grad=True)
    x *= torch.logspace(0, 2, 32).view(32, 1, 1, 1)
    session = compress()
    for count in (32, 32, 5, 1, 40):
        own = x.repeat(2, 1, 1, 1)[:count]
        one_step(session, lambda own=own: F.conv2d(own, weight), weight)
        (bits,) = tables(session).values()
        assert 1 <= bits <= 2.2 and (bits >= 1.5 or count == 1)


def test_gradients_that_overflow_leave_bits_uniform():
    x, weight = torch.randn(8, 4, 10, 10), torch.randn(3, 4, 3, 3, requires_grad=True)
    for faithful in (False, True):
        session = compress(faithful=faithful)
        for _ in range(2):
            with session:
                y = session.model(lambda: F.conv2d(x, weight))
            y.backward(torch.full_like(y, torch.inf))
        assert next(iter(tables(session).values())) == 2


# --------------------------------------------------------------------------------------------------
# Levels


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level):
    net, x = resnet(), torch.randn(8, 3, 32, 32)
    session = compress(level=level)
    one_step(session, lambda: net(x), *net.parameters())
    rows = session.report().rows
    bits = {row.bits for row in rows if row.codec == "rows"}
    assert bits == {"L0": set(), "L1": {4}, "L2": {4}}.get(level, {2})
    norms = {row.codec for row in rows if "BatchNorm" in row.consumer and row.note != "small"}
    exact = {row.codec for row in rows if "norms are exact" in row.note}
    assert ("rows" in norms) == (level not in ("L0", "L1"))
    assert exact == ({"kept"} if level == "L1" else set())
    assert session.method.offloads == (level == "L4")


@pytest.mark.parametrize(
    "options",
    [{"level": "L6"}, {"bits": 0.5}, {"bits": 9}, {"level": "L2", "bits": 2.5}, {"interval": 0}],
    ids=str,
)
def test_what_options_do_not_take(options):
    with pytest.raises(ValueError):
        compress(**options)


# --------------------------------------------------------------------------------------------------
# Layers that ActNN as released could not take


def near(session: Session, forward: Callable[[], Tensor], *leaves: Tensor) -> None:
    """At 8 bits, gradients after some steps are near the exact ones."""
    exact = one_step(compress("none"), forward, *leaves)
    for _ in range(3):
        found = one_step(session, forward, *leaves)
    for own, right in zip(found, exact, strict=True):
        assert (own - right).norm() <= 0.03 * right.norm()


def eight_bits() -> Session:
    return compress(bits=8)


@pytest.mark.parametrize("shape", [(6, 300), (3, 5, 300), (2, 3, 5, 300), (2, 3, 20)], ids=str)
def test_linear_layers_of_any_number_of_dimensions(shape):
    x = torch.randn(shape)
    weight = torch.randn(7, shape[-1], requires_grad=True)
    near(eight_bits(), lambda: F.linear(x, weight), weight)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(dims):
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    net, x = kinds[dims - 1](4, 6, 3, stride=2, groups=2), torch.randn(5, 4, *(8,) * dims)
    near(eight_bits(), lambda: net(x), *net.parameters())


def test_channels_last():
    net, x = nn.Conv2d(4, 6, 3), torch.randn(5, 4, 12, 12).to(memory_format=torch.channels_last)
    near(eight_bits(), lambda: net(x), *net.parameters())


def test_bfloat16():
    net, x = nn.Conv2d(4, 6, 3).bfloat16(), torch.randn(5, 4, 12, 12).bfloat16()
    near(eight_bits(), lambda: net(x), *net.parameters())


def test_frozen_layers_save_no_input():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).requires_grad_(False)
    net[0].weight.requires_grad_(True)
    x = torch.randn(5, 4, 12, 12)
    session = eight_bits()
    near(session, lambda: net(x), net[0].weight)
    assert sum(row.codec == "rows" for row in session.report().rows) == 1
