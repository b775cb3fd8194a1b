"""The metrics of a run as event files, which TensorBoard draws."""

import io
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aal.training.command_line import UserError


def check_installed() -> None:
    """Raise ``UserError`` if TensorBoard's own package is missing."""
    try:
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError as error:
        raise UserError('--tensorboard needs: pip install "aal[tensorboard]"') from error


class EventFile:
    """Appends epochs to a file of its own, which is closed in between.

    PyTorch's ``SummaryWriter`` writes in a thread, which a full disk ends with a traceback.

    Args:
        folder: that of all event files of the run.
        rows: metrics of the epochs that are finished. Older files may tell of later ones, which
            this file declares void.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]]):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # TensorBoard reads the files of a folder in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time_ns()}"
        try:
            is_new = not folder.exists()
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {folder}: {error.strerror}") from error
        start = SessionLog(status=SessionLog.START)
        self._append(
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=len(rows) + 1, session_log=start),
        )
        for row in rows if is_new else ():
            self.record(row)

    def record(self, row: Mapping[str, Any]) -> None:
        """Write the metrics of an epoch, which is TensorBoard's step; raises ``UserError``."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=v) for tag, v in scalars(row).items()]
        summary = Summary(value=values)
        self._append(Event(wall_time=time.time(), step=row["epoch"], summary=summary))

    def _append(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        content = io.BytesIO()
        for event in events:
            RecordWriter(content).write(event.SerializeToString())
        try:
            with self.path.open("ab") as file:
                file.write(content.getvalue())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among an epoch's metrics, by names that TensorBoard groups at the slash.

    Of Learning Indicators it has the median of each layer.
    """
    found = {}
    for key, value in row.items():
        part, _, name = key.partition("_")
        if part in ("train", "val"):
            found[f"{name}/{part}"] = value
        elif key not in ("epoch", "indicator"):
            found[f"run/{key}"] = value
    for layer, statistics in row.get("indicator", {}).items():
        found[f"learning_indicator/{layer}"] = statistics["median"]
    return {tag: value for tag, value in found.items() if value is not None}
