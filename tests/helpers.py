"""What several test files need: random tensors, comparisons and the rules spelled out."""

import copy
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aal.lean import replay

# Keyword arguments of ``aal.method.Method``, beside the rule.
LEAN_METHODS = {
    "exact": {"lean": "exact"},
    "exact-gcp": {"lean": "exact", "gcp": True},
    "approx": {"lean": "approx"},
    "approx-gcp": {"lean": "approx", "gcp": True},
}
METHODS = {"off": {}, **LEAN_METHODS}


def cotangent_of(y: Tensor) -> Tensor:
    """A random gradient of ``y``, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(y.shape, dtype=torch.double, generator=generator)
    return cotangent.to(y.device, y.dtype)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Equal to the last bit; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_no_worse(ours: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Rounding error of ``ours`` is at most ``factor`` times that of eager PyTorch."""
    ours_error, eager_error = ((t.double() - exact).abs().max() for t in (ours, eager))
    assert ours_error <= factor * eager_error + 1e-6 * exact.abs().max(), (ours_error, eager_error)


class ConvCase(NamedTuple):
    """A convolution of an awkward shape."""

    shape: tuple[int, ...] = (2, 4, 7, 5)  # of the input
    kernel: tuple[int, int] = (3, 3)
    bias: bool = True
    options: dict[str, Any] = {}

    def tensors(self, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight of six output channels, and bias."""
        in_channels = self.shape[-3] // self.options.get("groups", 1)
        weight = torch.randn(6, in_channels, *self.kernel, dtype=dtype)
        bias = torch.randn(6, dtype=dtype) if self.bias else None
        return torch.randn(self.shape, dtype=dtype), weight, bias


CONV_CASES = [
    pytest.param(ConvCase(options={"padding": 1}), id="padding"),
    pytest.param(ConvCase(bias=False), id="no-bias"),
    pytest.param(ConvCase(options={"stride": 2, "padding": 1}), id="stride"),
    pytest.param(ConvCase(kernel=(1, 1), options={"stride": 2}), id="1x1-stride"),
    pytest.param(ConvCase(kernel=(1, 1), options={"padding": 1}), id="1x1-padding"),
    pytest.param(
        ConvCase(
            shape=(2, 4, 9, 11),
            kernel=(3, 2),
            options={"stride": (2, 1), "padding": (1, 2), "dilation": (2, 3)},
        ),
        id="uneven-pairs",
    ),
    pytest.param(ConvCase(options={"groups": 2, "padding": 1}), id="groups"),
    pytest.param(ConvCase(shape=(2, 3, 7, 5), options={"groups": 3}), id="depthwise"),
    pytest.param(ConvCase(kernel=(2, 4), options={"padding": "same"}), id="same-even-kernel"),
    pytest.param(
        ConvCase(kernel=(2, 3), bias=False, options={"padding": "same", "dilation": 3}),
        id="same-dilation",
    ),
    pytest.param(ConvCase(options={"padding": "valid"}), id="valid"),
    pytest.param(ConvCase(shape=(4, 7, 5), options={"padding": 1}), id="unbatched"),
    pytest.param(
        ConvCase(shape=(4, 7, 5), kernel=(2, 2), options={"padding": "same"}), id="unbatched-same"
    ),
]


def torch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """``F.conv2d``, with its copy for "same" padding and even kernels made by hand.

    PyTorch makes the same copy, but warns about it.
    """
    if options.get("padding") == "same":
        dilation = options.get("dilation", 1)
        total = [dilation * (size - 1) for size in weight.shape[2:]]
        (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
        x, options = F.pad(x, (left, right, top, bottom)), {**options, "padding": 0}
    return F.conv2d(x, weight, bias, **options)


def spelled_out(
    function: Callable[..., Tensor],
    h: Tensor,
    r: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: float,
    **options: Any,
) -> Tensor:
    """A rule in PyTorch's operations: ``function(h, weight, bias)``, whose weight gradient is
    ``gain`` times the one at ``r``."""
    y = function(h, weight.detach(), bias, **options)
    learning = function(r.detach(), weight, **options)
    return y + gain * (learning - learning.detach())


def compiling(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that compiles.

    The compiler itself instantiates ``torch.autograd.Function``, and that of PyTorch 2.11 asks
    tensors that are no leaves for their gradient.
    """
    for message in (
        "ignore:.*should not be instantiated:DeprecationWarning",
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    ):
        test = pytest.mark.filterwarnings(message)(test)
    return pytest.mark.slow(test)


def assert_compiles(module: nn.Module, *inputs: Tensor, backend: str = "aot_eager") -> None:
    """Compiled as one graph, ``module`` gives the output and gradients that it gives in eager."""
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    found = []
    for function in (module, compiled):
        y = function(*inputs)
        found.append((y.detach(), torch.autograd.grad(y, module.parameters(), cotangent_of(y))))
    torch.testing.assert_close(*found)


class Lean(nn.Sequential):
    """A replayed chain as one module."""

    def forward(self, x: Tensor) -> Tensor:
        return replay(x, *self)


def lean_copy(layers: nn.Sequential) -> Lean:
    """The same layers, with weights of their own, as a replayed chain."""
    return Lean(*copy.deepcopy(layers))


LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def run(
    function: Callable[..., Tensor], *, frozen: Sequence[str] = (), **tensors: Tensor | None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Call ``function(**tensors)`` and go backward from one random cotangent.

    Returns:
        The output, and the gradient of each tensor by name.
    """
    leaves = {
        name: None if t is None else t.detach().requires_grad_(name not in frozen)
        for name, t in tensors.items()
    }
    y = function(**leaves)
    y.backward(cotangent_of(y))
    return y.detach(), {name: t.grad for name, t in leaves.items() if t is not None}


def under_autocast(dtype: torch.dtype, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` under CPU autocast; its backward is left outside, where PyTorch wants it."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            return function(*args, **kwargs)

    return forward


def train(
    module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    """One forward and backward pass of ``module``, or of a function ``forward`` that uses it.

    Returns:
        The output, the gradients of ``x`` and of the parameters, and the buffers afterwards.
    """
    x = x.detach().requires_grad_()
    y = module(x) if forward is None else forward(x)
    y.backward(cotangent_of(y))
    found = {"input": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    return y.detach(), found, {name: buffer.clone() for name, buffer in module.named_buffers()}


def code_blocks(markdown: str, language: str) -> list[str]:
    """The code of a text in a language, block by block."""
    return re.findall(rf"```{language}\n(.*?)```", markdown, flags=re.DOTALL)


def run_code(blocks: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run blocks of Python as one file, written to ``folder``; return its names."""
    path = folder / "blocks.py"
    path.write_text("\n".join(blocks))
    return runpy.run_path(str(path))
