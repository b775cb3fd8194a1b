"""The Learning Indicator: closed form, bounds and axes."""

import contextlib
import copy
from math import nan

import pytest
import torch
from helpers import assert_no_worse, assert_same_bits, cotangent_of, train
from torch import Tensor, nn

from aal import Conv2dARA, LinearABA, LinearASA, learning_indicator
from aal.indicator import IndicatorRecorder
from aal.lean import Transpose, replay

TOLERANCE = 1e-6  # what is added to the denominator


@pytest.mark.parametrize("start_dim", [1, 2, -1])
def test_equals_its_closed_form(start_dim):
    h, r = torch.randn(2, 3, 4, 5, 60, dtype=torch.double)
    dims = tuple(range(start_dim % 4, 4))
    expected = 1 - (h - r).square().sum(dims) / h.square().sum(dims)
    found = learning_indicator(h, r, start_dim=start_dim)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("start_dim", "shape"), [(1, (3,)), (2, (3, 4)), (-1, (3, 4, 5)), (0, ())], ids=str
)
def test_keeps_the_dimensions_before_the_first_that_is_summed(start_dim, shape):
    h = torch.randn(3, 4, 5, 6)
    assert learning_indicator(h, h, start_dim=start_dim).shape == shape


def test_first_dimension_is_the_batch_by_default():
    assert learning_indicator(torch.randn(3, 4, 5), torch.randn(3, 4, 5)).shape == (3,)


def test_same_activation_gives_one():
    h = torch.randn(8, 50, dtype=torch.double)
    torch.testing.assert_close(
        learning_indicator(h, h), torch.ones(8, dtype=torch.double), rtol=TOLERANCE, atol=0
    )


@pytest.mark.parametrize(("factor", "value"), [(0, 0), (0.5, 0.75), (2, 0), (-1, -3), (3, -3)])
def test_multiples_of_the_activation_give_known_values(factor, value):
    h = torch.randn(8, 50, dtype=torch.double)
    expected = torch.full((8,), value, dtype=torch.double)
    torch.testing.assert_close(learning_indicator(h, factor * h), expected, rtol=1e-6, atol=1e-6)


def test_never_exceeds_one():
    h, r = torch.randn(2, 1000, 3, dtype=torch.double)
    assert (learning_indicator(h, r) <= 1).all()


@pytest.mark.parametrize("r", [0.0, 1.0])
def test_zero_activation_gives_a_finite_value(r):
    assert learning_indicator(torch.zeros(2, 3), torch.full((2, 3), r)).isfinite().all()


