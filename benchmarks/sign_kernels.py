"""Speed of the kernels of ASA's signs on a CUDA device, with the shapes of ViT-L.

    python benchmarks/sign_kernels.py

The passes that add, pack and unpack signs, against a copy that moves as many bytes; then two ways
to the weight gradient, decoding the bits as a whole tensor before the product and decoding them
next to it, against the gradient of backpropagation. Every time is a median, with caches emptied
before each run. Writes ``results/sign_kernels_cuda.json``.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from record import record
from torch import Tensor

from aal.ops.sign_linear import (
    add_sign,
    add_sign_pack,
    add_sign_reference,
    gradient_from_bits,
    gradient_from_tiles,
    sign_scale,
)
from aal.ops.sign_pack import layout_of, pack_sign, unpack_sign
from aal.training.command_line import UserError, run

TOKENS = 25_216  # 128 images of 197
WIDTHS = (1024, 4096)
LAYERS = {  # outputs and columns of the weight
    "queries, keys and values": (3072, 1024),
    "attention's output": (1024, 1024),
    "first feed-forward": (4096, 1024),
    "second feed-forward": (1024, 4096),
}
DTYPES = (torch.bfloat16, torch.float32)  # of the passes; products are in the first one
EPSILON = 0.01
WARM_UP, REPEAT = 100, 500  # milliseconds


def median_seconds(action: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(action, warmup=WARM_UP, rep=REPEAT, return_mode="median") / 1000


def passes(width: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Bytes that each pass has to move, per second, and its time against a copy of as many."""
    x = torch.randn(TOKENS, width, device="cuda", dtype=dtype)
    packed, layout = pack_sign(x), layout_of(x)
    actions: dict[str, tuple[Callable[[], object], int]] = {
        "add": (lambda: add_sign(x, -1, EPSILON), 2 * x.nbytes),
        "add and pack": (lambda: add_sign_pack(x, -1, EPSILON), 2 * x.nbytes + packed.nbytes),
        "add and pack, operation by operation": (
            lambda: (add_sign_reference(x, -1, EPSILON), pack_sign(x)),
            2 * x.nbytes + packed.nbytes,
        ),
        "pack": (lambda: pack_sign(x), x.nbytes + packed.nbytes),
        "unpack": (lambda: unpack_sign(packed, layout, dtype), x.nbytes + packed.nbytes),
    }
    rows = {}
    for name, (action, num_bytes) in actions.items():
        source = torch.randint(256, (num_bytes // 2,), dtype=torch.uint8, device="cuda")
        copy, own = median_seconds(source.clone), median_seconds(action)
        rows[name] = {
            "milliseconds": round(1000 * own, 4),
            "gigabytes_per_second": round(num_bytes / own / 1e9, 1),
            "times_a_copy": round(own / copy, 3),
        }
    return rows


def products(outputs: int, columns: int, scaled: bool) -> dict[str, dict[str, float]]:
    """Time of each way to a weight gradient, and its error, relative to the norm."""
    x = torch.randn(TOKENS, columns, device="cuda", dtype=DTYPES[0])
    grad = torch.randn(TOKENS, outputs, device="cuda", dtype=DTYPES[0])
    scale = sign_scale(x, -1, EPSILON) if scaled else None
    arguments = (grad, pack_sign(x), columns, -1, scale)
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
            "teraflops": round(2 * TOKENS * outputs * columns / seconds / 1e12, 1),
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
    if not torch.cuda.is_available():
        raise UserError("no CUDA device was found, and there is nothing to measure without one")
    torch.manual_seed(0)
    numbers: dict[str, Any] = {"tokens": TOKENS, "passes": {}, "weight_gradient": {}}
    for dtype in DTYPES:
        for width in WIDTHS:
            name = f"{width} columns, {str(dtype).removeprefix('torch.')}"
            numbers["passes"][name] = passes(width, dtype)
    for name, sizes in LAYERS.items():
        for scaled in (False, True):
            key = f"{name}, {'mean' if scaled else 'fixed'} scale"
            numbers["weight_gradient"][key] = products(*sizes, scaled)
    record("sign_kernels_cuda", numbers)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "sign_kernels.py"))
