"""Files that are written whole or not at all, and checkpoints that are checked when read."""

import errno
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from aal.training.command_line import UserError
from aal.training.memory_limit import is_out_of_memory

PART = ".part"  # ends the names of files that are not whole yet
_CHECKSUM = "checksum"  # in a checkpoint, of all the rest


def write_whole(
    path: Path, write: Callable[[IO[bytes]], None], make_room: Callable[[], None] = lambda: None
) -> None:
    """Let ``write`` fill a temporary file, then put it in the place of ``path`` in one step.

    Args:
        make_room: called in between, when the new file is whole.

    Raises:
        UserError: the disk is full or not writable; what was at ``path`` is untouched.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            make_room()
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Remove what ``write_whole`` left of files of these names when its process was killed."""
    for path in folder.glob(f".*{PART}"):
        if any(path.name.startswith(f".{name}.") for name in names):
            path.unlink(missing_ok=True)


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


def write_checkpoint(
    path: Path, state: dict[str, Any], make_room: Callable[[], None] = lambda: None
) -> None:
    """Write tensors and plain values, and a checksum with them.

    Args:
        make_room: see ``write_whole``.

    Raises:
        UserError: see ``write_whole``.
    """
    content = state | {_CHECKSUM: checksum(state)}
    write_whole(path, lambda file: _save(content, file), make_room)


class _Watched:
    """A file that remembers why it could not be written; ``torch.save`` tells of other things."""

    def __init__(self, file: IO[bytes]):
        self.file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise


def _save(content: dict[str, Any], file: IO[bytes]) -> None:
    watched = _Watched(file)
    try:
        torch.save(content, watched)
    except RuntimeError as error:
        raise watched.error or error from None


class DamagedFile(UserError):
    """A checkpoint is truncated, or does not hold what was written."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint on CPU; only tensors and plain values are accepted.

    Raises:
        DamagedFile: the file was read and is none, or no longer.
        UserError: it is missing or cannot be read.
        MemoryError, RuntimeError: memory is too small for it.
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
        if is_out_of_memory(error) and _is_whole(path):
            raise
        # A damaged file may ask to go to a place before its beginning.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        # Its text is left out: it advises to load what may run code.
        what = f"{path} is damaged or not a checkpoint of tensors and numbers"
        raise DamagedFile(what) from error
    if not isinstance(state, dict):
        raise DamagedFile(f"{path} holds {type(state).__name__}, not a checkpoint")
    expected = state.pop(_CHECKSUM, None)  # other people's checkpoints have none
    if expected is not None and expected != checksum(state):
        raise DamagedFile(f"{path} is damaged, or was changed and kept its old checksum")
    return state


def _is_whole(path: Path) -> bool:
    """Has an archive the checksums of its parts? A damaged one may ask for any amount of memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error):
        return False


def checksum(value: Any) -> str:
    """A digest of tensors and plain values in dictionaries, lists and tuples (BLAKE2b, 256 bits).

    Raises:
        TypeError: there is something else.
    """
    digest = hashlib.blake2b(digest_size=32)
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", value: Any) -> None:
    """Add a value, preceded by what it is and how long, so that no two values look alike."""

    def begin(kind: str, *sizes: object) -> None:
        digest.update(f"{kind}{sizes};".encode())

    if isinstance(value, Tensor):
        begin("tensor", str(value.dtype), *value.shape)
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, dict):
        begin("dictionary", len(value))
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
    elif isinstance(value, list | tuple):
        begin("list" if isinstance(value, list) else "tuple", len(value))
        for item in value:
            _add(digest, item)
    elif isinstance(value, str | bytes):
        content = value.encode() if isinstance(value, str) else value
        begin(type(value).__name__, len(content))
        digest.update(content)
    elif isinstance(value, bool | int | float | None):
        begin(type(value).__name__, repr(value))
    else:
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")
