"""The folder that a run saves into: what is saved under which name, and when."""

import contextlib
import os
import time
from pathlib import Path

import torch

from engine.run import checkpoint_files
from engine.run.checkpoint_files import (
    BEST,
    CURVES,
    EPOCH_PATTERN,
    FORMAT,
    LAST,
    PREVIOUS,
    RECORDS,
    REPORTS,
    VERSION,
    checkpoints_in,
    epoch_name,
    position,
)
from engine.system.distributed import any_process, rank, run_on_rank0
from engine.system.errors import CheckpointError, MachineError, TrainingStopped
from engine.system.files import copy_file, delete_leftovers

RETRY_SECONDS = 60.0  # after a save that failed


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
            for names in ("*.pt", RECORDS, CURVES, *REPORTS):
                delete_leftovers(self.folder, names)
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
                checkpoint = checkpoint_files.read(there)
                if checkpoint["best"] == best or checkpoint["epoch"] > best["epoch"]:
                    return best  # a later one is of epochs that the resumed run trains again
                problem = f"it is of epoch {checkpoint['epoch']}"
            except (CheckpointError, MachineError) as error:
                problem = str(error)
        candidates = checkpoints_in(self.folder)
        if other_folder.resolve() != self.folder.resolve():
            candidates += checkpoints_in(other_folder)
        for path in candidates:
            if path != there and position(path) == (best["epoch"], 0):
                try:
                    if checkpoint_files.read(path)["best"] == best:
                        copy_file(path, there)
                        self.log(f"note: {BEST}, the weights of epoch {best['epoch']}, is made from {path}: {problem}")
                        return best
                except (CheckpointError, MachineError, OSError) as error:
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
        with contextlib.suppress(OSError):  # which the save meets as well
            if note := self.lock.require():
                self.log(note)
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
            failed = checkpoint_files.write(self.folder / LAST, checkpoint, due, self.folder / PREVIOUS)
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
        with contextlib.suppress(OSError, MachineError):
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
            "weights, statistics or optimizer state are no longer finite: not saved. "
            f"{way_out(folder)} with a lower --learning-rate"
        )


def way_out(folder):
    """Return what a run that diverged can go on from, as the beginning of a sentence."""
    last = Path(folder) / LAST
    if last.exists():
        return f"The last good checkpoint is {last}: resume it, or start anew"
    return "No checkpoint has been saved yet: start anew, with --overwrite,"


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
