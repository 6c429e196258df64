"""Checkpoints: whole files or none, verified when read, never lost to a full disk.

A checkpoint is what torch.save writes, a zip archive, whose archive comment holds the SHA-256 of everything before it. So
torch.load reads it like any other, and a single changed bit is noticed here.
"""

import contextlib
import hashlib
import math
import os
import re
import time
from pathlib import Path

import torch

from engine.run.events import EVENTS
from engine.system.distributed import any_process, rank, run_on_rank0
from engine.system.errors import CheckpointError, TrainingStopped, first_line
from engine.system.files import copy_file, delete_leftovers, keep_as, replacing, sync

FORMAT, VERSION = "resnet50-training-run", 1
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
EPOCH_PATTERN = re.compile(r"epoch_(\d{3,})\.pt")
RECORDS = "metrics.jsonl"
CURVES = "curves.png"
REPORTS = ("report.html", "report.md")

_COMMENT = re.compile(rb"sha256:([0-9a-f]{64})")
_COMMENT_BYTES = 7 + 64
CHECKSUM_BYTES = 2 + _COMMENT_BYTES  # at the end of a checkpoint: the length of the comment, and the comment
_ADVICE = "--resume auto takes the newest whole one beside it"
RETRY_SECONDS = 60.0  # after a save that failed


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
        CheckpointError: there is no such file, it cannot be read, it is damaged, or it is no checkpoint of a run.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise CheckpointError(f"no checkpoint at {path}; {_what_is_there(path.parent)}")
    if not os.path.isfile(path):
        what = "a link that leads nowhere" if path.is_symlink() and not os.path.exists(path) else "no regular file"
        raise CheckpointError(f"{path} is {what}")
    try:
        verify(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a checkpoint of this program: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a training run")
    if checkpoint.get("version", VERSION) > VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version of this program (its format is {checkpoint['version']}, this one reads "
            f"up to {VERSION}): update the program"
        )
    return checkpoint


def position(path):
    """Return (whole epochs, batches of the next one) of a checkpoint at a glance, unverified; None if it cannot be told."""
    if not os.path.isfile(path):
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # the tensors stay on disk
        return int(checkpoint["epoch"]), int(checkpoint["batch"])
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
            raise CheckpointError(
                f"{path} holds weights alone, without the optimizer, schedule and position that a run needs to go on; "
                "resume from a last.pt or epoch_NNN.pt instead"
            )
        raise CheckpointError(f"{path} is damaged or cut short ({size:,} bytes): its checksum is missing; {_ADVICE}")
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
    """Return the paths of the folder's checkpoints: last.pt, the latest epochs first, best.pt, the one before last.pt."""
    try:
        names = os.listdir(folder)
    except OSError:  # no such folder, or one that is closed to this user
        return []
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


def _what_is_there(folder):
    names = [p.name for p in checkpoints_in(folder)]
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
    for path in [*checkpoints_in(folder), *(folder / name for name in (RECORDS, CURVES, EVENTS, *REPORTS))]:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)


