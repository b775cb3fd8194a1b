"""Batch normalisation as plain tensor functions: forward, replay and backward.

They call the kernels that ``F.batch_norm`` calls (cuDNN's where PyTorch would choose it), so the
results are bit-identical to it on the same device, but together with ReLU in half precision on
CUDA. In training nothing here touches the running statistics: the forward pass returns the new
ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# For aten's functions: gradients of input, weight and bias.
Needs = tuple[bool, bool, bool]

# Where a batch norm with ReLU may round as it likes. In float32 it repeats every bit.
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)


class Parameters(NamedTuple):
    """The tensors of a batch norm, each (C,)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None  # absent in the backward pass of a training step
    running_var: Tensor | None


class Statistics(NamedTuple):
    """What normalised a batch; all empty in evaluation, where the running statistics do."""

    mean: Tensor  # (C,)
    rstd: Tensor  # (C,), 1 / sqrt(variance + eps)
    reserve: Tensor  # cuDNN's own; empty elsewhere


def batch_norm(
    x: Tensor, parameters: Parameters, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Statistics, tuple[Tensor, ...]]:
    """Normalise ``x`` (N, C, ...).

    Returns:
        The result, what normalised it, and the new running mean and variance, if training.

    Raises:
        ValueError: another number of channels, or one value per channel in training.
    """
    _check(x, parameters, training)
    if not training:
        return _evaluate(x, parameters, eps), Statistics(*parameters.weight.new_empty(3, 0)), ()
    y, mean, rstd, reserve, new_mean, new_var = torch.ops.aten._batch_norm_with_update_functional(
        _dense(x), *parameters, momentum, eps
    )
    return y, Statistics(mean, rstd, reserve), (new_mean, new_var)


def batch_norm_relu(
    x: Tensor, parameters: Parameters, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Statistics, tuple[Tensor, ...]]:
    """``batch_norm`` with ReLU behind it.

    In half precision on CUDA both are one Triton kernel (``batch_norm_triton``), behind that of the
    statistics; not where cuDNN would find these.
    """
    if _has_kernel(x) and not _is_of_cudnn(x, parameters, training, eps):
        return batch_norm_relu_fused(x, parameters, training, momentum, eps)
    y, statistics, updates = batch_norm(x, parameters, training, momentum, eps)
    return y.relu_(), statistics, updates


def batch_norm_relu_fused(
    x: Tensor, parameters: Parameters, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Statistics, tuple[Tensor, ...]]:
    """``batch_norm_relu`` where it has a kernel."""
    _check(x, parameters, training)
    nothing = parameters.weight.new_empty(0)
    statistics, updates = Statistics(nothing, nothing, nothing), ()
    if training:
        updates = (parameters.running_mean.clone(), parameters.running_var.clone())
        mean, var = torch.batch_norm_update_stats(_dense(x), *updates, momentum)
        statistics = Statistics(mean, (var + eps).rsqrt(), nothing)
    return _normalised_relu(x, parameters, training, eps, statistics), statistics, updates


def batch_norm_replay(
    x: Tensor, parameters: Parameters, training: bool, eps: float, statistics: Statistics
) -> Tensor:
    """The result of ``batch_norm`` once more, bit for bit."""
    if not training:
        return _evaluate(x, parameters, eps)
    mean, rstd, _ = statistics
    if x.device.type != "cpu":
        nothing = torch.zeros_like(parameters.weight)
        unused = parameters._replace(running_mean=nothing, running_var=nothing)
        return batch_norm(x, unused, training, 0.0, eps)[0]
    # In evaluation the CPU kernel computes x * (weight * rstd) + (bias - mean * weight * rstd) as
    # it does in training, in single precision at least; a variance of 1 and eps of 0 let the known
    # rstd through unrounded.
    precision = torch.promote_types(rstd.dtype, torch.float32)
    scale = parameters.weight.to(precision) * rstd.to(precision)
    mean, bias = mean.to(precision), parameters.bias.to(precision)
    known = Parameters(scale, bias, mean, torch.ones_like(mean))
    return _evaluate(x, known, 0.0)


def batch_norm_relu_replay(
    x: Tensor, parameters: Parameters, training: bool, eps: float, statistics: Statistics
) -> Tensor:
    """The result of ``batch_norm_relu`` once more.

    In half precision on CUDA it is one Triton kernel, which is given the statistics where PyTorch's
    would find them again, and rounds in its own way; elsewhere every bit is repeated.
    """
    if _has_kernel(x):
        return _normalised_relu(x, parameters, training, eps, statistics)
    return batch_norm_replay(x, parameters, training, eps, statistics).relu_()


def normalise_relu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """``relu((x - mean) * rstd * weight + bias)`` for x (N, C, ...) and (C,), in float32 at least.

    Definition of the kernel.
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    weight, bias, mean, rstd = (t.to(precision).view(shape) for t in (weight, bias, mean, rstd))
    return ((x - mean) * (rstd * weight) + bias).relu_().to(x.dtype)


@torch.library.custom_op("aal::normalise_relu", mutates_args=())
def _normalise_relu(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return normalise_relu_reference(_dense(x), weight, bias, mean, rstd)


@_normalise_relu.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    from aal.ops.batch_norm_triton import normalise_relu_triton

    return normalise_relu_triton(x, weight, bias, mean, rstd)


@_normalise_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(_dense(x))


def batch_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    parameters: Parameters,
    training: bool,
    eps: float,
    statistics: Statistics,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``batch_norm`` for input, weight and bias; None where ``needs`` is False."""
    mean, rstd, reserve = statistics
    if not training:
        return torch.ops.aten.native_batch_norm_backward(
            grad_output, x, *parameters[:1], *parameters[2:], mean, rstd, False, eps, needs
        )
    return torch.ops.aten.batch_norm_backward(
        grad_output,
        _dense(x),
        parameters.weight,
        None,
        None,
        mean,
        rstd,
        True,
        eps,
        needs,
        reserve,
    )


def _normalised_relu(
    x: Tensor, parameters: Parameters, training: bool, eps: float, statistics: Statistics
) -> Tensor:
    """By the kernel, with the statistics of the batch or, in evaluation, the running ones."""
    mean, rstd, _ = statistics
    if not training:
        mean, rstd = parameters.running_mean, (parameters.running_var.float() + eps).rsqrt()
    return _normalise_relu(_dense(x), *parameters[:2], mean, rstd)


def _has_kernel(x: Tensor) -> bool:
    """Not under a compiler, which fuses on its own."""
    return x.is_cuda and x.dtype in _KERNEL_DTYPES and not torch.compiler.is_compiling()


def _is_of_cudnn(x: Tensor, parameters: Parameters, training: bool, eps: float) -> bool:
    """Would PyTorch call cuDNN?"""
    backend = torch._C._select_batch_norm_backend(_dense(x), *parameters, training, eps)
    return backend == torch._C._BatchNormBackend.Cudnn


def _check(x: Tensor, parameters: Parameters, training: bool) -> None:
    channels = parameters.weight.numel()
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(f"batch norm needs (N, {channels}, ...), got {tuple(x.shape)}")
    if training and x.numel() == channels:
        raise ValueError(f"batch norm needs more than one value per channel, got {tuple(x.shape)}")


def _evaluate(x: Tensor, parameters: Parameters, eps: float) -> Tensor:
    """``F.batch_norm`` in evaluation, without its check that refuses an eps of 0."""
    weight, bias, mean, var = parameters
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, cudnn)


def _dense(x: Tensor) -> Tensor:
    """What cuDNN needs and ``F.batch_norm`` sees to: one of the two memory formats."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
