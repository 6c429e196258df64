"""What each key of a configuration admits, and which values go together. Needs no torch."""

import argparse
import math
import os
from pathlib import Path
from typing import NamedTuple

from engine.system.errors import UserError
from engine.system.files import ADDRESS, NO_ADDRESS, SCHEMES
from engine.system.micro_batches import ONE_PIXEL_PX, enough_for_batch_norm, network_px
from engine.system.torchrun import launched_size


class ConfigError(UserError):
    """Everything that is wrong with a command line or a configuration, one problem per line."""

    exit_code = 2

    def __init__(self, problems):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


OTHER_NETWORK = "the saved weights belong to another network"
OTHER_SIZE = "the first part of the run saw another size"
UNEXPLAINED = "a jump of the rate in mid-run costs accuracy that nobody can explain later"
OTHER_RUN = "the run would no longer be the one that was started"


def positive_number(text):
    """Return the number above 0 that a program's argument gives; for argparse.

    Raises:
        argparse.ArgumentTypeError: it gives none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


class Number(NamedTuple):
    """An int (whole) or float in [low, high]; `or_auto` also admits the word auto."""

    low: float
    high: float
    whole: bool = False
    or_auto: bool = False
    above_low: bool = False  # low itself is excluded
    kept: str = OTHER_RUN  # why a resumed run keeps a hyperparameter, here and below

    def read(self, text):
        if self.or_auto and text == "auto":
            return text
        try:
            return int(text) if self.whole else float(text)
        except ValueError:
            return text

    def admits(self, value):
        if self.or_auto and value == "auto":
            return True
        kinds = int if self.whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            return False
        return (self.low < value if self.above_low else self.low <= value) and value <= self.high

    def describe(self):
        kind = "a whole number" if self.whole else "a number"
        if math.isinf(self.high):
            bounds = f"above {self.low:g}" if self.above_low else f"of at least {self.low:g}"
        else:
            high = f"{self.high:d}" if self.whole else f"{self.high:g}"
            bounds = f"{'above' if self.above_low else 'from'} {self.low:g} {'up ' if self.above_low else ''}to {high}"
        return f"{kind} {bounds}" + (", or auto" if self.or_auto else "")


class Choice(NamedTuple):
    """One of a few words."""

    words: tuple
    kept: str = OTHER_RUN

    def read(self, text):
        return text

    def admits(self, value):
        return isinstance(value, str) and value in self.words

    def describe(self):
        return "one of " + ", ".join(self.words)


class Flag(NamedTuple):
    """true or false."""

    kept: str = OTHER_RUN

    def read(self, text):
        return {"true": True, "false": False}.get(text.lower(), text)

    def admits(self, value):
        return isinstance(value, bool)

    def describe(self):
        return "true or false"


class Numbers(NamedTuple):
    """A list of numbers, each as `number` admits; on the command line with commas in between, or none."""

    number: Number

    def read(self, text):
        return [self.number.read(part) for part in text.split(",")] if text != "none" else []

    def admits(self, value):
        return isinstance(value, list) and all(map(self.number.admits, value))

    def describe(self):
        return f"{self.number.describe()}, several with commas in between, or none"


class Address(NamedTuple):
    """The address of a service."""

    def read(self, text):
        return text

    def admits(self, value):
        return isinstance(value, str) and value.strip() != ""

    def describe(self):
        return "a text that is not empty"


class LocalPath(NamedTuple):
    """A path on this machine, in which ~ is the user's home."""

    def read(self, text):
        return str(Path(os.path.expanduser(text))) if text.startswith("~") else text  # an unknown user stays as written

    def admits(self, value):
        return isinstance(value, str) and value.strip() != "" and not ADDRESS.match(value)

    def describe(self):
        return NO_ADDRESS


class WeightsSource(NamedTuple):
    """A file on this machine, torchvision:NAME or none."""

    kept: str = OTHER_RUN

    def read(self, text):
        return LocalPath().read(text)

    def admits(self, value):
        return LocalPath().admits(value)

    def describe(self):
        return f"{NO_ADDRESS}, torchvision:NAME or none"


class Place(NamedTuple):
    """A path on this machine or the URL of a place in object storage."""

    def read(self, text):
        return LocalPath().read(text)

    def admits(self, value):
        return LocalPath().admits(value) or isinstance(value, str) and value.startswith(SCHEMES)

    def describe(self):
        return f"a path on this machine, or a URL that begins with {', '.join(SCHEMES)}"


