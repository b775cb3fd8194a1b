"""GACT: what it keeps and how, bits that follow the gradient, and the names of its release."""

import contextlib
import gc
import itertools
import random
import weakref
from math import inf

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from torch import Tensor, nn

import aal
from aal.compression import gact, gact_probe
from aal.compression.gact import (
    GACT,
    LEVELS,
    Controller,
    set_adapt_interval,
    set_optimization_level,
)
from aal.compression.gact_probe import sensitivity, squared_distances
from aal.compression.offload import HostMemory
from aal.compression.published_codecs import Ranges
from aal.compression.session import Session
from aal.ops.noise import Noise


@pytest.fixture(autouse=True)
def release_settings():
    yield
    set_optimization_level("L2")
    set_adapt_interval(1000)


class Convolutions(nn.Sequential):
    """Everything that GACT tells apart: norms, ReLUs, pools, dropout and a head."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Dropout(0.2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(1024, 10),
        )


class Chain(nn.Sequential):
    """Linear layers alone: the gradient of a weight is linear in what is saved for it."""

    def __init__(self, *widths: int):
        pairs = itertools.pairwise(widths)
        super().__init__(*(nn.Linear(*pair, bias=False, dtype=torch.double) for pair in pairs))


class Calling(nn.Module):
    """A function as a model, so that its last node is seen."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 16, 16), torch.randint(10, (8,))


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def pass_of(model: nn.Module, x: Tensor, y: Tensor, act: Session | None = None) -> list[Tensor]:
    """The gradients of one forward and backward pass."""
    model.zero_grad()
    with act or contextlib.nullcontext():
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return gradients(model)


def backprop_of(model: nn.Module, x: Tensor, y: Tensor):
    def backprop() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return backprop


def codecs_of(act: Session) -> set[tuple[str, str]]:
    return {(row.consumer, row.codec) for row in act.report().rows if row.codec != "kept"}


def random_states() -> list:
    of_numpy = np.random.get_state()
    of_torch = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        of_torch += torch.cuda.get_rng_state_all()
    return [random.getstate(), of_numpy[1].tolist(), of_numpy[2:], [s.tolist() for s in of_torch]]


def decoded(codec: Ranges, x: Tensor) -> Tensor:
    return codec.decode(*codec.encode(x, Noise(0, 5)))


# ------------------------------------------------------------------------------------------------
# The codec


@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 1000])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.half, torch.bfloat16], ids=str)
def test_codec_is_within_one_step(dtype, bits, numel):
    x = torch.randn(numel, dtype=torch.double).to(dtype)
    found = decoded(Ranges(bits), x)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    for group, own in zip(x.double().split(256), found.double().split(256), strict=True):
        if numel:
            low, high = group.aminmax()
            step = (high - low + low.abs() / 64) / (2**bits - 1) * 1.01  # of rounded ends
            rounding = 2 * torch.finfo(dtype).eps * group.abs()
            assert ((own - group).abs() <= step + rounding).all()


@pytest.mark.parametrize("faithful", [False, True])
def test_codec_takes_bytes_that_it_says(faithful):
    x = torch.randn(2560)
    kept, _ = Ranges(4, side_dtype=None, faithful=faithful).encode(x, Noise(0, 0))
    assert sum(tensor.nbytes for tensor in kept) == 2560 // 2 + 10 * 2 * 4


def test_largest_number_is_not_decoded_as_the_least():
    """Codes of the release have no upper bound, and turn over at 8 bits in half precision."""
    x = torch.randn(4000, 256).half().flatten()
    range_of = x.view(-1, 256).amax(1) - x.view(-1, 256).amin(1)
    share = []
    for codec in (Ranges(8), Ranges(8, side_dtype=None, faithful=True)):
        error = (decoded(codec, x) - x).view(-1, 256).abs().amax(1)
        share.append((error > range_of / 2).double().mean().item())
    assert share[0] == 0
    assert 0.005 < share[1] < 0.03


@pytest.mark.parametrize(("dtype", "width"), [(torch.half, 1e-4), (torch.float, 1e-7)], ids=str)
def test_small_ranges_are_resolved(dtype, width):
    """The release overflows in half precision, and has few codes below its epsilon."""
    x = (torch.rand(256, dtype=torch.double) * width).to(dtype)
    ours, theirs = (
        (decoded(codec, x).double() - x.double()).abs().nan_to_num(nan=1.0).max()
        for codec in (Ranges(4), Ranges(4, side_dtype=None, faithful=True))
    )
    assert ours < width / 15 * 1.1
    assert theirs > width / 15 * 2


