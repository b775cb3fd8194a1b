"""Networks in channels-last, under autocast and in CUDA graphs: as in plain PyTorch."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import LOW_PRECISION, METHODS, cotangent_of, train
from patch_networks import GELU, images, small
from resnet import RULES as RESNET_RULES
from resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from aal.lean.relu import PackedReLU

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
RESNET_METHODS = {name: METHODS[name] for name in ("off", "exact", "exact-gcp")}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
every_rule = pytest.mark.parametrize("rule", RESNET_RULES)
every_method = pytest.mark.parametrize("method", RESNET_METHODS.values(), ids=RESNET_METHODS)


def residual(block: type[nn.Module] = BasicBlock, **options) -> ResNet:
    return ResNet(block, (2, 1, 1, 1), num_classes=5, stem="small", **options)


def in_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@every_block
@every_rule
@every_method
def test_channels_last_computes_the_same(block, rule, method):
    model, x = residual(block, rule=rule, **method).double(), images().double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    y, *expected = train(model, x)
    found, *others = train(other, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close((found, *others), (y, *expected))


@every_block
@every_rule
@every_method
def test_channels_last_stays_channels_last(block, rule, method):
    model = residual(block, rule=rule, **method).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    seen = []
    watched = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, PackedReLU, BLOCKS["basic"], Bottleneck)
    for module in model.modules():
        if isinstance(module, watched):
            module.register_forward_hook(lambda _, inputs, y: seen.append(y))
    y = model(x)
    y.backward(cotangent_of(y))
    assert len(seen) > 8
    assert all(in_channels_last(tensor) for tensor in seen)
    gradients = [p.grad for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert all(in_channels_last(gradient) for gradient in gradients)


@LOW_PRECISION
@every_rule
@every_method
def test_autocast_gives_residual_networks_what_the_stock_layers_get(rule, method, dtype):
    stock = residual(rule=rule)
    ours, x, found = residual(rule=rule, **method), images(), []
    ours.load_state_dict(stock.state_dict())
    for model in (stock, ours):

        def forward(x, model=model):
            with torch.autocast("cpu", dtype):
                return model(x)

        found.append(train(model, x, forward))
    (y, gradients, buffers), (stock_y, stock_gradients, stock_buffers) = found[1], found[0]
    assert y.dtype == stock_y.dtype
    torch.testing.assert_close((y, buffers), (stock_y, stock_buffers), rtol=2e-2, atol=2e-2)
    for name, gradient in gradients.items():
        error = (gradient - stock_gradients[name]).norm()
        assert error <= 0.05 * stock_gradients[name].norm(), name


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit, bp, exact": lambda: small("vit", GELU["vit"], dropout=0.0, **METHODS["exact"]),
    "vit, asa4": lambda: small("vit", GELU["vit"], dropout=0.0, rule="asa4"),
    "vit, asa1, approx": lambda: small("vit", GELU["vit"], rule="asa1", **METHODS["approx"]),
    "vit, aba4": lambda: small("vit", GELU["vit"], dropout=0.0, rule="aba4"),
    "mixer, asa4, approx": lambda: small("mixer", GELU["mixer"], rule="asa4", **METHODS["approx"]),
    "resnet, ara, exact": lambda: residual(Bottleneck, rule="ara", **METHODS["exact"]),
    "resnet, ara, gcp": lambda: residual(Bottleneck, rule="ara", **METHODS["exact-gcp"]),
    "resnet, asa": lambda: residual(rule="asa"),
}


@pytest.mark.gpu
@LOW_PRECISION
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_autocast_on_a_gpu_is_near_full_precision(make, dtype):
    with torch.device("cuda"):
        model, x = make().eval(), torch.randn(4, 3, 16, 16)  # no dropout

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype):
            return model(x)

    y, expected, _ = train(model, x)
    gradients = {name: None if g is None else g.clone() for name, g in expected.items()}
    model.zero_grad()
    low, found, _ = train(model, x, forward)
    torch.testing.assert_close(low.float(), y, rtol=0.05, atol=0.05)
    for name, gradient in found.items():
        error = (gradient - gradients[name]).norm()
        assert error <= 0.1 * gradients[name].norm() + 1e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_step_is_captured_as_a_cuda_graph(make):
    """Nothing in a step waits for the device, and replays of the graph learn as steps do."""
    with torch.device("cuda"):
        model = make().eval()  # no dropout, whose masks would differ
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 0.0
    x = torch.randn(4, 3, 16, 16, device="cuda")

    def step() -> Tensor:
        y = model(x)
        y.backward(torch.ones_like(y))
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for seed in range(2):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        for p in model.parameters():
            p.grad.zero_()
        graph.replay()
        found = [y.clone(), *(p.grad.clone() for p in model.parameters())]
        twin = copy.deepcopy(model)
        twin.zero_grad(set_to_none=True)
        z = twin(x)
        z.backward(torch.ones_like(z))
        expected = [z.detach(), *(p.grad for p in twin.parameters())]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
