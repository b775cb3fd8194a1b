"""Mesa: policies, groups and running ranges, and the defects that are mended."""

import math

import pytest
import torch
import torch.nn.functional as F
from hazard_models import Block, gradient, resnet, vit
from torch import Tensor, nn

import aal
from aal.compression.mesa import Running
from aal.compression.mesa_policy import DEFAULT_POLICY, MesaPolicy
from aal.compression.session import Session
from aal.compression.site import OUTSIDE
from aal.ops.noise import Noise

BOTH = pytest.mark.parametrize("faithful", [False, True], ids=["mended", "faithful"])


def policy_of(*tags: str, rule: str = "enable: True", indices: str = "all") -> str:
    return "\n".join(f"on {tag}:\n by_index: {indices}\n {rule}" for tag in tags)


class After(nn.Module):
    """Layers behind an operation that saves nothing, so that their input is not the model's."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * 1)


class Attention(nn.Module):
    """Attention as it is written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        q = x.view(batch, tokens, 4, channels // 4).transpose(1, 2) * 2
        y = (q @ q.transpose(2, 3)).softmax(3) @ q
        return y.transpose(1, 2).reshape(batch, tokens, channels)


def session_of(model: nn.Module, **options) -> Session:
    return aal.compress("mesa", model=model, smallest=1, **options)


def kept(session: Session) -> dict[str, set[str]]:
    """Nodes by the codecs of what they saved; without statistics and the model's argument."""
    found: dict[str, set[str]] = {}
    for row in session.report().rows:
        if row.consumer and not row.note.startswith(("a ", "argument")):
            found.setdefault(row.codec, set()).add(row.consumer.removesuffix("Backward0"))
    return found


def codec(faithful: bool = False, groups: int = 1, shape=(4, 50), decay: float = 0.9) -> Running:
    return Running(shape, groups, 256, decay, faithful, {})


def decoded(codec: Running, x: Tensor, start: int = 0) -> Tensor:
    return codec.decode(*codec.encode(x, Noise(1, start)))


# --------------------------------------------------------------------------------------------------
# Policies


TAGS = {
    "fc": (nn.Linear(20, 20), (4, 6, 20), "Addmm"),
    "conv": (nn.Conv2d(4, 4, 3), (2, 4, 9, 9), "Convolution"),
    "gelu": (nn.GELU(), (4, 20), "Gelu"),
    "bn": (nn.BatchNorm2d(4), (2, 4, 9, 9), "NativeBatchNorm"),
    "relu": (nn.ReLU(), (4, 20), "Relu"),
    "softmax": (nn.Softmax(-1), (4, 20), "Softmax"),
    "matmul": (Attention(), (2, 6, 20), "Bmm"),
    "layernorm": (nn.LayerNorm(20), (4, 20), "NativeLayerNorm"),
}


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_enables_its_layers_alone(tag):
    layer, shape, node = TAGS[tag]
    parameter = nn.Parameter(torch.ones(1))
    for enabled in TAGS:
        model = After(layer)
        session = session_of(model, policy=policy_of(enabled))
        with session:
            model(torch.randn(shape) * parameter)
        codec = "mask" if tag == "relu" else "running"
        assert (node in kept(session).get(codec, set())) == (enabled == tag)


def test_the_default_is_everything_but_convolutions():
    for model, x in ((resnet(), torch.randn(4, 3, 16, 16)), (vit(), torch.randn(4, 6, 16))):
        session = session_of(model)
        gradient(session, x)
        assert kept(session).get("kept", set()) <= {"Convolution"}
    assert session.method.policy is DEFAULT_POLICY


def test_indices_count_modules_as_they_run():
    model = After(*(nn.Linear(20, 20) for _ in range(4)))
    session = session_of(model, policy=policy_of("fc", indices="1 3"))
    for _ in range(2):
        gradient(session, torch.randn(4, 20))
        rows = [row for row in session.report().rows if row.consumer == "AddmmBackward0"]
        assert [row.codec for row in rows] == ["kept", "running", "kept", "running"]
    assert {row.note for row in rows if row.codec == "kept"} == {"not in the policy"}


def test_what_attention_saves_has_one_index():
    model = nn.Sequential(Block(), Block())
    session = session_of(model, policy=policy_of("matmul", indices="1"))
    gradient(session, torch.randn(4, 6, 16))
    attention = [row for row in session.report().rows if "Attention" in row.consumer]
    rows = [row for row in attention if not row.note.startswith("a ")]  # statistics
    found = {module: {r.codec for r in rows if r.site[0] == module} for module in "01"}
    assert found == {"0": {"kept"}, "1": {"running"}}


def test_levels_and_decay_follow_the_epoch():
    policy = policy_of("fc") + "\non fc: 3\n by_index: all\n level: 4\n ema_decay: 0\n"
    model = After(nn.Linear(20, 20))
    session, exact = session_of(model, policy=policy), aal.compress("none", model=model)
    x = torch.randn(50, 20)
    errors = []
    for session.method.epoch in range(5):
        errors.append((gradient(session, x) - gradient(exact, x)).norm())
    assert max(errors[:3]) < 0.1 * min(errors[3:])


def test_values_without_a_tag_follow_a_rule_for_all_of_fc():
    model, x = After(nn.Linear(20, 20), nn.SiLU(), nn.Sigmoid()), torch.randn(4, 20)
    for policy, codec in ((policy_of("fc"), "running"), (policy_of("fc", indices="0"), "kept")):
        session = session_of(model, policy=policy)
        gradient(session, x)
        assert {"Silu", "Sigmoid"} <= kept(session)[codec]


def test_a_policy_is_text_or_an_object():
    text = policy_of("gelu")
    model = After(nn.Linear(8, 8))
    assert session_of(model, policy=text).method.policy == MesaPolicy.parse(text)
    with pytest.raises(ValueError, match="line 1"):
        session_of(model, policy="by_index: all")
    with pytest.raises(ValueError, match="groups"):
        session_of(model, groups=0)


# --------------------------------------------------------------------------------------------------
# Groups


def groups(session: Session) -> dict[str, int]:
    """Of the ranges of every site."""
    return {
        str(site): site.state["ranges"].low.numel()
        for site in session.sites
        if "ranges" in site.state and site.module not in ("", OUTSIDE)
    }


def test_there_are_as_many_groups_as_heads():
    for model in (nn.Sequential(Block(16, 4)), After(Attention(), nn.Linear(16, 12))):
        session = session_of(model)
        parameter = nn.Parameter(torch.ones(1))
        for _ in range(2):
            with session:
                model(torch.randn(2, 6, 16) * parameter)
        assert set(groups(session).values()) == {4}


def test_groups_that_do_not_divide_the_channels():
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 30, 3), nn.BatchNorm2d(30), nn.Flatten()
    model = After(*layers, nn.Linear(30 * 16, 7), nn.GELU())
    session = session_of(model, policy=policy_of("conv", "bn", "fc", "gelu"), groups=12)
    x = torch.randn(4, 3, 8, 8)
    error = gradient(session, x) - gradient(aal.compress("none", model=model), x)
    assert error.norm() < 0.05 * gradient(session, x).norm()
    assert list(groups(session).values()) == [math.gcd(12, n) for n in (3, 8, 30, 480, 7)]


