"""Bits that follow the variance of the gradient: its closed form, and what is made of it."""

import math

import pytest
import torch
from hazard_models import gradient, session_of
from torch import Tensor, nn

import aal
from aal.compression.adaptive import CHOICES, Adaptive, _allocation
from aal.compression.session import Session
from aal.compression.variance import Look


def looked(model: nn.Module, x: Tensor, **options) -> tuple[Session, dict[str, float], float]:
    """A session after its first step; the variances that it predicts at one bit; the gradient's
    square."""
    session, found = session_of("adaptive", model, **options), {}
    gradient(session, x)
    look = session.method._look
    assert isinstance(look, Look) and look.is_complete
    for site, sensitivity in zip(look.numels, look.sensitivities(), strict=True):
        found[str(site)] = sensitivity
    return session, found, look.gradient()


def variance(model: nn.Module, x: Tensor, site: str, bits: int, draws: int = 60) -> float:
    """Measured variance of the weights' gradient if one site has few bits and the others eight."""
    session = aal.compress("adaptive", model=model, smallest=1, bits=8, interval=10**9)
    gradient(session, x)
    session.method._look = None
    for each in session.sites:
        each.state["bits"] = bits if str(each) == site else 8
    exact = gradient(aal.compress("none", model=model), x)
    errors = [(gradient(session, x) - exact).square().sum().item() for _ in range(draws)]
    return sum(errors) / draws


def layers() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(24, 32, bias=False), nn.Linear(32, 8, bias=False)), torch.randn(
        96, 24
    )


def convolutions() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 3, stride=2, bias=False)
    )
    return net, torch.randn(8, 3, 12, 12)


@pytest.mark.parametrize("build", [layers, convolutions])
@pytest.mark.parametrize("bits", [2, 4])
def test_variance_of_a_layer_is_as_predicted(build, bits):
    model, x = build()
    _, predicted, _ = looked(model, x, bits=8)
    ((site, one_bit),) = predicted.items()  # the other layer's input is the model's argument
    measured = variance(model, x, site, bits)
    assert measured == pytest.approx(one_bit / (2**bits - 1) ** 2, rel=0.15)


def test_gradient_is_that_of_the_weights():
    model, x = layers()
    _, _, square = looked(model, x, bits=8)
    exact = gradient(aal.compress("none", model=model), x)
    assert square == pytest.approx(exact.square().sum().item(), rel=0.01)


def chain() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 4, 1, bias=False),
    )
    return net, torch.randn(8, 3, 12, 12)


@pytest.mark.parametrize("norm", ["1", "4"])
def test_variance_through_norms_has_the_right_size(norm):
    """The estimate takes errors to be unrelated, and inputs to be as they usually are."""
    model, x = chain()
    _, predicted, _ = looked(model, x, bits=8)
    (site,) = (site for site in predicted if site.startswith(f"{norm}["))
    assert 1 / 4 < variance(model, x, site, 4) / (predicted[site] / 15**2) < 4


def test_queries_and_keys_have_their_share_and_at_least_four_bits():
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(4, 12, 32)
    session = session_of("adaptive", model, bits=2)
    for _ in range(3):
        gradient(session, x)
    scores = [site.state for site in session.sites if site.state.get("least") == 4]
    assert len(scores) == 2 and all(state["bits"] >= 4 for state in scores)


def test_bits_are_those_of_the_budget_and_follow_the_sensitivities():
    sizes = [1000] * 6
    sensitivities = [10.0**i for i in range(6)]
    for mean in (2, 3, 4, 6, 8):
        chosen = _allocation(sensitivities, sizes, [2] * 6, mean)
        assert sum(chosen) <= 6 * mean and chosen == sorted(chosen)
        assert set(chosen) <= set(CHOICES)
    assert _allocation(sensitivities, sizes, [2] * 6, 4) != [4] * 6


def test_sites_that_need_more_are_paid_for_by_the_others():
    chosen = _allocation([1.0] * 5, [1000] * 5, [8, 2, 2, 2, 2], 4)
    assert chosen[0] == 8 and sum(chosen) <= 20
    assert _allocation([1.0] * 3, [10] * 3, [4, 2, 2], 2) == [4, 2, 2]  # nobody has less than 2


def test_equal_bits_stay_where_others_are_hardly_better():
    assert _allocation([1.0, 1.2, 0.9, 1.1], [1000] * 4, [2] * 4, 4) == [4] * 4
    assert _allocation([math.nan] * 3, [1000] * 3, [2] * 3, 5) == [4] * 3


def test_a_coarse_code_that_would_drown_the_gradient_is_refused():
    """One layer's input has ranges that two bits tell nothing of."""
    model, x = chain()
    with torch.no_grad():
        x[:, :, 0, 0] = 400  # an outlier in every map
    session = session_of("adaptive", model, bits=2)
    for _ in range(3):
        gradient(session, x)
    bits = [site.state["bits"] for site in session.sites if "bits" in site.state]
    assert max(bits) > 2


