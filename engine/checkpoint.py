"""Checkpoints: whole files or none, verified when read, never lost to a full disk.

A checkpoint is what torch.save writes, a zip archive, whose archive comment holds the SHA-256 of everything before it. So
torch.load reads it like any other, and a single changed bit is noticed here.
"""

import hashlib
import os
import re
import time
from pathlib import Path

import torch

from engine.distributed import any_process, by_first, rank
from engine.errors import CheckpointError, TrainingStopped, first_line
from engine.files import replacing

FORMAT, VERSION = "resnet50-training-run", 1
LAST, BEST = "last.pt", "best.pt"
EPOCH_PATTERN = re.compile(r"epoch_(\d{3,})\.pt")
RECORDS = "metrics.jsonl"
CURVES = "curves.png"

_COMMENT = re.compile(rb"sha256:([0-9a-f]{64})")
_COMMENT_BYTES = 7 + 64
_ADVICE = "--resume auto takes the newest whole one beside it"
RETRY_SECONDS = 60.0  # after a save that failed


def epoch_name(epochs):
    """Return the name of the checkpoint kept after this many epochs."""
    return f"epoch_{epochs:03d}.pt"


# One file ------------------------------------------------------------------------------------------------------------


def write(path, contents, also_as=()):
    """Write a checkpoint at `path`, and under the names `also_as` in the same folder: each whole, or as it was.

    Raises:
        OSError: the disk is full or will not be written to; `path` is as it was and nothing is left beside it.
    """
    with replacing(path, also_as=also_as) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(contents, hashing)
        except RuntimeError as error:  # torch's writer turns an OSError of our file into its own kind
            raise hashing.error or error from error
        hashing.seal()


def read(path):
    """Return the contents of a checkpoint, tensors on the CPU, after verifying its checksum.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is no checkpoint of a run.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}; {_what_is_there(path.parent)}")
    verify(path)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a checkpoint of this program: {first_line(error)}") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a training run")
    return contents


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
            raise CheckpointError(
                f"{path} holds weights alone, without the optimizer, rate plan and position that a run needs to go on; "
                "resume from a last.pt or epoch_NNN.pt instead"
            )
        raise CheckpointError(f"{path} is damaged or cut short ({size:,} bytes): its checksum is missing; {_ADVICE}")
    if comment[1].decode() != digest.hexdigest():
        raise CheckpointError(f"{path} is damaged: its checksum does not match ({size:,} bytes); {_ADVICE}")


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

            return load_file(path)
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
    """Return the paths of the folder's checkpoints, last.pt first, then the newest."""
    paths = [p for p in Path(folder).glob("*.pt") if p.name in (LAST, BEST) or EPOCH_PATTERN.fullmatch(p.name)]
    return sorted(paths, key=lambda p: (p.name == LAST, p.stat().st_mtime_ns), reverse=True)


def newest_good(folder):
    """Return (path, contents, problems) of the newest checkpoint that is whole, problems being those of newer ones.

    Raises:
        CheckpointError: there are checkpoints and none of them is whole.
    """
    problems = []
    candidates = checkpoints_in(folder)
    for path in candidates:
        try:
            return path, read(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join([*problems, f"no checkpoint in {folder} is whole: start anew with --overwrite"]))
    return None, None, []


def _what_is_there(folder):
    names = [p.name for p in checkpoints_in(folder)] if folder.is_dir() else []
    return f"found {', '.join(names)} there" if names else f"there is none in {folder}"


def refuse_to_overwrite(folder):
    """Raise CheckpointError if the folder holds another run's files."""
    found = [p.name for p in checkpoints_in(folder)] + [p.name for p in Path(folder).glob(RECORDS)]
    if found:
        shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise CheckpointError(
            f"{folder} holds another run ({shown}). Go on with it: --resume auto. "
            "Keep it and start another: --checkpoint-dir OTHER. Delete it and start anew: --overwrite"
        )


