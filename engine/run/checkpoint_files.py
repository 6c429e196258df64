"""Checkpoints: whole files or none, verified when read, never lost to a full disk.

A checkpoint is what torch.save writes, a zip archive, whose archive comment holds the SHA-256 of everything before it. So
torch.load reads it like any other, and a single changed bit is noticed here.
"""

import errno
import hashlib
import math
import os
import re
import zipfile
from pathlib import Path

import torch

from engine.run.events import EVENTS
from engine.system.errors import CheckpointError, MachineError, first_line, is_out_of_main_memory
from engine.system.files import copy_file, keep_as, readable_name, replacing, sync

FORMAT, VERSION = "resnet50-training-run", 1
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
EPOCH_PATTERN = re.compile(r"epoch_(\d{3,})\.pt")
RECORDS = "metrics.jsonl"
CURVES = "curves.png"
REPORTS = ("report.html", "report.md")
COMPARISONS = ("compared.html", "compared.md")  # of the run beside others
_REPORT_MARK = re.compile(rb"(\A# |<title>)(Training report: |\d+ runs compared)")  # in a report's head: it is no other file

_COMMENT = re.compile(rb"sha256:([0-9a-f]{64})")
_COMMENT_BYTES = 7 + 64
CHECKSUM_BYTES = 2 + _COMMENT_BYTES  # at the end of a checkpoint: the length of the comment, and the comment
_ADVICE = "--resume auto takes the newest whole one beside it"


class NotSealedError(CheckpointError):
    """A file does not end as a checkpoint of this program does: it is damaged, or something else."""


def epoch_name(epochs):
    """Return the name of the checkpoint kept after this many epochs."""
    return f"epoch_{epochs:03d}.pt"


# One file ------------------------------------------------------------------------------------------------------------


def write(path, checkpoint, copies=(), previous=None):
    """Write a checkpoint at `path`, whole, or as it was; return {copy: error} of the copies that could not be made.

    The copies come first and `path` last: whoever finds the new `path` after a kill finds them, too. Each is a file of its own,
    so that no damage to one reaches another.

    Args:
        copies: paths of further files with the same contents.
        previous: path under which the file that was at `path` stays.
    Raises:
        OSError: the disk is full or will not be written to; `path` is as it was and nothing is left beside it.
    """
    failed = {}
    with replacing(path) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(checkpoint, hashing)
        except RuntimeError as error:  # torch's writer turns an OSError of our file into its own kind
            raise hashing.error or error from error
        hashing.seal()
        sync(file)
        for copy in copies:
            try:
                copy_file(file.name, copy)
            except OSError as error:
                failed[copy] = error
        if previous is not None and os.path.isfile(path):
            keep_as(path, previous)
    return failed


def read(path):
    """Return the contents of a checkpoint, tensors on the CPU, after verifying its checksum.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is no checkpoint of a run.
        MachineError: it cannot be read for another reason than damage: no right to, or too little memory.
    """
    path = Path(path)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"no checkpoint at {path}; {what_is_there(path.parent)}") from None
    except OSError as error:  # a folder above is closed to this user
        raise MachineError(f"{path} cannot be read: {error.strerror}") from error
    if not os.path.isfile(path):
        what = "a link that leads nowhere" if path.is_symlink() and not os.path.exists(path) else "no regular file"
        raise CheckpointError(f"{path} is {what}")
    try:
        verify(path)
    except OSError as error:
        damaged = error.errno == errno.EIO  # of the disk; anything else is no fault of the file
        raise (CheckpointError if damaged else MachineError)(f"{path} cannot be read: {error.strerror}") from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, OSError) or is_out_of_main_memory(error):
            raise MachineError(f"{path} is whole, but cannot be read: {first_line(error)}") from error
        raise CheckpointError(f"{path} is not a checkpoint of this program: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a training run")
    require_known_version(checkpoint, path)
    return checkpoint


def require_known_version(checkpoint, path):
    """Raise CheckpointError if a newer version of this program has written the checkpoint."""
    if checkpoint.get("version", VERSION) > VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version of this program (its format is {checkpoint['version']}, this one reads "
            f"up to {VERSION}): update the program"
        )


def position(path):
    """Return (whole epochs, batches of the next one) of a checkpoint at a glance, unverified; None if it cannot be told."""
    return at_a_glance(path, lambda checkpoint: (int(checkpoint["epoch"]), int(checkpoint["batch"])))


def at_a_glance(path, look):
    """Return what look(contents) finds in a checkpoint, unverified; None where that cannot be told."""
    if not os.path.isfile(path):  # of a pipe nobody knows when it ends
        return None
    try:
        with readable_name(path) as name:
            return look(torch.load(name, map_location="cpu", weights_only=True, mmap=True))  # the tensors stay on disk
    except Exception:  # whatever is wrong with it, read() says
        return None


def verify(path):
    """Raise CheckpointError unless the file's bytes are those that write() wrote."""
    size = os.path.getsize(path)
    covered = size - _COMMENT_BYTES - 2  # before the comment and the two bytes of its length
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        remaining = max(covered, 0)
        while remaining:
            block = file.read(min(remaining, 1 << 20))
            if not block:
                break
            digest.update(block)
            remaining -= len(block)
        ending = file.read()
    comment = _COMMENT.fullmatch(ending[2:])
    if comment is None or int.from_bytes(ending[:2], "little") != _COMMENT_BYTES:
        if _holds_plain_weights(path):
            raise NotSealedError(
                f"{path} holds weights alone, without the optimizer, schedule and position that a run needs to go on; "
                "resume from a last.pt or epoch_NNN.pt instead, or begin a run with them: --initial-weights"
            )
        if ending.endswith(b"\0\0") and zipfile.is_zipfile(path):  # whole, and without a comment
            raise NotSealedError(
                f"{path} was saved by another program, or saved again: a run goes on from its own checkpoints alone. Begin a "
                "run with its weights: --initial-weights"
            )
        raise NotSealedError(f"{path} is damaged or cut short ({size:,} bytes): its checksum is missing; {_ADVICE}")
    if comment[1].decode() != digest.hexdigest():
        raise CheckpointError(f"{path} is damaged: its checksum does not match ({size:,} bytes); {_ADVICE}")


