"""What a run will take: epochs, resolutions, hours, cost."""

import itertools
import math
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from engine.data.batches import resolution_of_epoch, training_requests
from engine.data.loader import BatchLoader
from engine.run import checkpoint_files
from engine.run.curves import draw_curves
from engine.run.monitor import DRAWING_SECONDS
from engine.system.device import AUTOCAST_DTYPES, autocast, describe_device
from engine.system.distributed import all_reduce_sum, any_process, broadcast_from_rank0, run_on_rank0
from engine.system.errors import UserError
from engine.system.gpu_memory import retry_in_parts_on_oom, stop_on_oom
from engine.system.interruption import StopRequest
from engine.system.wording import duration
from engine.training import averaging
from engine.training.compiling import eager_mode
from engine.training.loss import build_mixing

MEASURED_LAPS = 2  # at least, of a batch from each worker


class PlanError(UserError):
    """A flag of the plan asks for what cannot be."""

    exit_code = 2


class Rates(NamedTuple):
    """What a machine takes for the parts of a run. Seconds that are not known are 0."""

    training: dict  # {px: images/s}
    validation: dict  # {networks that are scored at once: images/s at val_resolution}
    statistics: float  # images/s in recomputing batch-norm statistics at the largest resolution of training
    source: str  # in words
    start_seconds: float = 0.0  # from the program's start to its first step
    first_step_seconds: float = 0.0  # more than another step, at each resolution: the compiler, cuDNN's trials
    passes_seconds: float = 0.0  # in an epoch's passes over training and validation images, before the first batch is there
    save_seconds: float = 0.0  # of a checkpoint
    drawing_seconds: float = 0.0  # of the curves

    def training_at(self, resolution):
        """Return images/s at a resolution: seconds per image are taken to be linear in the number of pixels."""
        known = sorted(self.training)
        if len(known) == 1:
            return self.training[known[0]] * (known[0] / resolution) ** 2
        (low, high), seconds = (known[0], known[-1]), lambda px: 1 / self.training[px]
        slope = (seconds(high) - seconds(low)) / (high**2 - low**2)
        return 1 / (seconds(low) + slope * (resolution**2 - low**2))

    def validation_of(self, networks):
        """Return images/s where so many networks are scored at once: seconds are linear in their number, reading comes once."""
        fewest, most = min(self.validation), max(self.validation)
        if fewest == most:
            return self.validation[most] * most / networks
        slope = (1 / self.validation[most] - 1 / self.validation[fewest]) / (most - fewest)
        return 1 / (1 / self.validation[fewest] + slope * (networks - fewest))


def rates_stated(images_per_s, config):
    """Return the Rates that follow from one figure, images/s in training at 224 px; a forward pass is a third of the work."""
    views = 2 if config["val_flip"] else 1
    validation = 3 * images_per_s * (224 / config["val_resolution"]) ** 2 / views
    statistics = 3 * images_per_s * (224 / config["train_resolution"]) ** 2
    return Rates({224: images_per_s}, {1: validation}, statistics, f"calculated from {images_per_s:g} images/s at 224 px")


# Measuring -----------------------------------------------------------------------------------------------------------


class Pace(NamedTuple):
    """How fast batches went through some work, in seconds."""

    images_per_s: float  # once the queue of batches made beforehand was empty
    first_batch: float  # waiting for it
    first_work: float  # on it, more than on another one


def steady_pace(batches, work, workers, queued, seconds, clock=time.perf_counter):
    """Return the Pace at which batches can be made and worked on for as long as one likes.

    While the first batch takes its time, for the compiler or cuDNN's trials, the workers fill their queue. So the batches of a
    whole queue are passed over, then each worker makes one that is worked on, and only then the clock starts; it stops after
    whole laps, as batches of workers in step arrive in bursts of one from each.

    Args:
        batches: endless iterable of (images, labels).
        work: takes such a batch; returns a tensor on the device, whose reading waits for the device.
        workers: that make the batches in turn; 0 if this process makes them.
        queued: batches that they have been asked for ahead.
        seconds: of measuring, at least.
    """
    batches, lap = iter(batches), max(workers, 1)
    asked = clock()
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
    while laps < MEASURED_LAPS or not any_process(clock() - started > seconds):
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
    first_batch = max(there - asked - waited / steps, 0.0)  # the steady waiting is in the rate
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


