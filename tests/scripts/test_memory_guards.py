"""Runs for which memory is too small, and the search for what it holds."""

import contextlib
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from aal.memory import MIB
from aal.training import memory_limit

WIDE = ("--hidden", 32, "--mlp-hidden", 8192, "--img-size", 32, "--patch", 16, "--batch-size", 12)
WIDE += (
    "--cutmix",
    "False",
    "--dropout",
    0,
    "--num-layers",
    2,
)  # 96 MiB for each copy of the hidden units


@contextlib.contextmanager
def _left(mib: int) -> Iterator[None]:
    """This process gets so many MiB more inside the ``with`` block."""
    memory_limit.release()
    (own,) = re.findall(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text())
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(own) + mib * MIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_a_run_out_of_memory_says_what_would_have_fitted(train_vit: Callable, tmp_path: Path):
    with _left(300):
        status, out, err = train_vit(*WIDE, "--epochs", 1)
    note, line = err.splitlines()
    assert (status, out) == (2, "")
    assert note.startswith("train.py: note: out of memory")
    assert re.match(r"train.py: error: out of memory: \d+ of \d+ MiB were in use at most; ", line)
    assert "largest saved tensors: 2 x 96.4 MiB float32 of blocks." in line
    assert "--learning-rule asa1 --lean approx (peak " in line
    (fitting,) = re.findall(r"fit with (--.*?) \(peak", line)
    with _left(300):
        status, out, err = train_vit(*WIDE, *fitting.split(), "--epochs", 1)
    assert status == 0 and not err


def test_the_largest_batch_is_found(train_vit: Callable, tmp_path: Path):
    with _left(450):
        status, out, err = train_vit(*WIDE, "--find-batch-size")
    *tried, last = out.splitlines()
    assert (status, err) == (0, "")
    found = int(re.fullmatch(r"largest batch size: (\d+)", last).group(1))
    outcome = r"batch size (\d+): (?:fits, peak \d+ MiB, \S+ samples/s|out of memory)"
    sizes = {int(re.fullmatch(outcome, line).group(1)): "fits" in line for line in tried}
    assert 6 <= found == max(size for size, fits in sizes.items() if fits)
    assert min(size for size, fits in sizes.items() if not fits) > found
    assert not (tmp_path / "runs").exists()