ALLOWED = {
    "batch_size": Number(1, 65536, whole=True),
    "learning_rate": Number(0, 100, or_auto=True, above_low=True, kept=UNEXPLAINED),
    "epochs": Number(1, 10_000, whole=True),
    "weight_decay": Number(0, 10),
    "warmup_epochs": Number(0, 10_000),
    "grad_clip_value": Number(0, math.inf, above_low=True),
    "architecture": Choice(("resnet18", "resnet34", "resnet50", "resnet101"), kept=OTHER_NETWORK),
    "blur_pool": Flag(kept=OTHER_NETWORK),
    "blur_max_pool": Flag(kept=OTHER_NETWORK),
    "stochastic_depth": Number(0, 0.9),
    "sync_batch_norm": Flag(),
    "initialization": Choice(("fan_out", "fan_in")),
    "zero_init_residual": Flag(),
    "initial_weights": WeightsSource(kept="its checkpoint has weights of its own"),
    "freeze": Choice(("none", "stem", "layer1", "layer2", "layer3", "layer4"), kept="the saved momentum is of other weights"),
    "size_rule": Choice(("none", "bit")),
    "val_share": Number(0, 0.9, kept="the best figure so far was measured on other images"),
    "train_resolution": Number(32, 1024, whole=True, kept=OTHER_SIZE),
    "start_resolution": Number(0, 1024, whole=True, kept=OTHER_SIZE),
    "resolution_step": Number(1, 1024, whole=True),
    "resolution_ramp_start": Number(0, 1),
    "resolution_ramp_end": Number(0, 1),
    "val_resolution": Number(32, 1024, whole=True, kept="the best figure so far was measured at another size"),
    "val_flip": Flag(),
    "min_crop_area": Number(0, 1, above_low=True),
    "val_crop_ratio": Number(0.1, 1.0, kept="the best figure so far was measured with another crop"),
    "loss": Choice(("cross_entropy", "bce")),
    "class_weights": Choice(("none", "balanced")),
    "label_smoothing": Number(0, 0.99),
    "mixup_alpha": Number(0, 100),
    "cutmix_alpha": Number(0, 100),
    "augmentation": Choice(("none", "randaugment", "composer_randaugment", "trivialaugment")),
    "randaugment_ops": Number(1, 14, whole=True),
    "randaugment_magnitude": Number(0, 30, whole=True),
    "color_jitter": Number(0, 1),
    "random_erasing": Number(0, 1),
    "colout": Number(0, 0.5),
    "optimizer": Choice(("adamw", "adam", "sgd", "sgdw", "muon"), kept="the saved momentum belongs to another optimizer"),
    "adamw_learning_rate": Number(0, 100, above_low=True, kept=UNEXPLAINED),
    "backbone_rate_factor": Number(0, 1, above_low=True, kept=UNEXPLAINED),
    "momentum": Number(0, 0.9999),
    "nesterov": Flag(),
    "scale_learning_rate": Flag(),
    "decay_norms_and_biases": Flag(),
    "sam_rho": Number(0, 100),
    "sam_every_steps": Number(1, 1_000_000, whole=True),
    "schedule": Choice(("onecycle", "cosine", "step", "constant")),
    "step_epochs": Number(1, 10_000, whole=True),
    "step_factor": Number(0, 1, above_low=True),
    "onecycle_anneal": Choice(("cos", "linear")),
    "onecycle_div_factor": Number(1, 1e12),
    "onecycle_final_div_factor": Number(1, 1e12),
    "swa_start_epoch": Number(0, 10_000, whole=True),
    "swa_learning_rate": Number(0, 100),
    "swa_anneal_epochs": Number(0, 10_000, whole=True),
    "swa_batch_norm_batches": Number(1, 100_000, whole=True),
    "ema_half_life_images": Number(0, 10**12, whole=True),
    "ema_every_images": Number(1, 10**12, whole=True),
    "seed": Number(0, 2**32 - 1, whole=True, kept="the rest of the run would see other images than the ones not yet seen"),
    "data_dir": Place(),
    "local_data_dir": LocalPath(),
    "make_demo_data": Flag(),
    "num_workers": Number(0, 256, whole=True, or_auto=True),
    "max_bad_images": Number(0, 10_000_000, whole=True),
    "device": Choice(("auto", "cuda", "cpu")),
    "precision": Choice(("auto", "fp32", "fp16", "bf16")),
    "compile": Choice(("auto", "on", "off", "measure")),
    "memory": Choice(("fast", "low", "lowest")),
    "micro_batch_size": Number(0, 65536, whole=True),
    "deterministic": Flag(),
    "max_bad_steps": Number(1, 1_000_000, whole=True),
    "checkpoint_dir": LocalPath(),
    "mirror": Place(),
    "checkpoint_every_epochs": Number(0, 10_000, whole=True),
    "checkpoint_minutes": Number(0, math.inf, above_low=True),
    "keep_checkpoints": Number(0, 10_000, whole=True),
    "log_file": LocalPath(),
    "log_every_steps": Number(1, 1_000_000, whole=True),
    "report": Flag(),
    "tensorboard": Flag(),
    "validate_every_epochs": Number(1, 10_000, whole=True),
    "more_val_resolutions": Numbers(Number(32, 1024, whole=True)),
    "spot_notice": Flag(),
    "spot_notice_url": Address(),
}


