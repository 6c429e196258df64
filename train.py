"""Train ResNet-50 on ImageNet, or on any folder of images, on one GPU or on several.

python train.py                                the seed's run on data/imagenet
python train.py --recipe demo                  minutes on a CPU, no download
python train.py --recipe fast --hours 12       the recipe stretched into a budget; --plan only says what it would take
python train.py --resume checkpoints/last.pt   go on where a run was stopped; --resume auto takes the newest good file
torchrun --nproc_per_node=4 train.py           the same run on four GPUs
"""

import sys

from config import RULED_ON_RESUME, ConfigError, command_from_terminal, config_problems, resumed_config

OWN_FLAGS = {
    "resume FILE": "checkpoint to go on from; auto: the newest whole one in checkpoint_dir, or a new run if there is none",
    "overwrite": "delete the run that checkpoint_dir holds and start anew",
    "plan": "measure this machine for a minute, print how long the run will take, and exit",
    "hours H": "measure this machine for a minute, choose the epochs that fit into H hours, and train",
    "images-per-s N": "for the plan: N images/s in training at 224 px instead of measuring",
    "price-per-hour P": "for the plan: what an hour of the machine costs",
}
if __name__ == "__main__":  # before torch is imported: --help and typing errors answer at once
    COMMAND = command_from_terminal("train.py", __doc__, OWN_FLAGS)

import itertools
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from engine import averaging, checkpoint, data, distributed, metrics
from engine.compiling import COMPILE_ERRORS, choose_compile, compile_network, give_up_compiling, uncompiled
from engine.demo import make_demo_data
from engine.device import AUTOCAST_DTYPES, autocast, build_scaler, choose_device, choose_precision, describe_device
from engine.environment import environment
from engine.errors import TrainingStopped, UserError, first_line, run_program
from engine.interruption import Interrupted, StopRequest, watch_spot_notice
from engine.loss import build_mixing, main_class, training_loss
from engine.monitor import Monitor, Throughput
from engine.optim import build_optimizer, build_schedule, rate_factor
from engine.plan import epochs_within, measure_rates, plan_lines, plan_run, rates_stated
from engine.range_test import BATCHES_IN_CYCLE, USUAL_RANGE, describe_rates, range_test
from engine.recompute import statistics_untouched
from engine.sync_norm import norms_alone
from engine.workers import WorkerDied
from evaluate import evaluate
from model import build_model

# The state and the step ----------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """Exactly what a resumed run needs."""

    model: torch.nn.Module
    network: torch.nn.Module  # the model as it is called in training: with several processes it exchanges gradients
    averaged_model: torch.nn.Module | None
    ema_model: torch.nn.Module | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    precision: str
    micro_batch_size: int  # images per forward pass
    sums: metrics.TrainingSums  # of the epoch in progress
    epoch: int = 0  # whole epochs done
    batch: int = 0  # batches of the next one done
    best: dict = field(default_factory=lambda: {"top1": 0.0, "epoch": 0, "weights": "raw"})
    bad_images: set = field(default_factory=set)  # indices of training images that could not be read
    rehearsed: set = field(default_factory=set)  # resolutions that each process has tried out alone

    @property
    def device(self):
        return next(self.model.parameters()).device

    def state_dict(self):
        """Return everything as a dict of tensors and plain values, for a checkpoint of any number of processes.

        Each process must ask; what is their own is brought together.
        """
        for model in (self.model, self.ema_model):
            if model is not None:
                distributed.average_statistics(model)
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
            "micro_batch_size": self.micro_batch_size,
            "bad_images": sorted(self.bad_images),
            "rng": distributed.gathered(  # one for each process
                {
                    "cpu": torch.get_rng_state(),
                    "cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
                }
            ),
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
        self.scaler.load_state_dict(saved["scaler"])
        self.sums.load(saved["sums"])
        self.epoch, self.batch, self.best = saved["epoch"], saved["batch"], dict(saved["best"])
        was = saved["config"]
        if saved["micro_batch_size"] < was["batch_size"] and config["micro_batch_size"] == was["micro_batch_size"]:
            self.micro_batch_size = saved["micro_batch_size"]  # what the memory sufficed for, unless a flag says otherwise
        self.bad_images = set(saved["bad_images"])
        if distributed.rank() >= len(saved["rng"]):
            torch.manual_seed(config["seed"] + distributed.rank() + 1000 * self.schedule.last_epoch)  # a stream of its own
            return
        rng = saved["rng"][distributed.rank()]
        torch.set_rng_state(rng["cpu"])
        if self.device.type == "cuda" and rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"])


