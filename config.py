"""The hyperparameters of a run: CONFIG, the named RECIPES, the command line, the checks and the resume rule.

A run's configuration is CONFIG, overridden by one recipe, overridden by the command line. It is a flat dict and stays
what the user wrote: numbers derived from it are locals elsewhere. This module needs nothing but the standard library,
so `--help` and typing errors answer before torch is imported.
"""

import ast
import difflib
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from engine.console import protect_output
from engine.errors import UserError, launched_rank
from engine.files import ADDRESS, NO_ADDRESS
from engine.launch import launched_size
from engine.micro_batches import ONE_PIXEL_PX, enough_for_batch_norm

CONFIG = {
    # The seed's six.
    "batch_size": 256,  # images per optimizer step, of all GPUs together; 256 at 224 px fits the 16 GB of a T4
    "learning_rate": 0.0005,  # peak rate, reached after warmup_epochs; "auto" asks lr_finder.py first
    "epochs": 100,  # passes over the training images; warm-up and averaging keep their share of it unless they are given
    "weight_decay": 1e-4,  # per step, as the optimizer defines it; norms and biases get none
    "warmup_epochs": 10,  # epochs in which the rate rises to its peak
    "grad_clip_value": 1.0,  # largest global L2 norm of the true gradient; inf never clips
    # Model.
    "architecture": "resnet50",  # resnet50 is the subject; the smaller ones try an idea quickly
    "blur_pool": False,  # blurs before each strided convolution of 16 or more channels: arXiv:1904.11486
    "blur_max_pool": False,  # the first pooling takes the largest of every 3 x 3 px and blurs before its stride; same source
    "stochastic_depth": 0.0,  # probability that an image passes by the last block, less for earlier ones: arXiv:1603.09382
    "sync_batch_norm": False,  # of several GPUs: true normalises over all their images, false each one over its own
    "zero_init_residual": True,  # each block starts as the identity: arXiv:1706.02677, section 5.1
    # Data.
    "data_dir": "data/imagenet",  # folder with train.arrow and val.arrow, or train/<class>/* and val/<class>/*
    "train_resolution": 224,  # px; side of the random crop that the network sees in training
    "start_resolution": 0,  # px; of the first epochs, growing to train_resolution; 0 never grows
    "resolution_step": 32,  # px; resolutions in between are multiples of it; convolutions on a GPU like 32
    "resolution_ramp_start": 0.75,  # share of the epochs after which it grows
    "resolution_ramp_end": 0.875,  # share of the epochs after which train_resolution is reached
    "val_resolution": 224,  # px; side of the centre crop in validation
    "more_val_resolutions": [],  # px, as 192,288; the finished weights are scored there too (FixRes, arXiv:1906.06423)
    "val_flip": False,  # true also reports the accuracy of image plus mirror image, beside the plain one
    "min_crop_area": 0.08,  # smallest share of the image's area in a training crop; torchvision's default
    "val_crop_ratio": 0.875,  # centre crop's side over the resized shorter side; 224/256 is the custom
    "loss": "cross_entropy",  # cross_entropy, or bce: a yes-or-no question for each class (arXiv:2110.00476)
    "label_smoothing": 0.0,  # share of each label spread evenly over all classes
    "mixup_alpha": 0.0,  # of the Beta distribution of shares in which two images are blended; 0 never blends (arXiv:1710.09412)
    "cutmix_alpha": 0.0,  # of the Beta distribution of the area pasted from another image; 0 never pastes (arXiv:1905.04899)
    "augmentation": "none",  # none, randaugment (arXiv:1909.13719) or trivialaugment (arXiv:2103.10158)
    "randaugment_ops": 2,  # of randaugment: changes to each image
    "randaugment_magnitude": 9,  # of randaugment: strength of each, from 0 to 30
    "color_jitter": 0.0,  # largest relative change of brightness, contrast and saturation
    "random_erasing": 0.0,  # probability that a box of an image is painted over (arXiv:1708.04896)
    "make_demo_data": False,  # true makes the demo's pictures in data_dir on first use
    "num_workers": "auto",  # processes that decode images, for each GPU; "auto" shares out the cores, 0 is the main process
    "max_bad_images": 100,  # unreadable training images replaced before the run stops; in validation the first one stops it
    # Optimizer.
    "optimizer": "adamw",  # adamw, adam (decay inside the gradient) or sgd
    "momentum": 0.9,  # of sgd; Adam's betas are torch's defaults
    "nesterov": False,  # true looks ahead along sgd's momentum
    "scale_learning_rate": False,  # true multiplies learning_rate and swa_learning_rate by batch_size / 256
    "decay_norms_and_biases": False,  # true also decays the parameters of one dimension
    # Rate plan, stepped once per optimizer step.
    "schedule": "onecycle",  # onecycle; or after a straight warm-up cosine (to 0), step (drops) or constant
    "step_epochs": 30,  # of schedule step: epochs between drops, counted from the start of the run
    "step_factor": 0.1,  # of schedule step: what a drop multiplies the rate by
    "onecycle_anneal": "cos",  # cos or linear: the shape of rise and fall
    "onecycle_div_factor": 25.0,  # the rate starts at learning_rate / this
    "onecycle_final_div_factor": 1e4,  # and ends at its start / this
    # Weight averaging (SWA, arXiv:1803.05407).
    "swa_start_epoch": 32,  # first epoch, counted from 1, whose final weights enter the average; 0 never averages
    "swa_learning_rate": 0.00025,  # rate while averaging; 0 leaves OneCycleLR untouched
    "swa_anneal_epochs": 5,  # epochs of cosine passage from OneCycleLR's rate to swa_learning_rate
    "swa_batch_norm_batches": 200,  # training batches that give the averaged weights their batch-norm statistics
    "ema_half_life_steps": 0,  # steps after which weights count half in a running average (EMA); 0 keeps none
    "ema_every_steps": 20,  # steps between the weights that enter it
    # Numbers and device.
    "precision": "auto",  # auto, fp32, fp16 (with a GradScaler) or bf16; auto takes bf16 where the hardware has it
    "device": "auto",  # auto, cuda or cpu
    "compile": "auto",  # torch.compile of the network: on, off, auto where it is faster on a GPU, measure where it is anywhere
    "memory": "fast",  # fast keeps all activations; low and lowest compute ever more of them again, to the same bits
    "deterministic": False,  # true: a GPU gives the same bits each time, after a resumption too; slower, how much is unmeasured
    "micro_batch_size": 0,  # images per forward pass of a GPU; 0 is all it gets, halved when its memory runs out
    "max_bad_steps": 20,  # steps in a row with a non-finite loss or gradient before the run stops
    "seed": 0,  # of weights, order and augmentation; the same seed on the same CPU gives the same bits
    # Records.
    "checkpoint_dir": "checkpoints",  # folder of last.pt, best.pt, epoch_005.pt, metrics.jsonl and curves.png
    "checkpoint_every_epochs": 5,  # epochs between the kept epoch_NNN.pt; 0 keeps none
    "checkpoint_minutes": 10.0,  # minutes between saves of last.pt inside an epoch; the most that a kill can cost
    "keep_checkpoints": 0,  # newest epoch_NNN.pt to keep; 0 keeps all (about 0.4 GB each with AdamW and SWA)
    "log_file": "training.log",  # time-stamped record of everything said, appended to
    "log_every_steps": 50,  # steps between readings of the loss; each one waits for the device
    "tensorboard": False,  # true also writes every epoch's figures for TensorBoard, to checkpoint_dir/tensorboard
    # Interruption.
    "spot_notice": False,  # true polls the EC2 instance metadata for the two-minute termination notice
    "spot_notice_url": "http://169.254.169.254",  # address of the instance metadata service (IMDSv2)
}