@stop_on_oom("outside of a training step: make room in the GPU's memory")
def measure_with(batches, config, state, step, monitor, begun, seconds, clock):
    """Return measure_machine's Rates, with a BatchLoader."""
    start_seconds = clock() - begun
    mix = build_mixing(config, state.model.fc.out_features)
    context = autocast(state.device, state.precision)
    views = 2 if config["val_flip"] else 1

    def train_on(images, labels):
        state.ddp_model.train()
        result = step(state, *mix(images, labels))
        state.sums.add(result.loss, result.correct, result.grad_norm, config["batch_size"])
        averaging.update_ema(state.ema_model, state.model, config, steps_done=state.schedule.last_epoch)
        return result.loss

    forward = retry_in_parts_on_oom(lambda images: [state.model(view) for view in (images, images.flip(3))[:views]][0].sum())

    def score_with(networks):
        @torch.inference_mode()
        def score(images, labels):
            state.model.eval()
            with eager_mode(), context:
                for _ in range(networks):
                    sums = forward(images)
            return sums[-1]

        return score

    @torch.no_grad()
    def recompute(images, labels):
        state.model.train()
        with eager_mode(), context:
            return state.model(images).sum()

    def endless(epoch_of):
        return itertools.chain.from_iterable(epoch_of(epoch) for epoch in itertools.count())

    def pace(work, of_batches):
        monitor.start("measuring this machine", None)
        measured = steady_pace(monitor.watch(of_batches), work, batches.workers, batches.queued, seconds, clock)
        monitor.finish()
        return measured

    def training(resolution):
        fixed = config | {"start_resolution": 0, "train_resolution": resolution}
        return batches.training(endless(lambda epoch: training_requests(batches.splits["train"], fixed, epoch)), set())

    sizes = sorted({resolution_of_epoch(config, epoch) for epoch in range(config["epochs"])})
    at = {size: pace(train_on, training(size)) for size in sorted({sizes[0], sizes[-1]})}
    most = networks_scored(config, config["epochs"])
    scoring = {
        networks: pace(score_with(networks), endless(lambda epoch: batches.validation())) for networks in sorted({1, most})
    }
    statistics = pace(recompute, training(sizes[-1])).images_per_s if config["swa_start_epoch"] else 0.0
    save_seconds, first_drawing, drawing_seconds = seconds_to_keep(config, state, monitor.log, clock)
    return Rates(
        training={size: measured.images_per_s for size, measured in at.items()},
        validation={networks: measured.images_per_s for networks, measured in scoring.items()},
        statistics=statistics,
        source=f"measured on {describe_device(state.device)}, {state.precision}, data included",
        start_seconds=start_seconds + max(first_drawing - drawing_seconds, 0.0),
        first_step_seconds=max(measured.first_work for measured in at.values()),
        passes_seconds=at[sizes[-1]].first_batch + scoring[1].first_batch,
        save_seconds=save_seconds,
        drawing_seconds=drawing_seconds,
    )


def seconds_to_keep(config, state, log, clock):
    """Return the seconds of a checkpoint of the state, of the first drawing of the curves and of another one.

    They go to the disk of checkpoint_dir, into a folder that is then deleted; where nothing can be written, that is said, and
    they are 0.
    """
    place = Path(config["checkpoint_dir"]).absolute()
    place = next(folder for folder in (place, *place.parents) if folder.is_dir())
    figures = ("train_loss", "train_top1", "val_loss", "val_top1", "learning_rate", "images_per_s")
    records = [{"epoch": epoch + 1} | dict.fromkeys(figures, 1.0) for epoch in range(min(config["epochs"], 100))]

    def kept(contents, started):
        seconds = []
        try:
            with tempfile.TemporaryDirectory(prefix=".plan-", dir=place) as folder:
                checkpoint_files.write(Path(folder) / checkpoint_files.LAST, contents)
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
    contents = state.state_dict()
    checkpoint_files.all_finite(contents)
    return broadcast_from_rank0(run_on_rank0(kept, contents, started))


# Planning ------------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """Consecutive epochs of one resolution."""

    first_epoch: int  # counted from 1
    last_epoch: int
    resolution: int  # px
    images_per_s: float
    hours: float


class Plan(NamedTuple):
    phases: list
    validation_hours: float
    statistics_hours: float  # recomputing the averaged weights' batch norm
    start_hours: float  # start-up, each resolution's first step, the first batch of each pass
    saves: int
    keeping_hours: float  # saving and drawing

    @property
    def hours(self):
        parts = self.validation_hours, self.statistics_hours, self.start_hours, self.keeping_hours
        return sum(phase.hours for phase in self.phases) + sum(parts)


def networks_scored(config, epochs_trained):
    """Return how many kinds of weights are validated after so many epochs: raw, averaged, EMA."""
    averages = averaging.epochs_to_average(config, epochs_trained) > 0
    return 1 + averages + bool(config["ema_half_life_steps"])


def plan_new_run(config, options, counts, measure, stretch, is_sound):
    """Return (config, lines): the configuration with the epochs that fit, if hours are asked for, and its plan in words.

    Args:
        options: of the command line: hours, images_per_s, price_per_hour.
        counts: of the images for training and for validation.
        measure: returns the Rates of this machine; not called where the options state images_per_s.
        stretch: returns the configuration of a run of so many epochs.
        is_sound: tells whether a configuration can be run.
    Raises:
        PlanError: an option is no number above 0, or the hours are too few.
    """
    hours, images_per_s, price = (positive(name, options) for name in ("hours", "images_per_s", "price_per_hour"))
    rates = rates_stated(images_per_s, config) if images_per_s is not None else measure()
    if hours is not None:
        epochs = epochs_within(hours, stretch, rates, *counts, is_sound)
        if epochs == 0:
            raise PlanError(f"--hours {hours:g}: too short for this recipe on this machine ({rates.source}); allow more")
        config = stretch(epochs)
    return config, plan_lines(plan_run(config, rates, *counts), config, rates, *counts, price)