# ------------------------------------------------------------------------------------------------
# Decisions


@pytest.mark.parametrize("name", LEVELS)
def test_levels(name):
    act = aal.compress("gact", model=Convolutions(), level=name)
    bits = {"L1": 4, "L1.1": 8, "L1.2": 2, "L2": 4, "L2.1": 4, "L2.2": 2, "L3": 4, "L4bit-swap": 4}
    pass_of(act.model, *images(), act=act)
    row = {row.consumer: row for row in act.report().rows}.get("GeluBackward0")
    if name == "L0":
        assert row is None
    else:
        expected = ("ranges", bits[name]) if name in bits else ("raw", None)
        assert (row.codec, row.bits) == expected
    assert act.method.needs_closure == (name in ("L2", "L2.1", "L2.2", "L3"))
    assert act.method.offloads == (name in ("L3", "swap", "L4bit-swap"))
    assert isinstance(act._own_store, HostMemory) == act.method.offloads


@pytest.mark.parametrize(
    "options",
    [
        {"level": "L4"},
        {"level": "L1", "bits": 3},
        {"level": "L2", "bits": 0.5},
        {"level": "L0", "bits": 4},
        {"level": "swap", "bits": 4},
        {"interval": 0},
    ],
    ids=str,
)
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError):
        GACT(**options)


@pytest.mark.parametrize(
    ("bits", "first"), [(1, 1), (1.5, 2), (3, 4), (4, 4), (5, 8), (16, 8)], ids=str
)
def test_bits_before_the_first_adaptation(bits, first):
    act = aal.compress("gact", model=Convolutions(), bits=bits)
    pass_of(act.model, *images(), act=act)
    assert {row.bits for row in act.report().rows if row.codec == "ranges"} == {first}


@pytest.mark.parametrize("level", ["L0", "swap"])
def test_off_and_swap_change_no_bit(level, device):
    model, (x, y) = Convolutions().to(device), [own.to(device) for own in images()]
    torch.manual_seed(3)
    expected = pass_of(model, x, y)
    after = random_states()
    torch.manual_seed(3)
    act = aal.compress("gact", model=model, level=level)
    assert_same_bits(pass_of(model, x, y, act), expected)
    act.step()
    assert random_states() == after


@pytest.mark.parametrize(("level", "codec"), [("L1", "kept"), ("swap", "raw")])
def test_inputs_of_losses_are_exact(level, codec):
    model = nn.Sequential(nn.Linear(32, 256), nn.LogSoftmax(-1))
    act = aal.compress("gact", model=model, level=level)
    with act:
        y = model(torch.randn(64, 32))
    (row,) = (row for row in act.report().rows if row.consumer == "LogSoftmaxBackward0")
    assert row.codec == codec
    y.sum().backward()


def test_what_a_consumer_needs_is_kept_exactly():
    act = aal.compress("gact", model=Convolutions(), level="L1")
    pass_of(act.model, *images(), act=act)
    pool = "MaxPool2DWithIndicesBackward0"
    assert codecs_of(act) == {
        ("NativeBatchNormBackward0", "ranges"),
        ("ReluBackward0", "mask"),
        (pool, "shape"),
        (pool, "index"),
        ("ConvolutionBackward0", "ranges"),
        ("MulBackward0", "mask"),
        ("GeluBackward0", "ranges"),
        ("AddmmBackward0", "ranges"),
    }


