"""Training and evaluation of an image classifier, one pass over a loader at a time."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from aal.indicator import IndicatorRecorder
from aal.memory import MIB, preserved, saved_bytes
from aal.training.command_line import UserError
from aal.training.devices import Worker

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_INDICATOR_STEPS = 4  # sampled steps per epoch
_CHECK_EVERY = 16  # steps between looks at the loss, each of which waits for the GPU


@dataclass
class Trainer:
    """A model and everything that its training step needs.

    Args:
        model: perhaps wrapped for several processes.
        optimizer: its learning rate is set before every step.
        learning_rate: optimiser step -> learning rate.
        worker: device and processes.
        amp: "off", "bf16" or "fp16".
        recorder: Learning Indicators are sampled with it where it is given.
        mix: changes a batch of images and labels before it is learned.
        label_smoothing: share of each label spread over all classes.
        max_grad_norm: largest norm of all gradients together; 0 for any.
        accumulation: parts of a batch that go through the network one after the other. Loss and
            gradient stay those of the batch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    worker: Worker
    amp: str = "off"
    recorder: IndicatorRecorder | None = None
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    label_smoothing: float = 0.0
    max_grad_norm: float = 0.0
    accumulation: int = 1
    step: int = 0
    saved_mib: float | None = None

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.worker.device.type, enabled=self.amp == "fp16")

    def measure_saved_mib(self, loader: DataLoader) -> float:
        """MiB that autograd holds between forward and backward, per process.

        Takes the first batch of ``loader``, or the first part of it that goes through the network,
        and leaves buffers and random state as they were.
        """
        model, device = self._bare_model().train(), self.worker.device
        with preserved(model), _autocast(device, self.amp):
            batch = (tensor.to(device) for tensor in next(iter(loader)))
            images, labels = (part.chunk(self.accumulation)[0] for part in batch)
            held = saved_bytes(lambda: self._loss(model(images), labels))
        self.saved_mib = held / MIB
        return self.saved_mib

    def train_epoch(self, loader: DataLoader, title: str) -> dict[str, float]:
        """One pass over ``loader``; returns the means over its samples.

        Raises:
            UserError: the loss is not finite.
        """
        self.model.train()
        sampled = self._indicator_steps(len(loader))
        start = time.perf_counter()
        totals = _Totals(self.worker)
        for number, (images, labels) in enumerate(_batches(loader, title, totals, self.saved_mib)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step)
            if self.mix is not None:
                images, labels = self.mix(images, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._backward(images, labels, number in sampled, totals)
            if number % _CHECK_EVERY == 0:
                self._check(loss, title)
            if self.max_grad_norm:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step += 1
        self._check(totals.loss, title)
        seconds = time.perf_counter() - start
        means = totals.means()
        return means | {"seconds": seconds, "samples_per_s": means.pop("samples") / seconds}

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, apart from data and configuration.

        Takes part in every process, each of which has a random state of its own.
        """
        rng = {"cpu": torch.get_rng_state()}
        if self.worker.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.worker.device)
        return {
            "model": self._bare_model().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self.worker.gather_objects(rng),
            "step": self.step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state()``; with another number of processes, each draws its own."""
        self._bare_model().load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if len(state["rng"]) != self.worker.world_size:
            return
        rng = state["rng"][self.worker.rank]
        torch.set_rng_state(rng["cpu"])
        if self.worker.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.worker.device)

    def _backward(self, images: Tensor, labels: Tensor, sampled: bool, totals: "_Totals") -> Tensor:
        """Add the gradient of a batch's mean loss, part by part; returns that loss."""
        parts = list(
            zip(images.chunk(self.accumulation), labels.chunk(self.accumulation), strict=True)
        )
        whole = torch.zeros((), device=images.device)
        for number, (x, y) in enumerate(parts, 1):
            alone = self.worker.world_size == 1 or number == len(parts)
            with nullcontext() if alone else self.model.no_sync():
                recording = self.recorder.sampling() if sampled else nullcontext()
                with recording, _autocast(self.worker.device, self.amp):
                    logits = self.model(x)
                    loss = self._loss(logits, y)
                share = len(x) / len(images)
                self.scaler.scale(loss * share).backward()
            totals.add(loss, logits, y)
            whole = whole + loss.detach() * share
        return whole

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def _bare_model(self) -> nn.Module:
        """The model without the wrapper for several processes."""
        return getattr(self.model, "module", self.model)

    def _indicator_steps(self, num_batches: int) -> set[int]:
        if self.recorder is None:
            return set()
        return {i * num_batches // _INDICATOR_STEPS for i in range(_INDICATOR_STEPS)}

    def _check(self, loss: Tensor, title: str) -> None:
        if not math.isfinite(loss.item()):
            raise UserError(
                f"the loss is {loss.item()} at step {self.step} ({title}); try a lower --lr. "
                "Files of earlier epochs are untouched"
            )


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, worker: Worker, amp: str, title: str
) -> dict[str, float]:
    """Loss, accuracy in per cent and number of samples over all processes.

    Raises:
        UserError: the loss is not finite.
    """
    model.eval()
    totals = _Totals(worker)
    for images, labels in _batches(loader, title, totals):
        with _autocast(worker.device, amp):
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
        totals.add(loss, logits, labels)
    means = totals.means()
    if not math.isfinite(means["loss"]):
        raise UserError(f"the loss is {means['loss']} ({title}): the weights are no good")
    return means


class _Totals:
    """Sums over samples, on the device until they are asked for."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.loss, self.correct, self.samples = torch.zeros(
            3, dtype=torch.float64, device=worker.device
        )

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """``labels`` are classes, or shares of classes of which the largest counts."""
        classes = labels if labels.dim() == 1 else labels.argmax(1)
        self.loss = self.loss + loss.detach() * len(labels)
        self.correct = self.correct + (logits.detach().argmax(1) == classes).sum()
        self.samples = self.samples + len(labels)

    def means(self) -> dict[str, float]:
        sums = torch.stack([self.loss, self.correct, self.samples])
        loss, correct, samples = self.worker.sum(sums).tolist()
        return {"loss": loss / samples, "accuracy": 100 * correct / samples, "samples": samples}


def _batches(
    loader: DataLoader, title: str, totals: _Totals, saved_mib: float | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the worker's device, under a progress bar where there is a terminal."""
    worker = totals.worker
    saved = "" if saved_mib is None else f", saved {saved_mib:.1f} MiB"
    quiet = not (worker.is_main and sys.stderr.isatty())
    count = len(loader.sampler)
    with tqdm(total=count, desc=title, unit=" samples", leave=False, disable=quiet) as bar:
        for images, labels in loader:
            yield (
                images.to(worker.device, non_blocking=True),
                labels.to(worker.device, non_blocking=True),
            )
            if bar.update(len(labels)):
                loss, correct, samples = totals.loss, totals.correct, totals.samples
                means = f"loss {loss / samples:.4f}, {100 * correct / samples:.2f} %"
                bar.set_postfix_str(means + saved, refresh=False)


def _autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")
