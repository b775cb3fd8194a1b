"""A lock on a folder, which the system releases when the process that holds it ends in any way."""

import fcntl
import os
import weakref
from pathlib import Path

from aal.training.command_line import UserError, note

_FILE = ".lock"
_held: set[int] = set()  # file descriptors


class FolderLock:
    """Keeps a second run out of a folder as long as this object lives or until ``release``.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path):
        try:
            file = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise UserError(
                f"another run is at work in {folder}; wait for its end, or name another place with "
                "--output"
            ) from error
        except OSError as error:
            note(f"{folder} cannot be locked ({error.strerror}); start no second run there")
        _held.add(file)
        self.release = weakref.finalize(self, _close, file)


def _close(file: int) -> None:
    _held.discard(file)
    os.close(file)


def _close_in_child() -> None:
    """A child, such as one that loads data, may outlive the run; it must not hold its locks."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
