"""An epoch's record for TensorBoard, where that is installed and asked for."""

import io
import os
import socket
import time
from pathlib import Path

from engine.system.errors import UserError
from engine.system.files import append_whole

FOLDER = "tensorboard"


def open_tensorboard(folder, epochs_done):
    """Return a Board that writes to folder/tensorboard; what it held of epochs after `epochs_done` is taken back.

    Raises:
        UserError: TensorBoard is not installed.
        OSError: the folder cannot be made.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("tensorboard = True: TensorBoard is not installed: pip install tensorboard") from error
    Path(folder, FOLDER).mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
    return Board(Path(folder, FOLDER, name), purge_step=epochs_done + 1)


class Board:
    """Writes records as scalars, one step an epoch; not with torch's SummaryWriter, whose thread dies of a full disk.

    Args:
        path: of a new file.
        purge_step: from here on TensorBoard forgets what earlier files of the folder say.
    """

    def __init__(self, path, purge_step):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path, self._waiting = path, io.BytesIO()
        self._writer = RecordWriter(self._waiting)
        self._event(purge_step, file_version="brain.Event:2")
        self._event(purge_step, session_log=SessionLog(status=SessionLog.START))

    def _event(self, step, **facts):
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), step=step, **facts).SerializeToString())

    def add(self, record):
        """Write every number of an epoch's record; where that fails, with the next one."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self._event(record["epoch"], summary=scalar(name, value))
        append_whole(self._path, self._waiting.getvalue())
        self._waiting.seek(0)
        self._waiting.truncate()
