"""The files that flags of evaluate.py ask for: writable before the work begins, and errors in words."""

import contextlib
import tempfile
from pathlib import Path

from engine.system.errors import UserError


@contextlib.contextmanager
def user_error_on_failure(flag, path):
    """Turn an OSError of the block, which writes what a flag has asked for, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--{flag} {path} could not be written: {error}") from error


def make_room_for(flag, path):
    """Make the folder of an output before the work begins; raise UserError if nothing can be written there."""
    path = Path(path)
    with user_error_on_failure(flag, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    if path.is_dir():
        raise UserError(f"--{flag} {path} is a folder: name a file")