def positive(name, options):
    """Return an option as a number above 0, or None if it is not given."""
    if name not in options:
        return None
    try:
        value = float(options[name])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise PlanError(f"--{name.replace('_', '-')} {options[name]}: must be a number above 0")
    return value


def plan_run(config, rates, train_images, val_images):
    """Return the Plan of a whole run."""
    phases, epochs, steps = [], config["epochs"], train_images // config["batch_size"]
    by_resolution = itertools.groupby(range(epochs), lambda epoch: resolution_of_epoch(config, epoch))
    for resolution, group in by_resolution:
        group, rate = list(group), rates.training_at(resolution)
        hours = len(group) * steps * config["batch_size"] / rate / 3600
        phases.append(Phase(group[0] + 1, group[-1] + 1, resolution, rate, hours))
    fewest, most = (networks_scored(config, epoch) for epoch in (0, epochs))
    averaged = averaging.epochs_to_average(config, epochs)
    elsewhere = sum((side / config["val_resolution"]) ** 2 for side in config["more_val_resolutions"])  # at the end
    validation = (epochs - averaged) * val_images / rates.validation_of(fewest) if averaged < epochs else 0.0
    validation += (averaged + elsewhere) * val_images / rates.validation_of(most)
    statistics = 0.0
    for phase in phases if averaged else ():
        count = averaging.epochs_to_average(config, phase.last_epoch)
        count -= averaging.epochs_to_average(config, phase.first_epoch - 1)
        rate = rates.statistics * phase.images_per_s / rates.training_at(phases[-1].resolution)
        statistics += count * min(config["swa_batch_norm_batches"], steps) * config["batch_size"] / rate
    saves = epochs
    for phase in phases:  # each epoch's end starts the minutes anew
        count = phase.last_epoch - phase.first_epoch + 1
        saves += count * int(phase.hours / count * 60 / config["checkpoint_minutes"])
    working = sum(phase.hours for phase in phases) * 3600
    drawings = min(epochs, 1 + math.ceil((working + validation + statistics) / DRAWING_SECONDS))
    starting = rates.start_seconds + len(phases) * rates.first_step_seconds + epochs * rates.passes_seconds
    keeping = saves * rates.save_seconds + drawings * rates.drawing_seconds
    return Plan(phases, validation / 3600, statistics / 3600, starting / 3600, saves, keeping / 3600)


def epochs_within(hours, stretch, rates, train_images, val_images, is_sound):
    """Return the largest number of epochs with which the recipe takes at most so many hours, or 0 if there is none.

    Args:
        stretch: returns the configuration of a run of so many epochs.
        is_sound: tells whether a configuration can be run: averaging, for example, must begin before the run ends.
    """
    best = 0
    for epochs in itertools.count(1):
        stretched = stretch(epochs)
        if plan_run(stretched | {"swa_start_epoch": 0}, rates, train_images, val_images).hours > hours or epochs > 10_000:
            return best
        if is_sound(stretched) and plan_run(stretched, rates, train_images, val_images).hours <= hours:
            best = epochs
    raise AssertionError("not reached")


def plan_lines(plan, config, rates, train_images, val_images, price_per_hour=None):
    """Return the plan as lines of text."""
    lines = [
        f"plan: {config['epochs']} epochs of {train_images:,} images in batches of {config['batch_size']} ({rates.source})"
    ]
    for phase in plan.phases:
        epochs = (
            f"epoch {phase.first_epoch}"
            if phase.first_epoch == phase.last_epoch
            else (f"epochs {phase.first_epoch} to {phase.last_epoch}")
        )
        lines.append(f"  {epochs}: {phase.resolution} px, {phase.images_per_s:,.0f} images/s, {duration(phase.hours)}")
    lines.append(
        f"  validation: {val_images:,} images at {config['val_resolution']} px, {duration(plan.validation_hours)} in all"
    )
    if plan.statistics_hours:
        lines.append(f"  batch-norm statistics of the averaged weights: {duration(plan.statistics_hours)} in all")
    if plan.keeping_hours:
        lines.append(f"  saving {plan.saves} times, and drawing: {duration(plan.keeping_hours)} in all")
    if plan.start_hours:
        lines.append(f"  start-up, first steps and first batches: {duration(plan.start_hours)}")
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + 3600 * plan.hours))
    cost = f", {plan.hours * price_per_hour:,.2f} at {price_per_hour:g} per hour" if price_per_hour is not None else ""
    lines.append(f"  in all {duration(plan.hours)}{cost}; begun now it ends at {end}")
    return lines