def test_relu_is_exact():
    """The release keeps a few bits of a float, whose sign is that of ReLU's output by chance."""
    x = torch.randn(64, 128, requires_grad=True)
    expected = (x > 0).float()
    for faithful in (False, True):
        with aal.compress("gact", level="L1.2", faithful=faithful):
            y = F.relu(x * 1)
        (found,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(found, expected) != faithful


def test_elements_that_several_nodes_save_are_kept_once():
    x = torch.randn(64, 128, requires_grad=True)
    stored = []
    for faithful in (False, True):
        weights = [nn.Parameter(torch.randn(128, 32)) for _ in range(3)]
        model = Calling(lambda h, weights=weights: _sum_of_products(h * 2, weights))
        act = aal.compress("gact", model=model, level="L1", faithful=faithful)
        with act:
            y = model(x)
        stored.append(act.report().stored_bytes)
        y.sum().backward()
    side = 2 * 2 * 32  # two bfloat16 numbers for each of 32 groups
    assert stored == [64 * 128 // 2 + side, 3 * (64 * 128 // 2 + 2 * side)]


def _sum_of_products(h: Tensor, weights: list[nn.Parameter]) -> Tensor:
    return sum(h @ weight for weight in weights)


def test_equal_values_of_other_storages_are_told_apart():
    x = torch.ones(64, 128, requires_grad=True)
    weight = nn.Parameter(torch.randn(128, 32))
    model = Calling(lambda x: (x * 1) @ weight + (x * 1) @ weight)
    act = aal.compress("gact", model=model, level="L1")
    with act:
        y = model(x)
    assert [row.note for row in act.report().rows if row.codec == "ranges"] == ["linear"] * 2
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.half, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4096,), (64, 64), (2, 4, 8, 8, 16)], ids=str)
def test_every_float_of_every_rank_is_encoded(shape, dtype):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    model, codecs = Calling(lambda x: F.gelu(x * 1)), []
    for faithful in (False, True):
        act = aal.compress("gact", model=model, level="L1", faithful=faithful)
        with act:
            y = model(x)
        codecs.append([row.codec for row in act.report().rows])
        y.sum().backward()
    released = dtype in (torch.float, torch.half) and 2 <= len(shape) <= 4
    assert codecs[0][-1] == "ranges"
    assert codecs[1][-1] == ("ranges" if released else "kept")


def test_release_encodes_what_requires_a_gradient_alone():
    act = aal.compress("gact", model=Convolutions(), level="L1", faithful=True)
    pass_of(act.model, *images(), act=act)
    rows = {row.consumer: row for row in act.report().rows if row.codec == "ranges"}
    assert {"ReluBackward0", "MaxPool2DWithIndicesBackward0", "LogSoftmaxBackward0"} <= set(rows)
    kept = [row.note for row in act.report().rows if row.codec == "kept"]
    assert "of torch.int64" in kept and "of 1 dimensions" not in kept
    assert "requires no gradient" in kept  # statistics of the batch


class _Masked(torch.autograd.Function):
    """Multiplies by a mask of bytes, as dropout once did."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        assert mask.dtype == torch.uint8
        return gradient * mask, None


@pytest.mark.parametrize("values", [(0, 1), (0, 2), (1, 1)], ids=str)
def test_release_packs_masks_of_bytes(values):
    x = torch.randn(9, 57, requires_grad=True)
    mask = torch.tensor(values, dtype=torch.uint8)[torch.randint(2, x.shape)]
    model = Calling(lambda x: _Masked.apply(x, mask))
    act = aal.compress("gact", model=model, level="L1", faithful=True)
    with act:
        y = model(x)
    y.sum().backward()
    assert_same_bits(x.grad, mask.float())
    codec = [row.codec for row in act.report().rows]
    assert codec == ["mask" if values == (0, 1) else "kept"]


# ------------------------------------------------------------------------------------------------
# What a graph asks for


def test_backward_may_run_again():
    """The release deletes a payload when it is read."""
    x = torch.randn(64, 128, requires_grad=True)
    model = Calling(lambda x: F.gelu(x * 1).sum())
    with aal.compress("gact", model=model, level="L1"):
        y = model(x)
    first, again = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert_same_bits(first, again)
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    slope.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize("level", ["L1", "L2", "swap"])
def test_graph_that_is_not_used_is_freed(level):
    """The release holds the output of a node that holds it, where it is not encoded."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Softmax(-1))
    watched = []
    gc.disable()
    try:
        with aal.compress("gact", model=model, level=level, smallest=0):
            y = model(torch.randn(128, 32)).exp()
            watched += [weakref.ref(y), _watch(y)]
        del y
        assert [reference() for reference in watched] == [None, None]
    finally:
        gc.enable()


def _watch(y: Tensor) -> weakref.ref:
    """A reference to something that lives as long as the node of a tensor."""

    class Hook:
        def __call__(self, gradient: Tensor) -> None: ...

    hook = Hook()
    y.register_hook(hook)
    return weakref.ref(hook)


