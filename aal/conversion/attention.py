"""Attention modules that hand the weights of their layers to functions instead of calling them."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aal.conversion.linear import BiasRule, SignLinear, SignRule, sign_linear
from aal.conversion.notes import Note, Step, note_of, read, write_note
from aal.conversion.swap import Converted
from aal.lean.operations import LinearOperation
from aal.rules.aba import linear_aba
from aal.rules.layer import learns


class ReadingAttention(Converted):
    """``nn.MultiheadAttention`` that does not keep an input that can be computed again.

    Queries, keys and values are projected by ``in_proj_weight`` here, and ``out_proj`` is called.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``; there are no nested tensors."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask, which is missing")
        inputs = (query, key, value)
        if is_single := query.dim() == 2:
            inputs = [x.unsqueeze(1) for x in inputs]  # PyTorch projects them one by one then
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:  # PyTorch's order of rows, so that sums round alike
            inputs = _each(inputs, lambda x: x.transpose(0, 1))
        q, k, v = self._project(*inputs)
        sizes = q.shape[1], self.num_heads, len(q), len(k)
        mask = _merged_mask(attn_mask, key_padding_mask, sizes, q.dtype)
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else mask
        q, k, v = (self._heads(x) for x in (q, k, v))  # (B, heads, T or S, D)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = self._project_out(y)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if is_single:
            return y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y.transpose(0, 1) if self.batch_first else y, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """(T, B, C), (S, B, C) twice -> the same shapes. What reads one input is one product."""
        width, inputs = self.embed_dim, [query, key, value]
        parts: list[Tensor] = []
        while len(parts) < 3:
            first = len(parts)
            last = first + 1
            while last < 3 and inputs[last] is inputs[first]:
                last += 1
            y = self._apply_in(inputs[first], slice(first * width, last * width))
            if last - first > 1:  # one copy for all, as PyTorch makes it
                y = y.unflatten(-1, (last - first, width)).unsqueeze(0).transpose(0, -2)
                parts += y.squeeze(-2).contiguous().unbind()
            else:
                parts.append(y)
        return parts

    def _apply_in(self, x: Tensor, rows: slice) -> Tensor:
        """The product of an input and some rows of ``in_proj_weight``."""
        weight, bias = self._in_rows(rows)
        note = note_of(x)
        if note.base is None or not learns(weight):
            return F.linear(x, weight, bias)
        return read(LinearOperation(), (weight, bias), x, note)

    def _in_rows(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if rows == slice(0, len(weight)):
            return weight, bias
        return weight[rows], None if bias is None else bias[rows]

    def _heads(self, x: Tensor) -> Tensor:
        """(T, B, C) -> (B, heads, T, C / heads), by PyTorch's steps, so that sums round alike."""
        length, batch, width = x.shape
        x = x.contiguous().view(length, batch * self.num_heads, -1).transpose(0, 1)
        return x.view(batch, self.num_heads, length, width // self.num_heads)

    def _project_out(self, y: Tensor) -> Tensor:
        """(B, heads, T, D) -> (T, B, C)."""
        length, batch = y.shape[2], y.shape[0]
        rows = _rows_of(y)
        if not torch.compiler.is_compiling() and rows._base is None:  # a copy; the kernel keeps y
            write_note(rows, Note(y, (Step(_rows_of),)))
        return self.out_proj(rows).view(length, batch, -1)


def _rows_of(y: Tensor) -> Tensor:
    """(B, heads, T, D) -> (T * B, heads * D)."""
    return y.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)


class SignAttention(ReadingAttention, SignRule):
    """``nn.MultiheadAttention`` whose projections of queries, keys and values learn under ASA."""

    settings = SignLinear.settings

    def _apply_in(self, x: Tensor, rows: slice) -> Tensor:
        return sign_linear(self, x, *self._in_rows(rows), self.operation())


class BiasAttention(ReadingAttention, BiasRule):
    """``nn.MultiheadAttention`` whose projections learn under ABA: ``aux`` is (3, C)."""

    settings = ("lr_expansion",)
    parameters_added = ("aux",)

    def _apply_in(self, x: Tensor, rows: slice) -> Tensor:
        aux = self.aux[rows.start // self.embed_dim : rows.stop // self.embed_dim]
        self.observe(x, aux)
        return linear_aba(x, aux, *self._in_rows(rows), lr_expansion=self.lr_expansion)


class LayerCallingAttention(Converted):
    """Attention that gives weights of its own layers to ``F.linear``, which calls the layers.

    Settings:
        called: names of the layers.
    """

    settings = ("called",)

    def forward(self, *args, **kwargs):
        layers = [getattr(self, name) for name in self.called]
        with _CallingLayers(layers):
            return self.original.forward(self, *args, **kwargs)


class _CallingLayers(TorchFunctionMode):
    """``F.linear`` with the weight of a converted layer is that layer."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = {id(layer.weight): layer for layer in layers}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            x, weight, bias, *_ = (*args, *kwargs.values(), None)
            if (layer := self.layers.get(id(weight))) is not None:
                return layer.apply_to(x, bias)
        return function(*args, **kwargs)


class SlowEncoder(Converted):
    """``nn.TransformerEncoder`` and its layer without the fused path, which calls no layers."""

    use_nested_tensor = property(lambda self: False)
    activation_relu_or_gelu = property(lambda self: 0)


def _each(inputs: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Apply a function to query, key and value; neighbours that were one tensor stay one."""
    results: list[Tensor] = []
    for i, x in enumerate(inputs):
        is_same = i > 0 and x is inputs[i - 1]
        results.append(results[-1] if is_same else function(x))
    return results


def _merged_mask(
    mask: Tensor | None,
    padding: Tensor | None,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> Tensor | None:
    """Sum of a mask (T, S) or (B * heads, T, S) and one of padding (B, S), where True hides.

    Args:
        sizes: B, heads, T and S.

    Raises:
        RuntimeError: a mask of another shape, or one of integers.
    """
    batch, heads, length, source = sizes
    parts = []
    if mask is not None:
        shapes = ((length, source), (batch * heads, length, source))
        _check_mask("attn_mask", mask, shapes)
        parts.append(mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, heads)))
    if padding is not None:
        _check_mask("key_padding_mask", padding, ((batch, source),))
        parts.append(padding[:, None, None])
    return sum(_additive(part, dtype) for part in parts) if parts else None


def _check_mask(name: str, mask: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    if mask.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise RuntimeError(f"{name} must have shape {wanted}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RuntimeError(f"{name} must hold booleans or floating-point numbers, not {mask.dtype}")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
