"""Devices and processes: one process per device, joined to those of the other devices."""

import contextlib
import io
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aal.training.command_line import NOTED, ProcessLost, UserError, is_launched
from aal.training.launch import end_with_parent


@dataclass(frozen=True)
class Worker:
    """This process: its device and its place among the processes of the run.

    Args:
        host_group: the processes as a group whose exchanges do not wait for GPUs; None for the
            usual group.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers, such as running statistics."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all processes. Does not wait for the device."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.host_group)
        return tensor.tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """One value from every process, in their order; its tensors come to the CPU.

        It travels as ``torch.save`` writes it, for what PyTorch gathers itself is unpickled, and
        so can run code.

        Args:
            value: tensors, numbers and texts, perhaps in lists, tuples and dicts.
        """
        if self.world_size == 1:
            return [value]
        file = io.BytesIO()
        torch.save(value, file)
        own = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        dist.all_reduce(sizes, group=self.host_group)
        padded = nn.functional.pad(own, (0, int(sizes.max()) - len(own)))
        shares = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shares, padded, group=self.host_group)
        files = [
            io.BytesIO(share[:size].numpy().tobytes())
            for share, size in zip(shares, sizes.tolist(), strict=True)
        ]
        return [torch.load(file, map_location="cpu", weights_only=True) for file in files]


def parse_devices(words: Sequence[str] | None) -> list[torch.device]:
    """Turn ``--device`` into devices: GPU indices, "cpu" (once per process), or nothing.

    Raises:
        UserError: a GPU that this machine lacks, a repeated GPU, CPU and GPU together, or text.
    """
    available = torch.cuda.device_count()
    if not words:
        return [torch.device("cuda", 0) if available else torch.device("cpu")]
    if all(word == "cpu" for word in words):
        return [torch.device("cpu")] * len(words)
    indices = [int(word) for word in words if word.isdecimal()]
    if len(indices) < len(words):
        raise UserError(f"--device takes GPU indices or cpu, got {' '.join(words)}")
    if missing := [index for index in indices if index >= available]:
        has = f"{available} CUDA device{'s' if available != 1 else ''}"
        raise UserError(f"--device {missing[0]}: this machine has {has}; use --device cpu")
    if len(set(indices)) < len(indices):
        raise UserError(f"--device names a GPU twice: {' '.join(words)}")
    return [torch.device("cuda", index) for index in indices]


def num_processes(devices: Sequence[torch.device]) -> int:
    """How many processes train together.

    Raises:
        UserError: torchrun started another number of processes than there are devices.
    """
    if not is_launched():
        return len(devices)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name}, which starts one of several processes, is no number")
    count = int(os.environ["WORLD_SIZE"])
    if len(devices) not in (1, int(os.environ.get("LOCAL_WORLD_SIZE", count))):
        raise UserError(
            f"--device names {len(devices)} devices, but {count} processes were started"
        )
    return count


@contextlib.contextmanager
def joined(devices: Sequence[torch.device]):
    """Join the other processes, if there are any; yield this process's ``Worker``.

    Raises:
        ProcessLost: another process cannot be reached, or can be no longer, as it has ended or
            hangs. PyTorch waits for an answer for 30 minutes (gloo), or 10 (NCCL).
    """
    if not is_launched():
        if devices[0].type == "cuda":
            torch.cuda.set_device(devices[0])
        yield Worker(devices[0])
        return
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    device = devices[local_rank] if len(devices) > 1 else devices[0]
    if len(devices) == 1 and device.type == "cuda":  # torchrun without --device
        if local_rank >= (available := torch.cuda.device_count()):
            raise UserError(
                f"process {local_rank + 1} of this machine has no GPU, of which there are "
                f"{available}; start fewer processes, or use --device cpu"
            )
        device = torch.device("cuda", local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    end_with_parent()
    trouble = "cannot join the other processes of the run"
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        host_group = dist.new_group(backend="gloo") if device.type == "cuda" else None
        trouble = "lost another process of the run"
        yield Worker(device, dist.get_rank(), dist.get_world_size(), host_group)
    except RuntimeError as error:
        # PyTorch has a class of errors for NCCL and the meeting of processes, but none for gloo.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            if NOTED not in os.environ:  # else the parent tells
                # Torchrun, which notices too, ends us; we end anyway, but have something to say.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            # Without the line of PyTorch's source before it, and advice behind it.
            reason = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).split(". ")[0]
            raise ProcessLost(f"{trouble} ({reason})") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed PyTorch on every device; nothing else here draws random numbers."""
    torch.manual_seed(seed)