class Branches(nn.Module):
    """Two branches, of which one hardly counts."""

    def __init__(self):
        super().__init__()
        self.first, self.strong, self.second, self.weak = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.strong(self.first(x)) + 0.01 * self.weak(self.second(x))


def test_error_is_smaller_than_with_equal_bits_at_no_more_bytes():
    model, x = Branches(), torch.randn(512, 64)
    exact = gradient(aal.compress("none", model=model), x)
    errors, stored = [], []
    for adapts in (False, True):
        session = session_of("adaptive", model, bits=5)
        session.method._next_look = 1 if adapts else 10**9
        gradient(session, x)
        found = [(gradient(session, x) - exact).square().sum().item() for _ in range(5)]
        errors.append(sum(found) / 5)
        stored.append(session.report().stored_bytes)
    assert errors[1] < 0.1 * errors[0]
    assert stored[1] <= 1.3 * stored[0]  # of 5 bits, equal ones use 4


@pytest.mark.parametrize("share", [0.1, 0.15, 0.25])
def test_a_budget_is_met(share):
    model, x = nn.Sequential(*(nn.Linear(128, 128) for _ in range(8))), torch.randn(512, 128)
    raw = 8 * x.nbytes / 2**20
    session = aal.compress("adaptive", model=model, budget=share * raw)
    for _ in range(3):
        gradient(session, x)
    assert 0.6 * share * raw < session.report().stored_bytes / 2**20 <= share * raw


def test_a_budget_that_is_too_small_is_named_and_leaves_nothing_behind():
    model, x = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4))), torch.randn(512, 128)
    session = aal.compress("adaptive", model=model, budget=0.01)
    gradient(session, x)
    with pytest.raises(ValueError, match=r"0.01 MiB is too small: .* keeps 0\.\d\d? MiB"):
        gradient(session, x)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_budget_is_for_what_is_exact_too():
    """Masks, indices and statistics; and it comes before sites that would have more bits."""
    block = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    model, x = nn.Sequential(*block, nn.Conv2d(8, 8, 3), nn.Flatten()), torch.randn(8, 8, 32, 32)
    model[0].weight.data.mul_(1e3)
    full = session_of("adaptive", model, bits=8)
    gradient(full, x)
    for share in (0.4, 0.6, 0.8):
        budget = share * full.report().stored_bytes / 2**20
        session = aal.compress("adaptive", model=model, smallest=1, budget=budget)
        for _ in range(3):
            gradient(session, x)
        assert 0.5 * budget < session.report().stored_bytes / 2**20 <= budget


def test_a_method_that_fails_as_it_begins_leaves_no_hooks():
    """Without a model the forward pass begins as the session is entered."""
    session = aal.compress("adaptive", budget=0.01)
    with session:
        y = nn.Linear(128, 128)(torch.randn(512, 128, requires_grad=True)).square()
    y.sum().backward()
    with pytest.raises(ValueError, match="too small"), session:
        pass
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "budget": 3.0}, "exclude each other"),
        ({"bits": 1.5}, "from 2 to 8"),
        ({"bits": 9}, "from 2 to 8"),
        ({"budget": 0.0}, "positive number of MiB"),
        ({"interval": 0}, "at least 1"),
        ({"interval": math.nan}, "at least 1"),
        ({"group": 100}, "multiple of 64"),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adaptive(**options)


def test_arguments_of_the_model_are_not_counted():
    """The caller holds them anyway, perhaps as a view of a larger tensor."""
    model, images = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(9999, 64)
    session = session_of("adaptive", model)
    gradient(session, images[:128])
    rows = {row.site: row for row in session.report().rows}
    assert rows["0[0]"].note == "argument of the model"
    assert (rows["0[0]"].raw_bytes, rows["0[0]"].stored_bytes) == (0, 0)
    assert session.report().raw_bytes == 128 * 64 * 4


class TwoReaders(nn.Module):
    """A tensor that two layers read, one of which hardly counts."""

    def __init__(self):
        super().__init__()
        self.first, self.strong, self.weak = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.strong(x) + 0.01 * self.weak(x)


def test_elements_are_kept_once_whatever_bits_their_readers_would_get():
    model, x = TwoReaders(), torch.randn(256, 64)
    session = session_of("adaptive", model, bits=8)
    gradient(session, x)
    for site in session.sites:
        site.state["bits"] = 2 if site.module == "weak" else 8
    gradient(session, x)
    rows = {row.site.split("[")[0]: row for row in session.report().rows}
    assert rows["strong"].stored_bytes and not rows["weak"].stored_bytes
    assert rows["weak"].note == "shares a payload" and rows["weak"].bits == 8
