"""Files that are written whole or not at all, and checkpoints that are checked when read."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from aal.training.command_line import UserError


def write_whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let ``write`` fill a temporary file, then put it in the place of ``path`` in one step.

    Raises:
        UserError: the disk is full or not writable; what was at ``path`` is untouched.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _umask() -> int:
    """The permissions that the user takes from new files; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    write_whole(path, lambda file: np.save(file, array))


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    write_whole(path, lambda file: torch.save(state, file))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint on CPU; only tensors and plain values are accepted.

    Raises:
        UserError: the file is missing, unreadable, truncated, or not a checkpoint.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a checkpoint in it, such as best.pth")
        if not path.is_file():
            raise UserError(f"there is no checkpoint at {path}")
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        with file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for damaged files
        # Its text is left out: it advises to load what may run code.
        raise UserError(f"{path} is damaged or not a checkpoint of tensors and numbers") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds {type(state).__name__}, not a checkpoint")
    return state
