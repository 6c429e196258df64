"""Averages of the weights, on torch.optim.swa_utils: SWA (arXiv:1803.05407) over epochs, and a running one (EMA)."""

import itertools

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

MOST_OF_FIRST = 0.05  # of the EMA at a run's end, above which the first weights that entered it are too large a share


def epochs_to_average(config, epochs_trained):
    """Return how many epochs' final weights the average holds after this many epochs of training."""
    if config["swa_start_epoch"] == 0:
        return 0
    return max(0, epochs_trained - config["swa_start_epoch"] + 1)


def build_swa_model(model):
    """Return an empty equal-weight average of the model's parameters, on its device."""
    return AveragedModel(model)


def build_ema_model(model, config):
    """Return an empty exponential moving average of the model's parameters and batch-norm statistics, or None for none."""
    if config["ema_half_life_images"] == 0:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay(config)), use_buffers=True)


def ema_decay(config):
    """Return what is left of a share of the running average after each update."""
    return 0.5 ** (ema_every_steps(config) * config["batch_size"] / config["ema_half_life_images"])


def ema_updates(config, steps_done):
    """Return how many times weights enter the running average in so many steps of a run."""
    return steps_done // ema_every_steps(config) if config["ema_half_life_images"] else 0


def warning_of_ema(config, steps_per_epoch):
    """Return a line on a running average that stays empty, or that its first weights still fill at the run's end; else None."""
    steps = config["epochs"] * steps_per_epoch
    images, updates = steps * config["batch_size"], ema_updates(config, steps)
    if config["ema_half_life_images"] == 0 or updates and ema_decay(config) ** (updates - 1) <= MOST_OF_FIRST:
        return None
    what = f"no weights enter the EMA: they do every {ema_every_steps(config)} steps, and the run has {steps}"
    if updates:
        what = f"the EMA keeps {ema_decay(config) ** (updates - 1):.0%} of the first weights that enter it: the run has "
        what += f"{images:,} images, its half-life is {config['ema_half_life_images']:,}"
    half_life = int(float(f"{max(images / 10, 1):.2g}"))
    suits = f"--ema-half-life-images {half_life} --ema-every-images {max(half_life // 5, 1)}"
    return f"WARNING: {what}; {suits} would suit this length, --ema-half-life-images 0 keeps no EMA"


def ema_every_steps(config):
    """Return the steps between the weights that enter the running average, a whole number."""
    return max(1, round(config["ema_every_images"] / config["batch_size"]))


@torch.no_grad()
def update_ema(running_average, model, config, steps_done):
    """Take the model's weights into the running average if that is due after so many steps of the run.

    As AveragedModel.update_parameters does it, which copies its counter to the device and makes the host wait there.
    """
    if running_average is None or steps_done % ema_every_steps(config) != 0:
        return
    if running_average.n_averaged == 0:
        running_average.update_parameters(model)
        return
    by_dtype = {}
    for ours, theirs in zip(_tensors(running_average.module), _tensors(model), strict=True):
        averages, values = by_dtype.setdefault(ours.dtype, ([], []))
        averages.append(ours)
        values.append(theirs)
    for averages, values in by_dtype.values():
        running_average.multi_avg_fn(averages, values, None)
    running_average.n_averaged += 1


def _tensors(model):
    return itertools.chain(model.parameters(), model.buffers())


def update_swa(averaged_model, model, config, epochs_trained):
    """Take the model's weights into the average, unless this epoch's are in it already (after a resumption).

    Returns:
        True if the average holds anything.
    """
    due = epochs_to_average(config, epochs_trained)
    if due and int(averaged_model.n_averaged) < due:
        averaged_model.update_parameters(model)
    return due > 0