def delete_run(folder):
    """Delete a run's files, and nothing else, from the folder."""
    folder = Path(folder)
    for path in [*checkpoints_in(folder), folder / RECORDS, folder / CURVES]:
        if path.is_file():
            path.unlink()


class CheckpointFolder:
    """Saves a run's state as last.pt, and under other names when they are due.

    Args:
        config: the run's configuration; its checkpoint_dir is created if it is missing.
        facts: dict of what each checkpoint says about its run besides the state.
        say: called with each message for the user.
    """

    def __init__(self, config, facts, say):
        self.folder = Path(config["checkpoint_dir"])
        self.facts = {"format": FORMAT, "version": VERSION} | facts
        by_first(self._prepare)
        self.every_epochs = config["checkpoint_every_epochs"]
        self.interval_seconds = 60 * config["checkpoint_minutes"]
        self.keep = config["keep_checkpoints"]
        self.say = say
        self.is_saved = True  # whether the last attempt to save succeeded
        self._next_save = time.monotonic() + self.interval_seconds

    def _prepare(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.pt.tmp"):  # of a kill in the middle of a save
                leftover.unlink()
        except OSError as error:
            raise CheckpointError(f"checkpoint_dir = {str(self.folder)!r} cannot be written to: {error}") from error

    def save_if_due(self, state):
        """Save as last.pt if checkpoint_minutes have passed since the last save, by the first process's clock."""
        if any_process(rank() == 0 and time.monotonic() >= self._next_save):
            self.save(state)

    def save(self, state, is_best=False):
        """Save as last.pt; after a whole epoch also as epoch_NNN.pt when one is due, and as best.pt when it is the best.

        A full disk is said aloud and does not end the run: the files on disk stay, and the next save is tried again. Of
        several processes all must call this; the first one writes.

        Returns:
            True if everything is on disk.
        Raises:
            TrainingStopped: the state holds numbers that are not finite; the files on disk stay.
        """
        contents = self.facts | state.state_dict()
        require_finite(contents, self.folder)
        self.is_saved = by_first(self._write, contents, is_best)
        return self.is_saved

    def _write(self, contents, is_best):
        also_as = [self.folder / BEST] if is_best else []
        epochs = contents["epoch"]
        if contents["batch"] == 0 and epochs and self.every_epochs and epochs % self.every_epochs == 0:
            also_as.append(self.folder / epoch_name(epochs))
        try:
            write(self.folder / LAST, contents, also_as)
            self._prune()
        except OSError as error:
            self._next_save = time.monotonic() + min(RETRY_SECONDS, self.interval_seconds)
            self.say(
                f"WARNING: the checkpoint could not be saved to {self.folder}: {error}. The run goes on and the earlier "
                "checkpoint stays; make room, the next save is tried again"
            )
            return False
        self._next_save = time.monotonic() + self.interval_seconds
        return True

    def _prune(self):
        kept = sorted(p for p in self.folder.glob("epoch_*.pt") if EPOCH_PATTERN.fullmatch(p.name))
        for path in kept[: -self.keep] if self.keep else []:
            path.unlink()


def require_finite(contents, folder):
    """Raise TrainingStopped if a tensor inside holds a number that is not finite: it must not be saved or averaged."""
    if not all_finite(contents):
        raise TrainingStopped(
            "weights, statistics or optimizer state are no longer finite: not saved. The last good checkpoint is "
            f"{Path(folder) / LAST}; resume it, or start anew with a lower --learning-rate"
        )


def all_finite(contents):
    """Return whether every floating-point tensor inside nested dicts and lists is finite; waits for the device once."""
    tensors = [t for t in _tensors(contents) if t.is_floating_point() and t.numel()]
    return not tensors or bool(torch.isfinite(torch.nn.utils.get_total_norm(tensors, float("inf"))))


def _tensors(contents):
    if isinstance(contents, torch.Tensor):
        yield contents
    elif isinstance(contents, dict):
        for value in contents.values():
            yield from _tensors(value)
    elif isinstance(contents, (list, tuple)):
        for value in contents:
            yield from _tensors(value)
