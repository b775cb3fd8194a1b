"""Runs for which memory is too small, and the search for what it holds."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts.conftest import ROOT, SMALL_TRANSFORMER

WIDE = "--dataset tiny-imagenet --hidden 32 --head 2 --mlp-hidden 8192 --num-layers 2 --img-size 32"
WIDE += " --patch 16 --batch-size 12 --workers 0 --epochs 1 --dropout 0 --cutmix False --device cpu"
# 96 MiB for each copy of the hidden units of a layer.

# A process of its own, as what other tests gave back would be taken first.
LIMITED = """
import re, resource, runpy, sys
import matplotlib.pyplot, torch, torchvision.transforms.v2, transformers
from aal.training import program
torch.set_num_threads(1)
torch.nn.Linear(2, 2)(torch.ones(2, 2)).sum().backward()
(own,) = re.findall(r"VmData:\\s*(\\d+) kB", open("/proc/self/status").read())
limit = 1024 * int(own) + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
del sys.argv[:2]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def limited(tmp_path: Path) -> Callable:
    """Run a script with so many MiB beside what is imported: (exit status, stdout, stderr)."""

    def run(mib: int, script: str, *words: object) -> tuple[int, str, str]:
        command = [sys.executable, "-c", LIMITED, mib, ROOT / script, *words]
        command += ["--output", tmp_path / "runs"]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=200
        )
        return done.returncode, done.stdout, done.stderr

    return run


def _tried(out: str) -> tuple[dict[int, bool], int]:
    """Which sizes of batches fit, and the largest that does."""
    *tried, last = out.splitlines()
    outcome = r"batch size (\d+): (?:fits, peak \d+ MiB, \S+ \w+/s|out of memory)"
    sizes = {int(re.fullmatch(outcome, line).group(1)): "fits" in line for line in tried}
    return sizes, int(re.fullmatch(r"largest batch size: (\d+)", last).group(1))


def _assert_largest(out: str) -> int:
    sizes, found = _tried(out)
    assert found == max(size for size, fits in sizes.items() if fits)
    assert found < min(size for size, fits in sizes.items() if not fits)
    return found


@pytest.mark.slow
def test_a_run_out_of_memory_says_what_would_have_fitted(limited: Callable, tiny_imagenet: Path):
    words = (*WIDE.split(), "--data-path", tiny_imagenet)
    status, out, err = limited(330, "ViT/train.py", *words)
    assert (status, out) == (2, ""), err
    note, line = err.splitlines()
    assert note.startswith("train.py: note: out of memory")
    assert re.match(r"train.py: error: out of memory: \d+ of \d+ MiB were in use at most; ", line)
    assert "largest saved tensors: 2 x 96.4 MiB float32 of blocks." in line
    assert "--learning-rule asa1 --lean approx (peak " in line
    (fitting,) = re.findall(r"fit with (--.*?) \(peak", line)
    status, out, err = limited(330, "ViT/train.py", *words, *fitting.split())
    assert status == 0 and not err


@pytest.mark.slow
def test_the_largest_batch_is_found(limited: Callable, tmp_path: Path):
    status, out, err = limited(450, "ViT/train.py", *WIDE.split(), "--find-batch-size")
    assert (status, err) == (0, "")
    assert _assert_largest(out) >= 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_largest_batch_is_that_of_the_texts(limited: Callable, texts: Path):
    """Not of a dry run's, which has thousands of words."""
    words = ["--dataset-name", "parallel", "--data-path", texts, "--min-freq", 1, "--device", "cpu"]
    words += [*SMALL_TRANSFORMER.split(), "--epochs", 1]
    status, out, err = limited(120, "Transformer/train.py", *words, "--find-batch-size")
    assert (status, err) == (0, "")
    found = _assert_largest(out)
    assert found > 5000
    status, out, err = limited(120, "Transformer/train.py", *words, "--batch-size", 40, "--beam", 4)
    assert (status, err) == (0, "")
    status, out, err = limited(
        120, "Transformer/train.py", *words, "--batch-size", 3, "--find-batch-size"
    )
    assert status == 2 and "do not hold a training pair" in err


@pytest.mark.slow
def test_nothing_fits(limited: Callable):
    status, out, err = limited(40, "ViT/train.py", *WIDE.split(), "--find-batch-size")
    assert status == 2 and "batch size 1: out of memory" in out
    assert err.startswith("train.py: error: not even --batch-size 1 fits in memory; ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_memory_that_is_too_small_for_the_data_is_told(limited: Callable, tiny_imagenet: Path):
    words = WIDE.replace("--img-size 32", "--img-size 2048").replace("--patch 16", "--patch 1")
    status, out, err = limited(60, "ViT/train.py", *words.split(), "--dry-run")
    assert status == 2 and err.count("\n") == 1 and "memory" in err
