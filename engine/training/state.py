"""The state of a run in training: what a step changes, and what a checkpoint keeps of it."""

import contextlib
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from engine.data.batches import resolution_of_epoch
from engine.inference.freezing import freeze
from engine.inference.weight_files import load_whole
from engine.run.throughput import Throughput
from engine.system import distributed
from engine.system.device import build_scaler, load_scaler
from engine.system.gpu_memory import stop_on_oom
from engine.system.micro_batches import enough_for_batch_norm, network_px
from engine.system.random_state import random_state, set_random_state
from engine.training import averaging
from engine.training.compiling import compile_network
from engine.training.metrics import MetricAccumulator
from engine.training.optim import build_optimizer, build_schedule


class StepResult(NamedTuple):
    """Scalars on the device: reading one makes the host wait."""

    loss: torch.Tensor  # this process's part of the batch's mean
    grad_norm: torch.Tensor  # of the batch, before clipping; not finite if the step was skipped
    correct: torch.Tensor  # among this process's images


@dataclass
class TrainState:
    """Exactly what a resumed run needs."""

    model: torch.nn.Module
    ddp_model: torch.nn.Module  # the model as it is called in training: across ranks it exchanges gradients
    averaged_model: torch.nn.Module | None
    ema_model: torch.nn.Module | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    precision: str
    micro_batch_size: int  # images per forward pass
    sums: MetricAccumulator  # of the epoch in progress
    speed: Throughput  # of the same
    class_weights: torch.Tensor | None = None  # of the loss, which follow from configuration and images; None: all the same
    epoch: int = 0  # whole epochs done
    batch: int = 0  # batches of the next one done
    best: dict = field(default_factory=lambda: {"top1": 0.0, "epoch": 0, "weights": "raw"})
    bad_images: set = field(default_factory=set)  # indices of training images that could not be read
    probed_resolutions: set = field(default_factory=set)  # resolutions that each process has tried out alone
    compile_failed: bool = False  # the network, which was to be compiled, runs as written
    is_whole: bool = True  # not in the middle of a step

    @contextlib.contextmanager
    def changing(self):
        """Mark what is done inside as one change: a state that an error leaves in its middle must not be saved."""
        self.is_whole = False
        yield
        self.is_whole = True

    def count_step(self, result, config):
        """Take a step's StepResult into the epoch's sums, and its weights into the EMA when they are due."""
        self.sums.add(result.loss, result.correct, result.grad_norm, config["batch_size"])
        self.batch += 1
        averaging.update_ema(self.ema_model, self.model, config, steps_done=self.schedule.last_epoch)

    def count_epoch(self):
        """Begin the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums.reset()
        self.speed.reset()

    @property
    def learning_rate(self):
        """The rate of the last step that was taken, or before any of the first; of the first parameter group."""
        return self.schedule.rates_at(max(0, self.schedule.last_epoch - 1))[0]

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
            "schedule": {"step": self.schedule.last_epoch},  # the schedule itself follows from the configuration
            "scaler": self.scaler.state_dict(),
            "sums": self.sums.state(),
            "speed": self.speed.state(),
            "micro_batch_size": self.micro_batch_size,
            "compile_failed": self.compile_failed,
            "bad_images": sorted(self.bad_images),
            "rng": distributed.all_gather_object(random_state(self.device)),  # one for each process
        }

    def load_state_dict(self, saved, config, steps_per_epoch):
        """Take over a checkpoint; the schedule is built from the configuration and moved to the checkpoint's step."""
        load_whole(self.model, saved["model"], "the checkpoint")
        if self.averaged_model is not None and saved["averaged_model"] is not None:  # a flag may bring averaging in
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
        self._take_over_micro_batch(saved, config)
        self.bad_images = set(saved["bad_images"])
        if distributed.rank() >= len(saved["rng"]):
            torch.manual_seed(config["seed"] + distributed.rank() + 1000 * self.schedule.last_epoch)  # a stream of its own
            return
        set_random_state(saved["rng"][distributed.rank()], self.device)

    def _take_over_micro_batch(self, saved, config):
        """Go on with the micro-batch that has fitted the memory, unless a flag says otherwise."""
        was = saved["config"]
        if saved["micro_batch_size"] < was["batch_size"] and config["micro_batch_size"] == was["micro_batch_size"]:
            resolution = network_px(config, resolution_of_epoch(config, self.epoch))
            if enough_for_batch_norm(config, resolution, saved["micro_batch_size"], distributed.size()):
                self.micro_batch_size = saved["micro_batch_size"]


@stop_on_oom("with the weights and the optimizer's state alone: make room in the GPU's memory")
def new_state(model, config, steps_per_epoch, precision, compiled=False):
    """Return the TrainState at the start of a run.

    Args:
        model: the network, freshly initialised, on the run's device; what `freeze` names is frozen in it.
        precision: as choose_precision returns it.
        compiled: whether training runs compiled code.
    """
    device = next(model.parameters()).device
    freeze(model, config)
    averaged_model = averaging.build_swa_model(model) if config["swa_start_epoch"] else None
    ema_model = averaging.build_ema_model(model, config)
    if compiled:
        compile_network(model, config["memory"])  # in place, after the averages were copied from it
    optimizer = build_optimizer(model, config, precision)
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
