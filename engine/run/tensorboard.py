"""An epoch's record for TensorBoard, where that is installed and asked for."""

from engine.system.errors import UserError

FOLDER = "tensorboard"


def open_tensorboard(folder, epochs_done):
    """Return a Board that writes to folder/tensorboard; what it held of epochs after `epochs_done` is taken back.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard = True: TensorBoard is not installed: pip install tensorboard") from error
    return Board(SummaryWriter(folder / FOLDER, purge_step=epochs_done + 1))


class Board:
    """Writes records as scalars, one step an epoch."""

    def __init__(self, writer):
        self._writer = writer

    def add(self, record):
        """Write every number of an epoch's record."""
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def close(self):
        """Write what is left."""
        self._writer.close()
