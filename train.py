"""Train ResNet-50 on ImageNet, or on any folder of images, on one GPU or on several.

python train.py                                the seed's run on data/imagenet
python train.py --recipe demo                  minutes on a CPU, no download
python train.py --recipe fast --hours 12       the recipe stretched into a budget; --plan only says what it would take
python train.py --resume checkpoints/last.pt   go on where a run was stopped; --resume auto takes the newest good file
torchrun --nproc_per_node=4 train.py           the same run on four GPUs
"""

import sys
import time

from engine.cli.resume_rule import RULED_ON_RESUME, resumed_config
from engine.cli.keys import ConfigError, config_problems
from engine.cli.command_line import command_from_terminal, stretching_in_words

OWN_FLAGS = {
    "resume PATH": "checkpoint or run's folder to go on from; auto: the run in checkpoint_dir, or else a new run",
    "overwrite": "delete the run that checkpoint_dir holds and start anew",
    "plan": "measure this machine for a minute, print how long the run will take, and exit",
    "hours H": "measure this machine for a minute, choose the epochs that fit into H hours, and train",
    "images-per-s N": "for the plan: N images/s in training at 224 px instead of measuring",
    "price-per-hour P": "for the plan: what an hour of the machine costs",
}
if __name__ == "__main__":  # before torch is imported: --help and typing errors answer at once
    BEGUN = time.perf_counter()
    COMMAND = command_from_terminal("train.py", __doc__, OWN_FLAGS)

import contextlib
import functools
import itertools
import math
import os
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from engine.training import averaging
from engine.run import checkpoint_files
from engine.data.batches import resolution_of_epoch, training_requests
from engine.data.loader import BatchLoader
from engine.data.splits import open_splits, log_packing_gain
from engine.preparation.trees import IMAGENET_COUNTS
from engine.system.errors import DataError
from engine.system import distributed
from engine.inference.scoring import topk_correct
from engine.training.metrics import MetricAccumulator
from engine.training.compiling import choose_compile, choose_compiled, compile_network, keep_compiled_code_in, eager_mode
from engine.data.demo import make_demo_data
from engine.system.device import (
    AUTOCAST_DTYPES,
    autocast,
    build_scaler,
    choose_device,
    choose_precision,
    describe_device,
    load_scaler,
    precision_remarks,
    set_up_arithmetic,
    skip_unless_finite,
)
from engine.system.environment import environment
from engine.system.errors import CheckpointError, TrainingStopped, UserError, first_line, run_program
from engine.system.host_memory import keep_freed_memory
from engine.system.lock import folder_lock
from engine.system.interruption import Interrupted, StopRequest, watch_spot_notice
from engine.training.loss import build_mixing, main_class, training_loss
from engine.system.micro_batches import enough_for_batch_norm, num_micro_batches
from engine.run.monitor import Monitor, Throughput
from engine.training.optim import build_optimizer, build_schedule, lr_scale
from engine.system.gpu_memory import retry_pass_on_oom, stop_on_oom
from engine.training.out_of_memory import retry_on_oom
from engine.system.plain_json import to_json
from engine.training.plan import measure_machine, plan_new_run, positive
from engine.system.random_state import random_state, random_state_restored_on_error, set_random_state
from engine.training.range_test import BATCHES_IN_CYCLE, USUAL_RANGE, describe_rates, range_test
from engine.training.activation_checkpointing import frozen_bn_stats
from engine.training.sync_batch_norm import local_batch_norm
from engine.system.workers import WorkerDied
from evaluate import evaluate
from model import build_model

