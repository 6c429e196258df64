"""Optimizer and learning-rate schedule."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from engine.system.device import AUTOCAST_DTYPES
from engine.training.muon import Muon, split_groups


def parameter_groups(model, weight_decay, decay_norms_and_biases, backbone_rate_factor=1.0):
    """Return the optimizer's parameter groups: what has one dimension (norms, biases) gets no weight decay.

    With a factor other than 1 the last layer's groups come first, and those of everything else have it as `rate_factor`.
    """
    parameters, last = [p for p in model.parameters() if p.requires_grad], set()
    if backbone_rate_factor != 1:
        last = set(map(id, model.fc.parameters()))
    groups = []
    for own in ({}, {"rate_factor": backbone_rate_factor}) if last else ({},):
        some = [p for p in parameters if (id(p) in last) != bool(own)] if last else parameters
        if decay_norms_and_biases:
            groups.append({"params": some, "weight_decay": weight_decay} | own)
            continue
        groups.append({"params": [p for p in some if p.ndim >= 2], "weight_decay": weight_decay} | own)
        groups.append({"params": [p for p in some if p.ndim < 2], "weight_decay": 0.0} | own)
    return [group for group in groups if group["params"]]


def lr_scale(config):
    """Return what the configured rates are multiplied by: with `scale_learning_rate` they are meant per 256 images."""
    return config["batch_size"] / 256 if config["scale_learning_rate"] else 1.0


def peak_rates(optimizer, config):
    """Return the peak rate of each parameter group of the configuration's optimizer."""
    of_adamw, of_all = config["adamw_learning_rate"], config["learning_rate"]
    return [
        (of_adamw if group.get("by_adamw") else of_all) * lr_scale(config) * group.get("rate_factor", 1.0)
        for group in optimizer.param_groups
    ]


class SGDW(torch.optim.SGD):
    """torch's SGD, fused, whose decay is apart from the gradient (arXiv:1711.05101), as MosaicML's Composer has it.

    Before a step's gradient is followed, the weights shrink by their group's decay times the rate's share of the peak rate.
    """

    def __init__(self, groups, peak_rate, **options):
        """groups: with `weight_decay`, the share of the weights that a step at peak_rate takes away."""
        super().__init__([group | {"weight_decay": 0.0} for group in groups], lr=peak_rate, fused=True, **options)
        # these two follow from the configuration, and so are in no checkpoint
        self._peaks = [peak_rate * group.get("rate_factor", 1.0) for group in groups]
        self._decays = [group["weight_decay"] for group in groups]

    @torch.no_grad()
    def step(self, closure=None):
        found_inf = getattr(self, "found_inf", None)  # the GradScaler's verdict, on the device
        for group, peak, decay in zip(self.param_groups, self._peaks, self._decays, strict=True):
            if decay:
                keep = 1 - decay * min(group["lr"] / peak, 1.0)
                if found_inf is not None:
                    keep = torch.where(found_inf.reshape(()) > 0, 1.0, keep)
                torch._foreach_mul_(group["params"], keep)
        return super().step(closure)


def build_optimizer(model, config, precision="fp32"):
    """Return the optimizer that the configuration names, fused; Muon multiplies its matrices in the precision of the run.

    Fused optimizers take the GradScaler's verdict on the device; the others make the host wait for it at each step.
    """
    of_each_batch = lr_scale(config) if config["optimizer"] == "sgdw" else 1.0
    weight_decay, factor = config["weight_decay"] * of_each_batch, config["backbone_rate_factor"]
    groups = parameter_groups(model, weight_decay, config["decay_norms_and_biases"], factor)
    rate = config["learning_rate"] * lr_scale(config)
    if config["optimizer"] in ("sgd", "sgdw"):
        options = {"momentum": config["momentum"], "nesterov": config["nesterov"]}
        if config["optimizer"] == "sgdw":
            optimizer = SGDW(groups, rate, **options)
        else:
            optimizer = torch.optim.SGD(groups, lr=rate, fused=True, **options)
        # If the first step overflows, fused SGD leaves its new momentum as uninitialised memory (torch 2.11 to 2.14).
        # Zeros beforehand give the same first step, since momentum * 0 + gradient is the gradient.
        for group in optimizer.param_groups:
            for parameter in group["params"] if config["momentum"] else ():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if config["optimizer"] == "muon":
        options = {"lr": rate, "weight_decay": config["weight_decay"], "momentum": config["momentum"]}
        options |= {"adamw_lr": config["adamw_learning_rate"] * lr_scale(config), "dtype": AUTOCAST_DTYPES[precision]}
        optimizer = Muon(*split_groups(groups), **options)
        if factor != 1:
            optimizer.param_groups[0]["rate_factor"] = factor
        _allocate_moments(optimizer, optimizer.param_groups[1:])
        return optimizer
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config["optimizer"]]
    optimizer = kind(groups, lr=rate, fused=True)
    _allocate_moments(optimizer, optimizer.param_groups)
    return optimizer