def test_steps_may_save_more_or_less():
    """The release knows a tensor by its place among all of a step."""

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[: self.depth]:
                x = F.gelu(layer(x))
            return x

    model, x = Skipping(), torch.randn(128, 64)
    act = aal.compress("gact", model=model, interval=1)

    def backprop() -> None:
        model(x).sum().backward()

    for model.depth in (3, 1, 4, 2):
        with act:
            loss = model(x).sum()
        loss.backward()
        act.step(backprop)
    used = sum("bits" in site.state for site in act.sites)
    assert used == 2 * 4 - 1  # of each layer GELU's input and its own, the model's argument apart


# ------------------------------------------------------------------------------------------------
# Gradients


def test_gradient_has_no_bias():
    model = Chain(24, 32, 16, 8)
    x, direction = torch.randn(40, 24).double(), torch.randn(40, 8).double()
    (model(x) * direction).sum().backward()
    exact = gradients(model)
    act = aal.compress("gact", model=model, level="L1.2", smallest=0)
    draws = []
    for _ in range(400):
        model.zero_grad()
        with act:
            y = model(x)
        y.backward(direction)
        draws.append(gradients(model))
    for expected, *own in zip(exact, *draws, strict=True):
        stacked = torch.stack(own)
        error, spread = stacked.mean(0) - expected, stacked.std(0) / len(own) ** 0.5
        assert (error.abs() <= 5 * spread + 1e-9).all()
        assert error.square().sum() <= 2 * spread.square().sum() + 1e-18
    assert spread.min() > 0


# ------------------------------------------------------------------------------------------------
# Adaptation


def dominated() -> tuple[Chain, Tensor]:
    """Linear layers; what the third one saves has a large range and a large gradient."""
    model = Chain(64, 64, 64, 64, 64)
    with torch.no_grad():
        model[1].weight *= 100
        model[2].weight /= 100
    return model, torch.randn(128, 64).double()


def adapted(faithful: bool = False, **options) -> tuple[Session, list[int | None]]:
    model, x = dominated()
    act = aal.compress("gact", model=model, faithful=faithful, **options)
    if faithful:  # the release knows no numbers in double precision
        model, x = model.float(), x.float()
    with act:
        loss = model(x).square().mean()
    loss.backward()
    act.step(lambda: model(x).square().mean().backward())
    bits = [
        next((s.state["bits"] for s in act.sites if s.module == n and s.state), None)
        for n in "0123"
    ]
    return act, bits


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_tensor_that_matters_gets_more_bits(bits, faithful):
    _, (_, first, second, third) = adapted(faithful, bits=bits)
    assert second > first and second > third
    assert first + second + third <= 3 * bits + (bits if faithful else 0)


def test_bits_are_used_from_the_next_pass_on():
    model, (x, y) = Convolutions(), images()
    act = aal.compress("gact", model=model, level="L2", interval=3)
    calls = []

    def closure() -> None:
        calls.append(len(chosen))
        backprop_of(model, x, y)()

    chosen = []
    for _ in range(5):
        pass_of(model, x, y, act)
        chosen.append({row.site: row.bits for row in act.report().rows if row.codec == "ranges"})
        act.step(closure)
    count = len({site for site in act.sites if "bits" in site.state})
    assert calls == [1] * 3 * count + [4] * 3 * count
    assert set(chosen[0].values()) == {4}
    assert chosen[1] == chosen[2] == chosen[3] != chosen[0]
    known = {str(site): site.state["bits"] for site in act.sites if "bits" in site.state}
    assert {site: known[site] for site in chosen[4]} == chosen[4]


def test_mean_bits_stay_within_the_budget():
    model, (x, y) = Convolutions(), images()
    for mean in (2, 3, 4):
        act = aal.compress("gact", model=model, bits=mean)
        pass_of(model, x, y, act)
        sizes = dict(act.method._sizes)
        act.step(backprop_of(model, x, y))
        taken = sum(site.state["bits"] * size for site, size in sizes.items())
        assert taken <= mean * sum(sizes.values())


def test_probes_differ_in_one_tensor(monkeypatch):
    """At one bit, at one bit with other noise, and at eight; all others have the same noise."""
    encoded = []
    encode = Ranges.encode

    def spy(self, x, noise):
        encoded[-1].append((self.bits, noise.start))
        return encode(self, x, noise)

    model, (x, y) = Convolutions(), images()
    act = aal.compress("gact", model=model)
    pass_of(model, x, y, act)
    forwards = act.forwards
    monkeypatch.setattr(Ranges, "encode", spy)

    def closure() -> None:
        encoded.append([])
        backprop_of(model, x, y)()

    act.step(closure)
    monkeypatch.undo()
    assert act.forwards == forwards
    count = len(encoded) // 3
    assert count == len(encoded[0]) > 2
    starts = [start for _, start in encoded[0]]
    for i, runs in enumerate(zip(*[iter(encoded)] * 3, strict=True)):
        for number, run in enumerate(runs):
            expected = [(4, start) for start in starts]
            expected[i] = ((1, 1, 8)[number], run[i][1])
            assert run == expected
            assert (run[i][1] == starts[i]) == (number != 1)


