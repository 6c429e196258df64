"""How fast this machine does what a run does."""

import itertools
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from engine.data.batches import resolution_of_epoch, training_requests
from engine.data.loader import BatchLoader
from engine.run import checkpoint_files
from engine.run.checkpoint_folder import all_finite
from engine.run.curves import draw_curves
from engine.system.device import AUTOCAST_DTYPES, autocast, describe_device
from engine.system.distributed import all_reduce_sum, any_process, broadcast_from_rank0, run_on_rank0
from engine.system.gpu_memory import retry_in_parts_on_oom
from engine.system.interruption import StopRequest
from engine.system.micro_batches import network_px
from engine.training import sam
from engine.training.compiling import eager_mode
from engine.training.mixing import build_mixing
from engine.training.plan import Rates, networks_scored, passes_of_a_step

MEASURED_LAPS = 2  # at least, of a batch from each worker


class Pace(NamedTuple):
    """How fast batches went through some work, in seconds."""

    images_per_s: float  # once the queue of batches made beforehand was empty
    first_batch: float  # waiting for it
    first_work: float  # on it, more than on another one


def steady_pace(batches, work, workers, queued, seconds, clock=time.perf_counter, repeats=1):
    """Return the Pace at which batches can be made and worked on for as long as one likes.

    While the first batch takes its time, for the compiler or cuDNN's trials, the workers fill their queue. So the batches of a
    whole queue are passed over, then each worker makes one that is worked on, and only then the clock starts; it stops after
    whole laps, as batches of workers in step arrive in bursts of one from each, and a multiple of `repeats` steps.

    Args:
        batches: endless iterable of (images, labels).
        work: takes such a batch; returns a tensor on the device, whose reading waits for the device.
        workers: that make the batches in turn; 0 if this process makes them.
        queued: batches that they have been asked for ahead.
        seconds: of measuring, at least.
        repeats: steps after which the work repeats itself: with SAM, one of so many takes longer.
    """
    batches, lap, asked = iter(batches), max(workers, 1), clock()
    batch = next(batches)
    there = clock()
    work(*batch).item()
    first_work = clock() - there
    for _ in range(queued):
        next(batches)
    for _ in range(lap):
        result = work(*next(batches))
    result.item()
    batch, counted, waited, laps = next(batches), 0, 0.0, 0
    started = clock()
    while laps < MEASURED_LAPS or laps * lap % repeats or not any_process(clock() - started > seconds):
        for _ in range(lap):
            result = work(*batch)
            counted += len(batch[1])
            asked_next = clock()
            batch = next(batches)
            waited += clock() - asked_next
        result.item()  # what was begun counts, so wait for its end
        laps += 1
    took, steps = clock() - started, laps * lap
    counted = int(all_reduce_sum(torch.tensor(counted)))
    first_batch = max(there - asked - lap * waited / steps, 0.0)  # the steady waiting for a batch of each worker is in the rate
    return Pace(counted / took, first_batch, max(first_work - (took - waited) / steps, 0.0))


def measure_machine(config, splits, state, step, monitor, begun, seconds=20.0, clock=time.perf_counter):
    """Return the Rates of this machine with everything that a run does: data, averages, validation, saving.

    Args:
        splits: the run's images.
        state: TrainState to train and forget, as the run's own is at its start.
        step: (state, images, targets) -> result with loss, correct and grad_norm; trains.
        begun: what the clock showed at the program's start.
        seconds: of measuring each: training at the smallest and the largest resolution of the run, validation, statistics.
        clock: time.perf_counter; or time.process_time for the CPU time of a run without workers, which others do not disturb.
    """
    batches = BatchLoader(splits, config, state.device, AUTOCAST_DTYPES[state.precision], StopRequest(), monitor.log)
    try:
        return measure_with(batches, config, state, step, monitor, begun, seconds, clock)
    finally:
        batches.close()


