"""Every kernel as it is registered for CUDA: an operator with the results of its definition.

Tests of the kernels call them directly. Here they run behind their operators, by Triton's
interpreter where there is no GPU, so that PyTorch's own checks of operators see them: fake results
of the same shapes and strides, and no result that shares memory with an input or another result.
"""

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

import aal.ops
from aal.ops.group_quantise import GROUP, quantise_groups
from aal.ops.noise import Noise
from aal.ops.sign_pack import pack_sign

pytest.importorskip("triton")
for module in pkgutil.iter_modules(aal.ops.__path__):
    importlib.import_module(f"aal.ops.{module.name}")

KERNELS = {
    name.removeprefix("aal::"): operator
    for name, operator in OPDEFS.items()
    if name.startswith("aal::") and "cuda" in operator._backend_fns
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton 3.6, of PyTorch 2.11, cannot interpret a loop to a bound that is an argument.
LOOPS = ("layer_norm_backward_again", "sign_gradient_from_bits")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: x.repeat(1, 2)[:, 1::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "empty": lambda x: x[:0],
}


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def arguments_of(name: str, x: Tensor) -> list[tuple]:
    """What to call an operator with, for a tensor (6, 16) in some layout."""
    flat, half = x.reshape(-1), torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    own, parameters = floats(2, 16, dtype=x.dtype), floats(4, 16)
    packed = pack_sign(flat)
    group = 2 * GROUP
    if name in ("quantise_groups", "dequantise_groups"):
        values = floats(2 * group, dtype=x.dtype)
        if name == "quantise_groups":
            return [
                (values, bits, 1, 0, group, apart) for bits in (2, 4) for apart in (False, True)
            ]
        code = quantise_groups(values, 4, Noise(1, 0), group)
        return [(*code, 4, values.numel(), x.dtype, group, False)]
    return {
        "pack_sign": [(flat,)],
        "unpack_sign": [(packed, flat.numel(), x.dtype, low) for low in (-1, 0)],
        "add_sign": [(flat, -1, 0.01)],
        "add_sign_pack": [(flat, 0, 0.01)],
        "normalise_relu": [(x, *parameters), (image(x), *floats(4, 3))],
        "activation_backward_again": [(floats(6, 16, dtype=x.dtype)[: len(x)], x, "gelu")],
        "coded_activation": [
            (x.contiguous(), "silu", [-0.5, 0.0, 0.5], 0, 0.0),
            (x.contiguous(), "gelu", [], -1, 0.01),
        ],
        "multiply_by_derivative": [
            (x, [packed, packed], [0.0, 0.25, 0.5, 1.0]),
            (x, [packed], []),
        ],
        "layer_norm_add_sign": [(x, *own, 1e-5, -1, 0.01, half, x.dtype)],
        "layer_norm_backward_again": [
            (floats(len(x), 16, dtype=half), x, *own, 1e-5, wanted) for wanted in (True, False)
        ]
        + [(floats(len(x), 16, dtype=half), x, *own.float(), 1e-5, True)],
        "sign_gradient_from_bits": [
            # The interpreter makes no constants in bfloat16.
            (floats(len(x), 3, dtype=torch.float16), packed, 16, -1, scale)
            for scale in (None, floats(len(x), dtype=torch.float16))
        ],
    }[name]


def image(x: Tensor) -> Tensor:
    return floats(2, 3, 4, 5, dtype=x.dtype).contiguous(memory_format=torch.channels_last)


CASES = [
    (name, layout)
    for name in KERNELS
    for layout in LAYOUTS
    if layout == "contiguous" or not name.endswith("quantise_groups")  # whose values have no other
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
@pytest.mark.parametrize(("name", "layout"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_obey_the_rules_of_custom_operators(name, layout, dtype, monkeypatch):
    if name in LOOPS and version("triton").startswith("3.6."):
        pytest.skip("needs a newer interpreter")
    x = LAYOUTS[layout](floats(6, 16, dtype=dtype))
    own = KERNELS[name]
    calls = arguments_of(name, x)
    expected = [flattened(own(*arguments)) for arguments in calls]
    monkeypatch.setitem(own._backend_fns, None, own._backend_fns["cuda"])
    for arguments, definition in zip(calls, expected, strict=True):
        found = flattened(own(*arguments))
        tolerance = 0.02 if torch.bfloat16 in {t.dtype for t in definition} else 2e-3
        for result, true in zip(found, definition, strict=True):
            assert (result.dtype, result.shape) == (true.dtype, true.shape)
            torch.testing.assert_close(result, true, rtol=tolerance, atol=tolerance)
        torch.library.opcheck(own._opoverload, arguments)


def flattened(results: Tensor | list | tuple) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)
