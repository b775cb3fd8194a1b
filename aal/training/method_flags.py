"""The flags that choose a ``Method``: rule, lean mode, gcp, and what goes with them."""

import argparse
from typing import Any

from aal.method import LEAN, Method
from aal.ops.derivative_code import DERIVATIVES
from aal.rules.asa import SCALES
from aal.rules.placement import RULES
from aal.training.command_line import Parser, UserError, note

OPTIONS = ("learning_rule", "lean", "gcp", "asa_scale", "derivative")
_USUAL = Method()


def add_method_flags(
    parser: Parser, usual_lean: str = "off for bp without --gcp and exact otherwise"
) -> None:
    """Add them; ``settle_lean`` and ``note_inert_flags`` have to follow.

    Args:
        usual_lean: what --help says of an absent ``--lean``, where ``settle_lean`` is not asked.
    """
    add, absent = parser.add_argument, argparse.SUPPRESS
    add("--learning-rule", choices=RULES, default="bp", help="rule of the weight gradients")
    help = (
        "off for PyTorch's layers; exact computes norms and activations again; approx keeps two "
        "bits of an activation's derivative (ReLU: one, exactly), which approximates gradients; "
        f"if not given, {usual_lean}"
    )
    add("--lean", choices=LEAN, default=absent, help=help)
    parser.add_switch("--gcp", help="compute more in backward again, exactly, to save memory")
    help = "size of ASA's sign code: a constant, or the mean of what it stands for"
    add(
        "--asa-scale",
        choices=SCALES,
        default=absent,
        help=f"{help}; if not given, {_USUAL.asa_scale}",
    )
    help = "table of --lean approx"
    add(
        "--derivative",
        choices=tuple(DERIVATIVES),
        default=absent,
        help=f"{help}; if not given, {_USUAL.derivative}",
    )


def settle_lean(args: argparse.Namespace) -> None:
    """Give ``--lean`` its usual value; raises ``UserError`` if it contradicts ``--gcp``."""
    if "lean" not in args:
        args.lean = _usual_lean(args)
    elif args.gcp and args.lean == "off":
        raise UserError("--gcp builds on --lean exact; leave out --lean off or --gcp")


def note_inert_flags(
    args: argparse.Namespace,
    activation: str,
    has_attention: bool,
    has_memory: bool = False,
    drops_weights: bool = False,
) -> None:
    """Tell the user of flags that change nothing, and give them their usual values.

    Args:
        args: after ``settle_lean``.
        activation: of the network's feed-forward parts.
        has_attention: its blocks have attention, which ``--gcp`` replays in every lean mode.
        has_memory: some of it attends to another sequence.
        drops_weights: weights of attention are dropped.
    """
    rule, is_approx = args.learning_rule, args.lean == "approx"
    for flag, name, matters, where in (
        ("--asa-scale", "asa_scale", rule.startswith("asa"), f"under --learning-rule {rule}"),
        ("--derivative", "derivative", is_approx, "without --lean approx"),
        ("--derivative", "derivative", activation != "relu", "for ReLU, whose code is exact"),
    ):
        if name in args and not matters and getattr(args, name) != getattr(_USUAL, name):
            note(f"{flag} does nothing {where}")
            setattr(args, name, getattr(_USUAL, name))
        elif name not in args:
            setattr(args, name, getattr(_USUAL, name))
    if args.gcp and is_approx and not has_attention:
        note("--gcp does nothing under --lean approx without attention")
        args.gcp = False
    if rule == "bp" and is_approx:
        note("--lean approx keeps more than --lean exact does under --learning-rule bp")
    if rule == "bp" or args.lean != "exact":
        return
    level = int(rule[-1])
    if (level == 4 and has_memory) or (level >= 3 and drops_weights and not args.gcp):
        return
    if args.gcp:
        note(
            f"--learning-rule {rule} keeps no less than bp does under --gcp, which computes again "
            "what the rule does without"
        )
    elif activation != "relu":
        note(
            f"--learning-rule {rule} keeps no less than bp does under --lean exact with "
            f"{activation}; --lean approx lets it"
        )


def method_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What ``build`` of a network is told of the method."""
    options = {name: getattr(args, name) for name in OPTIONS}
    return {"rule": options.pop("learning_rule"), **options}


def method_words(args: argparse.Namespace) -> list[str]:
    """Names of the rule and of what is not as usual, for a run's folder."""
    words = [args.learning_rule]
    if args.gcp:
        words.append("gcp")
    if args.lean != _usual_lean(args):
        words.append(f"lean-{args.lean}")
    if args.asa_scale != _USUAL.asa_scale:
        words.append(f"asa-scale-{args.asa_scale}")
    if args.derivative != _USUAL.derivative:
        words.append(f"derivative-{args.derivative}")
    return words


def _usual_lean(args: argparse.Namespace) -> str:
    return "off" if args.learning_rule == "bp" and not args.gcp else "exact"
