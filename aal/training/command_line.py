"""Command lines that take dashes or underscores and answer a mistake with one clear line."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

NOTED = "AAL_NOTED"  # in the environment of processes whose parent has made their notes
ERRORS = "AAL_ERRORS"  # in their environment: the pipe that takes lines for the parent to tell
LOST = 75  # exit status of such a process after a ``ProcessLost``

_LARGEST = 1e30  # what single precision holds, with room for products
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


class UserError(Exception):
    """Something that the user can put right; its text says what is wrong and what to do."""


class Stopped(Exception):
    """A signal stopped the program; its text says what can be done now.

    Args:
        signal: its number.
        text: of the message.
    """

    def __init__(self, signal: int, text: str):
        super().__init__(text)
        self.status = 128 + signal


class ProcessLost(Exception):
    """Another process of the run has ended or hangs; its texts say how, and what can be done."""


def run(main: Callable[[Sequence[str]], int], arguments: Sequence[str], program: str) -> int:
    """Return ``main``'s exit status, or 2 after a ``UserError``.

    Signals that ask to stop give 130 (SIGINT) and 143 (SIGTERM). The status is 1 when one of
    several processes was lost, and when the reader of our output has gone, as in
    ``train.py ... | head -1``.

    One of several processes ends here. Were Python to take itself down first, threads of PyTorch's
    process groups, which outlive ``destroy_process_group``, could abort it: a run that had
    succeeded would count as lost.
    """
    status = _status(main, arguments, program)
    if is_launched():
        with contextlib.suppress(OSError):
            print(end="", flush=True)
        os._exit(status)
    return status


def _status(main: Callable[[Sequence[str]], int], arguments: Sequence[str], program: str) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None:  # it was closed; its number must not become that of another file
        sys.stderr = open(os.devnull, "w")
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # until the imports were done
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main(arguments)
    except UserError as error:
        _tell_parent(f"{program}: error: {' '.join(str(error).split())}")
        return 2
    except ProcessLost as error:
        if NOTED in os.environ:  # the parent knows more
            return LOST
        tell("; ".join([f"{program}: error: {error.args[0]}", *error.args[1:]]))
        return 1
    except BrokenPipeError:
        _drop_output()
        return 1
    except Stopped as stop:
        if is_first():
            tell(f"{program}: {stop}")
        return stop.status
    except KeyboardInterrupt as error:  # perhaps with what can be done now
        tell("; ".join([f"{program}: interrupted", *error.args]))
        return 130


class Parser(argparse.ArgumentParser):
    """An argument parser in which ``--learning_rule`` and ``--learning-rule`` are one flag.

    Flags are spelled with dashes here and are never abbreviated. Letters of flags are compared
    without regard to case. Mistakes raise ``UserError``.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )
        self._rejected: dict[str, str] = {}

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        known = {flag.lower(): flag for flag in [*self._option_string_actions, *self._rejected]}
        words = [_canonical(word, known) for word in args]
        for flag, _, value in (word.partition("=") for word in words):
            if flag in self._rejected:
                raise UserError(f"{flag} {self._rejected[flag]}")
            if value == "--":  # of which argparse makes an empty list
                raise UserError(f"{flag} does not take the value --")
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def add_switch(
        self, flag: str, help: str, default: Any = False, word: str | None = None
    ) -> None:
        """Add a switch: ``--flag``, ``--flag True``, ``--flag False`` or ``--no-flag``.

        Args:
            word: a third value that it takes.
        """

        def value(text: str) -> bool | str:
            return text if text == word else _truth(text, word)

        keywords = {"default": default, "type": value, "metavar": word, "help": help}
        self.add_argument(flag, nargs="?", const=True, **keywords)
        negative, name = flag.replace("--", "--no-", 1), flag[2:].replace("-", "_")
        hidden = argparse.SUPPRESS
        self.add_argument(negative, dest=name, action="store_false", default=hidden, help=hidden)

    def reject(self, hints: Mapping[str, str]) -> None:
        """Answer flags of old releases, by name, with what became of them."""
        self._rejected.update(hints)