def measure_with(batches, config, state, step, monitor, begun, seconds, clock):
    """Return measure_machine's Rates, with a BatchLoader."""
    batches.wait_for_workers()
    start_seconds, work = clock() - begun, Work(config, state, step)

    def pace(of_a_batch, of_batches, repeats=1):
        batches.wait_for_workers()
        monitor.start("measuring this machine", None)
        workers, queued = batches.workers, batches.queued
        measured = steady_pace(monitor.watch(of_batches), of_a_batch, workers, queued, seconds, clock, repeats)
        monitor.finish()
        return measured

    def training(resolution):
        fixed = config | {"start_resolution": 0, "train_resolution": resolution}
        return batches.training(endless(lambda epoch: training_requests(batches.splits["train"], fixed, epoch)), set())

    sizes = sorted({resolution_of_epoch(config, epoch) for epoch in range(config["epochs"])})
    repeats = sam.period(config) or 1
    at = {size: pace(work.train, training(size), repeats) for size in sorted({sizes[0], sizes[-1]})}
    counts = sorted({1, networks_scored(config, config["epochs"], len(batches.splits["train"]))})
    scoring = {count: pace(work.score_with(count), endless(lambda epoch: batches.validation())) for count in counts}
    statistics = pace(work.recompute, training(sizes[-1])).images_per_s if config["swa_start_epoch"] else 0.0
    save_seconds, first_drawing, drawing_seconds = seconds_to_keep(config, state, monitor.log, clock)
    return Rates(
        training={network_px(config, px): of_px.images_per_s * passes_of_a_step(config) for px, of_px in at.items()},
        validation={count: measured.images_per_s for count, measured in scoring.items()},
        statistics=statistics,
        source=f"measured on {describe_device(state.device)}, {state.precision}, data included",
        start_seconds=start_seconds + max(first_drawing - drawing_seconds, 0.0),
        first_step_seconds=max(measured.first_work for measured in at.values()),
        passes_seconds=at[sizes[-1]].first_batch + scoring[1].first_batch,
        save_seconds=save_seconds,
        drawing_seconds=drawing_seconds,
    )


def endless(epoch_of):
    """Return an iterator over epoch_of(0), epoch_of(1) and so on, one after the other."""
    return itertools.chain.from_iterable(epoch_of(epoch) for epoch in itertools.count())


class Work:
    """What a run does with a batch; each method takes (images, labels) and returns a tensor that comes last on the device."""

    def __init__(self, config, state, step):
        self.config, self.state, self.step = config, state, step
        self.mix = build_mixing(config, state.model.fc.out_features)
        self.context = autocast(state.device, state.precision)
        self.forward = retry_in_parts_on_oom(self._score)

    def train(self, images, labels):
        self.state.ddp_model.train()
        result = self.step(self.state, *self.mix(images, labels))
        self.state.count_step(result, self.config)
        return result.loss

    def score_with(self, networks):
        """Return the work of validation where so many networks are scored at once."""

        @torch.inference_mode()
        def score(images, labels):
            self.state.model.eval()
            with eager_mode(), self.context:
                for _ in range(networks):
                    sums = self.forward(images)
            return sums[-1]

        return score

    def _score(self, images):
        views = [images, images.flip(3)] if self.config["val_flip"] else [images]
        return [self.state.model(view) for view in views][0].sum()

    @torch.no_grad()
    def recompute(self, images, labels):
        self.state.model.train()
        with eager_mode(), self.context:
            return self.state.model(images).sum()


def seconds_to_keep(config, state, log, clock):
    """Return the seconds of a checkpoint of the state, of the first drawing of the curves and of another one.

    They go to the disk of checkpoint_dir, into a folder that is then deleted; where nothing can be written, that is said, and
    they are 0.
    """
    place = Path(config["checkpoint_dir"]).absolute()
    place = next(folder for folder in (place, *place.parents) if folder.is_dir())
    figures = ("train_loss", "train_top1", "val_loss", "val_top1", "learning_rate", "images_per_s")
    records = [{"epoch": epoch + 1} | dict.fromkeys(figures, 1.0) for epoch in range(min(config["epochs"], 100))]

    def kept(checkpoint, started):
        seconds = []
        try:
            with tempfile.TemporaryDirectory(prefix=".plan-", dir=place) as folder:
                checkpoint_files.write(Path(folder) / checkpoint_files.LAST, checkpoint)
                seconds.append(clock() - started)
                for _ in range(2):
                    started = clock()
                    draw_curves(records, Path(folder) / checkpoint_files.CURVES)
                    seconds.append(clock() - started)
            return seconds
        except OSError as error:
            log(f"WARNING: saving could not be measured and is not in the plan: {place} cannot be written to: {error}")
            return 0.0, 0.0, 0.0

    started = clock()
    checkpoint = state.state_dict()
    all_finite(checkpoint)
    return broadcast_from_rank0(run_on_rank0(kept, checkpoint, started))