@pytest.mark.parametrize(
    ("tag", "layer", "shape"),
    [
        ("fc", nn.Linear(8, 8), (5, 8)),
        ("fc", nn.Linear(8, 8), (2, 3, 4, 5, 8)),
        ("conv", nn.Conv1d(8, 8, 3), (2, 8, 9)),
        ("conv", nn.Conv3d(8, 8, 3), (2, 8, 5, 5, 5)),
        ("conv", nn.ConvTranspose2d(8, 8, 3), (2, 8, 5, 5)),
        ("bn", nn.BatchNorm1d(8), (9, 8)),
        ("bn", nn.BatchNorm1d(8), (3, 8, 9)),
        ("bn", nn.BatchNorm3d(8), (3, 8, 4, 4, 4)),
        ("bn", nn.GroupNorm(2, 8), (3, 8, 4, 4)),
        ("layernorm", nn.LayerNorm(8), (2, 3, 4, 8)),
    ],
    ids=str,
)
def test_ranges_are_those_of_channels(tag, layer, shape):
    model = After(layer)
    session = session_of(model, policy=policy_of(tag), groups=4)
    channels = 1 if tag in ("conv", "bn") else len(shape) - 1
    size = [-1 if dim == channels else 1 for dim in range(len(shape))]
    scale = torch.tensor([1, 1, 10, 10, 100, 100, 1000, 1000.0]).view(size)
    x = torch.rand(shape) * scale
    gradient(session, x)
    (site,) = (site for site in session.sites if "ranges" in site.state)
    ranges = site.state["ranges"]
    expected = [
        (float(part.min()), float(part.max() - part.min())) for part in x.chunk(4, dim=channels)
    ]
    found = list(zip(ranges.low.tolist(), ranges.width.tolist(), strict=True))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_consumers_of_one_tensor_share_its_code():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            return self.one(x) + self.two(x)

    session = session_of(Twice())
    gradient(session, torch.randn(3, 5, 8))
    rows = [row for row in session.report().rows if row.codec == "running"]
    assert [row.stored_bytes for row in rows] == [3 * 5 * 8 + 8, 0]


# --------------------------------------------------------------------------------------------------
# Ranges that run, and defects