# The state and the step ----------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """Exactly what a resumed run needs."""

    model: torch.nn.Module
    ddp_model: torch.nn.Module  # the model as it is called in training: with several processes it exchanges gradients
    averaged_model: torch.nn.Module | None
    ema_model: torch.nn.Module | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    precision: str
    micro_batch_size: int  # images per forward pass
    sums: MetricAccumulator  # of the epoch in progress
    speed: Throughput  # of the same
    epoch: int = 0  # whole epochs done
    batch: int = 0  # batches of the next one done
    best: dict = field(default_factory=lambda: {"top1": 0.0, "epoch": 0, "weights": "raw"})
    bad_images: set = field(default_factory=set)  # indices of training images that could not be read
    probed_resolutions: set = field(default_factory=set)  # resolutions that each process has tried out alone
    is_whole: bool = True  # not in the middle of a step

    @contextlib.contextmanager
    def changing(self):
        """Mark what is done inside as one change: a state that an error leaves in its middle must not be saved."""
        self.is_whole = False
        yield
        self.is_whole = True

    @property
    def device(self):
        return next(self.model.parameters()).device

    def state_dict(self):
        """Return everything as a dict of tensors and plain values, for a checkpoint of any number of processes.

        Each process must ask; what is their own is brought together.
        """
        for model in (self.model, self.ema_model):
            if model is not None:
                distributed.average_bn_stats(model)
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "best": dict(self.best),
            "model": self.model.state_dict(),
            "averaged_model": self.averaged_model.state_dict() if self.averaged_model is not None else None,
            "ema_model": self.ema_model.state_dict() if self.ema_model is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"step": self.schedule.last_epoch},  # the rate plan itself follows from the configuration
            "scaler": self.scaler.state_dict(),
            "sums": self.sums.state(),
            "speed": self.speed.state(),
            "micro_batch_size": self.micro_batch_size,
            "bad_images": sorted(self.bad_images),
            "rng": distributed.all_gather_object(random_state(self.device)),  # one for each process
        }

    def load_state_dict(self, saved, config, steps_per_epoch):
        """Take over a checkpoint's contents; the rate plan is built from the configuration and moved to its step."""
        self.model.load_state_dict(saved["model"])
        if self.averaged_model is not None:
            self.averaged_model.load_state_dict(saved["averaged_model"])
        if self.ema_model is not None:
            self.ema_model.load_state_dict(saved["ema_model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule = build_schedule(self.optimizer, config, steps_per_epoch)
        self.schedule.move_to(saved["epoch"] * steps_per_epoch + saved["batch"])
        load_scaler(self.scaler, saved["scaler"], self.precision)
        self.sums.load(saved["sums"])
        self.speed.load(saved.get("speed"))  # absent in a checkpoint of old
        self.epoch, self.batch, self.best = saved["epoch"], saved["batch"], dict(saved["best"])
        was = saved["config"]
        if saved["micro_batch_size"] < was["batch_size"] and config["micro_batch_size"] == was["micro_batch_size"]:
            resolution = resolution_of_epoch(config, self.epoch)
            if enough_for_batch_norm(config, resolution, saved["micro_batch_size"], distributed.size()):
                self.micro_batch_size = saved["micro_batch_size"]  # what fitted, unless a flag says otherwise
        self.bad_images = set(saved["bad_images"])
        if distributed.rank() >= len(saved["rng"]):
            torch.manual_seed(config["seed"] + distributed.rank() + 1000 * self.schedule.last_epoch)  # a stream of its own
            return
        set_random_state(saved["rng"][distributed.rank()], self.device)


@stop_on_oom("with the weights and the optimizer's state alone: make room in the GPU's memory")
def new_state(config, num_classes, steps_per_epoch, device, precision):
    """Return the TrainState at the start of a run."""
    model = build_model(config, num_classes).to(device)
    averaged_model = averaging.build_swa_model(model) if config["swa_start_epoch"] else None
    ema_model = averaging.build_ema_model(model, config)
    if config["compile"] == "on":
        compile_network(model, config["memory"])  # in place, after the averages were copied from it
    optimizer = build_optimizer(model, config)
    return TrainState(
        model=model,
        ddp_model=distributed.wrap_ddp(model),
        averaged_model=averaged_model,
        ema_model=ema_model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config, steps_per_epoch),
        scaler=build_scaler(device, precision),
        precision=precision,
        micro_batch_size=config["micro_batch_size"] or config["batch_size"],
        sums=MetricAccumulator(device),
        speed=Throughput(device, config["batch_size"]),
    )


def scratch_state(config, images, device, precision):
    """Return a TrainState for trying out steps: fresh weights, and a rate that stays where it is set."""
    state = new_state(config, len(images.classes), len(images) // config["batch_size"], device, precision)
    state.schedule = LambdaLR(state.optimizer, lambda step: 1.0)
    return state


class StepResult(NamedTuple):
    """Scalars on the device: reading one makes the host wait."""

    loss: torch.Tensor  # this process's part of the batch's mean
    grad_norm: torch.Tensor  # of the batch, before clipping; not finite if the step was skipped
    correct: torch.Tensor  # among this process's images


def train_step(state, images, targets, config):
    """Take one optimizer step on a batch, in micro-batches whose gradients add up to the batch's mean gradient.

    A gradient that is not finite leaves the weights as they were. The host never waits for the device.

    Args:
        images: [B, 3, H, W], ready for the network, on its device: this process's share of the batch.
        targets: int64 [B], or float [B, C] where images were mixed.
    """
    loss, correct = add_gradients(state, images, targets, config)
    state.scaler.unscale_(state.optimizer)  # clip the true gradient, not the scaled one
    grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config["grad_clip_value"])
    skip_unless_finite(state.scaler, state.optimizer, grad_norm)
    with stop_on_oom(f"while the weights were being changed; {cure(state, len(targets))}"):  # what precedes can be retried
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.schedule.step()
    return StepResult(loss, grad_norm, correct)


def add_gradients(state, images, targets, config, alone=False):
    """Set the parameters' gradients to the mean over the batch of all processes; return (loss, correct) as in StepResult.

    Args:
        alone: do not exchange gradients.
    """
    state.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=images.device)
    correct = torch.zeros((), device=images.device)
    parts = num_micro_batches(config["batch_size"], state.micro_batch_size, distributed.size())
    micro_batches = zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
    for number, (some_images, some_targets) in enumerate(micro_batches, 1):
        with distributed.gradient_sync(state.ddp_model, now=number == parts and not alone):
            with autocast(images.device, state.precision):
                logits = state.ddp_model(some_images)
                part = training_loss(logits.float(), some_targets, config) * (len(some_targets) / config["batch_size"])
            state.scaler.scale(part * distributed.size()).backward()  # the exchange takes the mean over the processes
        loss += part.detach()
        correct += topk_correct(logits.detach(), main_class(some_targets), 1)
    return loss, correct


