"""What a run shows while it runs: the progress bar and the verdict, besides all that it says."""

import sys
import time

from tqdm import tqdm

from engine.run.epoch_records import EpochRecords, epoch_line
from engine.run.heartbeat import Heartbeat
from engine.run.run_log import RunLog
from engine.run.telemetry import GpuFigures, GpuSampler, summary_of_all
from engine.run.verdict import STALLED_SECONDS, Work, sums_of
from engine.system.distributed import all_gather_object

PLAIN_LINE_SECONDS = 30.0  # between progress lines in the log, and on an output that is no terminal


class Monitor(RunLog):
    """Shows a run to people: a bar on a terminal, plain lines elsewhere, everything said also in the log file.

    Of several processes the first one speaks and writes; the others only add their GPU's figures.

    Args:
        log_file: path, or None: nothing is logged.
        device: torch.device whose figures the bar shows.
    """

    def __init__(self, log_file, device):
        super().__init__(log_file)
        self.forecast = None  # Forecast, where the run has one
        self.gpu = GpuFigures(device)
        self._sampler = GpuSampler(self.gpu)
        self._records = None  # EpochRecords, where the run keeps them
        self._terminal = self._is_main and sys.stderr.isatty()
        self._bar = None
        self._next_plain_line = 0.0
        self._verdict = self._loader = None
        self._what = self._waiting_since = None
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
        self.close()

    def start(self, what, total, done=0, epoch=None):
        """Begin a phase of `total` batches, `done` of which a resumed run has behind it; `epoch`, from 0, if it trains."""
        self.finish()
        self._total, self._done, self._epoch, self._began = total, done, epoch, time.monotonic()
        self._next_plain_line = self._next_whereabouts = self._began + PLAIN_LINE_SECONDS
        self._what = what
        if self._terminal:
            self._bar = tqdm(total=total, initial=done, desc=what, unit="batch", leave=False, dynamic_ncols=True)
            outlook = self.forecast and epoch is not None and self.forecast.outlook(epoch, done)
            if outlook:  # an epoch may end before its figures are read
                self._bar.set_postfix(outlook.as_figures())

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

    # An epoch's end ---------------------------------------------------------------------------------------------------

    def open_records(self, config, folder, epochs_done, resumed_from=None):
        """Begin or go on with the records in a folder, as EpochRecords.open()."""
        if self._is_main:
            self._records = EpochRecords(config, folder, self)
            self._records.open(epochs_done, resumed_from)

    def write_record(self, record):
        """Write the epoch's record; return it with the GPU's figures. Each process must ask."""
        gpus = {}
        with self.warn_on_error("the GPU's figures are not known"):
            gpus = summary_of_all(all_gather_object(self._sampler.summary()))
        record = {name: None if value != value else value for name, value in record.items()} | gpus  # JSON knows no NaN
        if self._is_main:
            self._records.write(record)
        return record

    def show_epoch(self, record):
        """Say the epoch's line, draw the curves anew and feed TensorBoard: what nothing depends on."""
        self.finish()
        if not self._is_main:
            return
        outlook = self.forecast.in_words(record["epoch"]) if self.forecast else ""
        self.log(epoch_line(record, self._records.epochs) + outlook)
        if self.forecast is not None and (warning := self.forecast.warning(record["epoch"], 0)):
            self.log(warning)  # of short epochs no figures are read within them
        self.event("epoch", epoch=record["epoch"], batch=0)
        if self._verdict is not None:
            self._pronounce(self._verdict.judge_epoch(record))
        self._records.draw(record)

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
