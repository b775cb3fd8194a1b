"""Recipes: how a network is usually trained, the flags that change it, and what they build."""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from aal.training.command_line import (
    Parser,
    UserError,
    fraction,
    non_negative_float,
    non_negative_int,
    note,
    positive_float,
    positive_int,
    probability,
)
from aal.training.precision import AMP_DTYPES
from aal.training.schedule import SCHEDULERS, learning_rate

OPTIMIZERS = ("sgd", "adam")  # beside "adamw", of scripts that choose it themselves


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a run that do not belong to its network; each has a flag's name.

    Exactly one of ``epochs`` and ``num_steps`` is given, and at most one of the warm-ups.

    Args:
        lr: largest step size.
        eval_every: steps between validations; goes with ``num_steps``.
        warmup_share: share of the steps in which the step size rises.
        drop_epochs: "step" lowers the rate every so many epochs; None means at half and at three
            quarters of the run.
        adam_epsilon: what Adam adds to the root of the mean of squared gradients.
    """

    optimizer: str = "sgd"
    scheduler: str = "cosine"
    amp: str = "off"
    seed: int = 0
    lr: float
    epochs: int | None = None
    num_steps: int | None = None
    eval_every: int | None = None
    batch_size: int
    gradient_accumulation_steps: int = 1
    min_lr: float = 0.0
    gamma: float = 0.1
    drop_epochs: int | None = None
    warmup_epoch: float | None = None
    warmup_steps: int | None = None
    warmup_share: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    adam_epsilon: float = 1e-8
    momentum: float = 0.9
    off_nesterov: bool = True
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    label_smoothing: float = 0.0

    def followed(self, args: argparse.Namespace) -> Self:
        """This recipe with the flags that were given in place of its values.

        Raises:
            UserError: two flags contradict each other.
        """
        given = {
            field.name: getattr(args, field.name) for field in fields(self) if field.name in args
        }
        for others in _EXCLUDING:
            chosen = [name for name in others if name in given]
            if len(chosen) > 1:
                raise UserError(" and ".join(map(_flag, chosen)) + " exclude each other")
            if chosen:
                given = dict.fromkeys(others) | given
        changed = replace(self, **given)
        every = None
        if changed.num_steps is not None:
            every = min(changed.eval_every, changed.num_steps)
        elif "eval_every" in given:
            raise UserError("--eval-every counts steps; it goes with --num-steps")
        changed = replace(changed, eval_every=every)
        if "min_lr" not in given:
            changed = replace(changed, min_lr=min(changed.min_lr, changed.lr))
        if changed.min_lr > changed.lr:
            raise UserError(f"--min-lr {changed.min_lr} is above --lr {changed.lr}")
        for name in given:
            changed.note_if_inert(name)
        return changed

    def note_if_inert(self, name: str) -> None:
        """Tell the user of a flag that changes nothing beside the other settings."""
        if name in _GOES_WITH:
            setting, kinds = _GOES_WITH[name]
            if (value := getattr(self, setting)) not in kinds:
                note(f"{_flag(name)} does nothing under {_flag(setting)} {value}")

    @property
    def rounds(self) -> int:
        """How often the run is validated."""
        if self.num_steps is None:
            return self.epochs
        return math.ceil(self.num_steps / self.eval_every)

    def round_name(self, number: int) -> str:
        """Where the run is after round ``number``, counted from 1."""
        if self.num_steps is None:
            return f"epoch {number}/{self.epochs}"
        return f"step {min(number * self.eval_every, self.num_steps)}/{self.num_steps}"

    def learning_rate(self, steps_per_epoch: int) -> Callable[[int], float]:
        """Optimiser step -> learning rate."""
        steps = self.num_steps or self.epochs * steps_per_epoch
        if self.drop_epochs is None:
            drops = [math.ceil(steps / 2), math.ceil(steps * 3 / 4)]
        else:
            period = self.drop_epochs * steps_per_epoch
            drops = range(period, steps, period)
        warmup = self.warmup_steps or int((self.warmup_epoch or 0) * steps_per_epoch)
        warmup = warmup or int((self.warmup_share or 0) * steps)
        return partial(
            learning_rate,
            self.scheduler,
            steps=steps,
            peak=self.lr,
            end=self.min_lr,
            warmup=warmup,
            gamma=self.gamma,
            drops=drops,
        )

    def optimizer_of(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser; "adamw" lets matrices decay alone, no biases, norms or vectors of ABA."""
        adam = {
            "lr": self.lr,
            "betas": (self.beta1, self.beta2),
            "eps": self.adam_epsilon,
            "weight_decay": self.weight_decay,
        }
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, **adam)
        if self.optimizer == "adamw":
            matrices, vectors = [], []
            for parameter in parameters:
                (matrices if parameter.dim() > 1 else vectors).append(parameter)
            groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
            return torch.optim.AdamW(groups, **adam)
        return torch.optim.SGD(
            parameters,
            self.lr,
            self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0 and not self.off_nesterov,
        )


