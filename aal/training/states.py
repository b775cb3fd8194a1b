"""The full states of a run: the newest, and those before it in case it is damaged."""

import os
import re
from pathlib import Path
from typing import Any

from aal.training.command_line import UserError, warn
from aal.training.files import PART, DamagedFile, read_checkpoint, write_checkpoint


class States:
    """``last.pth`` is the newest state of a folder; before it came ``last-1.pth`` and so on.

    While one is written, those that are there stay whole.

    Args:
        folder: that of the run.
        keep: how many states stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._damaged: list[Path] = []

    @property
    def newest(self) -> Path:
        return self._path(0)

    def paths(self) -> list[Path]:
        """Of all states, the newest first."""
        older = [path for path in self.folder.glob("last-*.pth") if self._number(path) is not None]
        newest = [self.newest] if self.newest.is_file() else []
        return newest + sorted(older, key=self._number)

    def read(self) -> tuple[Path, dict[str, Any]]:
        """The newest state that is whole, and its file; tells the user of newer ones that are not.

        Raises:
            UserError: there is none, or one cannot be read, but might be whole.
        """
        faults = []
        for path in self.paths() or [self.newest]:
            try:
                state = read_checkpoint(path)
            except DamagedFile as error:
                faults.append(str(error))
                continue
            if faults:
                warn(f"{'; '.join(faults)}; the run goes on from {path.name}, which is older")
            self._damaged = [newer for newer in self.paths() if newer != path][: len(faults)]
            return path, state
        raise UserError("; ".join(faults))

    def write(self, state: dict[str, Any]) -> None:
        """Write the newest state; raises ``UserError`` if it cannot be written."""
        write_checkpoint(self.newest, state, self._make_room)

    def _make_room(self) -> None:
        """Give every state the next name, as the new one is about to take that of the newest."""
        for path in self._damaged:
            path.unlink(missing_ok=True)
        self._damaged = []
        if self.newest.exists():
            for path in reversed(self.paths()):
                if 0 < (number := self._number(path)) < self.keep - 1:
                    os.replace(path, self._path(number + 1))
            if self.keep > 1:
                self._give_second_name(self.newest, self._path(1))
        for path in self.paths():
            if self._number(path) >= self.keep:
                path.unlink()

    def _give_second_name(self, path: Path, name: Path) -> None:
        link = self.folder / f".{path.name}.link{PART}"
        try:
            link.unlink(missing_ok=True)
            link.hardlink_to(path)
            os.replace(link, name)
            link.unlink(missing_ok=True)  # it stays where both names were the same file
        except OSError:  # a file system without hard links
            os.replace(path, name)

    def _path(self, number: int) -> Path:
        return self.folder / (f"last-{number}.pth" if number else "last.pth")

    def _number(self, path: Path) -> int | None:
        """How many newer states there are; None of a file with another name."""
        if path == self.newest:
            return 0
        found = re.fullmatch(r"last-([1-9][0-9]*)\.pth", path.name)
        return int(found[1]) if found else None