def checksum_at_end(file):
    """Return the SHA-256 that an open checkpoint ends with, in hexadecimal.

    Raises:
        OSError: it ends otherwise.
    """
    ending = os.pread(file.fileno(), CHECKSUM_BYTES, max(os.fstat(file.fileno()).st_size - CHECKSUM_BYTES, 0))
    comment = _COMMENT.fullmatch(ending[2:])
    if comment is None:
        raise OSError(f"{file.name} is cut short or damaged: its checksum is missing")
    return comment[1].decode()


def _holds_plain_weights(path):
    try:
        return bool(read_plain_weights(path))
    except CheckpointError:
        return False


def read_plain_weights(path):
    """Return the state dict {key: tensor} that a .pt file or a .safetensors file holds, and nothing else.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            with readable_name(path) as name:
                return load_file(name)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise CheckpointError(f"{path}: safetensors is not installed: pip install safetensors") from error
    except Exception as error:
        raise CheckpointError(f"{path} holds no weights: {first_line(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{path} holds something else than weights alone")
    return weights


class _HashingFile:
    """A writable file for torch.save that hashes what passes, and finally seals the archive with the hash."""

    def __init__(self, file):
        self.file = file
        self.error = None
        self._digest = hashlib.sha256()
        self._tail = b""  # the last two bytes so far: at the end of the archive the length of its comment

    def write(self, data):
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        view = memoryview(data).cast("B")
        if len(view) < 2:
            joined = self._tail + bytes(view)
            self._digest.update(joined[:-2])
            self._tail = joined[-2:]
        else:
            self._digest.update(self._tail)
            self._digest.update(view[:-2])
            self._tail = bytes(view[-2:])
        return len(view)

    def flush(self):
        self.file.flush()

    def seal(self):
        if self._tail != b"\0\0":  # no assert: python -O must not write what cannot be verified
            raise RuntimeError("torch.save no longer ends with an archive without comment")
        self.file.seek(-2, os.SEEK_END)
        self.file.write(_COMMENT_BYTES.to_bytes(2, "little"))
        self.file.write(b"sha256:" + self._digest.hexdigest().encode())


# The folder of a run -------------------------------------------------------------------------------------------------


def checkpoints_in(folder):
    """Return the paths of the folder's checkpoints: last.pt, the latest epochs first, best.pt, the one before last.pt.

    Raises:
        MachineError: the folder cannot be looked into now. It is not empty for that: a new run would delete what is there.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise MachineError(f"{folder} cannot be looked into: {error.strerror}") from error
    epochs = {int(found[1]): name for name in names if (found := EPOCH_PATTERN.fullmatch(name))}
    latest_first = [epochs[number] for number in sorted(epochs, reverse=True)]
    return [Path(folder) / name for name in (LAST, *latest_first, BEST, PREVIOUS) if name in names]


def by_progress(paths):
    """Return the paths of checkpoints: last.pt, then those that do not tell how far they are, then the farthest first.

    A run that was taken back to an earlier epoch has files of its former future beside its last.pt, so that one comes first.
    """

    def progress(path):
        return path.name == LAST, position(path) or (math.inf, 0)

    return sorted(paths, key=progress, reverse=True)  # stable: a kept epoch before its equals


def newest_good(folder):
    """Return (path, contents, problems) of the checkpoint to go on from, problems being those of files that come before it.

    That is last.pt, or where it is not whole the farthest of the others that is.

    Raises:
        CheckpointError: there are checkpoints and none of them is whole.
        MachineError: one that may be whole cannot be read; an earlier one would cost the work after it.
    """
    problems = []
    for path in by_progress(checkpoints_in(folder)):
        try:
            return path, read(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join([*problems, f"no checkpoint in {folder} is whole: start anew with --overwrite"]))
    return None, None, []


def what_is_there(folder):
    """Return in words which checkpoints a folder holds."""
    names = [p.name for p in checkpoints_in(folder)]
    return f"found {', '.join(names)} there" if names else f"there is no checkpoint in {folder}"


def refuse_to_overwrite(folder):
    """Raise CheckpointError if the folder holds another run's files."""
    found = [p.name for p in checkpoints_in(folder)] + [p.name for p in Path(folder).glob(RECORDS)]
    if found:
        shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise CheckpointError(
            f"{folder} holds another run ({shown}). Go on with it: --resume auto. "
            "Keep it and start another: --checkpoint-dir OTHER. Delete it and start anew: --overwrite"
        )


def is_report(path):
    """Return whether the file at a path is a report of a run."""
    with open(path, "rb") as file:
        return _REPORT_MARK.search(file.read(1 << 16)) is not None


def delete_run(folder):
    """Delete a run's files, and nothing else, from the folder."""
    folder = Path(folder)
    reports = (path for name in (*REPORTS, *COMPARISONS) if (path := folder / name).is_file() and is_report(path))
    for path in [*checkpoints_in(folder), *(folder / name for name in (RECORDS, CURVES, EVENTS)), *reports]:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