def adapting_train_step(state, images, targets, config, log):
    """Take a train_step; where the GPU's memory or the compiler fails, say so, adapt and take it again (see retry_on_oom).

    Several processes try out each resolution alone, since a step whose gradients are half exchanged cannot be taken again.
    """
    if distributed.size() == 1:
        step = functools.partial(train_step, state, images, targets, config)
        return retry_on_oom(step, state, len(targets), images.shape[3], config, log)
    if images.shape[3] not in state.probed_resolutions:
        state.probed_resolutions.add(images.shape[3])
        rehearse(state, images, targets, config, log)
    with stop_on_oom(f"in a step that had fitted before; {cure(state, len(targets))}"):
        return train_step(state, images, targets, config)


def rehearse(state, images, targets, config, log):
    """Adapt to the memory and the compiler by a step that leaves no trace, then agree on the smallest micro-batch."""
    device = [state.device] if state.device.type == "cuda" else []
    add_alone = functools.partial(add_gradients, state, images, targets, config, alone=True)
    with torch.random.fork_rng(device), frozen_bn_stats(state.model), local_batch_norm(state.model):
        retry_on_oom(add_alone, state, len(targets), images.shape[3], config, log)
    state.micro_batch_size = min(distributed.all_gather_object(state.micro_batch_size))


def cure(state, images):
    """Return what helps a run whose memory did not suffice where a step of so many images cannot be retried."""
    smaller = math.ceil(min(state.micro_batch_size, images) / 2)
    return f"the last checkpoint is whole: start again with --micro-batch-size {smaller} --resume auto"


# The loop ------------------------------------------------------------------------------------------------------------


BETWEEN_STEPS = "outside of a training step: make room in the GPU's memory, and start again with --resume auto"