_EXCLUDING = (("epochs", "num_steps"), ("warmup_epoch", "warmup_steps", "warmup_share"))

# Fields that matter for some values of another alone.
_GOES_WITH = {
    "beta1": ("optimizer", ("adam", "adamw")),
    "beta2": ("optimizer", ("adam", "adamw")),
    "momentum": ("optimizer", ("sgd",)),
    "off_nesterov": ("optimizer", ("sgd",)),
    "gamma": ("scheduler", ("step",)),
    "min_lr": ("scheduler", ("cosine", "linear")),
}

Flag = tuple[tuple[str, ...], dict[str, Any], str]

# Spellings beside the field's name, what argparse is told, and what --help says. Without a type or
# choices the flag is a switch. "; if not given, {usual}" follows where the text does not say it.
FLAGS: dict[str, Flag] = {
    "optimizer": ((), {"choices": OPTIMIZERS}, "update rule"),
    "scheduler": (("--decay-type",), {"choices": SCHEDULERS}, "course of the step size"),
    "lr": (("--learning-rate",), {"type": positive_float}, "largest step size"),
    "min_lr": ((), {"type": non_negative_float}, "step size at the end, of cosine and linear"),
    "gamma": (
        (),
        {"type": probability},
        "what step multiplies the step size by, at half and three quarters of the run",
    ),
    "warmup_epoch": (
        ("--warmup-epochs",),
        {"type": non_negative_int},
        "epochs in which the step size rises",
    ),
    "warmup_steps": ((), {"type": non_negative_int}, "the same in steps"),
    "warmup_share": (
        ("--warmup-ratio",),
        {"type": fraction},
        "share of the steps in which the step size rises",
    ),
    "epochs": (("--max-epochs",), {"type": positive_int}, "passes over the training part"),
    "num_steps": ((), {"type": positive_int}, "length of the run in steps instead of epochs"),
    "eval_every": ((), {"type": positive_int}, "steps between validations with --num-steps"),
    "gradient_accumulation_steps": (
        (),
        {"type": positive_int},
        "parts of a batch that go through the network one after the other",
    ),
    "beta1": ((), {"type": fraction}, "decay of Adam's mean of gradients"),
    "beta2": ((), {"type": fraction}, "decay of Adam's mean of squared gradients"),
    "momentum": ((), {"type": fraction}, "share of its last step that sgd repeats"),
    "off_nesterov": ((), {}, "sgd without looking ahead by its momentum"),
    "weight_decay": ((), {"type": non_negative_float}, "share of the weights added to gradients"),
    "max_grad_norm": (
        ("--clip-grad",),
        {"type": non_negative_float},
        "largest norm of all gradients together, 0 for any",
    ),
    "label_smoothing": (
        (),
        {"type": fraction, "nargs": "?", "const": 0.1, "metavar": "SHARE"},
        "share of each label spread over all classes, 0.1 if the flag has no value",
    ),
    "amp": ((), {"choices": tuple(AMP_DTYPES)}, "mixed precision"),
    "seed": ((), {"type": non_negative_int}, "random seed"),
}


def add_recipe_flags(
    parser: Parser,
    names: Sequence[str],
    recipes: Mapping[str, Recipe],
    flags: Mapping[str, Flag] = FLAGS,
) -> None:
    """Add the flags of some fields of ``Recipe``. Absent flags leave no trace in the result.

    Args:
        names: fields.
        recipes: whose values --help gives as defaults, by what they are for.
        flags: like ``FLAGS``.
    """
    for name in names:
        aliases, keywords, help = flags[name]
        help = help if "if not given" in help else f"{help}; if not given, {{usual}}"
        values = {label: getattr(recipe, name) for label, recipe in recipes.items()}
        help = help.replace("{usual}", usual_text(values))
        if not keywords:
            parser.add_switch(_flag(name), help=help, default=argparse.SUPPRESS)
            continue
        parser.add_argument(_flag(name), *aliases, default=argparse.SUPPRESS, help=help, **keywords)


def usual_text(values: Mapping[str, Any]) -> str:
    """What a flag is if not given, for --help: one value, or each with what it is for."""
    given = {label: value for label, value in values.items() if value is not None}
    if len(given) == len(values) and len(set(given.values())) == 1:
        return str(next(iter(given.values())))
    return ", ".join(f"{value} for {label}" for label, value in given.items())


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