def note(text: str) -> None:
    """Tell the user something that stops nothing, on stderr, once for all processes."""
    if is_first() and NOTED not in os.environ:
        tell(f"train.py: note: {text}")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Inside the ``with`` block ``note`` says nothing."""
    before = os.environ.get(NOTED)
    os.environ[NOTED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NOTED]
        else:
            os.environ[NOTED] = before


def warn(text: str, anywhere: bool = False) -> None:
    """Tell the user of something that went wrong and was put right, on stderr.

    Args:
        anywhere: in this process, even if it is not the first.
    """
    if anywhere or is_first():
        tell(f"train.py: warning: {text}")


def is_launched() -> bool:
    """Is this one of several processes, started by ``launch`` or torchrun?"""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def is_first() -> bool:
    """Is this the only process, or the first of several?"""
    return os.environ.get("RANK", "0") == "0"


def print_line(text: str) -> None:
    """Print to stdout at once; raises what ``write_output`` does."""
    _output(lambda: print(text, flush=True))


def write_output(content: bytes) -> None:
    """Write to stdout at once.

    Raises:
        UserError: it cannot be written, for instance because the disk is full.
        BrokenPipeError: the reader has gone; ``run`` knows what to do.
    """

    def write() -> None:
        if sys.stdout is not None:  # as when it was closed, where ``print`` prints nothing
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()

    _output(write)


def _output(write: Callable[[], None]) -> None:
    try:
        write()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise UserError(f"cannot write the output: {error.strerror}") from error


def positive_int(text: str) -> int:
    """An integer of at least 1 that fits 63 bits."""
    return _number(
        text, int, lambda value: 1 <= value < 2**63, "a whole number of at least 1, below 2**63"
    )


def non_negative_int(text: str) -> int:
    """An integer of at least 0 that fits 63 bits."""
    return _number(
        text, int, lambda value: 0 <= value < 2**63, "a whole number of at least 0, below 2**63"
    )


def positive_float(text: str) -> float:
    """A number above 0 that single precision can hold."""
    return _number(text, float, lambda value: 0 < value <= _LARGEST, "a number above 0, up to 1e30")


def non_negative_float(text: str) -> float:
    """A number of at least 0 that single precision can hold."""
    return _number(
        text, float, lambda value: 0 <= value <= _LARGEST, "a number of at least 0, up to 1e30"
    )


def probability(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def fraction(text: str) -> float:
    """A number of at least 0 and below 1."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def at_most(limit: float, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Numbers of a kind, such as ``positive_int``, up to a limit."""

    def number(text: str) -> Any:
        if (value := kind(text)) > limit:
            raise argparse.ArgumentTypeError(f"must be at most {limit}, got {text!r}")
        return value

    return number


# Larger sizes of tensors overflow where they are computed, before they are refused as too large.
tensor_size = at_most(2**31 - 1, positive_int)
# More layers would be built one after the other until the memory is full.
layer_count = at_most(1000, positive_int)


def _number(text: str, kind: type, valid: Callable[[Any], bool], wanted: str) -> Any:
    try:
        value = None if "_" in text else kind(text)  # Python takes 1_0 for 10
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return value


def _truth(text: str, word: str | None) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        wanted = "True or False" if word is None else f"True, False or {word}"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return text.lower() in _TRUE


def tell(line: str) -> None:
    """Write to stderr in one piece, so that lines of several processes do not mix."""
    print(f"{line}\n", end="", file=sys.stderr)


def _tell_parent(line: str) -> None:
    """Let the parent tell, which knows what others have said; without one, tell."""
    try:
        os.write(int(os.environ[ERRORS]), f"{line}\n".encode(errors="backslashreplace"))
    except (KeyError, OSError):  # the parent has ended
        tell(line)


def _drop_output() -> None:
    """Send to nowhere what stdout still holds, which Python would try to write at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _canonical(word: str, known: dict[str, str]) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    flag = flag.replace("_", "-")
    return known.get(flag.lower(), flag) + equals + value