def new_state(config, num_classes, steps_per_epoch, device, precision):
    """Return the TrainState at the start of a run."""
    model = build_model(config, num_classes).to(device)
    averaged_model = averaging.build_average(model) if config["swa_start_epoch"] else None
    ema_model = averaging.build_running_average(model, config)
    if choose_compile(config, device)[0]:
        compile_network(model, config["memory"])  # in place, after the averages were copied from it
    optimizer = build_optimizer(model, config)
    return TrainState(
        model=model,
        network=distributed.parallel(model),
        averaged_model=averaged_model,
        ema_model=ema_model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config, steps_per_epoch),
        scaler=build_scaler(device, precision),
        precision=precision,
        micro_batch_size=config["micro_batch_size"] or config["batch_size"],
        sums=metrics.TrainingSums(device),
    )


def state_to_forget(config, images, device, precision):
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
    parts = distributed.parts_of_shares(config["batch_size"], state.micro_batch_size)
    micro_batches = zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
    for number, (some_images, some_targets) in enumerate(micro_batches, 1):
        with distributed.exchanging(state.network, now=number == parts and not alone):
            with autocast(images.device, state.precision):
                logits = state.network(some_images)
                part = training_loss(logits.float(), some_targets, config) * (len(some_targets) / config["batch_size"])
            state.scaler.scale(part * distributed.size()).backward()  # the exchange takes the mean over the processes
        loss += part.detach()
        correct += metrics.topk_correct(logits.detach(), main_class(some_targets), 1)
    return loss, correct


def adapting_train_step(state, images, targets, config, say):
    """Take a train_step; where the GPU's memory or the compiler fails, say so, adapt and take it again.

    Out of memory the micro-batch is halved. What cannot be compiled runs as written, unless `compile` is on. Several
    processes try out each resolution alone, since a step whose gradients are half exchanged cannot be taken again.
    """
    if distributed.size() == 1:
        return adapting(lambda: train_step(state, images, targets, config), state, len(targets), config, say)
    if images.shape[3] not in state.rehearsed:
        state.rehearsed.add(images.shape[3])
        rehearse(state, images, targets, config, say)
    try:
        return train_step(state, images, targets, config)
    except torch.OutOfMemoryError:
        raise TrainingStopped(
            f"out of GPU memory in a step that had fitted before; start again with --micro-batch-size "
            f"{math.ceil(min(state.micro_batch_size, len(targets)) / 2)} --resume auto"
        ) from None


def rehearse(state, images, targets, config, say):
    """Adapt to the memory and the compiler by a step that leaves no trace, then agree on the smallest micro-batch."""
    device = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(device), statistics_untouched(state.model), norms_alone(state.model):
        adapting(lambda: add_gradients(state, images, targets, config, alone=True), state, len(targets), config, say)
    state.micro_batch_size = min(distributed.gathered(state.micro_batch_size))


def adapting(attempt, state, images, config, say):
    """Return attempt(), a step on so many images; it is tried again after each adaptation to what failed."""
    while True:
        try:
            return attempt()
        except torch.OutOfMemoryError:
            if state.micro_batch_size == 1:
                raise TrainingStopped("out of GPU memory with a single image: lower --train-resolution") from None
            out_of_memory = True
        except COMPILE_ERRORS as error:
            reason = first_line(error)
            if config["compile"] == "on":
                raise TrainingStopped(f"the network could not be compiled ({reason}); try --compile off") from error
            out_of_memory = False
        # outside the handlers, where the failed step's tensors are no longer referenced
        state.optimizer.zero_grad(set_to_none=True)
        if out_of_memory:
            state.micro_batch_size = math.ceil(min(state.micro_batch_size, images) / 2)
            torch.cuda.empty_cache()
            hint = " (--memory low needs less)" if config["memory"] == "fast" else ""
            say(f"out of GPU memory{hint}: the batch of {images} now goes in micro-batches of {state.micro_batch_size}")
        else:
            give_up_compiling(state.model)
            say(f"WARNING: the network could not be compiled ({reason}); it runs as written from now on, more slowly")


# The loop ------------------------------------------------------------------------------------------------------------


