"""Writing files whole or not at all."""

import contextlib
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def replacing(path, mode="wb", also_as=()):
    """Give a file to write beside `path`, and let it take its place, synced, when the block ends without an error.

    At any instant, a kill or a power cut included, `path` is the old file or the whole new one.

    Args:
        mode: 'wb', or 'w' for text in UTF-8.
        also_as: paths in the same folder that become further names of the new file. They come first and `path` last: whoever
            finds the new `path` after a kill finds the others too. The file must never be changed in place.
    Raises:
        OSError: the disk is full or will not be written to; `path` is as it was and nothing is left beside it.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for other in also_as:
            _give_name(temporary, Path(other))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _temporary(path):
    return path.with_name(f".{path.name}.tmp")


def _give_name(source, target):
    """Make `target` another name of the file `source`; a copy where the file system knows no hard links."""
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)  # of a kill at this very place
    try:
        os.link(source, temporary)
    except OSError:
        with replacing(target) as file, open(source, "rb") as original:
            shutil.copyfileobj(original, file)
    else:
        os.replace(temporary, target)


def sync_folder(folder):
    """Have the folder's entries on disk: without it a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