def test_adapting_leaves_everything_else_alone(device):
    model, (x, y) = Convolutions().to(device), [own.to(device) for own in images()]
    act = aal.compress("gact", model=model)
    pass_of(model, x, y, act)
    model[8].bias.grad = None
    before = [random_states(), {k: v.clone() for k, v in model.state_dict().items()}]
    held = [parameter.grad for parameter in model.parameters()]
    values = [own if own is None else own.clone() for own in held]
    report = str(act.report())

    def closure() -> None:
        random.random(), np.random.rand(), torch.rand(1)
        backprop_of(model, x, y)()

    act.step(closure)
    assert random_states() == before[0]
    assert_same_bits(model.state_dict(), before[1])
    for parameter, own, value in zip(model.parameters(), held, values, strict=True):
        assert parameter.grad is own
        assert own is None or torch.equal(own, value)
    assert str(act.report()) == report


def test_probes_see_the_same_random_numbers(device):
    model, (x, y) = Convolutions().to(device), [own.to(device) for own in images()]
    act = aal.compress("gact", model=model)
    pass_of(model, x, y, act)
    drawn = []

    def closure() -> None:
        of_torch = torch.rand(1).item(), torch.rand(1, device=device).item()
        drawn.append((random.random(), np.random.rand(), of_torch))
        backprop_of(model, x, y)()

    act.step(closure)
    assert len(set(drawn)) == 1 and len(drawn) > 3


def test_everything_is_put_back_when_the_closure_fails():
    model, (x, y) = Convolutions(), images()
    act = aal.compress("gact", model=model)
    expected = pass_of(model, x, y, act)
    before = random_states()

    def closure() -> None:
        backprop_of(model, x, y)()
        raise KeyError("data")

    with pytest.raises(KeyError):
        act.step(closure)
    assert random_states() == before
    assert_same_bits(gradients(model), expected)
    assert not any(site.state for site in act.sites)
    act.step(backprop_of(model, x, y))


@pytest.mark.parametrize("faithful", [False, True])
def test_gradients_that_overflow_ask_for_bits(faithful, monkeypatch):
    def found(session, closure, site) -> float:
        return {"1": 1.0, "2": inf, "3": 1e12}[site.module]

    monkeypatch.setattr(gact, "sensitivity", found)
    _, bits = adapted(faithful, bits=3)
    assert bits[1:] == [1, 4, 4]


@pytest.mark.parametrize(("faithful", "expected"), [(False, [4, 4, 4]), (True, [8, 1, 1])])
def test_gradients_that_do_not_change_ask_for_nothing(faithful, expected, monkeypatch):
    monkeypatch.setattr(gact, "sensitivity", lambda *_: 0.0)
    _, bits = adapted(faithful, bits=4)
    assert bits[1:] == expected


@pytest.mark.parametrize("found", [(9.0, 4.0, 3.0), (7.0, 4.5, 3.0), (7.0, 3.0, 4.5)], ids=str)
def test_sensitivity_is_the_largest_estimate(found, monkeypatch):
    model, x = dominated()
    act = aal.compress("gact", model=model)
    with act:
        model(x)
    monkeypatch.setattr(gact_probe, "squared_distances", lambda *_: found)
    assert sensitivity(act, lambda: None, next(iter(act.sites))) == 9


def test_sensitivity_is_twice_the_variance_at_one_bit():
    """That is ``(x - low) (high - x)`` for each element, times the squares of its gradients."""
    model, x, direction = Chain(64, 64, 64), torch.randn(512, 64), torch.randn(512, 64)
    x, direction = x.double(), direction.double()
    act = aal.compress("gact", model=model)
    with act:
        model(x)
    (site,) = act.method._sizes
    groups = model[0](x).detach().view(-1, 256)
    low, high = groups.aminmax(dim=1, keepdim=True)
    spread = ((groups - low) * (high - groups)).view(512, 64)
    variance = (spread.sum(1) * direction.square().sum(1)).sum().item()
    found = sensitivity(act, lambda: model(x).backward(direction), site)
    assert found == pytest.approx(2 * variance, rel=0.1)


