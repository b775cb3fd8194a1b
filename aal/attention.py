"""Multi-head attention under every rule and lean mode.

Projections that read one input are one linear layer: queries, keys and values of self-attention,
keys and values of cross-attention. Under ASA they keep one code of it.

The kernel of attention keeps its own output, which is the input of ``proj``, and ``gcp`` keeps
neither: a rule on ``proj`` (level 3) saves nothing but where PyTorch attends without a kernel, as
it does on CPU when weights of attention are dropped.

Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2; levels as in
``aal.rules.placement``.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aal.lean import replay
from aal.method import Method
from aal.ops.sign_pack import SignCode
from aal.rules.signed import in_turn


class _Attention(nn.Module):
    """What both kinds share; see ``SelfAttention`` for the arguments."""

    def __init__(self, width: int, heads: int, method: Method, scale: float | None, dropout: float):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads, self.method, self.scale, self.dropout = heads, method, scale, dropout

    def _project(self, linear: nn.Linear, x: Tensor, before: Sequence[nn.Module]) -> Tensor:
        """``linear`` of ``x`` after the layers ``before``, whose results need not be kept."""
        if self.method.is_lean and before:
            return replay(x, *before, linear)
        return in_turn(x, *before, linear)

    def _heads(self, x: Tensor, projections: int) -> Tensor:
        """(B, T, P * C) -> (P, B, heads, T, C / heads)."""
        return x.unflatten(-1, (projections, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        """(B, heads, T, D), (B, heads, S, D) twice -> (B, T, C)."""
        dropout = self.dropout if self.training else 0.0
        options = {"dropout_p": dropout, "is_causal": is_causal, "scale": self.scale}
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
        return self.proj(y.transpose(1, 2).flatten(2))

    def _core(self, attend: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """The part of attention that ``gcp`` computes again."""
        if not self.method.gcp:
            return attend(*inputs)
        draws = self.training and self.dropout > 0
        return checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=draws)


class SelfAttention(_Attention):
    """Attention of a sequence to itself.

    Args:
        width: C, features of a token.
        heads: parts of C that attend each by themselves.
        method: rule and lean mode.
        scale: factor on the scores, 1/√(C / heads) if None.
        dropout: probability, on the weights of attention.
        is_causal: a token sees itself and the ones before it alone. Goes without a mask.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        method: Method,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        is_causal: bool = False,
    ):
        super().__init__(width, heads, method, scale, dropout)
        self.is_causal = is_causal
        self.qkv = method.linear(4, width, 3 * width, projections=3)
        self.proj = method.linear(3, width, width)

    def forward(self, x: Tensor, *before: nn.Module, mask: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C), of ``x`` after the layers ``before`` (a norm).

        ``mask`` is True where a query (third dimension) may see a key (fourth), broadcast to
        (B, heads, T, T).
        """
        return self._core(self._attend_merged, self._project(self.qkv, x, before), mask)

    def stock_forward(self, x: Tensor, *before: nn.Module, mask: Tensor | None = None) -> Tensor:
        """Layer by layer; see ``aal.memory.report``."""
        return self._attend_merged(in_turn(x, *before, self.qkv), mask)

    def step(self, x: Tensor, cache: "KeyValueCache", *before: nn.Module) -> Tensor:
        """The last of a growing sequence: (B, 1, C) -> (B, 1, C); ``cache`` holds the others."""
        q, k, v = self._heads(in_turn(x, *before, self.qkv), 3)
        return self._attend(q, *cache.append(k, v), mask=None)

    def _attend_merged(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        return self._attend(*self._heads(qkv, 3), mask, self.is_causal)


class CrossAttention(_Attention):
    """Attention of a sequence to another one, the memory; arguments as ``SelfAttention``."""

    def __init__(self, width: int, heads: int, method: Method, *, dropout: float = 0.0):
        super().__init__(width, heads, method, None, dropout)
        self.q = method.linear(4, width, width)
        self.kv = method.linear(4, width, 2 * width, projections=2)
        self.proj = method.linear(3, width, width)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *before: nn.Module,
        mask: Tensor | None = None,
        code: SignCode | None = None,
    ) -> Tensor:
        """(B, T, C), (B, S, C) -> (B, T, C), of ``x`` after the layers ``before`` (a norm).

        ``mask`` is as in ``SelfAttention``, (B, heads, T, S). ``code`` is that of ``memory``, where
        several layers under ASA read the same one.
        """
        kv = self.kv(memory) if code is None else self.kv(memory, code)
        return self._core(self._attend_projected, self._project(self.q, x, before), kv, mask)

    def stock_forward(
        self,
        x: Tensor,
        memory: Tensor,
        *before: nn.Module,
        mask: Tensor | None = None,
        code: SignCode | None = None,
    ) -> Tensor:
        """Layer by layer; see ``aal.memory.report``."""
        return self._attend_projected(in_turn(x, *before, self.q), self.kv(memory), mask)

    def keys_values(self, memory: Tensor) -> Tensor:
        """What ``step`` reads of the memory: (B, S, C) -> (2, B, heads, S, C / heads)."""
        return self._heads(self.kv(memory), 2)

    def step(
        self, x: Tensor, keys_values: Tensor, mask: Tensor | None, *before: nn.Module
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), each of the T tokens by itself."""
        (q,) = self._heads(in_turn(x, *before, self.q), 1)
        return self._attend(q, *keys_values, mask)

    def _attend_projected(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        return self._attend(*self._heads(q, 1), *self._heads(kv, 2), mask)


class KeyValueCache:
    """Keys and values of the tokens that growing sequences have so far, without gradients.

    Args:
        capacity: tokens to make room for.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        # (capacity, B, heads, D): the tokens so far lie together, so that one copy selects.
        self._buffers: tuple[Tensor, ...] = ()

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add keys and values (B, heads, 1, D) of a token; returns all, (B, heads, T, D)."""
        if not self._buffers:
            shape = (self.capacity, *new[0].shape[:2], new[0].shape[3])
            self._buffers = tuple(tensor.new_empty(shape) for tensor in new)
        for buffer, tensor in zip(self._buffers, new, strict=True):
            buffer[self.length] = tensor[:, :, 0]
        self.length += 1
        return tuple(buffer[: self.length].permute(1, 2, 0, 3) for buffer in self._buffers)

    def select(self, rows: Tensor) -> None:
        """Keep sequences ``rows`` (R,), in this order; one may be there several times."""
        selected = []
        for buffer in self._buffers:
            kept = buffer.new_empty((self.capacity, len(rows), *buffer.shape[2:]))
            torch.index_select(buffer[: self.length], 1, rows, out=kept[: self.length])
            selected.append(kept)
        self._buffers = tuple(selected)
