"""What a run will take: epochs, resolutions, hours, cost."""

import argparse
import bisect
import itertools
import math
import time
from typing import NamedTuple

from engine.cli.keys import positive_number
from engine.data.batches import resolution_of_epoch
from engine.inference.freezing import work_of_a_step
from engine.run.epoch_records import DRAWING_SECONDS
from engine.system.errors import UserError
from engine.system.micro_batches import network_px
from engine.system.wording import duration
from engine.training import averaging, sam
from engine.training.range_test import USUAL_RANGE
from engine.training.validation import is_validated

# What a step of Muon takes beside the network's own, in ResNet-50's images at 224 px: 0.164 TFLOP (calculated, test_muon.py).
MUON_AS_IMAGES = 6.7
BUDGETS = ("hours", "dollars")  # flags that choose the epochs


class PlanError(UserError):
    """A flag of the plan asks for what cannot be."""

    exit_code = 2


class Rates(NamedTuple):
    """What a machine takes for the parts of a run. Seconds that are not known are 0."""

    training: dict  # {px that the network sees: images/s in steps without SAM}
    validation: dict  # {networks that are scored at once: images/s at val_resolution}
    statistics: float  # images/s in recomputing batch-norm statistics at the largest resolution of training
    source: str  # in words
    start_seconds: float = 0.0  # from the program's start to its first step
    first_step_seconds: float = 0.0  # more than another step, at each resolution: the compiler, cuDNN's trials
    passes_seconds: float = 0.0  # in an epoch's passes over training and validation images, before the first batch is there
    save_seconds: float = 0.0  # of a checkpoint
    drawing_seconds: float = 0.0  # of the curves

    def as_plain(self):
        """Return the Rates as what a checkpoint and JSON can hold."""
        return self._asdict() | {"training": list(self.training.items()), "validation": list(self.validation.items())}

    @classmethod
    def from_plain(cls, plain):
        """Return the Rates that as_plain() was of."""
        return cls(**plain | {name: dict(plain[name]) for name in ("training", "validation")})

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
    """Return the Rates that follow from one figure, images/s in training at 224 px with nothing frozen."""
    views = 2 if config["val_flip"] else 1
    validation = 3 * images_per_s * (224 / config["val_resolution"]) ** 2 / views
    statistics = 3 * images_per_s * (224 / config["train_resolution"]) ** 2
    seconds = work_of_a_step(config) / 3 / images_per_s  # of an image at 224 px
    more = MUON_AS_IMAGES / images_per_s / config["batch_size"] if config["optimizer"] == "muon" else 0.0
    training = {px: 1 / (seconds * (px / 224) ** 2 + more) for px in (112, 224)}
    return Rates(training, {1: validation}, statistics, f"calculated from {images_per_s:g} images/s at 224 px")


def passes_of_a_step(config):
    """Return how often a step passes forward and backward, on average: twice where SAM takes its gradient uphill."""
    every = sam.period(config)
    return 1 + 1 / every if every else 1.0


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
    range_test_hours: float = 0.0  # finding the learning rate, at the most

    @property
    def hours(self):
        parts = self.validation_hours, self.statistics_hours, self.start_hours, self.keeping_hours, self.range_test_hours
        return sum(phase.hours for phase in self.phases) + sum(parts)


