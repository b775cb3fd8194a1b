"""What every test starts from: a fixed seed, poisoned memory and a device; and what they record."""

import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aal.training.files import write_json
from aal.training.run_folder import environment

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before any test

BEGINNING = pytest.StashKey[float]()  # when this process began its tests, in seconds
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "write the figures that tests measure, beside those that the file has"
    parser.addoption("--record", type=Path, metavar="FILE", help=help)
    help = "skip slow tests that would begin later; those that are not slow come first"
    parser.addoption("--slow-until", type=float, metavar="MINUTE", help=help)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--record needs one process for all tests")
    # The fixture below asks for deterministic kernels; CUDA has none for some backward passes.
    message = ".*does not have a deterministic implementation.*"
    config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a CUDA device where there is none: thousands of tests, each a moment."""
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
    if config.getoption("--slow-until") is not None:
        items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[BEGINNING] = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--slow-until")
    if minutes is not None and item.get_closest_marker("slow"):
        if time.monotonic() - item.config.stash[BEGINNING] > 60 * minutes:
            pytest.skip(f"slow, and {minutes:g} minutes are over")


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What tests measure, by name. With ``--record`` it is written if all tests have passed."""
    found: dict[str, Any] = {}
    yield found
    path = request.config.getoption("--record")
    if path is not None and not request.session.testsfailed:
        known = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, known | {"environment": environment()} | found)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from more, and lose much to threads that wait for a busy core.

    The same holds in processes that tests start.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive():
    """Processes in the background ignore SIGINT from birth, and a run lets that be."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """Measuring memory collects garbage, which is slow on a heap full of imported modules."""
    torch.use_deterministic_algorithms(False)  # imports the compiler
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Fixed seed; uninitialised memory reads as NaN, so that an output nobody wrote shows up."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
