"""What a run keeps of each epoch: a line of metrics.jsonl, curves.png, TensorBoard's file."""

import math
import time

from engine.run.checkpoint_files import CURVES, RECORDS
from engine.run.curves import draw_curves
from engine.run.events import EVENTS
from engine.run.records import append_record, keep_records_up_to, read_records
from engine.run.tensorboard import open_tensorboard
from engine.run.weights import WEIGHTS
from engine.system.files import copy_file

DRAWING_SECONDS = 20.0  # between drawings of curves.png, besides the last


class EpochRecords:
    """The records of a run, in its folder, by the process that writes.

    Args:
        config: the run's.
        folder: where they are kept.
        log: RunLog, for what cannot be written.
    """

    def __init__(self, config, folder, log):
        self.epochs, self._tensorboard = config["epochs"], config["tensorboard"]
        self._folder, self._log = folder, log
        self._unwritten, self._board, self._next_drawing = [], None, -math.inf

    def open(self, epochs_done, resumed_from=None):
        """Begin or go on with metrics.jsonl; the records of epochs that will be trained again are dropped.

        Args:
            resumed_from: folder of the checkpoint that the run goes on from; its records come along where there are none here.
        """
        folder, log = self._folder, self._log
        with log.warn_on_error(f"{RECORDS} could not be written"):
            if resumed_from and (resumed_from / RECORDS).is_file() and not (folder / RECORDS).exists():
                for name in (RECORDS, EVENTS):
                    if (resumed_from / name).is_file():
                        copy_file(resumed_from / name, folder / name)
            if unreadable := keep_records_up_to(folder / RECORDS, epochs_done):
                log.log(f"WARNING: {unreadable} lines of {folder / RECORDS} could not be read and are dropped")
        log.open_events(folder)
        if self._tensorboard:
            with log.warn_on_error("TensorBoard's file could not be opened"):
                self._board = open_tensorboard(folder, epochs_done)

    def write(self, record):
        """Add an epoch's record to metrics.jsonl. What cannot be written now is written with the next record."""
        self._unwritten.append(record)
        with self._log.warn_on_error(f"the record of epoch {record['epoch']} could not be written"):
            while self._unwritten:
                append_record(self._folder / RECORDS, self._unwritten[0])
                self._unwritten.pop(0)

    def draw(self, record):
        """Feed TensorBoard the epoch's record, and draw the curves anew if it is time."""
        if self._board is not None:
            with self._log.warn_on_error("TensorBoard's file could not be written"):
                self._board.add(record)
        with self._log.warn_on_error(f"{CURVES} could not be drawn"):
            self._draw_curves_if_due(read_records(self._folder / RECORDS), is_last=record["epoch"] == self.epochs)

    def _draw_curves_if_due(self, records, is_last):
        """Draw the curves anew, unless that was done a moment ago: it takes about a second, more than a small epoch."""
        if not is_last and time.monotonic() < self._next_drawing:
            return
        self._next_drawing = time.monotonic() + DRAWING_SECONDS
        if not draw_curves(records, self._folder / CURVES) and len(records) == 1:
            self._log.log("matplotlib is not installed: no curves.png (pip install matplotlib)")


def epoch_line(record, epochs):
    """Return the line that a run prints for an epoch's record."""
    text = f"epoch {record['epoch']}/{epochs}: "
    if record["train_loss"] is not None:
        text += f"train loss {record['train_loss']:.3f}, top-1 {record['train_top1']:.2f} %; "
    if "val_loss" in record:
        text += f"val loss {record['val_loss']:.3f}, top-1 {record['val_top1']:.2f} %"
        text += f", top-5 {record['val_top5']:.2f} %" if "val_top5" in record else ""
    else:
        text += "not validated"
    if "val_balanced_top1" in record:
        text += f", mean of the classes {record['val_balanced_top1']:.2f} %"
    if "val_flip_top1" in record:
        text += f", with flip {record['val_flip_top1']:.2f} %"
    for kind, weights in WEIGHTS.items():
        if kind != "raw" and f"{weights.column}_top1" in record:
            text += f"; {weights.label} top-1 {record[f'{weights.column}_top1']:.2f} %"
    for other in record.get("more_val", ()):
        text += f"; at {other['val_resolution']} px {max(of['top1'] for of in other.values() if isinstance(of, dict)):.2f} %"
    text += f"; lr {record['learning_rate']:.2e}, {record['images_per_s']:.0f} images/s, {record['seconds']:.0f} s"
    if record["skipped_steps"]:
        text += f"; {record['skipped_steps']} steps skipped"
    return text
