"""Averages of the weights, on torch.optim.swa_utils: SWA (arXiv:1803.05407) over epochs, and a running one (EMA)."""

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn


def epochs_to_average(config, epochs_trained):
    """Return how many epochs' final weights the average holds after this many epochs of training."""
    if config["swa_start_epoch"] == 0:
        return 0
    return max(0, epochs_trained - config["swa_start_epoch"] + 1)


def build_average(model):
    """Return an empty equal-weight average of the model's parameters, on its device."""
    return AveragedModel(model)


def build_running_average(model, config):
    """Return an empty exponential moving average of the model's parameters and batch-norm statistics, or None for none."""
    if config["ema_half_life_steps"] == 0:
        return None
    decay = 0.5 ** (config["ema_every_steps"] / config["ema_half_life_steps"])
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def follow(running_average, model, config, steps_done):
    """Take the model's weights into the running average if that is due after so many steps of the run."""
    if running_average is not None and steps_done % config["ema_every_steps"] == 0:
        running_average.update_parameters(model)


def bring_average_up_to_date(averaged_model, model, config, epochs_trained):
    """Take the model's weights into the average, unless this epoch's are in it already (after a resumption).

    Returns:
        True if the average holds anything.
    """
    due = epochs_to_average(config, epochs_trained)
    if due and int(averaged_model.n_averaged) < due:
        averaged_model.update_parameters(model)
    return due > 0


def refresh_batch_norm(averaged_model, device_batches, autocast):
    """Recompute the batch-norm statistics of the averaged weights, as the plain mean over the batches.

    Averaged weights need statistics of their own; a few hundred batches are enough.

    Args:
        device_batches: yields (images, labels) as the network takes them in training.
        autocast: context of the run's precision.
    """
    with autocast:
        update_bn(device_batches, averaged_model)
    averaged_model.eval()
