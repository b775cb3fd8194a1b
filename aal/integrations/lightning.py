"""A callback for the ``Trainer`` of Lightning."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from aal.integrations.training import Choices, Passes
from aal.memory import MIB


class AALCallback(pl.Callback):
    """Converts a ``LightningModule``, compresses what its training step saves, and logs both.

    ::

        trainer = pl.Trainer(callbacks=[AALCallback("asa1")])
        trainer.fit(module, data)

    The module is converted before its optimisers are made, or a checkpoint is read, in every stage
    of the ``Trainer``; it stays so: ``aal.revert`` undoes it. Calls of ``training_step`` are
    compressed. The user's random state is left alone. With Lightning's logs are logged, once per
    step of the optimiser where there is something new:

    ``aal/saved_mib``
        what the compressor keeps of a training step, in MiB per process. As a training step
        cannot be repeated without doing harm, there is no such number without a compressor:
        ``aal.describe`` measures a model with an input.
    ``aal/li_median``, ``aal/li_positive``
        Learning Indicator of a step: the median over layers of their medians, and the share of
        values above 0, as a mean over layers.

    Args:
        rule, lean: as ``aal.convert``.
        compress: a method of ``aal.compress``, None for none.
        compress_options: its options.
        indicator_every: optimiser steps from one sample of Learning Indicators to the next; None
            for no samples.
        options: the other arguments of ``aal.convert``.

    Raises:
        ValueError: arguments that ``aal.convert`` or ``aal.compress`` does not take, or that
            change nothing.
        TypeError: an option that the compressor does not have.
    """

    def __init__(
        self,
        rule: str = "asa1",
        lean: str = "approx",
        compress: str | None = None,
        compress_options: Mapping[str, Any] | None = None,
        indicator_every: int | None = None,
        **options: Any,
    ):
        self._choices = Choices(rule, lean, compress, compress_options, indicator_every, options)
        self._passes: Passes | None = None
        self._step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._choices.convert(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._passes = Passes(self._choices, pl_module, "training_step", measures=False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step
        self._passes.follow(self._step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._passes.unfollow()
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._passes.step()
        values = self._passes.take()
        if self._choices.compresses:
            values["aal/saved_mib"] = self._passes.session.report().stored_bytes / MIB
        self.log_dict(values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._passes = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._passes is not None:
            self._passes.unfollow()
            self._passes = None
