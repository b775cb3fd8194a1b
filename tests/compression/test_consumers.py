"""What nodes need of what they saved: values where that is known to be safe, else all of it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hazard_models import LOSSY, METHODS, codecs, gradients, session_of
from helpers import assert_same_bits
from torch import Tensor, nn

import aal

INDEX = torch.arange(64) % 7


def pooled(reduce: str, x: Tensor) -> Tensor:
    return torch.ones(7, 16).scatter_reduce(0, INDEX[:, None].expand(-1, 16), x, reduce)


def segments(reduce: str, x: Tensor) -> Tensor:
    return torch.segment_reduce(x, reduce, lengths=torch.tensor([30, 34]))


# Nodes that look for an element, or divide by one, or know a pole.
UNSAFE: dict[str, Callable[[Tensor], Tensor]] = {
    "scatter_reduce amax": lambda x: pooled("amax", x),
    "scatter_reduce prod": lambda x: pooled("prod", x),
    "index_reduce": lambda x: torch.zeros(7, 16).index_reduce(0, INDEX, x, "amin"),
    "segment_reduce": lambda x: segments("max", x),
    "amax": lambda x: x.amax(1),
    "median": lambda x: x.median(1).values,
    "cummax": lambda x: x.cummax(1).values,
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
    "norm": lambda x: x.norm(dim=1),
    "var": lambda x: x.var(1),
    "addcdiv": lambda x: torch.addcdiv(x, x, 0.1 + x.square()),
    "reciprocal": lambda x: (0.1 + x.square()).reciprocal(),
    "rsqrt": lambda x: (0.1 + x.square()).rsqrt(),
    "cube root": lambda x: (0.1 + x.square()).pow(1 / 3),
    "log1p": lambda x: x.square().log1p(),
    "erfinv": lambda x: x.sin().mul(0.9).erfinv(),
    "logit": lambda x: x.sigmoid().logit(),
    "xlog1py": lambda x: torch.special.xlog1py(x, 0.9 * x.sin()),
    "ndtri": lambda x: torch.special.ndtri(x.sigmoid()),
    "entr": lambda x: torch.special.entr(x.sigmoid()),
    "lgamma": lambda x: (0.1 + x.square()).lgamma(),
    "prod": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(1),
    "tan": lambda x: x.tan(),
    "clamp": lambda x: x.clamp(-0.2, 0.3),
    "abs": lambda x: x.abs(),
    "l1_loss": lambda x: F.l1_loss(x, x.detach().flip(0), reduction="none"),
    "cdist": lambda x: torch.cdist(x, x.flip(0)),
    "inverse": lambda x: (x[:16] + 9 * torch.eye(16)).inverse(),
    "logsumexp": lambda x: x.logsumexp(1),
    "ctc_loss": lambda x: F.ctc_loss(
        x.view(8, 8, 16).log_softmax(-1),
        torch.ones(8, 2, dtype=torch.long),
        torch.full((8,), 8),
        torch.full((8,), 2),
    ),
}


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
@pytest.mark.parametrize("method", ["adaptive", "actnn", "fp8"])
@pytest.mark.parametrize("name", UNSAFE)
def test_what_a_node_may_need_exactly_is_exact(name, method):
    """Only functions that are safe round anything: what is left of them is near."""
    x = torch.randn(64, 16, requires_grad=True)

    def forward() -> Tensor:
        return UNSAFE[name](x * 1)

    expected = gradients(forward, [x], aal.compress("none"))
    found = gradients(forward, [x], session_of(method))
    assert_same_bits(found[0], expected[0])
    error = (found[1] - expected[1]).norm() / expected[1].norm()
    rounds = {"sin", "sigmoid", "square"} & set(UNSAFE[name].__code__.co_names)
    assert error < (0.15 if rounds else 1e-12)


@pytest.mark.parametrize("method", LOSSY)
def test_places_on_a_grid_are_exact_and_images_are_not(method):
    images, grid = torch.randn(2, 3, 16, 16), torch.rand(2, 8, 8, 2) * 1.6 - 0.8
    weight = torch.ones((), requires_grad=True)

    def forward() -> Tensor:
        return F.grid_sample(images * weight, grid * weight, align_corners=False).sin()

    expected = gradients(forward, [weight], aal.compress("none"))
    session = session_of(method)
    gradients(forward, [weight], session)
    rows = [row for row in session.report().rows if row.consumer.startswith("GridSampler")]
    assert {row.codec == "kept" for row in rows} == {True, False}
    for _ in range(3):
        found = gradients(forward, [weight], session)
        torch.testing.assert_close(found[1], expected[1], rtol=0.1, atol=5)


class Foreign(torch.autograd.Function):
    """Divides by what it saved."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return grad * (1 / (1 / y)) + 0 * x