def train(state, config, batches, checkpoints, monitor):
    """Train what is left of the run."""
    images = batches.splits["train"]
    while state.epoch < config["epochs"]:
        requests = training_requests(images, config, state.epoch, state.batch)
        monitor.start(f"epoch {state.epoch + 1}/{config['epochs']}", len(images) // config["batch_size"], state.batch)
        trained = train_one_epoch(state, batches.training(requests, state.bad_images), config, checkpoints, monitor)
        with random_state_restored_on_error(state.device):  # whoever resumes does all of it again
            validated, elsewhere = average_and_validate(state, batches, config, monitor)
        note_best(state, validated, checkpoints.best)
        record = monitor.write_record(epoch_record(state, config, trained, validated, elsewhere))
        state.epoch, state.batch = state.epoch + 1, 0
        state.sums.reset()
        state.speed.reset()
        checkpoints.save(state)
        monitor.show_epoch(record)


@stop_on_oom(BETWEEN_STEPS)
def train_one_epoch(state, device_batches, config, checkpoints, monitor):
    """Train on the batches, the rest of the epoch in progress; return its figures."""
    state.ddp_model.train()
    state.speed.start()
    if state.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # gpu_memory_peak_mib is each epoch's own
    mix = build_mixing(config, state.model.fc.out_features)
    for images, labels in state.speed.watch(device_batches):
        with state.changing():
            result = adapting_train_step(state, *mix(images, labels), config, monitor.log)
            state.sums.add(result.loss, result.correct, result.grad_norm, config["batch_size"])
            state.batch += 1
            averaging.update_ema(state.ema_model, state.model, config, steps_done=state.schedule.last_epoch)
        figures = None
        if state.batch % config["log_every_steps"] == 0:
            figures = state.sums.read()  # here, and only here, the host waits for the device
            stop_if_diverged(figures, state, config)
        monitor.advance(figures, state.schedule.get_last_lr()[0], state.speed)
        checkpoints.save_if_due(state)
    figures = state.sums.read()
    state.speed.stop()
    stop_if_diverged(figures, state, config)
    return figures


@stop_on_oom(BETWEEN_STEPS)
def average_and_validate(state, batches, config, monitor):
    """Bring the averaged weights up to date and validate.

    Returns:
        {'raw': ..., 'averaged': ..., 'ema': ...} of evaluate()'s figures; after the last epoch also {px: the same} for each of
        more_val_resolutions, before that {}.
    """
    checkpoint_files.require_finite(state.model.state_dict(), config["checkpoint_dir"])
    distributed.average_bn_stats(state.model)
    models = {"raw": state.model}
    context = autocast(state.device, state.precision)
    with state.changing():
        averages = averaging.update_swa(state.averaged_model, state.model, config, state.epoch + 1)
    if averages:

        def some_batches():
            requests = training_requests(batches.splits["train"], config, state.epoch)
            return batches.training(itertools.islice(requests, config["swa_batch_norm_batches"]), state.bad_images)

        refresh = functools.partial(averaging.recompute_bn_stats, state.averaged_model, autocast=context)
        retry_pass_on_oom(refresh, some_batches, config["batch_size"], state.device)
        distributed.average_bn_stats(state.averaged_model)
        models["averaged"] = state.averaged_model
    if state.ema_model is not None and state.ema_model.n_averaged:
        distributed.average_bn_stats(state.ema_model)
        models["ema"] = state.ema_model
    num_images = len(batches.splits["val"])

    def validated_at(resolution):
        what = f"epoch {state.epoch + 1}: validation at {resolution} px"
        monitor.start(what, math.ceil(num_images / config["batch_size"]))
        with eager_mode():  # a last batch of its own size would be compiled for one use
            return evaluate(models, monitor.watch(batches.validation(resolution)), num_images, context, config["val_flip"])

    is_last = state.epoch + 1 == config["epochs"]
    elsewhere = config["more_val_resolutions"] if is_last else []
    return validated_at(config["val_resolution"]), {resolution: validated_at(resolution) for resolution in elsewhere}


def note_best(state, validated, on_disk):
    """Remember the best of the epoch's weights if it is better than what best.pt holds; of equals the earlier one stays."""
    weights = max(validated, key=lambda name: validated[name]["top1"])
    if on_disk["epoch"] == 0 or validated[weights]["top1"] > on_disk["top1"]:
        state.best = {"top1": validated[weights]["top1"], "epoch": state.epoch + 1, "weights": weights}


def epoch_record(state, config, trained, validated, elsewhere):
    """Return the epoch's line of metrics.jsonl: loss in nats, accuracy in percent, sizes in px."""
    figures, speed = trained, state.speed
    record = {
        "epoch": state.epoch + 1,
        "train_loss": figures.loss,
        "train_top1": figures.top1,
        "train_images": figures.images,
        "train_resolution": resolution_of_epoch(config, state.epoch),
        "grad_norm": figures.grad_norm,
        "skipped_steps": figures.skipped_steps,
        "learning_rate": state.schedule.get_last_lr()[0],
    }
    for weights, result in validated.items():
        prefix = "val" if weights == "raw" else f"{weights}_val"
        record |= {f"{prefix}_{name}": value for name, value in result.items() if name != "images"}
    record |= {
        "val_images": validated["raw"]["images"],
        "val_resolution": config["val_resolution"],
        "test_time_augmentation": "none",
        "best_top1": state.best["top1"],
        "bad_images": len(state.bad_images),
    }
    if elsewhere:
        record["more_val"] = [{"val_resolution": resolution, **figures} for resolution, figures in elsewhere.items()]
    # what follows depends on the machine and on interruptions, what precedes does not
    record |= {"images_per_s": speed.overall(), "seconds": speed.seconds(), "time": time.time()}
    record["data_wait_share"] = speed.waited() / max(speed.seconds(), 1e-9)
    if state.device.type == "cuda":
        record["gpu_memory_peak_mib"] = max(distributed.all_gather_object(torch.cuda.max_memory_allocated())) / 2**20
    if distributed.size() > 1:
        record["processes"] = distributed.size()
    return record


def stop_if_diverged(figures, state, config):
    """Raise TrainingStopped if max_bad_steps steps in a row gave a loss or gradient that is not finite."""
    if figures.longest_skipped_row < config["max_bad_steps"]:
        return
    raise TrainingStopped(
        f"{figures.longest_skipped_row} steps in a row without a finite loss and gradient, in epoch {state.epoch + 1} before "
        f"step {state.batch}, at rate {state.schedule.get_last_lr()[0]:.3g}: stopped. The last good checkpoint is "
        f"{Path(config['checkpoint_dir']) / checkpoint_files.LAST}; try a lower --learning-rate, or --precision fp32"
    )


# The rate ------------------------------------------------------------------------------------------------------------


@stop_on_oom("outside of a training step: make room in the GPU's memory")
def find_learning_rate(config, batches, precision, monitor, lowest, highest, steps):
    """Return the result of a range test with this run's own step, on weights of its own that are then forgotten."""
    images = batches.splits["train"]
    state = scratch_state(config | {"learning_rate": lowest}, images, batches.device, precision)
    state.ddp_model.train()

    def step(rate, batch):
        for group in state.optimizer.param_groups:
            group["lr"] = rate * lr_scale(config)  # the rates of the test are those that the configuration names
        result = adapting_train_step(state, *batch, config, monitor.log)
        return distributed.all_reduce_sum(result.loss).item(), math.isfinite(result.grad_norm.item())

    requests = itertools.cycle(itertools.islice(training_requests(images, config, epoch=0), BATCHES_IN_CYCLE))
    monitor.start("learning-rate range test", steps)
    result = range_test(step, monitor.watch(batches.training(requests, set())), lowest, highest, steps)
    monitor.finish()
    return result


# What is measured beforehand -----------------------------------------------------------------------------------------


def prepare(command, config, contents, splits, device, precision, monitor, begun):
    """Return (config, compile_choice, remarks): whether the network is compiled and, where a plan is asked for, its lines."""
    images, remarks = splits["train"], []

    def scratch_state(config):
        return scratch_state(config | {"learning_rate": 1e-6}, images, device, precision)

    def step(state, *batch):
        return adapting_train_step(state, *batch, config, remarks.append)

    if choose_compile(config, device)[0] != "off":
        keep_compiled_code_in(config["checkpoint_dir"], create="plan" not in command.options)
    own_step = "resolution_step" in command.given or contents is not None
    hours = positive("hours", command.options)
    config, choice, lines = choose_compiled(
        config, contents, own_step, len(images), hours or math.inf, device, precision, scratch_state, step
    )
    if {"plan", "hours"} & set(command.options) and contents is None:
        settled = config | {"compile": "on" if choice["compiled"] else "off"}
        config, planned = distributed.broadcast_from_rank0(
            plan_new_run(
                config,
                command.options,
                (len(images), len(splits["val"])),
                lambda: measure_machine(settled, splits, scratch_state(settled), step, monitor, begun),
                lambda epochs: config | command.durations(epochs),
                lambda stretched: not config_problems(stretched),
            )
        )
        lines += planned
    return config, choice, lines + remarks


def print_plan(command, begun):
    """Print what a new run would take; nothing is written."""
    config, options = command.config, command.options
    device = choose_device(config)
    set_up_arithmetic(config, device)
    with Monitor(config | {"log_file": None}, device) as monitor:
        if "images_per_s" in options:
            try:
                splits = open_images(config, None, monitor.log)
                counts = len(splits["train"]), len(splits["val"])
            except DataError:
                counts = IMAGENET_COUNTS
                monitor.log(f"no images in {config['data_dir']}: planned for ImageNet-1K")
            stretch = lambda epochs: config | command.durations(epochs)  # noqa: E731
            _, lines = plan_new_run(config, options, counts, None, stretch, lambda stretched: not config_problems(stretched))
        else:
            splits = open_images(config, None, monitor.log)
            _, _, lines = prepare(command, config, None, splits, device, choose_precision(config, device), monitor, begun)
        monitor.log("\n".join(lines))
    return 0


# From the command line to the loop -----------------------------------------------------------------------------------


def source_of_run(command):
    """Return (what to go on from: a path, 'auto' or None; the folder that the run writes to)."""
    source = command.options.get("resume")
    if distributed.restarted():  # it goes on with its own run, however that was begun
        source = "auto"
    if source in (None, "auto"):
        return source, command.config["checkpoint_dir"]
    path = Path(source)
    if not os.path.lexists(path):
        checkpoint_files.read(path)  # which says what is there instead
    return source, command.given.get("checkpoint_dir", str(path if path.is_dir() else path.parent))


def open_checkpoint(command, source, folder):
    """Return (config, recipe, contents, remarks): the configuration to run with, and the checkpoint to go on from or None.

    `remarks` are to be said; contents has its path as 'path'.
    """
    config = command.config
    if distributed.launched() and command.options.get("overwrite"):
        raise ConfigError(
            [f"--overwrite: torchrun may start this program again, and the run would be lost; delete {folder} first"]
        )
    stretching = stretching_in_words(command.recipe, config, command.given)
    new_run = config, command.recipe or "seed", None, [stretching] if stretching else []
    if source is None:
        if not command.options.get("overwrite"):
            checkpoint_files.refuse_to_overwrite(folder)
        return new_run
    if command.options.get("overwrite"):
        raise ConfigError(["--resume and --overwrite: the one goes on with a run, the other deletes it"])
    remarks = []
    if source == "auto" or Path(source).is_dir():
        path, contents, problems = checkpoint_files.newest_good(folder if source == "auto" else source)
        remarks += [f"WARNING: {problem}" for problem in problems]
        if path is None and source != "auto":
            raise CheckpointError(f"--resume {source}: the folder holds no checkpoint")
        if path is None:
            if unsound := config_problems(config):
                raise ConfigError(unsound)
            new_run[3].append(f"nothing to resume in {folder}: a new run starts")
            return new_run
    else:
        path = Path(source)
        contents = checkpoint_files.read(path)
    if command.recipe not in (None, contents["recipe"]):
        raise ConfigError([f"--recipe {command.recipe}: {path} is a run of the recipe {contents['recipe']}; leave it out"])
    given = command.given | {"checkpoint_dir": str(folder)}
    config = resumed_config(contents["config"], given, contents["batch"], contents["epoch"])
    contents["path"] = str(path)
    position = f"after epoch {contents['epoch']}" + (f" and {contents['batch']} batches" if contents["batch"] else "")
    remarks.append(f"resumed {path}, {position} (best so far {contents['best']['top1']:.2f} %)")
    if path.name != checkpoint_files.LAST:
        remarks.append(f"note: {path.name} instead of {checkpoint_files.LAST}: whatever the run did after it is done again")
    for key in config:
        if config[key] != contents["config"].get(key):
            rule = f" ({RULED_ON_RESUME[key]})" if key in RULED_ON_RESUME else ""
            remarks.append(f"changed on resume: {key} = {config[key]!r}, was {contents['config'].get(key)!r}{rule}")
    return config, contents["recipe"], contents, remarks


def open_images(config, contents, log):
    """Return the splits; raise DataError if they are not those of the checkpoint, or too few for a batch."""
    if config["make_demo_data"]:
        made = distributed.run_on_all_ranks(lambda: distributed.local_rank() == 0 and make_demo_data(config["data_dir"]))
        if made:
            log(f"made the demo's pictures in {config['data_dir']}")
    splits = distributed.run_on_all_ranks(lambda: open_splits(config["data_dir"], log=log))
    images = splits["train"]
    if contents is not None and sorted(images.classes) == sorted(contents["classes"]) and images.classes != contents["classes"]:
        log("note: the classes stay in the order that the run recorded when it began")
        for split in splits.values():
            split.relabel(contents["classes"])
    seen = distributed.all_gather_object((images.classes, len(images), len(splits["val"])))
    if seen.count(seen[0]) < len(seen):
        raise DataError(f"{config['data_dir']} holds other images on one machine than on another")
    if contents is not None and (images.classes, len(images)) != (contents["classes"], contents["train_images"]):
        raise DataError(
            f"{config['data_dir']} holds {len(images):,} training images of {len(images.classes)} classes; the run to resume "
            f"saw {contents['train_images']:,} of {len(contents['classes'])}. Name its images with --data-dir"
        )
    if contents is not None and len(splits["val"]) != contents.get("val_images", len(splits["val"])):  # new in format 1
        raise DataError(
            f"{config['data_dir']} holds {len(splits['val']):,} validation images; the run to resume was scored on "
            f"{contents['val_images']:,}, and its best so far would mean nothing. Name its images with --data-dir"
        )
    if len(images) < config["batch_size"]:
        raise DataError(
            f"{len(images)} training images make no batch of batch_size = {config['batch_size']}: lower --batch-size"
        )
    if config["batch_size"] < distributed.size():
        raise ConfigError([f"batch_size = {config['batch_size']}: too few for {distributed.size()} processes"])
    if contents is None and distributed.rank() == 0:
        log_packing_gain(images, config, log)
    return splits


def main(command, begun=None):
    begun = begun or time.perf_counter()
    planning = {"plan", "hours"} & set(command.options)
    if planning and "resume" in command.options:
        raise ConfigError(
            [f"--{' and --'.join(sorted(planning))} with --resume: a plan is made for a new run; change --epochs"]
        )
    idle = sorted({"images_per_s", "price_per_hour"} & set(command.options))
    if idle and not planning:
        raise ConfigError([f"--{name.replace('_', '-')}: belongs to a plan; add --plan or --hours" for name in idle])
    device = choose_device(command.config)
    if device.type == "cpu":
        keep_freed_memory()
    with distributed.process_group(device):
        return print_plan(command, begun) if "plan" in planning else start(command, begun)


def start(command, begun=None):
    """Start or go on with the run that the command asks for; return the exit status."""
    source, folder = distributed.run_on_rank0(source_of_run, command)
    with folder_lock(folder, "checkpoint_dir", print, "train elsewhere: --checkpoint-dir OTHER") as lock:
        return start_in(folder, source, command, lock, begun)


def start_in(folder, source, command, lock, begun):
    """Do so in a folder whose lock is held; return the exit status."""
    config, recipe, contents, remarks = distributed.run_on_rank0(open_checkpoint, command, source, folder)
    if lock.note:
        remarks.insert(0, lock.note)
    device = choose_device(config)
    precision = choose_precision(config, device)
    set_up_arithmetic(config, device)
    remarks += precision_remarks(precision, device)
    with Monitor(config, device) as monitor:
        splits = open_images(config, contents, monitor.log)
        config, compile_choice, lines = prepare(command, config, contents, splits, device, precision, monitor, begun)
        remarks, monitor.epochs = lines + remarks, config["epochs"]
        return run(config, recipe, contents, compile_choice, remarks, splits, device, precision, monitor, lock)


def run(config, recipe, contents, compile_choice, remarks, splits, device, precision, monitor, lock):
    """Start a run, or go on with the one whose checkpoint `contents` is; return the exit status.

    Args:
        compile_choice: as prepare returns it.
        remarks: lines to log once the log says which run they belong to.
    """
    with StopRequest() as stop:
        images = splits["train"]
        steps_per_epoch = len(images) // config["batch_size"]
        if contents is None:  # refused above unless it is asked for or there is none
            distributed.run_on_rank0(checkpoint_files.delete_run, config["checkpoint_dir"])
        monitor.log_to_file(f"environment: {to_json(environment())}")
        monitor.log_to_file(f"configuration: {to_json(config)}")
        monitor.log(
            f"recipe {recipe}: {config['architecture']} on {len(images):,} images of {len(images.classes)} classes, "
            f"{steps_per_epoch} steps an epoch; {describe_device(device)}, {precision}, PyTorch {torch.__version__}"
        )
        if distributed.launched():
            monitor.log(f"{distributed.describe()}; batches of {config['batch_size']} over all of them")
        for remark in remarks:
            monitor.log(remark)
        batches = BatchLoader(splits, config, device, AUTOCAST_DTYPES[precision], stop, monitor.log)
        if config["spot_notice"] and distributed.local_rank() == 0:
            watch_spot_notice(stop, config["spot_notice_url"], monitor.log)
        checkpoints, resumed = None, contents and (contents["best"], contents["path"])
        try:
            if config["learning_rate"] == "auto":
                found = find_learning_rate(config, batches, precision, monitor, *USUAL_RANGE[config["optimizer"]])
                monitor.log(describe_rates(found))
                config = config | {"learning_rate": distributed.broadcast_from_rank0(found["suggestion"])}
                monitor.log_to_file(f"configuration: {to_json(config)}")  # the final one
            torch.manual_seed(config["seed"] + distributed.rank())
            compiled = {"compile": "on" if compile_choice["compiled"] else "off"}
            state = new_state(config | compiled, len(images.classes), steps_per_epoch, device, precision)
            if contents is not None:
                state.load_state_dict(contents, config, steps_per_epoch)
                contents = None  # hundreds of megabytes
            facts = {"config": config, "recipe": recipe, "classes": images.classes, "train_images": len(images)}
            facts["val_images"] = len(splits["val"])
            facts["compile_choice"] = compile_choice
            several = f"{distributed.size()} times " if distributed.size() > 1 else ""
            facts["hardware"] = several + describe_device(device)
            facts["class_names"] = getattr(images, "class_names", {})  # what people call them, where a packed file knows
            checkpoints = checkpoint_files.CheckpointFolder(config, facts, lock, stop, monitor.log)
            if resumed:
                checkpoints.find_best(*resumed)
            monitor.open_records(checkpoints.folder, state.epoch, Path(resumed[1]).parent if resumed else None)
            with distributed.detect_lost_ranks():  # here already, so that the log says it, too
                train(state, config, batches, checkpoints, monitor)
            if not (checkpoints.is_saved or checkpoints.save(state)):
                raise TrainingStopped(f"the run has ended, but its result could NOT be saved to {checkpoints.folder}")
            conditions = f"{config['val_resolution']} px, no test-time augmentation"
            monitor.log(f"finished {config['epochs']} epochs: {checkpoints.best_in_words(state.best, conditions)}")
        except (Interrupted, WorkerDied, DataError) as cause:
            exit_code = save_and_leave(cause, checkpoints, state if checkpoints else None, monitor)
            if stop.machine_goes_away:
                distributed.end_launcher()
            return exit_code
        except UserError as error:
            monitor.log_to_file(f"stopped: {error}")
            raise
        except Exception as error:
            monitor.log_to_file(traceback.format_exc())
            cause = f"{type(error).__name__}: {first_line(error)}"
            with contextlib.suppress(Exception):  # the first error is the one to show
                save_and_leave(cause, checkpoints, state if checkpoints else None, monitor)
            raise
        finally:
            batches.close()
    return 0


def save_and_leave(cause, checkpoints, state, monitor):
    """Save the state of a run that is asked to stop, say how to go on, and return the exit status."""
    exit_code = getattr(cause, "exit_code", 1)
    if checkpoints is None:
        monitor.log(f"stopped by {cause}, before the training began")
        return exit_code
    where = f"in epoch {state.epoch + 1} after {state.batch} batches"
    program = "torchrun ... train.py" if distributed.launched() else "python train.py"
    alone = isinstance(cause, str) and distributed.size() > 1  # an error of this process: the others do not save with it
    if not state.is_whole or alone:
        monitor.log(
            f"stopped by {cause} {where}; NOT saved, {'alone with it' if alone else 'in the middle of a step'}. "
            f"Go on from the last save with: {program} --resume {checkpoints.folder / checkpoint_files.LAST}"
        )
    elif checkpoints.save(state):
        monitor.log(
            f"stopped by {cause} {where}; saved. Go on with: {program} --resume {checkpoints.folder / checkpoint_files.LAST}"
        )
    else:
        monitor.log(f"stopped by {cause} {where}; NOT saved, an earlier checkpoint may be in {checkpoints.folder}")
    return exit_code


if __name__ == "__main__":
    sys.exit(run_program("train.py", main, COMMAND, BEGUN))
