"""Bandwidth of the kernels that pack, quantise and restore, against a copy of the same bytes.

    python benchmarks/bandwidth.py

A tensor of 1 GiB in bfloat16 on the GPU. Bytes are those that a kernel has to move, its input read
once and its output written once; the copy reads and writes as many. Writes
``results/bandwidth_cuda.json``.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from interleaved import compare, take_turns
from record import record
from torch import Tensor
from torch.utils._pytree import tree_leaves

from aal.ops.group_quantise import dequantise_groups, quantise_groups
from aal.ops.noise import Noise
from aal.ops.sign_pack import layout_of, pack_sign, unpack_sign
from aal.training.command_line import Parser, UserError, run

ELEMENTS = 2**29
CALLS, ROUNDS = 10, 20  # so many calls at a time that the time to launch one is nothing
BITS = (2, 4, 8)


def kernels(x: Tensor) -> dict[str, tuple[Callable[[], Any], int]]:
    """By name: a call of each kernel on (n,) elements, and the bytes that it moves."""
    packed, numel, dtype = pack_sign(x), x.numel(), x.dtype
    found = {
        "pack signs": (lambda: pack_sign(x), _bytes(x, packed)),
        "unpack signs": (lambda: unpack_sign(packed, layout_of(x), dtype), _bytes(x, packed)),
    }
    for bits in BITS:
        code = quantise_groups(x, bits, Noise(0, 0))
        moved = _bytes(x, code)
        quantise = functools.partial(quantise_groups, x, bits, Noise(0, 0))
        restore = functools.partial(dequantise_groups, code, bits, numel, dtype)
        found[f"quantise, {bits} bit"] = quantise, moved
        found[f"dequantise, {bits} bit"] = restore, moved
    return found


def _bytes(*tensors: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tree_leaves(tensors))


def bandwidths(x: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """GB/s of each kernel, and its share of the copy's."""
    rows = {}
    for name, (kernel, moved) in kernels(x).items():
        source = torch.empty(moved // 2, dtype=torch.uint8, device=x.device).random_()
        actions = {"copy": _repeated(source.clone), "kernel": _repeated(kernel)}
        row = compare(take_turns(actions, rounds), "kernel")
        rows[name] = {
            "gb_per_second": round(CALLS * moved / row["kernel"]["median_seconds"] / 1e9, 1),
            "share_of_copy": row["copy"]["median_ratio"],
            "share_20_percent": row["copy"]["ratio_20_percent"],
            "share_80_percent": row["copy"]["ratio_80_percent"],
        }
    return rows


def _repeated(call: Callable[[], Any]) -> Callable[[], None]:
    def action() -> None:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()

    return action


def main(arguments: Sequence[str]) -> int:
    Parser(prog="bandwidth.py", description=__doc__.splitlines()[0]).parse_args(arguments)
    if not torch.cuda.is_available():
        raise UserError("the kernels need a GPU, and PyTorch finds none")
    torch.manual_seed(0)
    x = torch.randn(ELEMENTS, dtype=torch.bfloat16, device="cuda")
    record("bandwidth_cuda", {"elements": ELEMENTS, "kernels": bandwidths(x, ROUNDS)})
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "bandwidth.py"))