def _allocate_moments(optimizer, groups):
    """Make what Adam's first step would, so that no step runs out of memory when it has changed half of the weights."""
    for group in groups:
        for parameter in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter].update(step=step, **moments)


class ThenConstant:
    """Lets a schedule's rate pass, from a step on, along a half cosine to a constant and stay there, as SWALR does.

    Comes before the schedule among a class's bases, whose rate must be a pure function of `last_epoch`, the count of
    steps, so that a resumed run only has to set it.
    """

    def __init__(self, optimizer, *, constant_from_step, constant_rates, passage_steps, **schedule):
        self.constant_from_step = constant_from_step
        self.constant_rates = constant_rates  # one for each parameter group
        self.passage_steps = passage_steps
        super().__init__(optimizer, **schedule)

    def get_lr(self):
        """Return the rate of each parameter group at step `last_epoch`."""
        step = self.last_epoch
        if step < self.constant_from_step:
            return super().get_lr()
        self.last_epoch = self.constant_from_step  # where the passage starts, whatever the schedule would do after it
        rates = super().get_lr()
        self.last_epoch = step
        passed = min(1.0, (step - self.constant_from_step) / self.passage_steps) if self.passage_steps else 1.0
        share = (1 - math.cos(math.pi * passed)) / 2
        return [rate + (constant - rate) * share for rate, constant in zip(rates, self.constant_rates, strict=True)]

    def rates_at(self, step):
        """Return the rate of each parameter group at `step`, counted from 0; nothing is changed."""
        present, self.last_epoch = self.last_epoch, step
        self._get_lr_called_within_step = True  # get_lr warns its callers otherwise
        rates = self.get_lr()
        self._get_lr_called_within_step = False
        self.last_epoch = present
        return rates

    def move_to(self, step):
        """Set the optimizer's rates to those of `step`, counted from 0."""
        self._last_lr, self.last_epoch = self.rates_at(step), step
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


class OneCycleThenConstantLR(ThenConstant, OneCycleLR):
    """torch's OneCycleLR."""


class LambdaThenConstantLR(ThenConstant, LambdaLR):
    """torch's LambdaLR: the optimizer's rate times a function of the step."""


def build_schedule(optimizer, config, steps_per_epoch):
    """Return the run's learning-rate schedule, at step 0, to be stepped once after each optimizer step.

    The peak is config['learning_rate'], at the end of the warm-up. With averaging at a rate of its own, the passage to that
    rate begins with epoch swa_start_epoch. Parameter groups with another peak follow in proportion.
    """
    peaks, of_all = peak_rates(optimizer, config), config["learning_rate"] * lr_scale(config)
    total_steps = config["epochs"] * steps_per_epoch
    warmup_steps = round(config["warmup_epochs"] * steps_per_epoch)
    averages = config["swa_start_epoch"] > 0 and config["swa_learning_rate"] > 0
    passage = {
        "constant_from_step": (config["swa_start_epoch"] - 1) * steps_per_epoch if averages else math.inf,
        "constant_rates": [config["swa_learning_rate"] * lr_scale(config) * (peak / of_all) for peak in peaks],
        "passage_steps": config["swa_anneal_epochs"] * steps_per_epoch,
    }
    if config["schedule"] != "onecycle":
        share_after = _share_after_warmup(config, total_steps, warmup_steps, steps_per_epoch)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):  # resumed, it brings its rate of that moment along
            group["lr"] = group["initial_lr"] = peak
        return LambdaThenConstantLR(
            optimizer,
            lr_lambda=lambda step: (step + 1) / warmup_steps if step < warmup_steps else share_after(step),
            **passage,
        )
    if warmup_steps:  # OneCycleLR divides by each phase's length less one: neither may be a single step
        warmup_steps = min(max(warmup_steps, 2), total_steps - 1) if total_steps > 2 else 0
    return OneCycleThenConstantLR(
        optimizer,
        max_lr=peaks,
        total_steps=total_steps,
        pct_start=warmup_steps / total_steps,
        anneal_strategy=config["onecycle_anneal"],
        cycle_momentum=False,  # it would overwrite the optimizer's momentum
        div_factor=config["onecycle_div_factor"],
        final_div_factor=config["onecycle_final_div_factor"],
        **passage,
    )


def _share_after_warmup(config, total_steps, warmup_steps, steps_per_epoch):
    """Return the function step -> share of the peak rate of the schedules with a straight warm-up."""
    if config["schedule"] == "cosine":
        length = max(1, total_steps - warmup_steps)
        return lambda step: (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / length))) / 2
    if config["schedule"] == "step":
        return lambda step: config["step_factor"] ** (step // (config["step_epochs"] * steps_per_epoch))
    return lambda step: 1.0