def test_stand_in_is_broadcast():
    h, r = torch.randn(3, 4, 5), torch.randn(4, 1)
    torch.testing.assert_close(learning_indicator(h, r), learning_indicator(h, r.expand(3, 4, 5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype):
    h, r = torch.randn(2, 4, 4096).to(dtype)
    found = learning_indicator(h, r)
    exact = learning_indicator(h.double(), r.double())
    assert found.dtype == torch.float32
    assert_no_worse(found, learning_indicator(h.float(), r.float()), exact, factor=1)


class TwoLayers(nn.Module):
    """A layer that is called twice, one called by keyword, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.twice, self.keyword = LinearASA(6, 6), Conv2dARA(2, 2, 1)
        self.idle = LinearASA(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x), code=None)
        return self.keyword(x, aux=0.5 * x)


def test_recorder_follows_the_calls_of_every_layer():
    model = TwoLayers()
    recorder = IndicatorRecorder(model)
    x = torch.randn(3, 2, 5, 6)
    with recorder.sampling():
        y = model(x)
        with torch.no_grad():
            model(x)  # recomputation, say
    model(x)
    values = recorder.take()
    counts = (~values.isnan()).sum(2)
    assert counts.tolist() == [[60, 3, 0]] * 2  # rows twice, samples, nothing
    expected = torch.full((3,), 0.75)  # 1 - |h - h / 2|^2 / |h|^2
    torch.testing.assert_close(values[0, 1, :3], expected)
    summary = recorder.summary(values)
    assert summary["keyword"]["median"] == 0.75 and summary["keyword"]["positive"] == 1
    assert summary["idle"] == dict.fromkeys(summary["keyword"])
    assert y.requires_grad and recorder.take().numel() == 0


def test_recorder_scales_by_the_gain():
    layer = LinearASA(8, 4, epsilon=0.1, lr_expansion=5.0)
    recorder = IndicatorRecorder(layer)
    x = torch.randn(7, 8)
    with recorder.sampling():
        layer(x)
    sign = torch.where(x > 0, 1.0, -1.0)
    h = x + 0.1 * sign
    raw, scaled = recorder.take()
    torch.testing.assert_close(raw[0], learning_indicator(h, 0.1 * sign, start_dim=-1))
    torch.testing.assert_close(scaled[0], learning_indicator(h, 0.5 * sign, start_dim=-1))


def test_recorder_holds_a_bounded_number_of_values():
    layer = LinearASA(2, 2)
    recorder = IndicatorRecorder(layer)
    with recorder.sampling():
        layer(torch.randn(5000, 2))
    assert recorder.take().shape == (2, 1, 512)


def test_backpropagation_stands_in_for_itself():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(5, 2))
    recorder = IndicatorRecorder(model)
    for _ in range(3):
        with recorder.sampling():
            model(torch.randn(2, 3, 4, 5))
    assert list(recorder.layers) == ["0", "2"]
    torch.testing.assert_close(recorder.take(), torch.ones(2, 2, 3))


def test_recorder_needs_a_layer_with_a_weight_gradient():
    with pytest.raises(ValueError, match="no layer has a weight gradient"):
        IndicatorRecorder(nn.ReLU())


class Places:
    """A compressor that keeps some places approximately: ones, such that these are indicators."""

    def __init__(self, **values: Tensor):
        self.values = values

    @contextlib.contextmanager
    def sampling(self, record):
        for name, indicators in self.values.items():
            rows = indicators.reshape(-1, 1)
            record(name, torch.ones_like(rows), 1 - (1 - rows).sqrt())
        yield


def _take(recorder: IndicatorRecorder, *places: Places, gather=lambda own: [own]) -> tuple:
    """Rows and their names, of sampled steps of a forward pass each."""
    for each in places:
        with recorder.sampling(each):
            next(iter(recorder.layers.values()))(torch.randn(2, 4))
    values = recorder.take(gather)
    return list(recorder.summary(values)), values


def test_places_of_a_compressor_are_recorded_behind_the_layers():
    recorder = IndicatorRecorder(nn.Sequential(LinearASA(4, 4), nn.Linear(4, 4)))
    indicators = torch.rand(6)
    names, values = _take(recorder, Places(a=indicators, b=torch.rand(5000)), Places(c=indicators))
    assert names == ["0", "a", "b", "c"] and values.dtype == torch.float32
    assert (~values.isnan()).sum(2).tolist() == [[4, 6, 512, 6]] * 2
    torch.testing.assert_close(values[:, 1, :6], indicators.expand(2, 6))


def test_places_of_a_compressor_take_the_place_of_backpropagation():
    recorder = IndicatorRecorder(nn.Linear(4, 4))
    names, values = _take(recorder, Places(), Places(a=torch.tensor([0.5])))
    assert names == ["a"] and values.flatten().tolist() == pytest.approx([0.5, 0.5])
    names, values = _take(recorder, Places())
    assert names == ["a"] and values.isnan().all()


def test_rows_stay_where_they_are():
    recorder = IndicatorRecorder(nn.Sequential(nn.Linear(4, 4)))
    one = torch.ones(1)
    assert _take(recorder, Places())[0] == ["0"]
    assert _take(recorder, Places(b=one))[0] == ["0", "b"]
    names, values = _take(recorder, Places(a=one / 4))
    assert names == ["0", "b", "a"]
    torch.testing.assert_close(values[0, :, 0], torch.tensor([1, nan, 0.25]), equal_nan=True)
    resumed = IndicatorRecorder(nn.Sequential(nn.Linear(4, 4)))
    resumed.resume(names)
    names, values = _take(resumed, Places(c=one, a=one / 4))
    assert names == ["0", "b", "a", "c"]
    torch.testing.assert_close(values[0, :, 0], torch.tensor([1, nan, 0.25, 1]), equal_nan=True)


def test_rows_of_all_processes_are_joined():
    """Each may have met other places."""
    both = []
    for places in (Places(a=torch.ones(2)), Places(b=torch.zeros(1), a=torch.zeros(3))):
        _take(IndicatorRecorder(nn.Linear(4, 4)), places, gather=lambda own: [both.append(own)][:0])
    names, values = _take(IndicatorRecorder(nn.Linear(4, 4)), gather=lambda own: both)
    assert names == ["a", "b"]
    expected = torch.tensor([[1, 1, 0, 0, 0], [0, nan, nan, nan, nan]])
    torch.testing.assert_close(values, expected.expand(2, 2, 5), equal_nan=True)


CHAINS = {
    "asa": lambda: [nn.LayerNorm(7), LinearASA(7, 5), nn.GELU(), LinearASA(5, 4)],
    "asa-mean": lambda: [LinearASA(7, 5), nn.ReLU(), LinearASA(5, 4, relu=True, scale="mean")],
    "aba": lambda: [nn.LayerNorm(7), LinearABA(7, 5), nn.ReLU(), LinearABA(5, 4)],
    "merged": lambda: [nn.LayerNorm(7), LinearABA(7, 6, projections=3)],
    "tokens": lambda: [Transpose(), LinearABA(3, 5), nn.GELU(), LinearASA(5, 3), Transpose()],
}
every_chain = pytest.mark.parametrize("chain", CHAINS)


class Lean(nn.Sequential):
    """A chain as one module."""

    def forward(self, x: Tensor) -> Tensor:
        return replay(x, *self)


@every_chain
def test_layers_of_a_chain_are_recorded_as_they_are_outside_of_one(chain):
    layers = nn.Sequential(*CHAINS[chain]())
    x, found = torch.randn(2, 3, 7), []
    for model in (Lean(*copy.deepcopy(layers)), layers):
        recorder = IndicatorRecorder(model)
        with recorder.sampling():
            model(x)
        found.append(recorder.take())
    assert not found[0].isnan().all(-1).any()  # no layer without a value
    assert_same_bits(*found)


@every_chain
def test_recording_changes_no_bit_of_a_chain(chain):
    model, x = Lean(*CHAINS[chain]()), torch.randn(2, 3, 7)
    recorder = IndicatorRecorder(model)
    with recorder.sampling():
        recorded = train(model, x)
    model.zero_grad()
    assert_same_bits(recorded, train(model, x))


@every_chain
def test_replays_of_a_chain_are_not_recorded(chain):
    model, x, found = Lean(*CHAINS[chain]()), torch.randn(2, 3, 7), []
    for goes_backward in (True, False):
        recorder = IndicatorRecorder(model)
        with recorder.sampling():
            y = model(x)
            if goes_backward:
                y.backward(cotangent_of(y))
        found.append(recorder.take())
    assert_same_bits(*found)


def test_layer_of_which_a_chain_computes_its_input_again_is_recorded_once():
    first, norm = LinearASA(7, 5), nn.LayerNorm(5)
    recorder = IndicatorRecorder(nn.Sequential(first, norm))
    x = torch.randn(2, 3, 7)
    with recorder.sampling():
        y = replay(first(x), norm, recompute=(first, x))
        y.backward(cotangent_of(y))
    assert recorder.take().shape == (2, 1, 6)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_lean", [True, False], ids=["chain", "layers"])
@every_chain
def test_what_autograd_does_not_record_is_not_recorded(chain, is_lean, without):
    model = (Lean if is_lean else nn.Sequential)(*CHAINS[chain]()).eval()
    recorder = IndicatorRecorder(model)
    with recorder.sampling(), without():
        model(torch.randn(2, 3, 7))
    assert recorder.take().numel() == 0


@pytest.mark.parametrize("is_lean", [True, False], ids=["chain", "layers"])
def test_nothing_is_recorded_outside_of_samples(is_lean):
    model = (Lean if is_lean else nn.Sequential)(*CHAINS["asa"]())
    recorder = IndicatorRecorder(model)
    with recorder.sampling():
        pass
    model(torch.randn(2, 3, 7))
    assert recorder.take().numel() == 0


def test_layers_are_left_alone_after_an_error():
    model = Lean(*CHAINS["asa"]())
    recorder = IndicatorRecorder(model)
    with pytest.raises(RuntimeError), recorder.sampling():
        model(torch.randn(2, 3, 8))
    assert [layer.observer for layer in recorder.layers.values()] == [None, None]
    recorder.take()
    model(torch.randn(2, 3, 7))
    assert recorder.take().numel() == 0


def test_mean_scale_learns_from_a_better_stand_in():
    x, medians = torch.randn(50, 64), {}
    for scale in ("fixed", "mean"):
        recorder = IndicatorRecorder(LinearASA(64, 2, scale=scale))
        with recorder.sampling():
            recorder.layers[""](x)
        medians[scale] = recorder.summary(recorder.take())[""]["scaled_median"]
    assert medians["mean"] == pytest.approx(2 / torch.pi, abs=0.02)
    assert medians["mean"] > medians["fixed"]
