"""What a run will take: epochs, resolutions, hours, cost."""

import itertools
import time
from typing import NamedTuple

import torch

from engine.data import resolution_of_epoch, training_requests
from engine.distributed import any_process, summed


class Rates(NamedTuple):
    """Images per second of a machine, at a few resolutions."""

    training: dict  # {px: images/s}
    validation: float  # images/s at val_resolution
    source: str  # in words

    def training_at(self, resolution):
        """Return images/s at a resolution: seconds per image are taken to be linear in the number of pixels."""
        known = sorted(self.training)
        if len(known) == 1:
            return self.training[known[0]] * (known[0] / resolution) ** 2
        (low, high), seconds = (known[0], known[-1]), lambda px: 1 / self.training[px]
        slope = (seconds(high) - seconds(low)) / (high**2 - low**2)
        return 1 / (seconds(low) + slope * (resolution**2 - low**2))


def rates_stated(images_per_s, val_resolution):
    """Return the Rates that follow from one figure, images/s in training at 224 px; a forward pass is a third of the work."""
    validation = 3 * images_per_s * (224 / val_resolution) ** 2
    return Rates({224: images_per_s}, validation, f"calculated from {images_per_s:g} images/s at 224 px")


def measure_rates(config, batches, train_on, score, source, monitor, seconds):
    """Return the Rates of this machine, data included.

    Args:
        batches: BatchServer of the run's images.
        train_on, score: take a batch (images, labels) in training and in validation; they return a tensor on the device.
        source: of the rates, in words.
        seconds: of measuring each: training at the smallest and the largest resolution of the run, and validation.
    """

    def rate(work, device_batches):
        monitor.start("measuring this machine", None)
        counted, started = 0, None
        for images, labels in monitor.watch(device_batches):
            result = work(images, labels)
            counted += len(labels)
            if started is None:  # the first batch warms up
                result.item()
                counted, started = 0, time.perf_counter()
            elif any_process(time.perf_counter() - started > seconds):
                break
        result.item()  # what was begun counts, so wait for its end
        monitor.finish()
        return max(int(summed(torch.tensor(counted))), 1) / (time.perf_counter() - started)

    def endless(epoch_of):
        return itertools.chain.from_iterable(epoch_of(epoch) for epoch in itertools.count())

    def requests(resolution):
        fixed = config | {"start_resolution": 0, "train_resolution": resolution}
        return endless(lambda epoch: training_requests(batches.splits["train"], fixed, epoch))

    sizes = [resolution_of_epoch(config, epoch) for epoch in range(config["epochs"])]
    training = {size: rate(train_on, batches.training(requests(size), set())) for size in sorted({min(sizes), max(sizes)})}
    return Rates(training, rate(score, endless(lambda epoch: batches.validation())), source)


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

    @property
    def hours(self):
        return sum(phase.hours for phase in self.phases) + self.validation_hours


def plan_run(config, rates, train_images, val_images):
    """Return the Plan of a whole run; without saving, drawing and the like, which take minutes of a long run."""
    phases = []
    by_resolution = itertools.groupby(range(config["epochs"]), lambda epoch: resolution_of_epoch(config, epoch))
    for resolution, group in by_resolution:
        epochs, rate = list(group), rates.training_at(resolution)
        hours = len(epochs) * train_images / rate / 3600
        phases.append(Phase(epochs[0] + 1, epochs[-1] + 1, resolution, rate, hours))
    passes = config["epochs"]
    if config["swa_start_epoch"]:
        passes += config["epochs"] - config["swa_start_epoch"] + 1
    if config["ema_half_life_steps"]:
        passes += config["epochs"]
    kinds = 1 + bool(config["swa_start_epoch"]) + bool(config["ema_half_life_steps"])
    passes += sum(kinds * (side / config["val_resolution"]) ** 2 for side in config["more_val_resolutions"])  # at the end
    passes *= 2 if config["val_flip"] else 1
    return Plan(phases, passes * val_images / rates.validation / 3600)


def epochs_within(hours, config, rates, train_images, val_images, is_sound):
    """Return the largest number of epochs with which the recipe takes at most so many hours, or 0 if there is none.

    Args:
        is_sound: tells whether a configuration can be run: averaging, for example, must begin before the run ends.
    """
    best = 0
    for epochs in itertools.count(1):
        stretched = config | {"epochs": epochs}
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
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + 3600 * plan.hours))
    cost = f", {plan.hours * price_per_hour:,.2f} at {price_per_hour:g} per hour" if price_per_hour is not None else ""
    lines.append(f"  in all {duration(plan.hours)}{cost}; begun now it ends at {end}")
    return lines


def duration(hours):
    """Return hours as text, in minutes or seconds where that says more."""
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.0f} seconds"
