"""Where memory ends: errors in place of the system's killing of processes, and what was in use.

Where memory is short Linux promises more than there is, and kills a process that takes what was
promised. Inside ``limited`` the process is refused instead what is not free, so that PyTorch raises
an error, as it does on a GPU.
"""

import contextlib
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None

_KIB = 1024
_GROUPS = {  # by controllers of control groups, versions 2 and 1: folder, and names of files
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "cache"),
}
_ROOT = Path("/")
_SIGNS = (
    "can't allocate memory|[Oo]ut of memory|bad_alloc|ALLOC_FAILED|enough memory|"
    "could not (create a primitive(?! descriptor)|execute a primitive|create a memory)"  # oneDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """Does an error say that memory is short, on the host or on a GPU?"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and re.search(_SIGNS, str(error)) is not None


def release() -> None:
    """Give back what nobody refers to."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Refuse this process more memory than is free now, inside the ``with`` block.

    Several processes of a run get equal shares of it. Processes that are started inside inherit the
    limit. Nothing happens where Linux does not tell what is free. The address space that CUDA
    reserves is none that a process takes, but may be counted: leave the block before CUDA is used.
    """
    free, own = available(), _status("VmData")
    if resource is None or free is None or own is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (own + free // _processes_here(), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def available() -> int | None:
    """Bytes that this process could take more, swap included; None where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        free = _KIB * (kib["MemAvailable"] + kib["SwapFree"])
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return min([free, *_free_in_group(), *_free_below_limit()])


def limit(device: torch.device) -> int | None:
    """Bytes that ``peak`` can come to; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free, own = available(), _status("VmRSS")
    return None if free is None or own is None else free + own


def peak(device: torch.device) -> int | None:
    """Most bytes in use since ``reset_peak``: of tensors on a GPU, or of the whole process.

    None where that is not known.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Let ``peak`` begin with what is in use now, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _free_in_group() -> Iterator[int]:
    """What the limits of the process's control group, and of those around it, leave."""
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, group in (line.split(":", 2) for line in lines):
        for controller in {*controllers.split(",")} & {*_GROUPS}:
            folder, *names = _GROUPS[controller]
            top = _ROOT / folder.lstrip("/")
            place = top / group.lstrip("/")
            for around in (place, *place.parents):
                if around.is_relative_to(top):
                    yield from _free_in(around, *names)


def _free_in(group: Path, limit: str, in_use: str, cache: str) -> Iterator[int]:
    """What the limit of a control group leaves, if there is one."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # no such file, or "max"
        words = (group / "memory.stat").read_text().split()
        cached = int(words[words.index(cache) + 1])  # which the system gives up if need be
        taken = int((group / in_use).read_text()) - cached
        yield max(0, int((group / limit).read_text()) - taken)


def _processes_here() -> int:
    """Processes of the run that share this machine."""
    count = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    return int(count) if count.isdecimal() and int(count) else 1


def _free_below_limit() -> Iterator[int]:
    """What the limit on the data of a process leaves, if there is one."""
    own = _status("VmData")
    if resource is not None and own is not None:
        soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if soft != resource.RLIM_INFINITY:
            yield max(0, soft - own)


def _status(name: str) -> int | None:
    """Bytes of a field of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return _KIB * int(found[0]) if found else None
