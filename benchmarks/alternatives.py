"""What a user would pick instead: PyTorch's own ways to hold less between forward and backward.

Each changes a model in place, by its blocks. ``torch.autograd.graph.save_on_cpu`` needs no help.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

_aten = torch.ops.aten
ATTENTION = (
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)
PRODUCTS = (_aten.mm.default, _aten.addmm.default)
CONVOLUTIONS = (_aten.convolution.default,)
_GRAPHS = 64  # that settings and shapes make of one piece of code; PyTorch gives up at 8


def checkpoint_blocks(
    blocks: Iterable[nn.Module], contexts: Callable[[], tuple[Any, Any]] = noop_context_fn
) -> None:
    """Keep the inputs of blocks alone, and what ``contexts`` selects; compute the rest again."""
    for block in blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, context_fn=contexts
        )


def keeping(*operations: Any) -> Callable[[], tuple[Any, Any]]:
    """Contexts of selective checkpointing that keep the results of some operations."""
    return functools.partial(create_selective_checkpoint_contexts, list(operations))


def keeping_attention_and_every_second_product() -> tuple[Any, Any]:
    """Contexts of selective checkpointing: attention, and the first of every two products."""
    return create_selective_checkpoint_contexts(_EverySecondProduct())


class _EverySecondProduct:
    """A policy for one pass through one block."""

    def __init__(self):
        self.products = {False: 0, True: 0}  # in forward, and as it is computed again

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in PRODUCTS:
            self.products[context.is_recompute] += 1
            keeps = self.products[context.is_recompute] % 2 == 1
        else:
            keeps = operation in ATTENTION
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def compile_modules(modules: Iterable[nn.Module], budget: float = 1.0) -> None:
    """Compile each of ``modules`` as one graph with ``torch.compile``.

    Args:
        modules: blocks of one kind share a graph, which takes a fraction of the whole model's time
            to compile.
        budget: ``activation_memory_budget``, from 0 (keep the inputs) to 1 (keep what is fastest).
    """

    # PyTorch reuses graphs of equal code and backend, whatever the budget: so this is a new one.
    def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        with functorch_config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    torch._dynamo.config.recompile_limit = _GRAPHS
    for module in modules:
        module.compile(backend=inductor, fullgraph=True, dynamic=False)
