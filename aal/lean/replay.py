"""Chains of layers that keep their first input only and replay the rest in backward.

``replay(x, bn, relu, conv)`` is ``conv(relu(bn(x)))``, but the result of batch norm and ReLU,
which the convolution needs for its weight gradient, is computed again from ``x``, which batch
norm keeps anyway. Replays reuse the batch statistics of the forward pass, so running statistics
are updated once. The last layer of a chain is never replayed.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from aal.lean.operations import may_return_input, operation_of
from aal.lean.pairs import merge_pairs
from aal.ops.autocast import autocast_again, autocast_dtype
from aal.ops.operation import Operation, Tensors


def replay(
    x: Tensor, *layers: nn.Module, recompute: tuple[nn.Module, *tuple[Tensor, ...]] | None = None
) -> Tensor:
    """Apply ``layers`` in turn and keep ``x`` alone; see ``ReplayFunction``.

    Args:
        x: of the shape that the first layer takes.
        layers: ``nn.Conv2d`` (zero padding), ``nn.BatchNorm2d``, ``nn.MaxPool2d``,
            ``nn.LayerNorm``, ``nn.Linear``, ``LinearASA``, ``LinearABA``, ``nn.Dropout``,
            ``nn.ReLU``, ``nn.GELU``, ``nn.SiLU`` and ``Transpose`` in any order. Their hooks are
            not called.
        recompute: ``(module, *inputs)`` such that ``module(*inputs)`` is ``x``. The inputs are
            kept instead of ``x``, which pays where they are smaller or kept by somebody else.

    Returns:
        What the layers compute in sequence. Gradients and running statistics are those of the
        layers, bit for bit in float32 on the same device.

    Raises:
        TypeError: a layer of another type.
    """
    links = []
    owns_input = False  # may a layer overwrite its input?
    for layer in layers:
        links.append(operation_of(layer, x, owns_input))
        owns_input |= not may_return_input(layer)
    operations, parameters = zip(*merge_pairs(links, x), strict=True)
    recipe, sources = None, ()
    if recompute is not None:
        module, *inputs = recompute
        names = [name for name, _ in module.named_parameters()]
        recipe, sources = _Recipe(module, names), (*module.parameters(), *inputs)
    chain = _Chain(operations, [len(own) for own in parameters], recipe, len(sources))
    y, *updates = ReplayFunction.apply(chain, x, *sources, *sum(parameters, ()))
    statistics = iter(updates)
    for layer, (operation, _) in zip(layers, links, strict=True):
        if type(layer) is nn.BatchNorm2d and operation.training:
            _update_running_statistics(layer, next(statistics), next(statistics))
    return y


class ReplayFunction(torch.autograd.Function):
    """A chain of layers that keeps its first input only.

    Forward     y = layers[-1](... layers[0](x)), and the new running statistics of its batch norms
    Backward    computes the inputs of the later layers again, with the statistics of the forward
                pass, and runs the own backward of every layer on them: all gradients are those of
                the layers, bit for bit in float32 on the same device

    Shapes      as the layers
    Saves       x, or what ``recompute`` makes it from; mean and 1 / standard deviation of each
                batch norm; 4 bits per output of a max pool; 1 bit per element of a dropout;
                parameters by reference. Stock layers keep the input of every layer.
    Edge cases  batch norm in evaluation mode and frozen parameters as in PyTorch. No double
                backward.
    """

    @staticmethod
    def forward(ctx, chain: "_Chain", x: Tensor, *tensors: Tensor | None):
        parameters = chain.parameters(tensors)
        y, kept, updates = x, [], []
        for i, operation in enumerate(chain.operations):
            own = parameters[i]
            y, keep, update = operation.forward(y, own)
            kept.append(keep)
            updates.extend(update)
            # The caller overwrites the running statistics, the last tensors of a batch norm.
            parameters[i] = own[: len(own) - len(update)] + (None,) * len(update)
        sources = tensors[: chain.num_sources] if chain.recipe else (x,)
        ctx.chain, ctx.num_first = chain, len(sources)
        ctx.num_kept = [len(keep) for keep in kept]
        ctx.autocast = autocast_dtype(x.device)
        ctx.save_for_backward(*sources, *sum(parameters, ()), *sum(kept, ()))
        ctx.mark_non_differentiable(*updates)
        return y, *updates

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        chain: _Chain = ctx.chain
        operations = chain.operations
        saved = ctx.saved_tensors  # read once: checkpoints allow no more
        first, rest = saved[: ctx.num_first], saved[ctx.num_first :]
        if torch.compiler.is_compiling():
            # Of the same tensor the compiler would compute the same only once, in forward, and keep
            # the results. These are views that it does not see through before it has decided.
            first = tuple(tensor.unsqueeze(0).squeeze(0) for tensor in first)
        parameters = _split(rest, chain.num_parameters)
        kept = _split(rest[sum(chain.num_parameters) :], ctx.num_kept)
        with autocast_again(grad.device, ctx.autocast):
            inputs = [chain.recipe(first) if chain.recipe else first[0]]
            for i, operation in enumerate(operations[:-1]):
                y, kept[i] = operation.replay(inputs[i], parameters[i], kept[i])
                inputs.append(y)

        _, needs_x, *needs_tensors = ctx.needs_input_grad
        needs = _split(needs_tensors[chain.num_sources :], chain.num_parameters)
        learning = [i for i, need in enumerate(needs) if any(need)]
        lowest = 0 if needs_x else min(learning, default=len(operations))
        grads: list[Tensors] = [(None,) * number for number in chain.num_parameters]
        for i in reversed(range(lowest, len(operations))):
            needs_input = needs_x or i > lowest
            x = inputs.pop()
            grad, grads[i] = operations[i].backward(
                grad, x, parameters[i], kept[i], (needs_input, *needs[i])
            )
            grad = grad.to(x.dtype) if needs_input else None  # autograd does so between layers
        return None, grad if needs_x else None, *(None,) * chain.num_sources, *sum(grads, ())


class _Recipe(NamedTuple):
    """How to compute the first input of a chain again."""

    module: nn.Module
    names: list[str]  # of the module's parameters

    def __call__(self, sources: Tensors) -> Tensor:
        parameters = dict(zip(self.names, sources, strict=False))
        return functional_call(self.module, parameters, sources[len(self.names) :])


class _Chain(NamedTuple):
    """Everything about a chain but its tensors."""

    operations: tuple[Operation, ...]
    num_parameters: list[int]
    recipe: _Recipe | None
    num_sources: int

    def parameters(self, tensors: Tensors) -> list[Tensors]:
        return _split(tensors[self.num_sources :], self.num_parameters)


def _update_running_statistics(layer: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    if layer.running_mean is not None:
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)


def _split(items: tuple, sizes: list[int]) -> list[tuple]:
    """Cut ``items`` into tuples of the given sizes, ignoring what is left over."""
    iterator = iter(items)
    return [tuple(itertools.islice(iterator, size)) for size in sizes]
