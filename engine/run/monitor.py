"""What a run shows: the progress bar, the log, the records."""

import contextlib
import logging
import math
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from engine.run.checkpoint_files import CURVES, RECORDS
from engine.run.curves import draw_curves
from engine.run.events import EVENTS, EventLog
from engine.run.heartbeat import Heartbeat
from engine.run.records import append_record, keep_records_up_to, read_records
from engine.run.telemetry import GpuFigures, GpuSampler, summary_of_all
from engine.run.tensorboard import open_tensorboard
from engine.run.verdict import STALLED_SECONDS, Work, sums_of
from engine.run.weights import WEIGHTS
from engine.system.console import lost_output
from engine.system.distributed import all_gather_object, rank
from engine.system.errors import UserError, first_line
from engine.system.files import copy_file

DRAWING_SECONDS = 20.0  # between drawings of curves.png, besides the last
WARNINGS = ("WARNING", "bad image", "out of GPU memory")  # what a warning begins with
PLAIN_LINE_SECONDS = 30.0  # between progress lines in the log, and on an output that is no terminal


class Monitor:
    """Shows a run to people: a bar on a terminal, plain lines elsewhere, everything said also in the log file.

    Of several processes the first one speaks and writes; the others only add their GPU's figures.

    Args:
        config: for epochs and log_file; with None there nothing is logged.
        device: torch.device whose figures the bar shows.
    """

    def __init__(self, config, device):
        self.epochs = config["epochs"]
        self.forecast = None  # Forecast, where the run has one
        self.gpu = GpuFigures(device)
        self._sampler = GpuSampler(self.gpu)
        self._config = config
        self._board = None
        self._events = EventLog()
        self._unwritten = []
        self._output_was_lost = False
        self._next_drawing = -math.inf
        self._is_main = rank() == 0
        self._log = logging.Logger("training")  # not from the registry: each run has its own file
        if self._is_main and config["log_file"] is not None:
            try:
                Path(config["log_file"]).parent.mkdir(parents=True, exist_ok=True)
                handler = logging.FileHandler(config["log_file"], encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                raise UserError(f"log_file = {config['log_file']!r} cannot be written to: {error}") from error
            handler.handleError = _complain_of_the_log
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"))
            self._log.addHandler(handler)
        self._terminal = self._is_main and sys.stderr.isatty()
        self._bar = None
        self._next_plain_line = 0.0
        self._verdict = self._loader = None
        self._what = self._waiting_since = None
        self._speaking = threading.RLock()  # the heartbeat speaks, too
        self._heartbeat = Heartbeat(self._beat)

    def __enter__(self):
        self._sampler.start()
        if self._is_main:
            self._heartbeat.start()
        return self

    def __exit__(self, *exception):
        self._heartbeat.stop()
        self.finish()
        self._sampler.stop()
        if self._board is not None:
            with self.warn_on_error("TensorBoard's file could not be closed"):
                self._board.close()
        for handler in self._log.handlers:
            with contextlib.suppress(OSError):  # what a full disk did not take has been complained of
                handler.close()

    def log(self, text):
        """Print a line above the bar, if there is one, and log it."""
        if not self._is_main:
            return
        with self._speaking:
            self.log_to_file(text)
            if text.startswith(WARNINGS):
                self.event("warning", text=text)
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            if not self._output_was_lost and (reason := lost_output()):
                self._output_was_lost = True
                self.log_to_file(
                    f"note: standard output cannot be written to ({reason}); the run goes on, and this log has everything"
                )

    def event(self, event, **facts):
        """Add an event to events.jsonl, which lies in the folder of open_records."""
        if self._is_main:
            with self._speaking:
                self._events.add(event, **facts)

    def log_to_file(self, text):
        """Write a line to the log file alone."""
        for line in text.splitlines():
            self._log.info(line)

    def start(self, what, total, done=0, epoch=None):
        """Begin a phase of `total` batches, `done` of which a resumed run has behind it; `epoch`, from 0, if it trains."""
        self.finish()
        self._total, self._done, self._epoch, self._began = total, done, epoch, time.monotonic()
        self._next_plain_line = self._next_whereabouts = self._began + PLAIN_LINE_SECONDS
        self._what = what
        if self._terminal:
            self._bar = tqdm(total=total, initial=done, desc=what, unit="batch", leave=False, dynamic_ncols=True)

    def advance(self, metrics=None, learning_rate=None, speed=None):
        """Count one batch; show the TrainingMetrics, the rate and the Throughput where they are given."""
        self._done += 1
        figures, forecast = None, self.forecast if self._epoch is not None else None
        if forecast is not None:
            forecast.note(self._epoch, self._done)
        if metrics is not None:
            outlook = forecast and forecast.outlook(self._epoch, self._done)
            figures = {
                "loss": f"{metrics.loss:.3f}",
                "top1": f"{metrics.top1:.1f}%",
                "lr": f"{learning_rate:.2e}",
                "img/s": f"{speed.recent():.0f}",
                **self.gpu.text(),
                **(outlook.as_figures() if outlook else {}),
            }
            self._next_whereabouts = time.monotonic() + PLAIN_LINE_SECONDS
            self._judge(metrics, learning_rate, speed)
            if self._verdict is not None and self._verdict.active:
                figures["verdict"] = " and ".join(self._verdict.active)
            if forecast is not None and (warning := forecast.warning(self._epoch, self._done)):
                self.log(warning)
        if self._bar is not None:
            if figures is not None:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update()
        if figures is not None and time.monotonic() >= self._next_plain_line:
            self._next_plain_line = time.monotonic() + PLAIN_LINE_SECONDS
            shown = ", ".join(f"{name} {text}" for name, text in figures.items())
            line = f"{self._what}: batch {self._done}/{self._total}, {shown}"
            self.log_to_file(line)
            self.event("progress", epoch=self._epoch, batch=self._done, loss=metrics.loss, top1=metrics.top1)
            if self._is_main and self._bar is None:
                print(line, flush=True)

    def watch(self, batches):
        """Yield the batches and count each."""
        for batch in self.observe(batches):
            yield batch
            self.advance()
        self.finish()

    def observe(self, batches):
        """Yield the batches; one that does not come is said."""
        batches = iter(batches)
        while True:
            self._waiting_since = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waiting_since = None
            if self._verdict is not None and "no batch" in self._verdict.active:
                self._pronounce(self._verdict.judge_stall(0.0, {}))
            yield batch

    def finish(self):
        """End the phase."""
        self._what = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def open_records(self, folder, epochs_done, resumed_from=None):
        """Begin or go on with metrics.jsonl; the records of epochs that will be trained again are dropped.

        Args:
            resumed_from: folder of the checkpoint that the run goes on from; its records come along where there are none here.
        """
        if not self._is_main:
            return
        self._folder = folder
        with self.warn_on_error(f"{RECORDS} could not be written"):
            if resumed_from and (resumed_from / RECORDS).is_file() and not (folder / RECORDS).exists():
                for name in (RECORDS, EVENTS):
                    if (resumed_from / name).is_file():
                        copy_file(resumed_from / name, folder / name)
            if unreadable := keep_records_up_to(folder / RECORDS, epochs_done):
                self.log(f"WARNING: {unreadable} lines of {folder / RECORDS} could not be read and are dropped")
        self._events.open(folder)
        if self._config["tensorboard"]:
            with self.warn_on_error("TensorBoard's file could not be opened"):
                self._board = open_tensorboard(folder, epochs_done)

    def write_record(self, record):
        """Add the epoch's record to metrics.jsonl; return it with the GPU's figures. Each process must ask.

        What cannot be written now is written with the next record.
        """
        gpus = {}
        with self.warn_on_error("the GPU's figures are not known"):
            gpus = summary_of_all(all_gather_object(self._sampler.summary()))
        record = {name: None if value != value else value for name, value in record.items()} | gpus  # JSON knows no NaN
        if self._is_main:
            self._unwritten.append(record)
            with self.warn_on_error(f"the record of epoch {record['epoch']} could not be written"):
                while self._unwritten:
                    append_record(self._folder / RECORDS, self._unwritten[0])
                    self._unwritten.pop(0)
        return record

    def show_epoch(self, record):
        """Say the epoch's line, draw the curves anew and feed TensorBoard: what nothing depends on."""
        self.finish()
        if not self._is_main:
            return
        self.log(epoch_line(record, self.epochs) + (self.forecast.in_words(record["epoch"]) if self.forecast else ""))
        self.event("epoch", epoch=record["epoch"], batch=0)
        if self._verdict is not None:
            self._pronounce(self._verdict.judge_epoch(record))
        if self._board is not None:
            with self.warn_on_error("TensorBoard's file could not be written"):
                self._board.add(record)
        with self.warn_on_error(f"{CURVES} could not be drawn"):
            self._draw_curves_if_due(read_records(self._folder / RECORDS), is_last=record["epoch"] == self.epochs)

    # The verdict ------------------------------------------------------------------------------------------------------

    def judge_with(self, verdict, loader):
        """Hold the run's figures against a Verdict from now on; the BatchLoader tells what its workers do."""
        if self._is_main:
            self._verdict, self._loader = verdict, loader

    def _judge(self, metrics, learning_rate, speed):
        if self._verdict is None or self._epoch is None:
            return
        sums = sums_of(metrics, self._verdict.batch_size, speed.seconds(), speed.waited(), Work(*self._loader.work))
        self._pronounce(self._verdict.read(self._epoch, sums, learning_rate))
        self._pronounce(self._verdict.judge_gpu(self._sampler.fresh(), *self.gpu.allocator_mib()))

    def _pronounce(self, changes):
        """Log the Changes and keep them as events."""
        for change in changes:
            self.log(f"verdict: {change.text}")
            position = {"epoch": self._epoch, "batch": self._done} if self._epoch is not None else {}
            self.event("verdict", name=change.name, begins=change.begins, text=change.text, **position)

    def _beat(self):
        """Say, in the heartbeat's thread, what the loop cannot: that no batch comes, and where a phase without figures is."""
        now, since = time.monotonic(), self._waiting_since
        if self._verdict is not None and since is not None and now - since >= STALLED_SECONDS:
            self._pronounce(self._verdict.judge_stall(now - since, self._loader.worker_states()))
        what = self._what
        if what is None or now < self._next_whereabouts:
            return
        self._next_whereabouts = now + PLAIN_LINE_SECONDS
        of = f"batch {self._done}/{self._total}, " if self._total else f"batch {self._done}, " if self._done else ""
        line = f"{what}: {of}{now - self._began:.0f} s so far"
        self.log_to_file(line)
        if self._bar is None:
            print(line, flush=True)

    @contextlib.contextmanager
    def warn_on_error(self, trouble):
        """Turn whatever goes wrong inside into a warning: the run is worth more."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self.log(f"WARNING: {trouble}: {first_line(error)}. The run goes on")

    def _draw_curves_if_due(self, records, is_last):
        """Draw the curves anew, unless that was done a moment ago: it takes about a second, more than a small epoch."""
        if not is_last and time.monotonic() < self._next_drawing:
            return
        self._next_drawing = time.monotonic() + DRAWING_SECONDS
        if not draw_curves(records, self._folder / CURVES) and len(records) == 1:
            self.log("matplotlib is not installed: no curves.png (pip install matplotlib)")


def _complain_of_the_log(record):
    """Say that a line could not be logged, in place of logging's traceback: a full disk must not end the run."""
    print(f"WARNING: not logged ({sys.exc_info()[1]}): {record.getMessage()}", file=sys.stderr)


def epoch_line(record, epochs):
    """Return the line that a run prints for an epoch's record."""
    text = f"epoch {record['epoch']}/{epochs}: "
    if record["train_loss"] is not None:
        text += f"train loss {record['train_loss']:.3f}, top-1 {record['train_top1']:.2f} %; "
    if "val_loss" in record:
        text += f"val loss {record['val_loss']:.3f}, top-1 {record['val_top1']:.2f} %, top-5 {record['val_top5']:.2f} %"
    else:
        text += "not validated"
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
