"""One network in several processes: copies that average gradients (DDP), or shares (FSDP2).

Under FSDP2 every process holds a share of each parameter, of its gradient and of what the optimiser
knows of it. Blocks of the network are put together where they are computed.
"""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from aal.training.command_line import Parser, UserError, note
from aal.training.compression_flags import Compression
from aal.training.devices import Worker

KINDS = ("ddp", "fsdp")


def add_parallel_flag(parser: Parser) -> None:
    """Add ``--parallel``; ``check_parallel`` reads it."""
    help = (
        "several processes hold copies of the network (ddp), or shares of it and of the "
        "optimiser's state, to save memory (fsdp); if not given, ddp"
    )
    parser.add_argument("--parallel", choices=KINDS, default=argparse.SUPPRESS, help=help)


def check_parallel(
    args: argparse.Namespace, processes: int, device: torch.device, compression: Compression
) -> str:
    """The kind that flags choose; tells the user of flags that do nothing in one process.

    Raises:
        UserError: something else cannot work in this kind, or on this device.
    """
    kind, syncs = vars(args).get("parallel", KINDS[0]), vars(args).get("sync_batchnorm", False)
    if processes == 1:
        for flag, is_given in (("--parallel", "parallel" in args), ("--sync-batchnorm", syncs)):
            if is_given:
                note(f"{flag} does nothing in one process")
        return kind
    if syncs and device.type == "cpu":
        raise UserError("--sync-batchnorm needs GPUs; PyTorch has no such batch norm on cpu")
    if syncs and args.lean != "off":
        raise UserError(
            f"--sync-batchnorm does not go with --lean {args.lean}, whose batch norms know one "
            "process alone; give --lean off without --gcp"
        )
    if kind == "fsdp" and compression.probes:
        raise UserError(
            f"--compress {compression.method} at level {compression.level} probes the gradient in "
            "each process alone, which holds a share of the network under --parallel fsdp; use "
            "another level, or --parallel ddp"
        )
    return kind


def parallelised(
    model: nn.Module, kind: str, worker: Worker, frees_blocks: bool = True
) -> nn.Module:
    """The model as it trains in all processes together; itself in one.

    FSDP2 changes the model itself, whose parameters are others afterwards.

    Args:
        kind: of ``KINDS``.
        frees_blocks: under "fsdp" a block is put together once more for backward. It stays whole
            where the backward pass of a block reads parameters of another one.
    """
    if worker.world_size == 1:
        return model
    if kind == "ddp":
        index = [worker.device] if worker.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=index)
    mesh = DeviceMesh.from_group(dist.group.WORLD, worker.device.type)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=frees_blocks)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.frees_blocks = frees_blocks
    model.register_load_state_dict_pre_hook(_share_weights)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost members of lists of modules that consist of layers themselves."""
    found = []
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            for member in child:
                is_block = any(member.children()) and any(p.numel() for p in member.parameters())
                found += [member] if is_block else blocks_of(member)
        else:
            found += blocks_of(child)
    return found


@contextlib.contextmanager
def without_exchange(model: nn.Module) -> Iterator[None]:
    """Gradients of backward passes inside the ``with`` block wait for one outside of it.

    Args:
        model: ``parallelised``, for more than one process.
    """
    if not isinstance(model, FSDPModule):
        with model.no_sync():
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block every process has all of the model, and runs it alone.

    All processes enter and leave together. There is neither backward nor loading inside.

    Args:
        model: without the wrapper of DDP.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    shared = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.set_reshard_after_forward(False)
    for module in shared:
        module.unshard()
    try:
        yield
    finally:
        for module in shared:
            module.reshard()
            if module is not model:
                module.set_reshard_after_forward(model.frees_blocks, recurse=False)


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, worker: Worker
) -> dict[str, dict[str, Any]]:
    """State dicts of both, by names of parameters; the same for any processes of either kind.

    All processes take part. Of several the first gets whole tensors on the CPU, the others get
    nothing. In one the tensors are those that training goes on with.

    Args:
        model: without the wrapper of DDP.

    Returns:
        What ``torch.distributed.checkpoint.state_dict`` sets "model" and "optimizer" to. An
        optimiser that keeps nothing has an empty one.
    """
    several = worker.world_size > 1
    options = StateDictOptions(full_state_dict=several, cpu_offload=several)
    state = {"model": get_model_state_dict(model, options=options), "optimizer": {}}
    if optimizer.state:  # without any PyTorch would have it take a step, which Adam counts
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    return state


def load_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]
) -> None:
    """Continue from a ``state_of``, which every process has all of.

    Args:
        model: without the wrapper of DDP.
    """
    if state["optimizer"] and isinstance(model, FSDPModule):
        # Parameters that have had no gradient have no state.
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    elif state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    model.load_state_dict(state["model"])


def _share_weights(model: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Replace whole tensors by this process's shares, before a state dict is loaded."""
    for name, parameter in model.named_parameters():
        value = state.get(name)
        if value is None or isinstance(value, DTensor) or value.shape != parameter.shape:
            continue
        place = parameter.device_mesh, parameter.placements
        # Every process has all of it, so that none needs to send anything.
        state[name] = distribute_tensor(value.to(parameter.device), *place, src_data_rank=None)
