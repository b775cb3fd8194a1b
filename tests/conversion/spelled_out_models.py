"""The rules on whole models in PyTorch's operations: what ``aal.convert`` is compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from helpers import spelled_out
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Of an input: the activation h that the weight multiplies, what stands in for it in the weight
# gradient, and the gain. ``part`` tells queries (0), keys and values apart.
Formula = Callable[[Tensor, int], tuple[Tensor, Tensor, float]]


def sign_formula(low: float, epsilon: float, lr_expansion: float) -> Formula:
    """ASA."""

    def formula(x: Tensor, part: int) -> tuple[Tensor, Tensor, float]:
        sign = torch.where(x > 0, 1.0, low).to(x.dtype)
        return x + epsilon * sign, sign, epsilon * lr_expansion

    return formula


def mean_sign_formula(low: float, epsilon: float) -> Formula:
    """ASA with scale="mean": the size per row that brings size * sign nearest to h."""

    def formula(x: Tensor, part: int) -> tuple[Tensor, Tensor, float]:
        sign = torch.where(x > 0, 1.0, low).to(x.dtype)
        h = x + epsilon * sign
        size = (h * sign).sum(-1, keepdim=True) / (sign * sign).sum(-1, keepdim=True).clamp(1e-9)
        return h, (size * sign).detach(), 1.0

    return formula


def bias_formula(aux: Tensor, lr_expansion: float, is_image: bool = False) -> Formula:
    """ABA with a vector (C,), or one for each part (3, C); images are (N, C, H, W)."""

    def formula(x: Tensor, part: int) -> tuple[Tensor, Tensor, float]:
        vector = aux[part] if aux.dim() == 2 else aux
        vector = vector[:, None, None] if is_image else vector
        return x + vector, vector.expand_as(x), lr_expansion

    return formula


def given_formula(auxiliary: Callable[[], Tensor]) -> Formula:
    """ARA: the weight gradient at another tensor, which is known when the layer is reached."""
    return lambda x, part: (x, auxiliary(), 1.0)


class SpelledOut(TorchFunctionMode):
    """In it, a stock model computes the formulas of its layers, which are found by their weights.

    Args:
        formulas: by identity of the weight.
    """

    def __init__(self, formulas: Mapping[int, Formula]):
        super().__init__()
        self.formulas = formulas

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == F.linear:
            return self.apply(F.linear, *args, **kwargs)
        if function == F.conv2d:
            x, weight, bias, stride, padding, dilation, groups = args
            options = {"stride": stride, "padding": padding, "dilation": dilation}
            return self.apply(F.conv2d, x, weight, bias, groups=groups, **options)
        if function == torch.addmm and id(args[2]) in self.formulas:  # GPT-2: bias, input, weight
            bias, x, weight = args
            return self.apply(_linear_transposed, x, weight, bias)
        if function == F.multi_head_attention_forward:
            return self.attention(*args, **kwargs)
        return function(*args, **kwargs)

    def apply(
        self,
        function: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        formula = self.formulas.get(id(weight))
        if formula is None:
            return function(x, weight, bias, **options)
        h, r, gain = formula(x, 0)
        return spelled_out(function, h, r, weight, bias, gain, **options)

    def attention(
        self, query, key, value, width, heads, weight, bias, *args, **kwargs
    ) -> tuple[Tensor, None]:
        """Of tensors (T, B, C), a mask for the whole batch or padding, and no weights returned."""
        _, _, _, dropout, out_weight, out_bias = args
        assert not kwargs["need_weights"]
        formula = self.formulas.get(id(weight), lambda x, part: (x, x, 1.0))
        q, k, v = (
            spelled_out(F.linear, h, r, own_weight, own_bias, gain).unflatten(-1, (heads, -1))
            for own_weight, own_bias, (h, r, gain) in zip(
                weight.chunk(3),
                bias.chunk(3),
                (formula(x, part) for part, x in enumerate((query, key, value))),
                strict=True,
            )
        )
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # (B, heads, T, D)
        mask = kwargs["attn_mask"]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        if kwargs["key_padding_mask"] is not None:
            hidden = kwargs["key_padding_mask"][:, None, None]
            if hidden.dtype == torch.bool:
                hidden = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -torch.inf)
            mask = hidden if mask is None else mask + hidden
        dropout = dropout if kwargs["training"] else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = y.permute(2, 0, 1, 3).flatten(2)  # (T, B, C)
        return self.apply(F.linear, y, out_weight, out_bias), None


def _linear_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.T, bias)


def weight_of(module: nn.Module) -> nn.Parameter:
    return module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