def train(state, config, batches, checkpoints, monitor):
    """Train what is left of the run."""
    images = batches.splits["train"]
    while state.epoch < config["epochs"]:
        requests = data.training_requests(images, config, state.epoch, state.batch)
        monitor.start(f"epoch {state.epoch + 1}/{config['epochs']}", len(images) // config["batch_size"], state.batch)
        trained = train_one_epoch(state, batches.training(requests, state.bad_images), config, checkpoints, monitor)
        validated, elsewhere = average_and_validate(state, batches, config, monitor)
        is_best = note_best(state, validated)
        monitor.record_epoch(epoch_record(state, config, trained, validated, elsewhere))
        state.epoch, state.batch = state.epoch + 1, 0
        state.sums.reset()
        checkpoints.save(state, is_best)


def train_one_epoch(state, device_batches, config, checkpoints, monitor):
    """Train on the batches, the rest of the epoch in progress; return its figures."""
    state.network.train()
    speed = Throughput(state.device, config["batch_size"])
    mix = build_mixing(config, state.model.fc.out_features)
    for images, labels in speed.watch(device_batches):
        result = adapting_train_step(state, *mix(images, labels), config, monitor.say)
        state.sums.add(result.loss, result.correct, result.grad_norm, config["batch_size"])
        state.batch += 1
        averaging.follow(state.ema_model, state.model, config, steps_done=state.schedule.last_epoch)
        figures = None
        if state.batch % config["log_every_steps"] == 0:
            figures = state.sums.read()  # here, and only here, the host waits for the device
            stop_if_diverged(figures, state, config)
        monitor.advance(figures, state.schedule.get_last_lr()[0], speed)
        checkpoints.save_if_due(state)
    figures = state.sums.read()
    speed.stop()
    stop_if_diverged(figures, state, config)
    return figures, speed


def average_and_validate(state, batches, config, monitor):
    """Bring the averaged weights up to date and validate.

    Returns:
        {'raw': ..., 'averaged': ..., 'ema': ...} of evaluate()'s figures; after the last epoch also {px: the same} for each of
        more_val_resolutions, before that {}.
    """
    checkpoint.require_finite(state.model.state_dict(), config["checkpoint_dir"])
    distributed.average_statistics(state.model)
    models = {"raw": state.model}
    context = autocast(state.device, state.precision)
    if averaging.bring_average_up_to_date(state.averaged_model, state.model, config, state.epoch + 1):
        requests = data.training_requests(batches.splits["train"], config, state.epoch)
        requests = itertools.islice(requests, config["swa_batch_norm_batches"])
        averaging.refresh_batch_norm(state.averaged_model, batches.training(requests, state.bad_images), context)
        distributed.average_statistics(state.averaged_model)
        models["averaged"] = state.averaged_model
    if state.ema_model is not None and state.ema_model.n_averaged:
        distributed.average_statistics(state.ema_model)
        models["ema"] = state.ema_model
    num_images = len(batches.splits["val"])

    def validated_at(resolution):
        what = f"epoch {state.epoch + 1}: validation at {resolution} px"
        monitor.start(what, math.ceil(num_images / config["batch_size"]))
        with uncompiled():  # a last batch of its own size would be compiled for one use
            return evaluate(models, monitor.watch(batches.validation(resolution)), num_images, context, config["val_flip"])

    is_last = state.epoch + 1 == config["epochs"]
    elsewhere = config["more_val_resolutions"] if is_last else []
    return validated_at(config["val_resolution"]), {resolution: validated_at(resolution) for resolution in elsewhere}


def note_best(state, validated):
    """Remember the best of the raw and the averaged weights if it is the run's best; return whether it is."""
    weights = max(validated, key=lambda name: validated[name]["top1"])
    is_best = state.best["epoch"] == 0 or validated[weights]["top1"] > state.best["top1"]
    if is_best:
        state.best = {"top1": validated[weights]["top1"], "epoch": state.epoch + 1, "weights": weights}
    return is_best


def epoch_record(state, config, trained, validated, elsewhere):
    """Return the epoch's line of metrics.jsonl: loss in nats, accuracy in percent, sizes in px."""
    figures, speed = trained
    record = {
        "epoch": state.epoch + 1,
        "train_loss": figures.loss,
        "train_top1": figures.top1,
        "train_images": figures.images,
        "train_resolution": data.resolution_of_epoch(config, state.epoch),
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
        record["gpu_memory_peak_mib"] = max(distributed.gathered(torch.cuda.max_memory_allocated())) / 2**20
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
        f"{Path(config['checkpoint_dir']) / checkpoint.LAST}; try a lower --learning-rate, or --precision fp32"
    )


# The rate ------------------------------------------------------------------------------------------------------------


def find_learning_rate(config, batches, precision, monitor, lowest, highest, steps):
    """Return the result of a range test with this run's own step, on weights of its own that are then forgotten."""
    images = batches.splits["train"]
    state = state_to_forget(config | {"learning_rate": lowest}, images, batches.device, precision)
    state.network.train()

    def step(rate, batch):
        for group in state.optimizer.param_groups:
            group["lr"] = rate * rate_factor(config)  # the rates of the test are those that the configuration names
        result = adapting_train_step(state, *batch, config, monitor.say)
        return distributed.summed(result.loss).item(), math.isfinite(result.grad_norm.item())

    requests = itertools.cycle(itertools.islice(data.training_requests(images, config, epoch=0), BATCHES_IN_CYCLE))
    monitor.start("learning-rate range test", steps)
    result = range_test(step, monitor.watch(batches.training(requests, set())), lowest, highest, steps)
    monitor.finish()
    return result


# The plan ------------------------------------------------------------------------------------------------------------


def measure(config, splits, device, precision, monitor, seconds=20.0):
    """Return the Rates of this machine, data included, with the run's own step on weights that are then forgotten."""
    config = config | {"learning_rate": 1e-6}
    state = state_to_forget(config, splits["train"], device, precision)
    mix = build_mixing(config, len(splits["train"].classes))

    def train_on(images, labels):
        state.network.train()
        return adapting_train_step(state, *mix(images, labels), config, monitor.say).loss

    @torch.inference_mode()
    def score(images, labels):
        with uncompiled(), autocast(device, precision):
            return state.model.eval()(images).sum()

    source = f"measured on {describe_device(device)}, {precision}, data included"
    batches = data.BatchServer(splits, config, device, AUTOCAST_DTYPES[precision], StopRequest(), monitor.say)
    try:
        return measure_rates(config, batches, train_on, score, source, monitor, seconds)
    finally:
        batches.close()


def plan_new_run(config, options, splits, counts, monitor):
    """Return (config, lines): the configuration with the epochs that fit, if hours are asked for, and its plan in words.

    Args:
        splits: to measure with; not needed where the options state images_per_s.
        counts: of the images for training and for validation.
    """
    if "images_per_s" in options:
        rates = rates_stated(positive("images-per-s", options), config["val_resolution"])
    else:
        device = choose_device(config)
        rates = measure(config, splits, device, choose_precision(config, device), monitor)
    if "hours" in options:
        hours = positive("hours", options)
        epochs = epochs_within(hours, config, rates, *counts, lambda stretched: not config_problems(stretched))
        if epochs == 0:
            raise ConfigError([f"--hours {hours:g}: too short for this recipe on this machine ({rates.source}); allow more"])
        config = config | {"epochs": epochs}
    price = positive("price-per-hour", options) if "price_per_hour" in options else None
    return config, plan_lines(plan_run(config, rates, *counts), config, rates, *counts, price)


def print_plan(command):
    """Print what a new run would take; nothing is written."""
    config, options = command.config, command.options
    with Monitor(config | {"log_file": None}, choose_device(config)) as monitor:
        try:
            splits = open_images(config, None, monitor.say)
            counts = len(splits["train"]), len(splits["val"])
        except data.DataError:
            if "images_per_s" not in options:
                raise
            splits, counts = None, data.IMAGENET_COUNTS
            monitor.say(f"no images in {config['data_dir']}: planned for ImageNet-1K")
        _, lines = plan_new_run(config, options, splits, counts, monitor)
        monitor.say("\n".join(lines))
    return 0


def positive(flag, options):
    """Return a flag's value as a number above 0."""
    text = options[flag.replace("-", "_")]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError([f"--{flag} {text}: must be a number above 0"])
    return value


# From the command line to the loop -----------------------------------------------------------------------------------


def open_checkpoint(command):
    """Return (config, recipe, contents, remarks): the configuration to run with, and the checkpoint to go on from or None."""
    config, folder = command.config, command.config["checkpoint_dir"]
    source = command.options.get("resume")
    if distributed.restarted():  # it goes on with its own run, however that was begun
        source = "auto"
    if distributed.launched() and command.options.get("overwrite"):
        raise ConfigError(
            [f"--overwrite: torchrun may start this program again, and the run would be lost; delete {folder} first"]
        )
    if source is None:
        if not command.options.get("overwrite"):
            checkpoint.refuse_to_overwrite(folder)
        return config, command.recipe or "seed", None, []
    if command.options.get("overwrite"):
        raise ConfigError(["--resume and --overwrite: the one goes on with a run, the other deletes it"])
    remarks = []
    if source == "auto":
        path, contents, problems = checkpoint.newest_good(folder)
        remarks += [f"WARNING: {problem}" for problem in problems]
        if path is None:
            if unsound := config_problems(config):
                raise ConfigError(unsound)
            return config, command.recipe or "seed", None, [f"nothing to resume in {folder}: a new run starts"]
    else:
        path = Path(source)
        contents, folder = checkpoint.read(path), command.given.get("checkpoint_dir", str(path.parent))
    if command.recipe not in (None, contents["recipe"]):
        raise ConfigError([f"--recipe {command.recipe}: {path} is a run of the recipe {contents['recipe']}; leave it out"])
    config = resumed_config(contents["config"], command.given | {"checkpoint_dir": folder}, contents["batch"])
    position = f"after epoch {contents['epoch']}" + (f" and {contents['batch']} batches" if contents["batch"] else "")
    remarks.append(f"resumed {path}, {position} (best so far {contents['best']['top1']:.2f} %)")
    if path.name != checkpoint.LAST:
        remarks.append(f"note: {path.name} instead of {checkpoint.LAST}: whatever the run did after it is done again")
    for key in config:
        if config[key] != contents["config"].get(key):
            rule = f" ({RULED_ON_RESUME[key]})" if key in RULED_ON_RESUME else ""
            remarks.append(f"changed on resume: {key} = {config[key]!r}, was {contents['config'].get(key)!r}{rule}")
    return config, contents["recipe"], contents, remarks


def open_images(config, contents, say):
    """Return the splits; raise DataError if they are not those of the checkpoint, or too few for a batch."""
    if config["make_demo_data"]:
        made = distributed.by_each(lambda: distributed.local_rank() == 0 and make_demo_data(config["data_dir"]))
        if made:
            say(f"made the demo's pictures in {config['data_dir']}")
    splits = distributed.by_each(lambda: data.open_splits(config["data_dir"], say=say))
    images = splits["train"]
    if contents is not None and sorted(images.classes) == sorted(contents["classes"]) and images.classes != contents["classes"]:
        say("note: the classes stay in the order that the run recorded when it began")
        for split in splits.values():
            split.relabel(contents["classes"])
    seen = distributed.gathered((images.classes, len(images), len(splits["val"])))
    if seen.count(seen[0]) < len(seen):
        raise data.DataError(f"{config['data_dir']} holds other images on one machine than on another")
    if contents is not None and (images.classes, len(images)) != (contents["classes"], contents["train_images"]):
        raise data.DataError(
            f"{config['data_dir']} holds {len(images):,} training images of {len(images.classes)} classes; the run to resume "
            f"saw {contents['train_images']:,} of {len(contents['classes'])}. Name its images with --data-dir"
        )
    if len(images) < config["batch_size"]:
        raise data.DataError(
            f"{len(images)} training images make no batch of batch_size = {config['batch_size']}: lower --batch-size"
        )
    if config["batch_size"] < distributed.size():
        raise ConfigError([f"batch_size = {config['batch_size']}: too few for {distributed.size()} processes"])
    if contents is None and distributed.rank() == 0:
        data.say_packing_gain(images, config, say)
    return splits


def main(command):
    planning = {"plan", "hours"} & set(command.options)
    if planning and "resume" in command.options:
        raise ConfigError(
            [f"--{' and --'.join(sorted(planning))} with --resume: a plan is made for a new run; change --epochs"]
        )
    idle = sorted({"images_per_s", "price_per_hour"} & set(command.options))
    if idle and not planning:
        raise ConfigError([f"--{name.replace('_', '-')}: belongs to a plan; add --plan or --hours" for name in idle])
    with distributed.joined(choose_device(command.config)):
        return print_plan(command) if "plan" in planning else start(command)


def start(command):
    """Start or go on with the run that the command asks for; return the exit status."""
    config, recipe, contents, remarks = distributed.by_first(open_checkpoint, command)
    device = choose_device(config)
    precision = choose_precision(config, device)
    torch.backends.cudnn.benchmark = True  # the sizes are fixed: let cuDNN try its algorithms once
    with Monitor(config, device) as monitor:
        splits = open_images(config, contents, monitor.say)
        if "hours" in command.options and contents is None:
            counts = len(splits["train"]), len(splits["val"])
            config, lines = distributed.as_the_first(plan_new_run(config, command.options, splits, counts, monitor))
            remarks += lines
            monitor.epochs = config["epochs"]
        return run(config, recipe, contents, remarks, splits, device, precision, monitor)


def run(config, recipe, contents, remarks, splits, device, precision, monitor):
    """Start a run, or go on with the one whose checkpoint `contents` is; return the exit status."""
    with StopRequest() as stop:
        images = splits["train"]
        steps_per_epoch = len(images) // config["batch_size"]
        if contents is None:  # refused above unless it is asked for or there is none
            distributed.by_first(checkpoint.delete_run, config["checkpoint_dir"])
        monitor.log(f"environment: {json.dumps(environment())}")
        monitor.log(f"configuration: {json.dumps(config)}")
        monitor.say(
            f"recipe {recipe}: {config['architecture']} on {len(images):,} images of {len(images.classes)} classes, "
            f"{steps_per_epoch} steps an epoch; {describe_device(device)}, {precision}, PyTorch {torch.__version__}"
        )
        if distributed.launched():
            monitor.say(f"{distributed.describe()}; batches of {config['batch_size']} over all of them")
        compiles, why = choose_compile(config, device)
        monitor.say(f"the network is {'compiled' if compiles else 'not compiled'}: {why}")
        for remark in remarks:
            monitor.say(remark)
        batches = data.BatchServer(splits, config, device, AUTOCAST_DTYPES[precision], stop, monitor.say)
        if config["spot_notice"] and distributed.local_rank() == 0:
            watch_spot_notice(stop, config["spot_notice_url"], monitor.say)
        checkpoints = None
        try:
            if config["learning_rate"] == "auto":
                found = find_learning_rate(config, batches, precision, monitor, *USUAL_RANGE[config["optimizer"]])
                monitor.say(describe_rates(found))
                config = config | {"learning_rate": distributed.as_the_first(found["suggestion"])}
            torch.manual_seed(config["seed"] + distributed.rank())
            state = new_state(config, len(images.classes), steps_per_epoch, device, precision)
            if contents is not None:
                state.load_state_dict(contents, config, steps_per_epoch)
                contents = None  # hundreds of megabytes
            facts = {"config": config, "recipe": recipe, "classes": images.classes, "train_images": len(images)}
            several = f"{distributed.size()} times " if distributed.size() > 1 else ""
            facts["hardware"] = several + describe_device(device)
            facts["class_names"] = getattr(images, "class_names", {})  # what people call them, where a packed file knows
            checkpoints = checkpoint.CheckpointFolder(config, facts, monitor.say)
            monitor.open_records(checkpoints.folder, state.epoch)
            with distributed.noticing_losses():  # here already, so that the log says it, too
                train(state, config, batches, checkpoints, monitor)
            if not (checkpoints.is_saved or checkpoints.save(state)):
                raise TrainingStopped(f"the run has ended, but its result could NOT be saved to {checkpoints.folder}")
            best = state.best
            monitor.say(
                f"finished {config['epochs']} epochs: best validation top-1 {best['top1']:.2f} % in epoch {best['epoch']} "
                f"({best['weights']} weights, {config['val_resolution']} px, no test-time augmentation), "
                f"in {checkpoints.folder / checkpoint.BEST}"
            )
        except (Interrupted, WorkerDied, data.DataError) as cause:
            exit_code = save_and_leave(cause, checkpoints, state if checkpoints else None, monitor)
            if stop.machine_goes_away:
                distributed.end_launcher()
            return exit_code
        except UserError as error:
            monitor.log(f"stopped: {error}")
            raise
        finally:
            batches.close()
    return 0


def save_and_leave(cause, checkpoints, state, monitor):
    """Save the state of a run that is asked to stop, say how to go on, and return the exit status."""
    exit_code = getattr(cause, "exit_code", 1)
    if checkpoints is None:
        monitor.say(f"stopped by {cause}, before the training began")
        return exit_code
    where = f"in epoch {state.epoch + 1} after {state.batch} batches"
    program = "torchrun ... train.py" if distributed.launched() else "python train.py"
    if checkpoints.save(state):
        monitor.say(f"stopped by {cause} {where}; saved. Go on with: {program} --resume {checkpoints.folder / checkpoint.LAST}")
    else:
        monitor.say(f"stopped by {cause} {where}; NOT saved, an earlier checkpoint may be in {checkpoints.folder}")
    return exit_code


if __name__ == "__main__":
    sys.exit(run_program("train.py", main, COMMAND))
