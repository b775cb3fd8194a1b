"""Training of a model, one pass over a loader at a time, whatever it learns."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aal.compression.report import Report
from aal.compression.session import Session
from aal.indicator import IndicatorRecorder
from aal.memory import MIB, SavedTensor, saved_bytes, saved_tensors
from aal.preserved import preserved
from aal.training import finite, parallel
from aal.training.command_line import UserError
from aal.training.devices import Worker
from aal.training.precision import MAX_SKIPPED, LossScaler, autocast
from aal.training.task import Task
from aal.training.totals import Progress, Totals, progress_bar

_INDICATOR_STEPS = 4  # sampled steps per epoch
_PROBE_SAMPLES = 8
_ADVICE = "try a lower --lr"
_UNTOUCHED = "Files that were written before are untouched"


@dataclass
class Trainer:
    """A model and everything that its training step needs.

    The gradient of a step is that of the mean loss over all units of all processes' batches.

    Args:
        task: what is learned.
        model: perhaps wrapped for several processes.
        optimizer: its learning rate is set before every step.
        learning_rate: optimiser step -> learning rate.
        worker: device and processes.
        amp: "off", "bf16" or "fp16".
        recorder: Learning Indicators are sampled with it where it is given.
        max_grad_norm: largest norm of all gradients together; 0 for any.
        accumulation: parts of a batch that go through the network one after the other. Loss and
            gradient stay those of the batch.
        compress: makes a compressor of what autograd saves, for the model without the wrapper.
            Only training enters it.
    """

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    worker: Worker
    amp: str = "off"
    recorder: IndicatorRecorder | None = None
    max_grad_norm: float = 0.0
    accumulation: int = 1
    compress: Callable[[], Session] | None = None
    step: int = 0
    saved_mib: float | None = None
    compression_report: Report | None = None  # of the last epoch's last batch
    progress: Progress | None = None  # of the epoch that is being learned

    def __post_init__(self) -> None:
        self.scaler = LossScaler(self.worker.device, self.amp, self.worker.world_size)
        self.compression = self.compress and self.compress()
        self._awaited: dict[str, Tensor] | None = None  # random state of the epoch to be continued
        self._watch = finite.LossWatch(self.worker.device)

    def measure_saved_mib(self, loader: Any) -> float:
        """MiB that autograd holds between forward and backward, per process.

        Takes the first batch of ``loader``, or the first part of it that goes through the network,
        and leaves buffers and random state as they were.
        """
        with self._trying_out(loader) as forward:
            self.saved_mib = saved_bytes(forward) / MIB
        return self.saved_mib

    def saved_tensors(self, loader: Any) -> list[SavedTensor]:
        """What ``measure_saved_mib`` counts, tensor by tensor, the largest first."""
        with self._trying_out(loader) as forward:
            return saved_tensors(self._bare_model(), forward)

    @contextmanager
    def _trying_out(self, loader: Any) -> Iterator[Callable[[], Any]]:
        """The loss of the first part of the first batch as a function, which leaves no trace."""
        model, device = self._bare_model().train(), self.worker.device
        with preserved(model), parallel.whole(model), autocast(device, self.amp):
            batch = self.task.on_device(next(iter(loader)), device)
            part = self.task.split(batch, self.accumulation)[0]
            # Another compressor, as that of training learns from forward and backward passes.
            compression = self.compress and self.compress()
            yield lambda: self._loss(model, part, compression)

    def train_epoch(
        self, loader: Any, title: str, after_step: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """One pass over ``loader``, or the rest of one; returns the means over all its units.

        Args:
            loader: yields the batches that are not yet done; its length is that of the epoch.
            after_step: called after every step but the last.

        Raises:
            UserError: the loss is not finite (under fp16, in too many steps), or the epoch that
                was begun had other steps.
        """
        self.model.train()
        if self.progress is None:
            totals = Totals(self.task.unit, self.task.measures, self.worker)
            self.progress = Progress(title, len(loader), totals)
        progress = self.progress
        if progress.of != len(loader):
            raise UserError(
                f"the state was saved in an epoch of {progress.of} steps, which has {len(loader)} "
                "now; continue with as many processes as it was saved by"
            )
        start = time.perf_counter() - progress.seconds
        batches = iter(loader)  # which may draw random numbers, as it did when the epoch began
        if self._awaited is not None:
            self.set_random_state(self._awaited)
            self._awaited = None
        bar = progress_bar(progress.of, title, self.worker, initial=progress.steps)
        saved = "" if self.saved_mib is None else f", saved {self.saved_mib:.1f} MiB"
        with bar:
            for batch in batches:
                self._learn(self.task.on_device(batch, self.worker.device))
                progress.seconds = time.perf_counter() - start
                if bar.update():
                    bar.set_postfix_str(f"{progress.totals}{saved}", refresh=False)
                if progress.steps < progress.of:
                    after_step()
        if progress.skipped == progress.of:
            raise UserError(
                f"all steps of {title} were skipped, as gradients overflow in float16; use --amp "
                f"bf16, or {_ADVICE}"
            )
        means, unit = progress.totals.means(), self.task.unit
        progress.seconds = time.perf_counter() - start
        rate = means.pop(unit) / progress.seconds
        if self.scaler.is_enabled:
            means["skipped_steps"] = progress.skipped
        return means | {"seconds": progress.seconds, f"{unit}_per_s": rate}

    def end_epoch(self) -> None:
        """The next epoch begins at its first step."""
        self.progress = None

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, apart from data and configuration.

        Takes part in every process, each of which has a random state and a part of the epoch of
        its own.

        Raises:
            UserError: weights are not finite.
        """
        if (name := finite.weights_not_finite(self._bare_model())) is not None:
            raise UserError(f"{name} is not finite after step {self.step}; {_ADVICE}. {_UNTOUCHED}")
        progress, own = self.progress, {"rng": self.random_state()}
        if self.compression is not None:
            own["compression"] = self.compression.state()
        if progress is not None:
            own["totals"] = progress.totals.state()
            own["indicators"] = self.recorder.state() if self.recorder else {}
        processes = self.worker.gather_objects(own)
        return {
            **parallel.state_of(self._bare_model(), self.optimizer, self.worker),
            "scaler": self.scaler.state_dict(),
            "rng": [process.pop("rng") for process in processes],
            "step": self.step,
            "compression": [process.pop("compression", None) for process in processes],
            "progress": progress
            and {
                "title": progress.title,
                "of": progress.of,
                "steps": progress.steps,
                "skipped": progress.skipped,
                "seconds": progress.seconds,
                "processes": processes,
            },
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state()``; with another number of processes, each draws its own."""
        parallel.load_state(self._bare_model(), self.optimizer, state)
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if self.compression is not None:
            compression = state["compression"]
            is_own = len(compression) == self.worker.world_size
            self.compression.load_state(compression[self.worker.rank if is_own else 0])
        if state.get("progress") is not None:  # older versions saved states between epochs alone
            self._load_progress(**state["progress"])
        if len(state["rng"]) == self.worker.world_size:
            rng = state["rng"][self.worker.rank]
            if self.progress is None:
                self.set_random_state(rng)
            else:
                self._awaited = rng

    def _load_progress(
        self,
        title: str,
        of: int,
        steps: int,
        skipped: int,
        seconds: float,
        processes: Sequence[dict[str, Any]],
    ) -> None:
        """Continue an epoch; of other processes than before, the first takes all that they had."""
        totals = Totals(self.task.unit, self.task.measures, self.worker)
        if len(processes) == self.worker.world_size:
            own = processes[self.worker.rank : self.worker.rank + 1]
        else:
            own = processes if self.worker.is_main else ()
        if own:
            totals.load_state(sum(process["totals"] for process in own))
        if self.recorder is not None:
            for process in own:
                self.recorder.add_state(process["indicators"])
        self.progress = Progress(title, of, totals, steps, skipped, seconds)

    def random_state(self) -> dict[str, Tensor]:
        """Of this process, on CPU and on its GPU."""
        rng = {"cpu": torch.get_rng_state()}
        if self.worker.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.worker.device)
        return rng

    def set_random_state(self, rng: dict[str, Tensor]) -> None:
        """Go back to a ``random_state()``."""
        torch.set_rng_state(rng["cpu"])
        if self.worker.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.worker.device)

    def _learn(self, batch: Any) -> None:
        """One step of the optimiser; under fp16 none where gradients overflow."""
        progress = self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.task.changed(batch)
        is_sampled = progress.steps in self._indicator_steps(progress.of)
        parts = self._backward(batch, is_sampled)
        if math.isfinite(loss := self._watch.value()):
            for part in parts:
                progress.totals.add(*part)
        elif not self.scaler.is_enabled:
            raise UserError(f"{self._not_finite(loss, batch)}; {_ADVICE}. {_UNTOUCHED}")
        if self.max_grad_norm:
            self.scaler.unscale(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        if self.scaler.step(self.optimizer):
            progress.skipped += 1
            if self.scaler.skipped_in_row == MAX_SKIPPED:
                raise UserError(self._too_many_skipped(loss, batch))
        self.step += 1
        progress.steps += 1
        self._step_compression(batch, is_last=progress.steps == progress.of)

    def _backward(self, batch: Any, sampled: bool) -> list[tuple[Tensor, int, Sequence[Tensor]]]:
        """Add the gradient of a batch's loss, part by part; ``_watch`` sees the loss.

        Returns:
            What ``Totals.add`` takes, of each part.
        """
        parts, weight = self._parts(batch), self.task.weight
        # The wrapper averages the gradients of the processes, whatever their weights.
        mean = self._step_weight(weight(batch)) / self.worker.world_size
        whole, outcomes = torch.zeros((), device=self.worker.device), []
        for number, part in enumerate(parts, 1):
            alone = self.worker.world_size == 1 or number == len(parts)
            with nullcontext() if alone else parallel.without_exchange(self.model):
                recording = self.recorder.sampling(self.compression) if sampled else nullcontext()
                with recording, autocast(self.worker.device, self.amp):
                    loss, sums = self._loss(self.model, part, self.compression)
                share = weight(part) / mean
                outcomes.append((loss.detach(), weight(part), sums))
                whole = whole + loss.detach() * share
                if number == len(parts):
                    self._watch.see(whole)
                self.scaler.scaled(loss * share).backward()
        return outcomes

    def _parts(self, batch: Any) -> Sequence[Any]:
        """Of a batch, as many in every process: FSDP2 puts blocks together for each of them."""
        parts = self.task.split(batch, self.accumulation)
        if self.accumulation == 1 or self.task.is_even:
            return parts
        (fewest,) = self.worker.largest([-len(parts)])
        return self.task.split(batch, -fewest)

    def _not_finite(self, loss: float, batch: Any) -> str:
        """What is known of a loss that is not finite, for the user."""
        model = self._bare_model()

        def forward() -> None:
            for part in self.task.split(batch, self.accumulation):
                with autocast(self.worker.device, self.amp):
                    self.task.loss(model, part)

        where = f"the loss is {loss} at step {self.step + 1} ({self.progress.title})"
        return where + finite.origin(model, batch, forward)

    def _too_many_skipped(self, loss: float, batch: Any) -> str:
        """Why no step is taken any more, for the user."""
        text = (
            f"{MAX_SKIPPED} steps in a row were skipped up to step {self.step + 1} "
            f"({self.progress.title}), as gradients overflow in float16 even when the loss is "
            f"multiplied by {self.scaler.scale:g}"
        )
        if not math.isfinite(loss):
            text += f": {self._not_finite(loss, batch)}"
        elif (name := finite.gradient_not_finite(self._bare_model())) is not None:
            text += f"; that of {name} does"
        return f"{text}. Use --amp bf16, or {_ADVICE}. {_UNTOUCHED}"

    def _loss(
        self, model: nn.Module, batch: Any, compression: Session | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The task's, with what autograd saves compressed."""
        with compression or nullcontext():
            return self.task.loss(model, batch)

    def _step_compression(self, batch: Any, is_last: bool) -> None:
        """Tell the compressor that a step on ``batch`` is over, the last of an epoch perhaps."""
        if self.compression is None:
            return
        if is_last:  # before probes, whose tensors are smaller
            self.compression_report = self.compression.report()
        needs_closure = self.compression.method.needs_closure
        self.compression.step(partial(self._probe, batch) if needs_closure else None)

    def _probe(self, batch: Any) -> None:
        """Add the gradient of a few samples of a batch, in this process alone."""
        few = self.task.first(batch, _PROBE_SAMPLES)
        with autocast(self.worker.device, self.amp):
            loss, _ = self._loss(self._bare_model(), few, self.compression)
        self.scaler.scaled(loss).backward()

    def _step_weight(self, own: int) -> int:
        """The weight of the step's batches of all processes together."""
        if self.task.is_even or self.worker.world_size == 1:
            return own * self.worker.world_size
        return int(self.worker.sum(torch.tensor(own, device=self.worker.device)))

    def _bare_model(self) -> nn.Module:
        """The model without the wrapper for several processes."""
        return getattr(self.model, "module", self.model)

    def _indicator_steps(self, num_batches: int) -> set[int]:
        if self.recorder is None:
            return set()
        return {i * num_batches // _INDICATOR_STEPS for i in range(_INDICATOR_STEPS)}