# FFCV's ResNet-50 schedule, stretched by --epochs. Published for 8 A100s at batch 4,096, 256 px with flip: 73.76 % in 16
# epochs, 75.56 in 24, 76.59 in 32, 77.24 in 40, 78.43 in 88 (libffcv/ffcv-imagenet, assets/agg.csv); without flip none.
# 16 epochs are 9.1 epochs' worth of 224 px: 8.1 T4 hours at 400 images/s, 11.4 at 282 (calculated).
FFCV = {
    "batch_size": 256,
    "learning_rate": 0.10625,  # 1.7 at batch 4,096
    "scale_learning_rate": True,
    "epochs": 16,
    "warmup_epochs": 2,
    "grad_clip_value": float("inf"),
    "blur_pool": True,
    "zero_init_residual": False,
    "train_resolution": 192,
    "start_resolution": 160,
    "val_resolution": 256,
    "val_flip": True,
    "label_smoothing": 0.1,
    "optimizer": "sgd",
    "onecycle_anneal": "linear",
    "onecycle_div_factor": 1e4,
    "onecycle_final_div_factor": 1e12,
    "swa_start_epoch": 0,
}

RECIPES = {
    # The run that this project set out to beat: 59.21 % top-1 after about 65 hours on a T4.
    "seed": {},
    "fast": FFCV,
    # The same for 88 epochs: 78.43 % published; 48.9 epochs' worth of 224 px: 44 T4 hours at 400 images/s, 62 at 282
    # (calculated).
    "long": FFCV | {"epochs": 88},
    # Mosaic's mild recipe (mosaicml/benchmarks, blogs/resnet): 76.19 % published for 28.8 epochs; 9.5 epochs' worth of 224 px:
    # 8.4 T4 hours at 400 images/s, 12 at 282 (calculated). Two things differ: whole epochs; decay inside the gradient, as
    # strong as its decoupled 5e-4 at momentum 0.875 and rate 2.048 (5e-4 * 0.125 / 2.048).
    "mild": {
        "batch_size": 256,
        "learning_rate": 0.256,  # 2.048 at batch 2,048
        "scale_learning_rate": True,
        "epochs": 29,
        "weight_decay": 3.05e-5,
        "warmup_epochs": 3,
        "grad_clip_value": float("inf"),
        "blur_pool": True,
        "blur_max_pool": True,
        "zero_init_residual": False,
        "train_resolution": 176,
        "start_resolution": 88,
        "resolution_step": 4,
        "resolution_ramp_start": 0.4,
        "resolution_ramp_end": 0.8,
        "val_resolution": 224,
        "val_crop_ratio": 224 / 232,
        "loss": "bce",
        "label_smoothing": 0.08,
        "optimizer": "sgd",
        "momentum": 0.875,
        "schedule": "cosine",
        "swa_start_epoch": 0,
        "ema_half_life_steps": 100,
        "ema_every_steps": 20,
    },
    # A data set that the program makes itself, learned by the same ResNet-50 in minutes on a CPU.
    "demo": {
        "data_dir": "data/demo",
        "make_demo_data": True,
        "checkpoint_dir": "checkpoints/demo",
        "batch_size": 32,
        "learning_rate": 0.001,
        "epochs": 8,
        "warmup_epochs": 1,
        "train_resolution": 48,
        "val_resolution": 48,
        "min_crop_area": 0.6,
        "swa_start_epoch": 6,
        "swa_learning_rate": 0.0003,
        "swa_anneal_epochs": 1,
        "swa_batch_norm_batches": 20,
        "log_every_steps": 5,
    },
}