class CheckpointFolder:
    """Saves a run's state as last.pt, and under other names when they are due.

    Args:
        config: the run's configuration; its checkpoint_dir is there already.
        facts: dict of what each checkpoint says about its run besides the state.
        lock: FolderLock of the folder, without which nothing is written.
        stop: StopRequest, which may also ask for a save alone.
        log: called with each message for the user.
        event: called with the name and the facts of each event, as Monitor.event.
        ledger: the run's Ledger, which each checkpoint keeps; or None.
        mirror: Mirror to upload to what is saved, or None.
    """

    def __init__(self, config, facts, lock, stop, log, event=lambda name, **facts: None, ledger=None, mirror=None):
        self.folder = Path(config["checkpoint_dir"])
        self.facts = {"format": FORMAT, "version": VERSION} | facts
        self.every_epochs = config["checkpoint_every_epochs"]
        self.interval_seconds = 60 * config["checkpoint_minutes"]
        self.keep = config["keep_checkpoints"]
        self.lock, self.stop, self.log, self.event = lock, stop, log, event
        self.ledger, self.mirror = ledger, mirror
        self.best = {"top1": 0.0, "epoch": 0, "weights": "raw"}  # of the weights in best.pt
        self.is_saved = True  # whether the last attempt to save succeeded
        self._next_save = time.monotonic() + self.interval_seconds
        run_on_rank0(self._delete_leftovers)

    def _delete_leftovers(self):
        try:
            delete_leftovers(self.folder, "*.pt")
        except OSError as error:
            raise CheckpointError(f"checkpoint_dir = {str(self.folder)!r} cannot be written to: {error}") from error

    def find_best(self, best, resumed_from):
        """See that best.pt holds the best weights that a resumed run knows of; what it does hold is then in `best`.

        Where it does not, it is made again from another checkpoint of that epoch, if there is one.

        Args:
            best: of the resumed state.
            resumed_from: path of its checkpoint, whose folder may be another one.
        """
        self.is_saved = Path(resumed_from).resolve() == (self.folder / LAST).resolve()
        self.best = run_on_rank0(self._find_best, best, Path(resumed_from).parent)

    def _find_best(self, best, other_folder):
        there, problem = self.folder / BEST, "it is not there"
        if best["epoch"] == 0:
            return best
        if os.path.lexists(there):
            try:
                checkpoint = read(there)
                if checkpoint["best"] == best or checkpoint["epoch"] > best["epoch"]:
                    return best  # a later one is of epochs that the resumed run trains again
                problem = f"it is of epoch {checkpoint['epoch']}"
            except CheckpointError as error:
                problem = str(error)
        candidates = checkpoints_in(self.folder)
        if other_folder.resolve() != self.folder.resolve():
            candidates += checkpoints_in(other_folder)
        for path in candidates:
            if path != there and position(path) == (best["epoch"], 0):
                try:
                    if read(path)["best"] == best:
                        copy_file(path, there)
                        self.log(f"note: {BEST}, the weights of epoch {best['epoch']}, is made from {path}: {problem}")
                        return best
                except (CheckpointError, OSError) as error:
                    self.log(f"WARNING: {BEST} could not be made from {path}: {error}")
        self.log(
            f"WARNING: the best weights so far ({best['top1']:.2f} % in epoch {best['epoch']}) are not in {there} any more: "
            f"{problem}. From here on the best of the epochs to come is kept"
        )
        return {"top1": 0.0, "epoch": 0, "weights": "raw"}

    def save_if_due(self, state):
        """Save as last.pt if checkpoint_minutes have passed since the last save, or if SIGUSR1 asks for it, in any process."""
        asked = self.stop.save_asked
        if any_process(asked or (rank() == 0 and time.monotonic() >= self._next_save)) and self.save(state) and asked:
            self.log(f"saved {self.folder / LAST}, as SIGUSR1 asked; the run goes on")

    def save(self, state):
        """Save as last.pt; after a whole epoch also as epoch_NNN.pt when one is due, and as best.pt when it is the best.

        A full disk is said aloud and does not end the run: the files on disk stay, and the next save is tried again. Of
        several processes all must call this; the first one writes.

        Returns:
            True if everything is on disk.
        Raises:
            TrainingStopped: the state holds numbers that are not finite, or another run has taken the folder over; the
                files on disk stay.
        """
        self.stop.save_asked = False
        checkpoint = self.facts | state.state_dict()
        require_finite(checkpoint, self.folder)
        self.is_saved, self.best = run_on_rank0(self._write, checkpoint)
        return self.is_saved

    def _write(self, checkpoint):
        """Return (whether everything is on disk, what best.pt holds)."""
        self.lock.require()
        if self.mirror is not None:
            self.mirror.lock.require()
        best, at_best, epochs = checkpoint["best"], self.best, checkpoint["epoch"]
        due = {}
        if self.ledger is not None:
            self.ledger.saves += 1
            checkpoint = checkpoint | {"ledger": self.ledger.state()}
        if checkpoint["batch"] == 0 and epochs and best["epoch"] == epochs and best != self.best:
            due[self.folder / BEST] = "the best so far"
        if checkpoint["batch"] == 0 and epochs and self.every_epochs and epochs % self.every_epochs == 0:
            due[self.folder / epoch_name(epochs)] = f"epoch {epochs}"
        try:
            failed = write(self.folder / LAST, checkpoint, due, self.folder / PREVIOUS)
        except OSError as error:
            self._next_save = time.monotonic() + min(RETRY_SECONDS, self.interval_seconds)
            self.log(
                f"WARNING: the checkpoint could not be saved to {self.folder}: {error}. The run goes on and the earlier "
                "checkpoint stays; make room, the next save is tried again"
            )
            return False, at_best
        self._next_save = time.monotonic() + self.interval_seconds
        if self.folder / BEST in due and self.folder / BEST not in failed:
            at_best = dict(best)
        written = [LAST, *(path.name for path in due if path not in failed)]
        self.event("save", epoch=epochs, batch=checkpoint["batch"], files=written)
        if self.mirror is not None:
            self.mirror.offer(written, (epochs, checkpoint["batch"]), checkpoint["ledger"]["saves"])
        for path, error in failed.items():
            self.log(f"WARNING: {path.name}, {due[path]}, could not be written: {error}. {LAST} is saved")
        with contextlib.suppress(OSError):
            self._prune()
        return not failed, at_best

    def mirror_what_is_there(self, state):
        """Have the checkpoints of a run that goes on at last.pt uploaded; what the mirror has is not sent again."""
        if self.mirror is not None and self.is_saved:
            names = [path.name for path in checkpoints_in(self.folder) if path.name in (LAST, BEST)]
            self.mirror.offer(names, (state.epoch, state.batch), self.ledger.saves)

    def best_in_words(self, best, conditions):
        """Return where the best weights are, in words that are true: of best.pt as it is on disk.

        Args:
            best: the run's, as the state remembers it.
            conditions: of the accuracy, in words.
        """
        path, there = self.folder / BEST, self.best
        if there["epoch"] == 0 or position(path) != (there["epoch"], 0):
            text = f"there is no {path}"
        else:
            text = f"best validation top-1 {_accuracy_in_words(there, conditions)}, in {path}"
        if best["epoch"] and best != there:
            text += f"; {_accuracy_in_words(best, conditions)} is not on disk"
        return text

    def _prune(self):
        kept = [path for path in reversed(checkpoints_in(self.folder)) if EPOCH_PATTERN.fullmatch(path.name)]
        for path in kept[: -self.keep] if self.keep else []:
            path.unlink()


def _accuracy_in_words(best, conditions):
    return f"{best['top1']:.2f} % in epoch {best['epoch']} ({best['weights']} weights, {conditions})"


def require_finite(checkpoint, folder):
    """Raise TrainingStopped if a tensor inside holds a number that is not finite: it must not be saved or averaged."""
    if not all_finite(checkpoint):
        raise TrainingStopped(
            "weights, statistics or optimizer state are no longer finite: not saved. The last good checkpoint is "
            f"{Path(folder) / LAST}; resume it, or start anew with a lower --learning-rate"
        )


def all_finite(checkpoint):
    """Return whether every floating-point tensor inside nested dicts and lists is finite; waits for the device once."""
    tensors = [t for t in _tensors(checkpoint) if t.is_floating_point() and t.numel()]
    return not tensors or bool(torch.isfinite(torch.nn.utils.get_total_norm(tensors, float("inf"))))


def _tensors(checkpoint):
    if isinstance(checkpoint, torch.Tensor):
        yield checkpoint
    elif isinstance(checkpoint, dict):
        for value in checkpoint.values():
            yield from _tensors(value)
    elif isinstance(checkpoint, (list, tuple)):
        for value in checkpoint:
            yield from _tensors(value)
