"""Writing files whole or not at all, on any file system."""

import argparse
import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

# A file system that cannot do what is asked says so with one of these: CIFS, FUSE, folders shared with a virtual machine.
CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF, errno.ENOTTY}


ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:/|(s3|gs|az):")  # mistyped ones, too: none is the name of a folder
SCHEMES = ("s3://", "gs://", "az://")  # of object storage
NO_ADDRESS = "a path on this machine (object storage: copy from and to it, or mount it)"


def path_argument(text):
    """Return the Path that a program's argument names, in which ~ is the user's home; for argparse.

    Raises:
        argparse.ArgumentTypeError: it is the address of something elsewhere.
    """
    if ADDRESS.match(text):
        raise argparse.ArgumentTypeError(f"{text}: must be {NO_ADDRESS}")
    return Path(os.path.expanduser(text))  # a user who is not known stays as written


def path_text(text):
    """Return a path as path_argument does, but as text: of a prefix a slash at the end counts; for argparse."""
    path_argument(text)
    return os.path.expanduser(text)


def make_folder(folder):
    """Make a folder, and those above it, unless it is there.

    Raises:
        OSError: it cannot be made; a file or a link in its way is named.
    """
    if obstacle := in_the_way(folder):
        raise NotADirectoryError(obstacle)
    Path(folder).mkdir(parents=True, exist_ok=True)


def in_the_way(folder):
    """Return in words what lies where a folder is or will be made, and is none; None where nothing does."""
    there = next((place for place in (Path(folder), *Path(folder).parents) if os.path.lexists(place)), None)
    if there is None or os.path.isdir(there):
        return None
    return f"{there} is a link that leads nowhere" if not os.path.exists(there) else f"{there} is no folder"


@contextlib.contextmanager
def replacing(path, mode="wb"):
    """Give a file to write beside `path`, and let it take its place, synced, when the block ends without an error.

    At any instant, a kill or a power cut included, `path` is the old file or the whole new one.

    Args:
        mode: 'wb', or 'w' for text in UTF-8.
    Raises:
        OSError: the disk is full or will not be written to, or `path` is a folder, pipe or device; it is as it was and nothing
            is left beside it.
    """
    path = Path(path)
    _require_replaceable(path)
    temporary = _temporary(path)
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}  # of names that are no UTF-8
        with open(temporary, mode, **text) as file:
            yield file
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def readable_name(path):
    """Give a file's name as text, or where its bytes are no UTF-8, which some libraries refuse, one that holds in the block."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield os.fspath(path)


def append_whole(path, content, synced=False):
    """Append bytes to a file, which is made where there is none: all of them, or none where that fails.

    Args:
        synced: have them on disk before returning.
    """
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if synced:
                sync(file)
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def copy_file(source, target):
    """Make `target` a file of its own with the bytes of `source`, whole or as it was; shares blocks where the disk can."""
    with replacing(target) as copy, open(source, "rb") as original:
        remaining = os.fstat(original.fileno()).st_size
        with contextlib.suppress(AttributeError, OSError):  # no such call on this system, or not between these files
            while remaining and (copied := os.copy_file_range(original.fileno(), copy.fileno(), remaining)):
                remaining -= copied
        if remaining:
            original.seek(-remaining, os.SEEK_END)
            copy.seek(0, os.SEEK_END)
            shutil.copyfileobj(original, copy, 1 << 20)


def keep_as(path, target):
    """Let the file at `path` be found as `target`, too, without a copy: whoever replaces `path` next leaves it there.

    Where the file system has no hard links the file is moved, and `path` is gone until it is written anew.
    """
    _require_replaceable(target)
    temporary = _temporary(Path(target))
    try:
        os.link(path, temporary)
    except OSError:
        os.replace(path, target)
    else:
        os.replace(temporary, target)  # does nothing where both are names of one file
        temporary.unlink(missing_ok=True)


def _require_replaceable(path):
    """Raise OSError if what is there is a folder, pipe or device: a rename would take its place."""
    if os.path.exists(path) and not os.path.isfile(path):
        number = errno.EISDIR if os.path.isdir(path) else errno.EEXIST
        raise OSError(number, "no regular file, so it is not replaced", str(path))


def _temporary(path):
    return path.with_name(f".{os.getpid()}-{path.name}.tmp")  # of this process alone: two may write the same file


def delete_leftovers(folder, names):
    """Delete what kills in the middle of writing left of files of these names, of any process.

    Args:
        names: a pattern of file names, as for Path.glob.
    """
    for pattern in (f".*-{names}.tmp", f".{names}.tmp"):  # the second as earlier versions named them
        for leftover in Path(folder).glob(pattern):
            leftover.unlink(missing_ok=True)


def sync(file):
    """Have an open file's bytes on disk, as far as its file system can."""
    file.flush()
    _fsync(file.fileno())


def sync_folder(folder):
    """Have the folder's entries on disk, as far as its file system can: without it a power cut may undo a rename."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
        return
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(descriptor):
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