def networks_scored(config, epochs_trained, train_images):
    """Return how many kinds of weights are validated after so many epochs: raw, averaged, EMA."""
    averages = averaging.epochs_to_average(config, epochs_trained) > 0
    steps = epochs_trained * (train_images // config["batch_size"])
    return 1 + averages + (averaging.ema_updates(config, steps) > 0)


def validation_seconds(config, rates, epochs_done, counts):
    """Return the seconds in which the weights are scored after so many epochs of a run: 0 where they are not.

    Args:
        counts: of the images for training and for validation.
    """
    if not is_validated(config, epochs_done):
        return 0.0
    others = config["more_val_resolutions"] if epochs_done == config["epochs"] else []
    passes = 1 + sum((side / config["val_resolution"]) ** 2 for side in others)
    return passes * counts[1] / rates.validation_of(networks_scored(config, epochs_done, counts[0]))


def plan_new_run(config, options, counts, measure, stretch, is_sound):
    """Return (config, lines): the configuration with the epochs that fit, if hours are asked for, and its plan in words.

    Args:
        options: of the command line: hours, dollars, images_per_s, price_per_hour.
        counts: of the images for training and for validation.
        measure: returns the Rates of this machine; not called where the options state images_per_s.
        stretch: returns the configuration of a run of so many epochs.
        is_sound: tells whether a configuration can be run.
    Raises:
        PlanError: an option is no number above 0, or the hours are too few.
    """
    images_per_s, price = (positive(name, options) for name in ("images_per_s", "price_per_hour"))
    hours = budget_hours(options)
    rates = rates_stated(images_per_s, config) if images_per_s is not None else measure()
    if hours is not None:
        epochs = epochs_within(hours, stretch, rates, *counts, is_sound)
        if epochs == 0:
            raise too_short(options, rates)
        config = stretch(epochs)
    return config, plan_lines(plan_run(config, rates, *counts), config, rates, *counts, price)


def positive(name, options):
    """Return an option as a number above 0, or None if it is not given."""
    if name not in options:
        return None
    try:
        return positive_number(options[name])
    except argparse.ArgumentTypeError as error:
        raise PlanError(f"--{name.replace('_', '-')} {error}") from error


def budget_hours(options):
    """Return the hours that a run may take, as given or as what the dollars pay for, or None if there is no such limit."""
    dollars, price = positive("dollars", options), positive("price_per_hour", options)
    return positive("hours", options) if dollars is None else dollars / price


def budget_flag(options):
    """Return which flag gives a run its budget, 'hours' or 'dollars', or None where it has none."""
    return next((name for name in BUDGETS if name in options), None)


def asks_for_plan(command):
    """Return whether a plan is asked for, alone or for a budget."""
    return "plan" in command.options or budget_flag(command.options) is not None


def overruled(command):
    """Return lines on what a command asks for in vain: epochs, beside a budget."""
    budget = budget_flag(command.options)
    if budget is None or "epochs" not in command.given:
        return []
    return [f"note: --epochs {command.given['epochs']} is not used: --{budget} chooses the epochs"]


def too_short(options, rates):
    """Return the PlanError of a budget that not one epoch fits into."""
    asked = budget_flag(options)
    return PlanError(
        f"--{asked} {positive(asked, options):g}: too short for this recipe on this machine ({rates.source}); allow more"
    )


def plan_run(config, rates, train_images, val_images):
    """Return the Plan of a whole run."""
    phases, epochs, steps = [], config["epochs"], train_images // config["batch_size"]
    by_resolution = itertools.groupby(range(epochs), lambda epoch: resolution_of_epoch(config, epoch))
    for resolution, group in by_resolution:
        group = list(group)
        rate = rates.training_at(network_px(config, resolution)) / passes_of_a_step(config)
        hours = len(group) * steps * config["batch_size"] / rate / 3600
        phases.append(Phase(group[0] + 1, group[-1] + 1, resolution, rate, hours))
    averaged = averaging.epochs_to_average(config, epochs)
    counts = train_images, val_images
    validation = sum(validation_seconds(config, rates, epoch + 1, counts) for epoch in range(epochs))
    statistics = 0.0
    for phase in phases if averaged else ():
        count = averaging.epochs_to_average(config, phase.last_epoch)
        count -= averaging.epochs_to_average(config, phase.first_epoch - 1)
        rate = rates.statistics * phase.images_per_s / phases[-1].images_per_s
        statistics += count * min(config["swa_batch_norm_batches"], steps) * config["batch_size"] / rate
    saves = epochs
    for phase in phases:  # each epoch's end starts the minutes anew
        count = phase.last_epoch - phase.first_epoch + 1
        saves += count * int(phase.hours / count * 60 / config["checkpoint_minutes"])
    working = sum(phase.hours for phase in phases) * 3600
    drawings = min(epochs, 1 + math.ceil((working + validation + statistics) / DRAWING_SECONDS))
    starting = rates.start_seconds + len(phases) * rates.first_step_seconds + epochs * rates.passes_seconds
    keeping = saves * rates.save_seconds + drawings * rates.drawing_seconds
    finding = range_test_steps(config) * config["batch_size"] / phases[0].images_per_s
    return Plan(phases, validation / 3600, statistics / 3600, starting / 3600, saves, keeping / 3600, finding / 3600)


def range_test_steps(config):
    """Return how many steps look for the learning rate before the run, at the most."""
    return USUAL_RANGE[config["optimizer"]][2] if config["learning_rate"] == "auto" else 0


def epochs_within(hours, stretch, rates, train_images, val_images, is_sound, most=10_000):
    """Return the largest number of epochs with which the recipe takes at most so many hours, or 0 if there is none.

    Args:
        stretch: returns the configuration of a run of so many epochs.
        is_sound: tells whether a configuration can be run: averaging, for example, must begin before the run ends.
        most: epochs that are considered.
    """

    def hours_of(config):
        return plan_run(config, rates, train_images, val_images).hours

    # More epochs take longer, but for the averages, whose start jumps: the search is for what fits without them.
    fit = bisect.bisect_right(range(1, most + 1), hours, key=lambda epochs: hours_of(stretch(epochs) | {"swa_start_epoch": 0}))
    for epochs in range(fit, 0, -1):
        stretched = stretch(epochs)
        if is_sound(stretched) and hours_of(stretched) <= hours:
            return epochs
    return 0


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
    if plan.range_test_hours:
        steps = range_test_steps(config)
        lines.append(f"  finding the learning rate: at most {steps} steps, {duration(plan.range_test_hours)}")
    if plan.start_hours:
        lines.append(f"  start-up, first steps and first batches: {duration(plan.start_hours)}")
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + 3600 * plan.hours))
    cost = f", {plan.hours * price_per_hour:,.2f} at {price_per_hour:g} per hour" if price_per_hour is not None else ""
    lines.append(f"  in all {duration(plan.hours)}{cost}; begun now it ends at {end}")
    return lines
