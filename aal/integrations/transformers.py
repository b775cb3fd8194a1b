"""A callback for the ``Trainer`` of Hugging Face's transformers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aal.conversion.swap import Converted
from aal.integrations.training import Choices, Passes


class AALCallback(TrainerCallback):
    """Converts the model of a ``Trainer``, compresses what its training saves, and logs both.

    ::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[AALCallback("asa1")])
        trainer.train()

    The model is converted when the ``Trainer`` is made and stays so: ``aal.revert`` undoes it.
    Passes of a training step are compressed; evaluation is not, and computes with the rule. The
    user's random state is left alone. ``state.log_history`` has, with the first logs after it
    was found:

    ``aal/saved_mib``
        what autograd holds between forward and backward of the first batch, in MiB per process.
    ``aal/stock_mib``
        what it would hold with the model's own layers and no compressor. (Once, two more forward
        passes are made for the two.)
    ``aal/li_median``, ``aal/li_positive``
        Learning Indicator of a step: the median over layers of their medians, and the share of
        values above 0, as a mean over layers.

    Callbacks that come before this one in the list of the ``Trainer`` do not see these logs: it
    puts those of ``report_to`` first. With ``report_to="none"`` they can be given behind this one.

    A ``Trainer`` tells nobody that training was interrupted. If that happens in a backward pass,
    call ``detach``, or train again, before the model is used elsewhere.

    Args:
        rule, lean: as ``aal.convert``.
        compress: a method of ``aal.compress``, None for none.
        compress_options: its options.
        indicator_every: optimiser steps from one sample of Learning Indicators to the next; None
            for no samples.
        options: the other arguments of ``aal.convert``.

    Raises:
        ValueError: arguments that ``aal.convert`` or ``aal.compress`` does not take, or that
            change nothing; in training, a ``Trainer`` whose optimiser lacks parameters that the
            conversion added, or that runs the model in a way that no session can follow.
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

    def detach(self) -> None:
        """Leave the model alone; it stays converted."""
        if self._passes is not None:
            self._passes.unfollow()
            self._passes = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        self._choices.convert(model)  # before there is an optimiser

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        self.detach()
        if args.n_gpu > 1:
            raise ValueError(
                "AALCallback does not work with nn.DataParallel: start one process per device, "
                "with torchrun or accelerate launch"
            )
        watches = self._choices.compresses or self._choices.indicator_every
        if args.torch_compile and watches:
            raise ValueError(
                "with torch_compile AALCallback takes no compressor and records no indicators: "
                "nothing can be done around passes that are compiled as a whole"
            )
        self._choices.convert(model)  # model_init may have made another
        _check_optimizer(model, optimizer)
        if not args.torch_compile:
            self._passes = Passes(self._choices, model, "forward", measures=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._passes is not None:
            self._passes.follow(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._passes is not None:  # whatever runs from here on is no training
            self._passes.unfollow()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._passes is not None:
            self._passes.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if self._passes is not None and (values := self._passes.take()):
            logs.update(values)
            state.log_history[-1].update(values)  # a copy was made before callbacks were called

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.detach()


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ``ValueError`` if vectors of ABA would never learn."""
    learned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, module in model.named_modules():
        added = module.parameters_added if isinstance(module, Converted) else ()
        if any(id(module._parameters[parameter]) not in learned for parameter in added):
            raise ValueError(
                f"the optimiser does not have the vector that {name} learns: it was made before "
                "the model was converted. Call aal.convert yourself, in model_init or before the "
                "optimiser is made, or give AALCallback to the Trainer when that is made"
            )
