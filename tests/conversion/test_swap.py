import copy
import inspect
import io
import pickle

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import aal
from aal.conversion.linear import BiasLinear, ReadingLinear, SignLinear
from aal.conversion.pointwise import RepeatedModule
from aal.conversion.swap import Converted, class_of, original_class, restore, swap
from aal.rules.asa import LinearASA

OPTIONS = {"relu": False, "epsilon": 0.01, "lr_expansion": 100.0, "scale": "fixed"}


class Named(nn.Linear):
    """A subclass, as other libraries have them."""


def test_a_module_stays_the_same_object():
    layer = Named(4, 3)
    before, parameters = dict(vars(layer)), list(layer.parameters())
    swap(layer, SignLinear, **OPTIONS)
    assert isinstance(layer, SignLinear | LinearASA) and isinstance(layer, Named)
    assert original_class(layer) is Named
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    restore(layer)
    assert type(layer) is Named and vars(layer) == before


def test_swapping_again_replaces_the_first():
    layer = nn.Linear(4, 3)
    swap(layer, SignLinear, **OPTIONS)
    swap(layer, ReadingLinear)
    assert original_class(layer) is nn.Linear and not set(OPTIONS) & set(vars(layer))
    assert type(layer) is class_of(ReadingLinear, nn.Linear)


def test_swapping_to_the_same_keeps_what_was_added():
    layer = nn.Linear(4, 3)
    swap(layer, BiasLinear, lr_expansion=1.0)
    layer.register_parameter("aux", nn.Parameter(torch.ones(4)))
    aux = layer.aux
    swap(layer, BiasLinear, lr_expansion=2.0)
    assert layer.aux is aux and layer.lr_expansion == 2
    restore(layer)
    assert list(layer._parameters) == ["weight", "bias"]


def test_restoring_what_was_not_converted_does_nothing():
    layer = nn.Linear(4, 3)
    restore(layer)
    assert type(layer) is nn.Linear


def test_hooks_go_on_working():
    layer, calls = nn.Linear(4, 3), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    swap(layer, SignLinear, **OPTIONS)
    layer(torch.randn(2, 4))
    assert calls == [1]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "pickle, oldest protocol": lambda module: pickle.loads(pickle.dumps(module, 0)),
    "copy": copy.copy,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind, options", [(SignLinear, OPTIONS), (ReadingLinear, {})])
def test_copies_are_converted_and_can_be_restored(duplicate, kind, options):
    layer = Named(4, 3)
    swap(layer, kind, **options)
    other = duplicate(layer)
    assert type(other) is type(layer) and all(vars(other)[k] == v for k, v in options.items())
    x = torch.randn(2, 4)
    torch.testing.assert_close(other(x), layer(x))
    restore(other)
    assert type(other) is Named and isinstance(layer, Converted)


def test_a_saved_module_loads():
    file = io.BytesIO()
    layer = nn.LayerNorm(4)
    swap(layer, RepeatedModule)
    torch.save(layer, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is type(layer)


IMAGE = torch.randn(2, 3, 6, 6)
BY_KEYWORD = {
    "linear": (lambda: nn.Linear(6, 4), "input", "bp"),
    "linear, asa": (lambda: nn.Linear(6, 4), "input", "asa"),
    "linear, aba": (lambda: nn.Linear(6, 4), "input", "aba"),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), "input", "bp"),
    "convolution, asa": (lambda: nn.Conv2d(3, 4, 3), "input", "asa"),
    "convolution, aba": (lambda: nn.Conv2d(3, 4, 3), "input", "aba"),
    "layer norm": (lambda: nn.LayerNorm(6), "input", "bp"),
    "RMS norm": (lambda: LlamaRMSNorm(6), "hidden_states", "bp"),
    "batch norm": (lambda: nn.BatchNorm2d(3), "input", "bp"),
    "GELU": (nn.GELU, "input", "bp"),
    "ReLU": (nn.ReLU, "input", "bp"),
    "dropout": (nn.Dropout, "input", "bp"),
    "max pool": (lambda: nn.MaxPool2d(2), "input", "bp"),
}


@pytest.mark.parametrize("make, name, rule", BY_KEYWORD.values(), ids=BY_KEYWORD)
def test_an_input_may_be_given_by_the_name_that_it_had(make, name, rule):
    layer = aal.convert(make(), rule, lean="exact")
    outputs = []
    for args, kwargs in (((IMAGE,), {}), ((), {name: IMAGE})):
        torch.manual_seed(0)
        outputs.append(layer(*args, **kwargs))
    assert isinstance(layer, Converted)
    assert_same_bits(*outputs)
    assert inspect.signature(layer.forward) == inspect.signature(make().forward)
    with pytest.raises(TypeError):
        layer(**{name: IMAGE}, unknown=1)
