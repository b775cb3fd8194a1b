"""The course of a training run: its epochs, what is recorded of them, and where it can be left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aal.memory import MIB
from aal.training.command_line import UserError, print_line
from aal.training.devices import Worker
from aal.training.interruption import Interruption, StopAtOnce
from aal.training.loop import Trainer
from aal.training.parallel import whole
from aal.training.saving import Saver
from aal.training.tensorboard import EventFile

if TYPE_CHECKING:
    from aal.training.run import Run


class Course:
    """Trains from the beginning, or from the last saved state, and scores the best epoch.

    In a run of ``num_steps`` what lies between two validations counts as an epoch.

    Args:
        run: what is learned, and how it is scored.
        worker: this process.
        trainer, loader: of the run.
    """

    def __init__(self, run: Run, worker: Worker, trainer: Trainer, loader: Any):
        self.run, self.worker, self.trainer, self.loader = run, worker, trainer, loader
        self.folder, self.settings = run.folder, run.settings
        self.best_metric, self.val_metric = f"best_{run.metric}", f"val_{run.metric}"
        self.epoch, self.best = 0, float("-inf")  # epochs that are done, and their best score
        self.events: EventFile | None = None

    def follow(self) -> None:
        """Go to the end.

        Raises:
            UserError: anything that the user can put right.
            Stopped: a signal came; the state is saved.
        """
        state = self.folder.resume(self.run.config) if self.run.args.resume else None
        steps = self.worker.gather_objects(None if state is None else state.get("step"))
        if len(set(steps)) > 1:
            found = ", ".join("no state" if step is None else f"step {step}" for step in steps)
            raise UserError(
                f"the processes found different states in {self.folder.path} ({found}); look at "
                "the file system that they share, and start again"
            )
        if state is not None:
            self._resume(state)
        elif self.worker.is_main:
            self.folder.start(self.run.config)
        if self.run.args.tensorboard and self.worker.is_main:
            self.events = EventFile(self.folder.path / "tensorboard", self.folder.metrics)
        self.trainer.measure_saved_mib(self.loader)
        write, every = self.folder.save, self.run.args.save_every
        with (
            Interruption() as interruption,
            Saver(every, self._state, write, self.worker, interruption) as self.saver,
        ):
            while self.epoch < self.settings.rounds:
                self._learn_epoch()
            self._finish()

    def _resume(self, state: dict[str, Any]) -> None:
        self.run.check_extras(state)
        try:
            self.trainer.load_state(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.folder.last} is damaged: {error}") from error
        self.epoch, self.best = state["epoch"], state[self.best_metric]
        if self.trainer.recorder is not None:
            self.trainer.recorder.resume(self.folder.indicator_names)

    def _state(self) -> dict[str, Any]:
        """The full state, all processes together; complete in the first one."""
        state = self.trainer.state()
        if self.worker.is_main:
            state |= {"config": self.run.config, "function": self.run.function}
            state |= {"epoch": self.epoch, self.best_metric: self.best, **self.run.extras()}
        return state

    def _learn_epoch(self) -> None:
        """Train to the next validation, or from where that was left, and record it."""
        trainer, title = self.trainer, self.settings.round_name(self.epoch + 1)
        if trainer.compression is not None:
            trainer.compression.method.epoch = self.epoch
        done = trainer.progress.steps if trainer.progress is not None else 0
        self.run.begin_epoch(self.loader, self.epoch, done)
        on_gpu = self.worker.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.worker.device)
        train = trainer.train_epoch(
            self.loader, title, lambda: self.saver.after_step(self.trainer.step)
        )
        peak = torch.cuda.max_memory_allocated(self.worker.device) / MIB if on_gpu else None
        if self.worker.is_main and trainer.compression_report is not None and self.epoch == 0:
            self.folder.record_compression(str(trainer.compression_report))
        self.worker.share_buffers(self.run.model)  # what is validated is what is saved
        self.saver.wait()  # so that no process is made while a thread writes
        row = self._row(train, self._validation(title), peak)
        indicator = None
        if trainer.recorder is not None:
            values = trainer.recorder.take(self.worker.gather_objects)
            row["indicator"] = trainer.recorder.summary(values)
            indicator = values[0].numpy()
        trainer.end_epoch()
        self._record(row, indicator, title)

    def _validation(self, title: str) -> Mapping[str, Any]:
        """Scores of the validation part; where a signal comes, it is done again on resuming."""
        if number := self.saver.asked():
            self.saver.save_and_stop(self.trainer.step, number)
        before = self.trainer.random_state()
        try:
            with self.saver.obeying(), whole(self.run.model):
                return self.run.validate(self.worker, title)
        except StopAtOnce:
            self.trainer.set_random_state(before)
            self.saver.save_and_stop(self.trainer.step, self.saver.asked())

    def _row(
        self, train: Mapping[str, float], validation: Mapping[str, Any], peak: float | None
    ) -> dict[str, Any]:
        """The metrics of an epoch."""
        scores = {f"train_{name}": value for name, value in train.items()}
        scores |= {f"val_{name}": value for name, value in validation.items()}
        rate = f"{self.trainer.task.unit}_per_s"
        skipped = {"skipped_steps": train["skipped_steps"]} if "skipped_steps" in train else {}
        return {
            "epoch": self.epoch + 1,
            "step": self.trainer.step,
            **{name: value for name, value in scores.items() if name in self.run.columns},
            **skipped,
            "learning_rate": self.trainer.optimizer.param_groups[0]["lr"],
            "saved_mib": self.trainer.saved_mib,
            "peak_mib": peak,
            rate: train[rate],
            "seconds": train["seconds"],
        }

    def _record(self, row: dict[str, Any], indicator: np.ndarray | None, title: str) -> None:
        """An epoch is done."""
        score = row[self.val_metric]
        is_best = score > self.best
        self.best = max(self.best, score)
        self.epoch += 1
        state = self._state() | {self.val_metric: score}
        if self.worker.is_main:
            if self.events is not None:  # first, as an epoch that is not finished is done again
                self.events.record(row)
            self.folder.finish_epoch(row, indicator, state, is_best)
            print_line(self.run.epoch_text(row, title))
        self.saver.restart_clock()
        if number := self.saver.asked():
            self.saver.stop(self.trainer.step, number)

    def _finish(self) -> None:
        """Score the best epoch on the test part."""
        self.worker.barrier()
        try:
            with self.saver.obeying():
                test = self.run.score_test(self.folder.best, self.worker)
        except StopAtOnce:
            self.saver.stop(self.trainer.step, self.saver.asked())
        if self.worker.is_main:
            self.folder.finish(test)
            print_line(f"run folder: {self.folder.path}")
