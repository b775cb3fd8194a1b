"""The flags that choose a compressor of what autograd saves, see ``aal.compress``."""

import argparse
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aal.compression.compress import METHODS, compress
from aal.compression.mesa_policy import MesaPolicy
from aal.compression.method import Method
from aal.compression.session import Session
from aal.training.command_line import Parser, UserError, note, positive_float

_SWITCHES = ("actnn", "mesa")  # the flags of the paper's later release, each a method
_OPTIONS = {  # of methods, by flag: the name in the constructor, and what some methods have none of
    "compress_level": ("level", "levels"),
    "compress_bits": ("bits", "bits to choose"),
    "mesa_policy": ("policy", "policy"),
}


def add_compression_flags(parser: Parser) -> None:
    """Add them; ``compression_of`` reads what was given."""
    add, absent = parser.add_argument, argparse.SUPPRESS
    help = (
        "compress what autograd saves between forward and backward: actnn, mesa, gact and division "
        "as published, adaptive, fp8, exact (gradients are bit-identical) or offload (to the "
        "host's memory, exactly); if not given, none"
    )
    add("--compress", choices=tuple(METHODS), default=absent, help=help)
    help = (
        "published level of actnn (L0, L1, L2, L3, L3.1, L4) or gact (L0, L1, L1.1, L1.2, L2, "
        "L2.1, L2.2, L3, swap, L4bit-swap); if not given, L3 of actnn and L2 of gact"
    )
    add("--compress-level", metavar="LEVEL", default=absent, help=help)
    help = (
        "bits per number, of adaptive, actnn and gact on average; if not given, 4 for adaptive, "
        "2 for division, as the level says for actnn and gact"
    )
    add("--compress-bits", type=_bits, metavar="BITS", default=absent, help=help)
    parser.add_switch("--actnn", help="the paper's name of --compress actnn")
    parser.add_switch("--mesa", help="the paper's name of --compress mesa")
    help = (
        "which layers mesa compresses and how, a file in Mesa's own format; if not given, 8 bits "
        "for all but convolutions"
    )
    add("--mesa-policy", type=Path, metavar="FILE", default=absent, help=help)


@dataclass(frozen=True)
class Compression:
    """A compressor as flags describe it.

    Args:
        method: a key of ``METHODS``.
        level, bits: of the method, None where it has none or chooses itself.
        policy: Mesa's, where one was given.
        policy_name: of its file, without the ending.
        policy_text: what the file says.
    """

    method: str = "none"
    level: str | None = None
    bits: float | None = None
    policy: MesaPolicy | None = None
    policy_name: str = ""
    policy_text: str | None = None

    def sessions_for(self, model: nn.Module, seed: int) -> Callable[[], Session] | None:
        """Makes sessions for a model; None if nothing is compressed."""
        if self.method == "none":
            return None
        return functools.partial(compress, self.method, model, seed=seed, **self._options())

    def make(self) -> Method:
        """The method; raises ``ValueError`` for values that it does not take."""
        return _class_of(self.method)(**self._options())

    @property
    def probes(self) -> bool:
        """Does it try out from time to time what its bits do to the gradient?"""
        return self.make().needs_closure

    def config(self) -> dict[str, Any]:
        """What is recorded of it, by flag."""
        return {
            "compress": self.method,
            "compress_level": self.level,
            "compress_bits": self.bits,
            "mesa_policy": self.policy_text,
        }

    def words(self) -> list[str]:
        """Its name for a run's folder, such as "actnn-L3" or "adaptive-4bit", or nothing."""
        if self.method == "none":
            return []
        bits = None if self.bits is None else f"{self.bits:g}bit"
        parts = (self.method, self.level, bits, self.policy_name)
        return ["-".join(part for part in parts if part)]

    def _options(self) -> dict[str, Any]:
        values = {"level": self.level, "bits": self.bits, "policy": self.policy}
        return {name: value for name, value in values.items() if value is not None}


def compression_of(args: argparse.Namespace, device: torch.device) -> Compression:
    """The compressor that flags choose for a device; tells the user if it does nothing there.

    Raises:
        UserError: flags contradict each other, a value is none that the method takes, or the
            policy cannot be read.
    """
    method, given = _method_of(args), vars(args)
    accepted = inspect.signature(_class_of(method)).parameters
    for flag, (option, what) in _OPTIONS.items():
        if flag in given and option not in accepted:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} does not go with --compress {method}, which has no {what}")
    level = accepted["level"].default if "level" in accepted else None
    policy = _read_policy(args.mesa_policy) if "mesa_policy" in given else ()
    compression = Compression(
        method, given.get("compress_level", level), given.get("compress_bits"), *policy
    )
    try:
        made = compression.make()
    except ValueError as error:
        raise UserError(f"--compress {method}: {error}") from error
    if "bits" in accepted and level is None:  # else the level says it
        compression = replace(compression, bits=made.bits)
    if method != "none" and "model_path" in given:
        note(f"--compress {method} does nothing with --model-path, which trains nothing")
    elif method != "none" and made.is_off:
        note(f"--compress {method} does nothing at level {compression.level}")
    elif made.offloads and device.type == "cpu":
        note(f"--compress {method} moves nothing on cpu, whose tensors are in the host's memory")
    return compression


def _method_of(args: argparse.Namespace) -> str:
    chosen = {f"--{name}": name for name in _SWITCHES if getattr(args, name)}
    if "compress" in args:
        chosen[f"--compress {args.compress}"] = args.compress
    if len(set(chosen.values())) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other")
    return next(iter(chosen.values()), "none")


def _class_of(method: str) -> type[Method]:
    module, name = METHODS[method]
    return getattr(importlib.import_module(module), name)


def _read_policy(path: Path) -> tuple[MesaPolicy, str, str]:
    """A policy, the name of its file and what that says."""
    try:
        text = path.read_text(encoding="utf-8")
        return MesaPolicy.parse(text), path.stem, text
    except OSError as error:
        raise UserError(f"--mesa-policy: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--mesa-policy {path}: {error}") from error


def _bits(text: str) -> float:
    """A number above 0, whole where it is."""
    bits = positive_float(text)
    return int(bits) if bits == int(bits) else bits