@pytest.mark.parametrize("method", METHODS)
def test_functions_of_somebody_else_have_what_they_saved(method):
    x = torch.randn(64, 16, requires_grad=True)
    expected = gradients(lambda: Foreign.apply(x * 1), [x], aal.compress("none"))
    session = session_of(method)
    assert_same_bits(gradients(lambda: Foreign.apply(x * 1), [x], session), expected)


SPARSE = {
    "coo": lambda: torch.eye(64).to_sparse(),
    "csr": lambda: torch.eye(64).to_sparse_csr(),
    "csc": lambda: torch.eye(64).to_sparse_csc(),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_tensors_are_kept(layout, method):
    matrix, layer = SPARSE[layout](), nn.Linear(16, 16)
    x = torch.randn(64, 16)

    def forward() -> Tensor:
        return matrix @ layer(x)

    leaves = list(layer.parameters())
    expected = gradients(forward, leaves, aal.compress("none"))
    session = session_of(method)
    found = gradients(forward, leaves, session)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    (row,) = (row for row in session.report().rows if "dense" in row.note)
    assert row.codec == "kept" and row.stored_bytes == row.raw_bytes >= 64 * 4


def test_complex_gradients_do_not_trouble_the_look():
    weight = torch.randn(16, 16, dtype=torch.complex64, requires_grad=True)
    session = session_of("adaptive")
    for _ in range(3):
        with session:
            y = ((torch.randn(64, 16).to(torch.complex64) @ weight).abs() * 1).sin()
        y.sum().backward()
        assert weight.grad.isfinite().all()
    assert "kept" in codecs(session)


@pytest.mark.parametrize("method", METHODS)
def test_overlapping_windows_are_not_copied(method):
    x = torch.randn(4096, requires_grad=True)
    session = session_of(method)
    with session:
        total = (x * 1).unfold(0, 64, 1).sin().sum()
        y = total.sin()
    y.backward()
    (row,) = (row for row in session.report().rows if row.raw_bytes == x.nbytes)
    assert row.stored_bytes == x.nbytes
    torch.testing.assert_close(x.grad[64:-64], (total.cos() * x.cos() * 64)[64:-64])


@pytest.mark.parametrize("method", ["actnn", "division", "gact", "adaptive"])
def test_queries_and_keys_of_fused_attention_have_four_bits_at_least(method):
    """Backward takes the exponential of their products: at two bits nothing is left of it."""
    options = {"gact": {"level": "L1.2"}, "adaptive": {"bits": 2}}.get(method, {})
    x = torch.randn(2, 4, 64, 32)
    layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward() -> Tensor:
        q, k, v = (layer(x) for layer in layers)
        return F.scaled_dot_product_attention(q, k, v)

    session = aal.compress(method, smallest=1, **options)
    leaves = list(layers.parameters())
    gradients(forward, leaves, session)
    rows = [row for row in session.report().rows if row.consumer.startswith("ScaledDot")]
    bits = [row.bits for row in rows if row.bits is not None]
    assert sorted(bits)[:2] == [2, 2] and sorted(bits)[2:4] == [4, 4]