def value_problems(config):
    """Return one clear line for each value that is wrong by itself."""
    return [
        f"{key} = {value!r}: must be {ALLOWED[key].describe()}"
        for key, value in config.items()
        if not ALLOWED[key].admits(value)
    ]


def config_problems(config):
    """Return every problem of a configuration as one clear line each; an empty list means that it can be run."""
    problems = value_problems(config)
    if problems:  # combinations of values that are wrong by themselves would only repeat them
        return problems
    return [
        problem
        for conditions in (_durations, _batches, _arithmetic, _resolutions)
        for holds, problem in conditions(**config)
        if not holds
    ]


# Each returns (whether a combination of keys holds, what is wrong otherwise). Their arguments are keys.


def _durations(epochs, warmup_epochs, swa_start_epoch, swa_learning_rate, swa_anneal_epochs, **others):
    # the passage to swa_learning_rate begins with epoch swa_start_epoch, at 0 there is none
    risen = warmup_epochs < swa_start_epoch if swa_learning_rate == 0 else warmup_epochs <= swa_start_epoch - 1
    return [
        (warmup_epochs <= epochs, f"warmup_epochs = {warmup_epochs}: longer than the run of epochs = {epochs}; lower it"),
        (
            swa_start_epoch <= epochs,
            f"swa_start_epoch = {swa_start_epoch}: after the last of epochs = {epochs}; lower it, or set it to 0 for no "
            "averaging",
        ),
        (
            swa_start_epoch == 0 or risen,
            f"swa_start_epoch = {swa_start_epoch}: the rate still rises until warmup_epochs = {warmup_epochs:g}; start the "
            f"averaging with epoch {math.ceil(warmup_epochs) + 1} or later",
        ),
        (
            swa_start_epoch != 1 or swa_learning_rate == 0 or warmup_epochs > 0 or swa_anneal_epochs > 0,
            f"swa_start_epoch = 1 with swa_anneal_epochs = 0: each step would have swa_learning_rate = {swa_learning_rate:g}, "
            "and learning_rate is never used; start the averaging later",
        ),
    ]


def _batches(batch_size, micro_batch_size, **others):
    config = {"batch_size": batch_size, "micro_batch_size": micro_batch_size} | others
    processes, smallest = launched_size(), network_px(config, others["start_resolution"] or others["train_resolution"])
    largest = micro_batch_size or batch_size
    several = f" with {processes} processes" if processes > 1 else ""
    return [
        (micro_batch_size <= batch_size, f"micro_batch_size = {micro_batch_size}: larger than batch_size = {batch_size}"),
        (
            batch_size < processes or enough_for_batch_norm(config, smallest, largest, processes),
            f"{'micro_batch_size' if micro_batch_size else 'batch_size'} = {largest} at {ONE_PIXEL_PX} px{several}: one image "
            "would be alone in a forward pass, and of its single last pixel batch norm knows no variance; raise it, or the "
            "resolution",
        ),
    ]


def _arithmetic(precision, device, deterministic, compile, nesterov, optimizer, momentum, **others):
    return [
        (
            not (precision == "fp16" and device == "cpu"),
            "precision = 'fp16' with device = 'cpu': a CPU trains in fp32 or bf16",
        ),
        (
            not (deterministic and compile == "on"),
            "deterministic = True with compile = 'on': the compiler chooses its kernels by measurement, and so the order of "
            "their sums; leave --compile auto",
        ),
        (
            not nesterov or (optimizer in ("sgd", "sgdw") and momentum > 0),
            f"nesterov = True with optimizer = {optimizer!r} and momentum = {momentum}: it is a kind of sgd's momentum",
        ),
    ]


def _resolutions(start_resolution, train_resolution, resolution_step, resolution_ramp_start, resolution_ramp_end, **others):
    grows = start_resolution > 0
    smallest = start_resolution or train_resolution
    seen = network_px(others, smallest)
    return [
        (
            not grows or (train_resolution - start_resolution) % resolution_step == 0,
            f"start_resolution = {start_resolution} and train_resolution = {train_resolution}: must lie multiples of "
            f"resolution_step = {resolution_step} apart, in which a resolution grows",
        ),
        (
            not grows or 32 <= start_resolution <= train_resolution,
            f"start_resolution = {start_resolution}: must be from 32 to train_resolution = {train_resolution}; "
            "--start-resolution 0 trains at that throughout",
        ),
        (
            resolution_ramp_start <= resolution_ramp_end,
            f"resolution_ramp_start = {resolution_ramp_start}: after resolution_ramp_end = {resolution_ramp_end}",
        ),
        (
            seen >= 32 or smallest < 32,
            f"colout = {others['colout']}: leaves {seen} of {smallest} px, and the network needs 32; lower it, or raise "
            f"{'start_resolution' if grows else 'train_resolution'}",
        ),
    ]