class ConfigError(UserError):
    """Everything that is wrong with a command line or a configuration, one problem per line."""

    exit_code = 2

    def __init__(self, problems):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


# What each key may hold --------------------------------------------------------------------------------------------


class Number(NamedTuple):
    """An int (whole) or float in [low, high]; `or_auto` also admits the word auto."""

    low: float
    high: float
    whole: bool = False
    or_auto: bool = False
    above_low: bool = False  # low itself is excluded

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
            bounds = f"{'above' if self.above_low else 'from'} {self.low:g} {'up ' if self.above_low else ''}to {self.high:g}"
        return f"{kind} {bounds}" + (", or auto" if self.or_auto else "")


class Choice(NamedTuple):
    """One of a few words."""

    words: tuple

    def read(self, text):
        return text

    def admits(self, value):
        return isinstance(value, str) and value in self.words

    def describe(self):
        return "one of " + ", ".join(self.words)


class Flag(NamedTuple):
    """true or false."""

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
        return str(Path(text).expanduser()) if text.startswith("~") else text

    def admits(self, value):
        return isinstance(value, str) and value.strip() != "" and not ADDRESS.match(value)

    def describe(self):
        return NO_ADDRESS


ALLOWED = {
    "batch_size": Number(1, 65536, whole=True),
    "learning_rate": Number(0, 100, or_auto=True, above_low=True),
    "epochs": Number(1, 10_000, whole=True),
    "weight_decay": Number(0, 10),
    "warmup_epochs": Number(0, 10_000, whole=True),
    "grad_clip_value": Number(0, math.inf, above_low=True),
    "architecture": Choice(("resnet18", "resnet34", "resnet50", "resnet101")),
    "blur_pool": Flag(),
    "blur_max_pool": Flag(),
    "stochastic_depth": Number(0, 0.9),
    "sync_batch_norm": Flag(),
    "zero_init_residual": Flag(),
    "data_dir": LocalPath(),
    "train_resolution": Number(32, 1024, whole=True),
    "start_resolution": Number(0, 1024, whole=True),
    "resolution_step": Number(1, 1024, whole=True),
    "resolution_ramp_start": Number(0, 1),
    "resolution_ramp_end": Number(0, 1),
    "val_resolution": Number(32, 1024, whole=True),
    "more_val_resolutions": Numbers(Number(32, 1024, whole=True)),
    "val_flip": Flag(),
    "min_crop_area": Number(0, 1, above_low=True),
    "val_crop_ratio": Number(0.1, 1.0),
    "loss": Choice(("cross_entropy", "bce")),
    "label_smoothing": Number(0, 0.99),
    "mixup_alpha": Number(0, 100),
    "cutmix_alpha": Number(0, 100),
    "augmentation": Choice(("none", "randaugment", "trivialaugment")),
    "randaugment_ops": Number(1, 14, whole=True),
    "randaugment_magnitude": Number(0, 30, whole=True),
    "color_jitter": Number(0, 1),
    "random_erasing": Number(0, 1),
    "make_demo_data": Flag(),
    "num_workers": Number(0, 256, whole=True, or_auto=True),
    "max_bad_images": Number(0, 10_000_000, whole=True),
    "optimizer": Choice(("adamw", "adam", "sgd")),
    "momentum": Number(0, 0.9999),
    "nesterov": Flag(),
    "scale_learning_rate": Flag(),
    "decay_norms_and_biases": Flag(),
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
    "ema_half_life_steps": Number(0, 10_000_000, whole=True),
    "ema_every_steps": Number(1, 1_000_000, whole=True),
    "precision": Choice(("auto", "fp32", "fp16", "bf16")),
    "device": Choice(("auto", "cuda", "cpu")),
    "compile": Choice(("auto", "on", "off", "measure")),
    "memory": Choice(("fast", "low", "lowest")),
    "deterministic": Flag(),
    "micro_batch_size": Number(0, 65536, whole=True),
    "max_bad_steps": Number(1, 1_000_000, whole=True),
    "seed": Number(0, 2**32 - 1, whole=True),
    "checkpoint_dir": LocalPath(),
    "checkpoint_every_epochs": Number(0, 10_000, whole=True),
    "checkpoint_minutes": Number(0, math.inf, above_low=True),
    "keep_checkpoints": Number(0, 10_000, whole=True),
    "log_file": LocalPath(),
    "log_every_steps": Number(1, 1_000_000, whole=True),
    "tensorboard": Flag(),
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

    def require(holds, problem):
        if not holds:
            problems.append(problem)

    require(
        config["warmup_epochs"] <= config["epochs"],
        f"warmup_epochs = {config['warmup_epochs']}: longer than the run of epochs = {config['epochs']}; lower it",
    )
    require(
        config["swa_start_epoch"] <= config["epochs"],
        f"swa_start_epoch = {config['swa_start_epoch']}: after the last of epochs = {config['epochs']}; "
        "lower it, or set it to 0 for no averaging",
    )
    require(
        config["micro_batch_size"] <= config["batch_size"],
        f"micro_batch_size = {config['micro_batch_size']}: larger than batch_size = {config['batch_size']}",
    )
    processes, smallest = launched_size(), config["start_resolution"] or config["train_resolution"]
    micro_batch_size = config["micro_batch_size"] or config["batch_size"]
    require(
        config["batch_size"] < processes or enough_for_batch_norm(config, smallest, micro_batch_size, processes),
        f"{'micro_batch_size' if config['micro_batch_size'] else 'batch_size'} = {micro_batch_size} at {ONE_PIXEL_PX} px"
        + (f" with {processes} processes" if processes > 1 else "")
        + ": one image would be alone in a forward pass, and of its single last pixel batch norm knows no variance; "
        + "raise it, or the resolution",
    )
    require(
        not (config["precision"] == "fp16" and config["device"] == "cpu"),
        "precision = 'fp16' with device = 'cpu': a CPU trains in fp32 or bf16",
    )
    require(
        not (config["deterministic"] and config["compile"] == "on"),
        "deterministic = True with compile = 'on': the compiler chooses its kernels by measurement, and so the order of their "
        "sums; leave --compile auto",
    )
    require(
        not config["nesterov"] or (config["optimizer"] == "sgd" and config["momentum"] > 0),
        f"nesterov = True with optimizer = {config['optimizer']!r} and momentum = {config['momentum']}: it is a kind of sgd's "
        "momentum",
    )
    grows = config["start_resolution"] > 0
    step = config["resolution_step"]
    require(
        not grows or (config["start_resolution"] % step == 0 and config["train_resolution"] % step == 0),
        f"start_resolution = {config['start_resolution']} and train_resolution = {config['train_resolution']}: both must be "
        f"multiples of resolution_step = {step}, in which a resolution grows",
    )
    require(
        not grows or 32 <= config["start_resolution"] <= config["train_resolution"],
        f"start_resolution = {config['start_resolution']}: must be from 32 to train_resolution = {config['train_resolution']}, "
        "or 0 for train_resolution throughout",
    )
    require(
        config["resolution_ramp_start"] <= config["resolution_ramp_end"],
        f"resolution_ramp_start = {config['resolution_ramp_start']}: after resolution_ramp_end = "
        f"{config['resolution_ramp_end']}",
    )
    require(
        config["swa_start_epoch"] == 0 or config["swa_start_epoch"] > config["warmup_epochs"],
        f"swa_start_epoch = {config['swa_start_epoch']}: the rate still rises until warmup_epochs = "
        f"{config['warmup_epochs']}; start the averaging later",
    )
    return problems


# The resume rule ---------------------------------------------------------------------------------------------------

# On resume the checkpoint's configuration rules. These keys cannot bend the run, so they may change:
FREE_ON_RESUME = {
    "data_dir": "the same images elsewhere; the number and the classes of both splits are checked",
    "more_val_resolutions": "figures of the finished weights, besides the run's own",
    "num_workers": "augmentation does not depend on who decodes",
    "make_demo_data": "the pictures are the same each time",
    "max_bad_images": "a limit",
    "device": "the weights move; rounding differs between devices",
    "precision": "the weights are kept in fp32; rounding differs",
    "compile": "the same network; rounding differs",
    "memory": "the same gradients",
    "deterministic": "the same arithmetic; rounding differs",
    "micro_batch_size": "the gradient stays the batch's; only batch norm sees smaller groups",
    "max_bad_steps": "a limit",
    "checkpoint_dir": "a place",
    "checkpoint_every_epochs": "a record",
    "checkpoint_minutes": "a record",
    "keep_checkpoints": "a record",
    "log_file": "a record",
    "log_every_steps": "a record",
    "tensorboard": "a record",
    "spot_notice": "a way to stop",
    "spot_notice_url": "a way to stop",
}

# These follow a rule, which train.py carries out and says aloud:
RULED_ON_RESUME = {
    "epochs": "the rate plan is rebuilt over the new length; the steps done keep their place in it",
    "batch_size": "only between epochs, since a position inside one is counted in batches",
}

# Every other key is refused; why, where the general reason can be bettered:
REFUSED_ON_RESUME = {
    "architecture": "the saved weights belong to another network",
    "optimizer": "the saved momentum belongs to another optimizer",
    "seed": "the rest of the run would see other images than the ones not yet seen",
    "learning_rate": "a jump of the rate in mid-run costs accuracy that nobody can explain later",
    "train_resolution": "the first part of the run saw another size",
    "start_resolution": "the first part of the run saw another size",
    "val_resolution": "the best figure so far was measured at another size",
    "blur_pool": "the saved weights belong to another network",
    "blur_max_pool": "the saved weights belong to another network",
    "val_crop_ratio": "the best figure so far was measured with another crop",
}


def resumed_config(saved, given, batch, done=0):
    """Return the configuration that a resumed run goes on with.

    Args:
        saved: the checkpoint's configuration.
        given: the keys that flags on the command line name, with their values.
        batch: the batches that the checkpoint's epoch in progress has behind it.
        done: the whole epochs that it has behind it.
    Raises:
        ConfigError: with one line for each given key that would bend the run.
    """
    problems = []
    given = {key: value for key, value in given.items() if value != "auto" or key != "learning_rate"}  # found already
    begun = done + (1 if batch else 0)
    if given.get("epochs", begun) < begun:
        problems.append(
            f"epochs = {given['epochs']}: the checkpoint lies {done} epochs and {batch} batches into its run; give at least "
            f"{begun}, or resume an earlier epoch_NNN.pt"
        )
    if batch and given.get("batch_size", saved["batch_size"]) != saved["batch_size"]:
        problems.append(
            f"batch_size = {given['batch_size']}: the checkpoint lies {batch} batches of {saved['batch_size']} into its epoch; "
            "the batch size may change only between epochs; resume an epoch_NNN.pt, or leave the flag out"
        )
    for key, value in given.items():
        if key not in FREE_ON_RESUME and key not in RULED_ON_RESUME and saved.get(key, CONFIG[key]) != value:
            reason = REFUSED_ON_RESUME.get(key, "the run would no longer be the one that was started")
            problems.append(
                f"{key} = {value!r}: this run was started with {saved.get(key, CONFIG[key])!r}, and a resumed run keeps it "
                f"({reason}); leave the flag out, or start a new run with another --checkpoint-dir"
            )
    config = CONFIG | {key: value for key, value in saved.items() if key in CONFIG} | given
    problems += config_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


# The command line --------------------------------------------------------------------------------------------------


PATH_FLAGS = ("resume", "output")  # the programs' own flags that name a place


class Command(NamedTuple):
    """What a command line asks for."""

    config: dict  # of a new run
    given: dict  # only the keys that flags name: what a resumed run is checked against
    recipe: str | None  # as named on the command line; None means the default, seed
    options: dict  # the program's own flags, such as resume

    def durations(self, epochs):
        """Return {key: value} of what the length of a new run decides: what is not given keeps its share of it."""
        config = stretched(CONFIG | RECIPES.get(self.recipe, {}), self.recipe, self.given | {"epochs": epochs})
        return {key: config[key] for key in ("epochs", *DURATIONS)}


# A published schedule that says otherwise: FFCV's warm-up takes 2 epochs at any length.
WARMUP_OF_ANY_LENGTH = ("fast", "long")
DURATIONS = ("warmup_epochs", "swa_start_epoch", "swa_anneal_epochs")


def stretched(recipe_config, recipe, given):
    """Return a recipe's configuration with the given keys; where they change `epochs`, other durations keep their share.

    These are the DURATIONS, rounded to whole epochs, unless one of their kind is given.
    """
    config = recipe_config | given
    epochs, usual = config["epochs"], recipe_config["epochs"]
    if not ALLOWED["epochs"].admits(epochs) or epochs == usual:
        return config

    def share(key):
        return int(recipe_config[key] * epochs / usual + 0.5)

    if "warmup_epochs" not in given and recipe not in WARMUP_OF_ANY_LENGTH:
        config["warmup_epochs"] = share("warmup_epochs")
    if config["swa_start_epoch"] and not {"swa_start_epoch", "swa_anneal_epochs"} & set(given):
        first = config["warmup_epochs"] + 1 if isinstance(config["warmup_epochs"], int) else 1
        config["swa_start_epoch"] = min(max(share("swa_start_epoch"), first), epochs)
        config["swa_anneal_epochs"] = share("swa_anneal_epochs")
    return config


def stretching_in_words(recipe, config, given):
    """Return a sentence about what `stretched` has changed beside the epochs, or None."""
    usual = CONFIG | RECIPES.get(recipe, {})
    changed = [key for key in DURATIONS if key not in given and config[key] != usual[key]]
    if not changed:
        return None
    shown = ", ".join(f"{key} = {config[key]} (was {usual[key]})" for key in changed)
    return f"epochs = {config['epochs']} (the recipe's are {usual['epochs']}): {shown} follow; flags set them otherwise"


def key_comments():
    """Return {key: the comment beside it in CONFIG}; the comment is the key's help."""
    source = Path(__file__).read_text(encoding="utf-8")
    block = source[source.index("\nCONFIG = {") : source.index("\n}\n")]
    return dict(re.findall(r'^    "(\w+)": .*?,  # (.*)$', block, flags=re.MULTILINE))


def _docstring_of(program):
    """Return the docstring at the head of a program beside this file; `python -OO` leaves none at run time."""
    return ast.get_docstring(ast.parse(Path(__file__).with_name(program).read_text(encoding="utf-8")))


def help_text(program, usage, own_flags):
    """Return the text of `--help`: the usage, the program's own flags, then every key with default and comment."""
    lines = [(usage or _docstring_of(program)).strip(), "", "options:"]
    lines += [f"  --{flag:<26} {text}" for flag, text in own_flags.items()]
    lines += [f"  --{'recipe NAME':<26} {', '.join(RECIPES)}; named overrides of the defaults below", ""]
    lines += [f"configuration ({program} --key value; defaults of the seed recipe in brackets):"]
    for key, comment in key_comments().items():
        lines.append(f"  --{key.replace('_', '-'):<26} [{CONFIG[key]}] {comment}")
    return "\n".join(lines)


def parse_command_line(arguments, own_flags=()):
    """Return the Command that the arguments ask for.

    Args:
        arguments: list of str, without the program's name.
        own_flags: the program's flags besides the keys, as in its help: 'resume FILE' takes a value, 'overwrite' none.
    Raises:
        ConfigError: with every problem found, not just the first.
    """
    takes_value = {flag.split()[0].replace("-", "_"): " " in flag for flag in own_flags} | {"recipe": True}
    problems, flags, recipe, options = [], {}, None, {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word}: not a flag; flags look like --learning-rate 0.001")
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in CONFIG and name not in takes_value:
            nearest = difflib.get_close_matches(name, [*CONFIG, *takes_value], n=1, cutoff=0.5)
            hint = f"; did you mean --{nearest[0].replace('_', '-')}?" if nearest else "; --help lists them all"
            problems.append(f"{word.partition('=')[0]}: no such flag{hint}")
            if waiting and not waiting[0].startswith("--"):
                waiting.pop(0)  # its value, which would only be a second complaint
            continue
        if takes_value.get(name, True) and not equals:
            if not waiting or waiting[0].startswith("--"):
                problems.append(f"--{name.replace('_', '-')}: a value is missing")
                continue
            value = waiting.pop(0)
        if name == "recipe":
            recipe = value
        elif name in takes_value:
            options[name] = value if takes_value[name] else True
        else:
            flags[name] = ALLOWED[name].read(value)
    if recipe is not None and recipe not in RECIPES:
        nearest = difflib.get_close_matches(recipe, RECIPES, n=1)
        problems.append(
            f"--recipe {recipe}: there are {', '.join(RECIPES)}" + (f"; did you mean {nearest[0]}?" if nearest else "")
        )
    for name, value in options.items():
        if name in PATH_FLAGS:
            options[name] = LocalPath().read(value)
            if not LocalPath().admits(value):
                problems.append(f"--{name} {value}: must be {LocalPath().describe()}")
    config = stretched(CONFIG | RECIPES.get(recipe, {}), recipe, flags)
    # with --resume the flags join the checkpoint's configuration, and only that can tell whether they go together
    problems += value_problems(config) if "resume" in options else config_problems(config)
    if problems:
        raise ConfigError(problems)
    return Command(config, flags, recipe, options)


def command_from_terminal(program, usage, own_flags):
    """Return the Command of this process, or leave it: with the help (exit 0), or with all problems (exit 2)."""
    protect_output()
    arguments = sys.argv[1:]
    is_first = launched_rank() == 0  # of the processes that torchrun has started with the same command line
    if "--help" in arguments or "-h" in arguments:
        if is_first:
            print(help_text(program, usage, own_flags))
        sys.exit(0)
    try:
        return parse_command_line(arguments, own_flags)
    except ConfigError as error:
        if is_first:
            print("\n".join(f"{program}: {problem}" for problem in error.problems), file=sys.stderr)
        sys.exit(2)
