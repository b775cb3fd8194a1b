"""Memory of a training step; and the largest batch of ViT-B/16 that a GPU trains, with its speed.

    python benchmarks/memory.py --minutes 2

ViT-B/16 on 224 x 224 images in bfloat16: plain, with full checkpointing, and with ``asa1``, lean
approx and 4 bits. The largest batch of each is found first, then their images per second are
measured in turns, each also at the largest batches of the others that it can train. Writes
``results/memory_cuda.json``. ``speed.py`` measures saved and peak MiB of one batch with the
functions in this file.
"""

import functools
import gc
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from record import record
from settings import (
    ASA1_APPROX_FOUR_BIT,
    CHECKPOINT,
    PLAIN,
    Network,
    Setting,
    Step,
    alternative,
    vision_transformer,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves
from turns import Failures, Rounds, release_memory, take_turns_within

from aal.memory import MIB, saved_bytes
from aal.training.batch_size import affordable, largest_batch
from aal.training.command_line import Parser, UserError, positive_float, run

SETTINGS = (alternative(PLAIN), CHECKPOINT, ASA1_APPROX_FOUR_BIT)
FIRST_BATCHES = (64, 128)  # memory grows from one to the other as it does to any other batch
WARM_UP = 3  # steps: by then compressors have chosen their bits
ROUNDS = Rounds(least=1, most=5)


def saved_mib(step: Step) -> float:
    """MiB on the step's device that wait between forward and backward, parameters excluded."""
    gc.collect()  # not meanwhile, when what it frees would be subtracted
    if step.images.is_cuda:
        before = torch.cuda.memory_allocated()
        loss = step.loss(step.images, step.labels)
        held = torch.cuda.memory_allocated() - before
    elif step.is_compiled:  # what ``saved_bytes`` watches would not be compiled
        loss = step.loss(step.images, step.labels)
        known = (*step.model.parameters(), step.images, step.labels)
        held = bytes_of_graph(loss, known)
    else:
        return saved_bytes(step.loss, step.images, step.labels) / MIB
    loss.backward()  # whoever keeps something for it lets go of it
    step.model.zero_grad()
    step.after()
    return held / MIB


def bytes_of_graph(loss: Tensor, known: Sequence[Tensor]) -> int:
    """Bytes of the tensors that the nodes behind ``loss`` keep, but for those of ``known``.

    Each storage counts once. What nodes keep out of sight, as checkpoints do, is not found.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    found = {}
    for node in _nodes(loss.grad_fn):
        names = [name for name in dir(node) if name.startswith("_saved_")]
        kept = [getattr(node, name) for name in names]
        kept += [getattr(node, "saved_tensors", ()), getattr(node, "__dict__", {})]
        for tensor in tree_leaves(kept):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(held for place, held in found.items() if place not in own)


def _nodes(last: torch.autograd.graph.Node) -> Iterator[torch.autograd.graph.Node]:
    seen, stack = set(), [last]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [before for before, _ in node.next_functions if before is not None]
            yield node


def peak_mib(step: Step) -> float:
    """Activation peak on a GPU: most MiB in use during a step, less what is in use before it.

    Gradients of parameters count as in use before, for they take the same in every setting.
    """
    with_gradients(step)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_gradients(step)
    peak = torch.cuda.max_memory_allocated() - before
    step.model.zero_grad()
    return peak / MIB


def with_gradients(step: Step) -> None:
    """A step that leaves its gradients where they are."""
    step.loss(step.images, step.labels).backward()
    step.after()


def largest_on_gpu(network: Network, step: Step) -> int:
    """The largest batch of a setting. The step is left without one."""
    peaks = []
    for batch in FIRST_BATCHES:
        give_batch(network, step, batch)
        for _ in range(WARM_UP):
            with_gradients(step)
        torch.cuda.reset_peak_memory_stats()
        with_gradients(step)
        peaks.append(torch.cuda.max_memory_allocated())
    take_batch(step)
    free, _ = torch.cuda.mem_get_info()
    limit = free + torch.cuda.memory_reserved()

    def fits(batch: int) -> bool:
        has_run = _runs(network, step, batch)
        take_batch(step)  # behind the handler, whose error holds on to tensors
        return has_run

    return largest_batch(fits, 0, max(affordable(FIRST_BATCHES, peaks, limit), 1))


def _runs(network: Network, step: Step, batch: int) -> bool:
    try:
        give_batch(network, step, batch)
        with_gradients(step)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    return True


def give_batch(network: Network, step: Step, batch: int) -> None:
    """Another batch, on the device of the model."""
    device = next(step.model.parameters()).device
    step.images, step.labels = network.random_batch(batch, device)


def take_batch(step: Step) -> None:
    """Leave a step with as little as it can have, for others to have the memory."""
    step.images, step.labels = step.images[:0].clone(), step.labels[:0].clone()
    step.model.zero_grad()
    release_memory()


def visit(network: Network, step: Step, batch: int) -> float:
    """Seconds of a step with another batch. The step is left without one."""
    give_batch(network, step, batch)
    step()  # the first one takes memory from the device
    seconds = step.seconds()
    take_batch(step)
    return seconds


def points_of(largest: Mapping[str, int]) -> list[tuple[str, int]]:
    """Every setting at its largest batch, and at those of others that it can train."""
    return [
        (name, batch)
        for name, own in largest.items()
        for batch in sorted({*largest.values()})
        if batch <= own
    ]


def compare_largest(
    network: Network, settings: Sequence[Setting], device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """A row for every setting and batch, on a GPU."""
    begin = time.monotonic()
    batch = network.random_batch(1, device)
    failures = Failures()
    steps: dict[str, Step] = {}
    largest: dict[str, int] = {}
    for name, _, make in settings:
        step = failures.attempt((name, None), functools.partial(make, network, *batch))
        if step is not None:
            steps[name] = step
    for name, step in steps.items():  # only now, as all lie beside each other later
        found = failures.attempt((name, None), functools.partial(largest_on_gpu, network, step))
        if found:
            largest[name] = found
    visits = {
        (name, batch): functools.partial(visit, network, steps[name], batch)
        for name, batch in points_of(largest)
    }
    left = seconds - (time.monotonic() - begin)
    times = take_turns_within(left, ROUNDS, visits, failures)
    rows = [
        {
            "setting": name,
            "batch": batch,
            "is_largest": batch == largest[name],
            "images_per_second": round(batch / statistics.median(own), 1),
        }
        for (name, batch), own in times.items()
    ]
    errors = [
        {"setting": name, "batch": batch, "error": error}
        for (name, batch), error in failures.items()
    ]
    return rows + errors


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="memory.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=positive_float, default=2.0, help="time that it may take")
    minutes = parser.parse_args(arguments).minutes
    if not torch.cuda.is_available():
        raise UserError("the largest batch needs a GPU; speed.py has saved bytes on CPU too")
    torch.manual_seed(0)
    network = vision_transformer("ViT-B_16", batch=0, dtype=torch.bfloat16)
    rows = compare_largest(network, SETTINGS, torch.device("cuda"), 60 * minutes)
    memory = torch.cuda.get_device_properties(0).total_memory / MIB
    record("memory_cuda", {"network": network.name, "gpu_mib": round(memory), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "memory.py"))