def test_a_probe_that_overflows_says_so():
    model, x = dominated()
    act = aal.compress("gact", model=model)
    with act:
        model(x)
    (site,) = (site for site in act.method._sizes if site.module == "2")

    def closure() -> None:
        (model(x) * 1e200).square().sum().backward()

    assert sensitivity(act, closure, site) == inf


def test_tensors_that_the_closure_does_not_encode_keep_the_mean():
    model, (x, y) = Convolutions(), images()
    act = aal.compress("gact", model=model, bits=2, smallest=2000)
    pass_of(model, x, y, act)
    act.step(backprop_of(model, x[:1], y[:1]))  # all but the first have 1024 elements then
    sizes = {site.module: site.state["bits"] for site in act.sites if site.state}
    assert sizes.pop("1") >= 2
    assert set(sizes.values()) == {2} and len(sizes) >= 2


def test_shared_elements_are_probed_once():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.left(h) * 0 + self.right(h)

    model, x = Branches(), torch.randn(128, 64)
    act, calls = aal.compress("gact", model=model), []

    def closure() -> None:
        calls.append(model(x).square().sum().backward())

    for _ in range(2):
        with act:
            loss = model(x).square().sum()
        loss.backward()
        act.step(closure)
    shared = [row for row in act.report().rows if row.note == "shares a payload"]
    assert [row.site for row in shared] == ["right[0]"]
    assert len(calls) == 3 * sum("bits" in site.state for site in act.sites)


def test_adapting_needs_a_closure_and_a_model():
    model, (x, y) = Convolutions(), images()
    act = aal.compress("gact", model=model)
    pass_of(model, x, y, act)
    with pytest.raises(ValueError, match="closure"):
        act.step()
    act = aal.compress("gact")
    with pytest.raises(ValueError, match="model"):
        pass_of(model, x, y, act)
        act.step(backprop_of(model, x, y))
    act = aal.compress("gact", model=model, level="L1")
    pass_of(model, x, y, act)
    act.step()


def test_closure_must_not_step():
    model, (x, y) = Convolutions(), images()
    act = aal.compress("gact", model=model)
    pass_of(model, x, y, act)

    def closure() -> None:
        act.step(closure)

    with pytest.raises(RuntimeError, match="must not step"):
        act.step(closure)


# ------------------------------------------------------------------------------------------------
# Distances of gradients


@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.half, torch.bfloat16], ids=str)
def test_distances_are_those_of_the_whole_gradients(dtype):
    layers = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 5), (7,), ())]
    frozen = nn.Parameter(torch.randn(2), requires_grad=False)
    wanted = [[torch.randn(3, *layer.shape).to(dtype) for layer in layers] for _ in range(3)]
    layers[1].grad = torch.ones(7, dtype=dtype)

    def run(number: int) -> None:
        for layer, parts in zip(layers, wanted[number], strict=True):
            if layer.dim() or number:  # the last has no gradient in the first run
                for part in parts[: number + 1]:  # and several passes make one gradient
                    (layer * part).sum().backward()
                    assert layer.grad is None

    found = squared_distances(run, [*layers, frozen])
    whole = [
        torch.cat([part[: i + 1].double().sum(0).flatten() for part in wanted[i]]) for i in range(3)
    ]
    whole[0][-1] = 0
    expected = [(a - b).square().sum().item() for a, b in itertools.combinations(whole, 2)]
    rtol = 1e-5 if dtype in (torch.double, torch.float) else 3e-2
    torch.testing.assert_close(list(found), expected, rtol=rtol, atol=0)
    assert layers[0].grad is None and torch.equal(layers[1].grad, torch.ones_like(layers[1]))


def test_distances_of_sparse_gradients():
    table = nn.Embedding(10, 3, sparse=True, dtype=torch.double)
    places = [torch.tensor(own) for own in ([1, 2, 2], [2, 3, 9], [0, 0, 2])]

    def run(number: int) -> None:
        table(places[number]).sum().backward()

    counts = [torch.bincount(own, minlength=10) for own in places]
    expected = [3 * (a - b).square().sum().item() for a, b in itertools.combinations(counts, 2)]
    assert squared_distances(run, table.parameters()) == pytest.approx(expected)


