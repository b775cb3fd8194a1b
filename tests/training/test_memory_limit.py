"""Limits of memory, and how errors of running out of it are known."""

import resource
from pathlib import Path

import pytest
import torch

from aal.memory import MIB
from aal.training import memory_limit

CPU = torch.device("cpu")


def test_memory_that_is_not_free_is_refused(monkeypatch: pytest.MonkeyPatch):
    # What other processes need meanwhile is not taken, only asked for.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    free = memory_limit.available()
    with memory_limit.limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        assert 0 < soft != before[0] and hard == before[1]
        with pytest.raises(RuntimeError) as error:  # the system would promise each of them
            held = [torch.empty(free // 3, dtype=torch.uint8) for _ in range(4)]
            assert len(held) < 4
        assert memory_limit.is_out_of_memory(error.value)
        torch.empty(MIB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(
    "line, folder, names",
    [
        ("0::/user.slice/job.scope", "", ("memory.max", "memory.current", "file")),
        (
            "4:cpu,memory:/job",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "cache"),
        ),
        ("0::/", "", ("memory.max", "memory.current", "file")),
    ],
)
def test_limits_of_control_groups_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, folder: str, names: tuple[str, ...]
):
    monkeypatch.setattr(memory_limit, "_ROOT", tmp_path)
    place = tmp_path / "sys/fs/cgroup" / folder / line.rpartition(":")[2].lstrip("/")
    place.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"2:freezer:/other\n{line}\n")
    limit, in_use, cache = names
    (place / limit).write_text(f"{100 * MIB}\n")
    (place / in_use).write_text(f"{70 * MIB}\n")
    (place / "memory.stat").write_text(f"anon {50 * MIB}\n{cache} {20 * MIB}\n")
    assert memory_limit.available() == 50 * MIB
    if place.name == "job.scope":  # of a group around it
        for file in place.iterdir():
            file.rename(place.parent / file.name)
        assert memory_limit.available() == 50 * MIB
        place = place.parent
    (place / limit).write_text("max\n")
    assert memory_limit.available() > 51 * MIB


def test_processes_of_a_run_share_what_is_free(monkeypatch: pytest.MonkeyPatch):
    limits = []
    for count in ("1", "4"):
        monkeypatch.setenv("WORLD_SIZE", count)
        with memory_limit.limited():
            limits.append(memory_limit.available())
    assert limits[1] == pytest.approx(limits[0] / 4, rel=0.05)


def test_the_peak_is_that_since_it_was_reset():
    torch.ones(100 * MIB, dtype=torch.uint8)
    memory_limit.reset_peak(CPU)
    before = memory_limit.peak(CPU)
    torch.ones(300 * MIB, dtype=torch.uint8)
    assert 290 * MIB < memory_limit.peak(CPU) - before < 320 * MIB
    assert memory_limit.peak(CPU) < memory_limit.limit(CPU)


@pytest.mark.parametrize(
    "error, is_meant",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_known(error: Exception, is_meant: bool):
    assert memory_limit.is_out_of_memory(error) == is_meant