@BOTH
def test_ranges_are_running_means_of_those_of_the_batches(faithful):
    one, (low, width) = codec(faithful), (None, None)
    for step in range(5):
        x = torch.randn(4, 50) * (step + 1)
        decoded(one, x)
        own_low, own_width = float(x.min()), float(x.max() - x.min())
        low = own_low if low is None else 0.9 * low + 0.1 * own_low  # the first as it is
        width = own_width if width is None else 0.9 * width + 0.1 * own_width
        assert float(one.state["ranges"].low) == pytest.approx(low, rel=1e-5)
        assert float(one.state["ranges"].width) == pytest.approx(width, rel=1e-5)


@BOTH
def test_numbers_beyond_the_range_are_clamped_and_turn_over_as_released(faithful):
    one = codec(faithful)
    decoded(one, torch.rand(4, 50))
    x = torch.rand(4, 50)
    x[0, 0] = 1.3
    y = decoded(one, x)
    assert (y[0, 0] < 0.3) == faithful
    if not faithful:
        assert y[0, 0] == pytest.approx(1.02, abs=0.03)


def test_growing_ranges_stay_near_those_of_the_batch():
    def squared_error(codec: Running, x: Tensor) -> float:
        return float((decoded(codec, x) - x).square().sum() / x.square().sum())

    def ratio(faithful: bool, growth: float) -> float:
        """To the error of a range that is the batch's own."""
        running, shares = codec(faithful, shape=(1, 200_000)), []
        for step in range(25):
            x = torch.randn(1, 200_000) * growth**step
            own = squared_error(codec(shape=(1, 200_000)), x)
            shares.append(squared_error(running, x) / own)
        return sum(shares[15:]) / 10

    assert ratio(False, 1.0) < 1.1
    assert ratio(False, 1.05) < 2 < 30 < ratio(True, 1.05)


@BOTH
def test_a_payload_is_decoded_with_its_own_range_or_as_released_with_the_latest(faithful):
    one, x = codec(faithful, decay=0.0), torch.rand(4, 50)
    code = one.encode(x, Noise(1, 0))
    before = one.decode(*code)
    one.encode(5 * x, Noise(1, 0))
    assert torch.equal(one.decode(*code), before) != faithful
    assert (before - x).abs().max() < 0.01


def test_two_forward_passes_before_a_backward_pass():
    model, x = After(nn.Linear(20, 5)), torch.rand(4, 20)
    policy = policy_of("fc", rule="enable: True\n ema_decay: 0")
    errors = []
    for faithful in (False, True):
        session = session_of(model, policy=policy, faithful=faithful)
        with session:
            first = model(x)
            model(-40 * x)
        found = torch.autograd.grad(first.sum(), model.layers[0].weight)[0]
        right = x.sum(0).expand(5, 20)
        errors.append((found - right).norm() / right.norm())
    assert errors[0] < 0.01 and errors[1] > 1


def test_constants_infinity_and_nan_do_not_spoil_ranges():
    one = codec(groups=2, shape=(4, 50))
    x = torch.full((4, 50), 3.0)
    assert torch.equal(decoded(one, x), x)
    spoiled = torch.randn(4, 50) * 100
    spoiled[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    decoded(one, spoiled)
    assert all(end.isfinite().all() for end in one.state["ranges"])
    y = decoded(one, torch.randn(4, 50))
    assert y.isfinite().all()


def test_masked_scores():
    scores = torch.randn(2, 4, 6, 6, requires_grad=True)
    mask = torch.ones(6, 6).triu(1).bool()
    for method in ("none", "mesa"):
        with aal.compress(method, smallest=1):
            y = scores.masked_fill(mask, -torch.inf).softmax(3)
            loss = (y * torch.arange(6.0)).sum()
        (grad,) = torch.autograd.grad(loss, scores)
        if method == "none":
            exact = grad
    assert grad.isfinite().all()
    assert (grad - exact).norm() < 0.03 * exact.norm()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_near(channels_last, dtype, faithful):
    model, x = resnet().to(dtype), torch.randn(8, 3, 16, 16, dtype=dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    policy = policy_of("conv", "bn", "relu", "fc")
    session = session_of(model, policy=policy, faithful=faithful)
    exact = gradient(aal.compress("none", model=model), x)
    limit = 0.2 if dtype == torch.bfloat16 else 0.05
    assert (gradient(session, x) - exact).norm() <= limit * exact.norm()


def test_frozen_layers():
    model = After(nn.Linear(8, 8), nn.Conv1d(8, 8, 1))
    model.requires_grad_(False)
    x = torch.randn(2, 8, 8, requires_grad=True)
    session = session_of(model, policy=policy_of("fc", "conv"))
    with session:
        y = F.relu(model(x))
    y.sum().backward()
    assert "running" not in kept(session)
    assert x.grad is not None