def test_two_gradients_are_held_beside_those_of_the_user():
    shape = (37, 41)
    parameters = [nn.Parameter(torch.randn(shape)) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.randn(shape)
    most = []

    def count(_: Tensor) -> None:
        tensors = (own for own in gc.get_objects() if isinstance(own, Tensor))
        most.append(sum(own.shape == shape for own in tensors))

    def run(number: int) -> None:
        x = torch.ones(41, requires_grad=True)
        x.register_hook(count)
        y = 0
        for parameter in parameters:
            y = y + (parameter @ x).sum()
        y.backward()
        count(x)

    squared_distances(run, parameters)
    beside = max(most) - 2 * len(parameters)  # these and the user's gradients
    assert 0 <= beside - 2 * len(parameters) <= 2  # one or two are being made


# ------------------------------------------------------------------------------------------------
# The names of the release


def innermost_hooks():
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def training(controller: Controller, model: nn.Module, steps: int) -> list[int]:
    """The loop of the release's README; returns the step of every call of its closure."""
    optimizer, calls = torch.optim.SGD(model.parameters(), lr=0.01), []
    for step in range(steps):
        x, y = images()

        def backprop(step=step, x=x, y=y) -> None:
            calls.append(step)
            output = model(x)
            loss = F.cross_entropy(output, y)
            optimizer.zero_grad()
            loss.backward()

        output = model(x)
        loss = F.cross_entropy(output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.iterate(backprop)
    return calls


@pytest.mark.parametrize("level", LEVELS)
def test_example_of_the_release(level):
    set_optimization_level(level)
    set_adapt_interval(2)
    model = Convolutions()
    controller = Controller(model)
    controller.install_hook()
    calls = training(controller, model, 3)
    controller.uninstall_hook()
    assert innermost_hooks() is None
    assert sorted(set(calls)) == ([0, 2] if LEVELS[level].adapts else [])
    assert not any(module._forward_hooks for module in model.modules())


def test_off_trains_as_without():
    set_optimization_level("L0")
    models = [Convolutions(), Convolutions()]
    models[1].load_state_dict(models[0].state_dict())
    torch.manual_seed(1)
    with Controller(models[0]) as controller:
        training(controller, models[0], 3)
    torch.manual_seed(1)
    training(_NoController(), models[1], 3)
    assert_same_bits(models[0].state_dict(), models[1].state_dict())


class _NoController:
    def iterate(self, backprop) -> None: ...


def test_a_level_leaves_nothing_behind():
    """In the release, a level that is set keeps what it does not mention."""
    set_optimization_level("L3")
    set_optimization_level("L1")
    method = Controller(Convolutions()).session.method
    assert (method.offloads, method.needs_closure, method.bits) == (False, False, 4)


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="unknown level"):
        set_optimization_level("L9")
    with pytest.raises(ValueError, match="interval"):
        set_adapt_interval(0)


def test_installing_is_idempotent():
    set_optimization_level("L1")
    model = Convolutions()
    controller = Controller(model)
    controller.uninstall_hook()
    controller.install_hook()
    controller.install_hook()
    controller.iterate()
    controller.uninstall_hook()
    assert innermost_hooks() is None
    controller.uninstall_hook()


def test_hooks_of_others_are_not_removed():
    """The release removes the innermost hooks when it is collected, whosever they are."""
    set_optimization_level("L1")
    controller = Controller(Convolutions())
    with torch.autograd.graph.save_on_cpu():
        theirs = innermost_hooks()
        controller.uninstall_hook()
        controller.install_hook()
        controller.uninstall_hook()
        del controller
        gc.collect()
        assert innermost_hooks() == theirs
    controller = Controller(Convolutions())
    controller.install_hook()
    with torch.autograd.graph.save_on_cpu(), pytest.raises(RuntimeError, match="left first"):
        controller.uninstall_hook()
    controller.uninstall_hook()
    assert innermost_hooks() is None


def test_nothing_piles_up_while_installed():
    set_optimization_level("L1")
    model, watched = Convolutions(), []
    with Controller(model) as controller:
        for _ in range(4):
            x, y = images()
            loss = F.cross_entropy(model(x), y)
            watched.append(_watch(loss))
            loss.backward()
            del loss
        session = controller.session
        assert len(session._visited) < 30 and len(session._tips) < 5
    gc.collect()
    assert [reference() for reference in watched] == [None] * 4
