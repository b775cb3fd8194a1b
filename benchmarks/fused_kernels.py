"""Fused kernels on a CUDA device, against the operations that they stand for, in sizes of ViT-L.

    python benchmarks/fused_kernels.py

Each pass over memory against PyTorch's operations one after the other, and against a copy that
moves as many bytes as the pass has to; then two ways to the weight gradient under ASA, decoding the
bits as a whole tensor before the product and next to it, against the gradient of backpropagation.
All in bfloat16. Every time is a median, with caches emptied before each run. Writes
``results/fused_kernels_cuda.json``.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor

from aal.ops.activation import Activation
from aal.ops.addition import Addition
from aal.ops.batch_norm import (
    Parameters,
    Statistics,
    batch_norm_relu_fused,
    batch_norm_relu_replay,
    batch_norm_replay,
)
from aal.ops.derivative_code import (
    coded_activation,
    encode_derivative,
    multiply_by_derivative,
    table_of,
)
from aal.ops.layer_norm import (
    layer_norm,
    layer_norm_add_sign,
    layer_norm_backward,
    layer_norm_backward_again,
)
from aal.ops.sign_linear import (
    add_sign_pack,
    add_sign_reference,
    gradient_from_bits,
    gradient_from_tiles,
    sign_scale,
)
from aal.ops.sign_pack import pack_sign
from aal.training.command_line import Parser, UserError, run

TOKENS, WIDTH, HIDDEN = 25_216, 1024, 4096  # 128 images of 197 tokens
IMAGES = (256, 64, 56, 56)  # of the first stage of ResNet-50, in channels-last
LAYERS = {  # outputs and columns of the weight
    "queries, keys and values": (3 * WIDTH, WIDTH),
    "attention's output": (WIDTH, WIDTH),
    "first feed-forward": (HIDDEN, WIDTH),
    "second feed-forward": (WIDTH, HIDDEN),
}
ADDITION = Addition(-1, 0.01)
EPS = 1e-6
WARM_UP, REPEAT = 50, 250  # milliseconds


class Pass(NamedTuple):
    """A kernel, what it stands for, and the bytes that it has to move."""

    fused: Callable[[], Any]
    one_by_one: Callable[[], Any]
    num_bytes: float


def passes(device: torch.device, scale: int = 1) -> dict[str, Pass]:
    """Every fused pass by name; on tensors that are smaller by ``scale``."""
    dtype = {"dtype": torch.bfloat16, "device": device}
    narrow = torch.randn(TOKENS // scale, WIDTH, **dtype)
    wide = torch.randn(TOKENS // scale, HIDDEN, **dtype)
    weight, bias = torch.randn(2, WIDTH, **dtype)
    image = torch.randn(IMAGES[0] // scale, *IMAGES[1:], **dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    norm = Parameters(*torch.rand(4, IMAGES[1], device=device))
    statistics = Statistics(*torch.rand(2, IMAGES[1], device=device), image.new_empty(0))
    gelu, table = Activation("gelu"), table_of(Activation("gelu"), "fitted")
    _, planes = coded_activation(wide, gelu, table)

    def added(x: Tensor) -> tuple[Tensor, Tensor]:
        return add_sign_reference(x, *ADDITION), pack_sign(x)

    def layer_norm_gradients() -> tuple[Tensor | None, ...]:
        y, *found = layer_norm(narrow, (WIDTH,), weight, bias, EPS)
        needs = (True, True, True)
        grads = layer_norm_backward(narrow, narrow, (WIDTH,), weight, bias, *found, needs)
        return grads[0], y, *grads[1:]

    def batch_norm_relu() -> Tensor:
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        return F.batch_norm(image, mean, var, *norm[:2], True, 0.1, EPS).relu_()

    bits = wide.numel() / 8
    return {
        "add and pack signs": Pass(
            lambda: add_sign_pack(wide, *ADDITION), lambda: added(wide), 2 * wide.nbytes + bits
        ),
        "GELU and its code": Pass(
            lambda: coded_activation(wide, gelu, table),
            lambda: (F.gelu(wide), encode_derivative(wide, table)),
            2 * wide.nbytes + 2 * bits,
        ),
        "GELU, its code, add signs": Pass(
            lambda: coded_activation(wide, gelu, table, ADDITION),
            lambda: (added(F.gelu(wide))[0], encode_derivative(wide, table)),
            2 * wide.nbytes + 2 * bits,
        ),
        "GELU, add and pack signs": Pass(
            lambda: coded_activation(wide, gelu, None, ADDITION),
            lambda: added(F.gelu(wide)),
            2 * wide.nbytes + bits,
        ),
        "gradient of GELU from its code": Pass(
            lambda: multiply_by_derivative(wide, planes, table),
            lambda: gelu.backward(wide, wide),
            2 * wide.nbytes + 2 * bits,
        ),
        "layer norm, add and pack signs": Pass(
            lambda: layer_norm_add_sign(narrow, weight, bias, EPS, ADDITION),
            lambda: added(F.layer_norm(narrow, (WIDTH,), weight, bias, EPS)),
            2 * narrow.nbytes + narrow.numel() / 8,
        ),
        "gradient of GELU, and GELU once more": Pass(
            lambda: gelu.backward_again(wide, wide),
            lambda: (gelu.backward(wide, wide), gelu.forward(wide)),
            4 * wide.nbytes,
        ),
        "gradients of layer norm, and it once more": Pass(
            lambda: layer_norm_backward_again(narrow, narrow, weight, bias, EPS, True),
            layer_norm_gradients,
            4 * narrow.nbytes,
        ),
        "batch norm and ReLU": Pass(
            lambda: batch_norm_relu_fused(image, norm, True, 0.1, EPS),
            batch_norm_relu,
            3 * image.nbytes,
        ),
        "batch norm and ReLU once more": Pass(
            lambda: batch_norm_relu_replay(image, norm, True, EPS, statistics),
            lambda: batch_norm_replay(image, norm, True, EPS, statistics).relu_(),
            2 * image.nbytes,
        ),
    }


def median_seconds(action: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(action, warmup=WARM_UP, rep=REPEAT, return_mode="median") / 1000


def measure_pass(one: Pass) -> dict[str, float]:
    """Milliseconds of each way, and the kernel's time in units of the other's and of a copy's."""
    source = torch.empty(int(one.num_bytes) // 2, dtype=torch.uint8, device="cuda").random_()
    copy, fused, apart = map(median_seconds, (source.clone, one.fused, one.one_by_one))
    return {
        "milliseconds": round(1000 * fused, 4),
        "one_by_one_milliseconds": round(1000 * apart, 4),
        "times_one_by_one": round(fused / apart, 3),
        "times_a_copy": round(fused / copy, 3),
    }


def products(outputs: int, columns: int, scaled: bool) -> dict[str, dict[str, float]]:
    """Time of each way to a weight gradient, and its error, relative to the norm."""
    x = torch.randn(TOKENS, columns, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(TOKENS, outputs, device="cuda", dtype=torch.bfloat16)
    scale = sign_scale(x, *ADDITION) if scaled else None
    arguments = (grad, pack_sign(x), columns, ADDITION.low, scale)
    exact = exact_gradient(grad, x, scale)
    actions: dict[str, Callable[[], Tensor]] = {
        "decoded whole": lambda: gradient_from_tiles(*arguments),
        "decoded next to the product": lambda: gradient_from_bits(*arguments),
    }
    stock = median_seconds(lambda: grad.T @ x)
    rows = {"backpropagation": {"milliseconds": round(1000 * stock, 4)}}
    for name, action in actions.items():
        error = torch.linalg.norm(action().double() - exact) / torch.linalg.norm(exact)
        seconds = median_seconds(action)
        rows[name] = {
            "milliseconds": round(1000 * seconds, 4),
            "times_backpropagation": round(seconds / stock, 3),
            "relative_error": float(f"{error.item():.2g}"),
        }
    return rows


def exact_gradient(grad: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
    """The weight gradient in float64, on the device."""
    sign = torch.where(x > 0, 1.0, -1.0).double()
    if scale is not None:
        sign *= scale.double()[:, None]
    return grad.double().T @ sign


def main(arguments: Sequence[str]) -> int:
    Parser(prog="fused_kernels.py", description=__doc__.splitlines()[0]).parse_args(arguments)
    if not torch.cuda.is_available():
        raise UserError("the kernels need a GPU, and PyTorch finds none")
    torch.manual_seed(0)
    numbers: dict[str, Any] = {"tokens": TOKENS, "passes": {}, "weight_gradient": {}}
    for name, one in passes(torch.device("cuda")).items():
        numbers["passes"][name] = measure_pass(one)
    for name, sizes in LAYERS.items():
        for scaled in (False, True):
            key = f"{name}, {'mean' if scaled else 'fixed'} scale"
            numbers["weight_gradient"][key] = products(*sizes, scaled)
    record("fused_kernels_cuda", numbers)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "fused_kernels.py"))
