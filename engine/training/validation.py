"""What follows an epoch's last step: the averages brought up to date, every kind of weights scored, and the epoch's record."""

import functools
import itertools
import math
import time
from typing import NamedTuple

import torch

from engine.data.batches import resolution_of_epoch, training_requests
from engine.inference.batch_norm import recompute_bn_stats, remark_on_left_out
from engine.inference.scoring import are_uneven, evaluate
from engine.run.checkpoint_folder import require_finite, way_out
from engine.run.weights import WEIGHTS
from engine.system import distributed
from engine.system.device import autocast
from engine.system.errors import TrainingStopped
from engine.system.gpu_memory import retry_pass_on_oom
from engine.system.random_state import random_state_restored_on_error
from engine.training import averaging
from engine.training.compiling import eager_mode


class Scores(NamedTuple):
    """Figures of evaluate() for each kind of weights: {'raw': ..., 'averaged': ..., 'ema': ...}."""

    at_val_resolution: dict  # empty where the epoch is not validated
    other_resolutions: dict  # {px: the same}, of more_val_resolutions and after the last epoch only


def is_validated(config, epochs_done):
    """Return whether the weights are scored after so many epochs of a run."""
    return epochs_done % config["validate_every_epochs"] == 0 or epochs_done == config["epochs"]


def average_and_validate(state, run):
    """Return the Scores of the epoch's weights and of their averages, which are brought up to date first."""
    config, is_last = run.config, state.epoch + 1 == run.config["epochs"]
    with random_state_restored_on_error(state.device):  # whoever resumes does all of it again
        models = averaged_models(state, run)  # also where nothing is scored: a checkpoint's averages are always ready for use
        if not is_validated(config, state.epoch + 1):
            return Scores({}, {})
        scores = validate(models, config["val_resolution"], state, run)
        others = config["more_val_resolutions"] if is_last else []
        return Scores(scores, {px: validate(models, px, state, run) for px in others})


def averaged_models(state, run):
    """Return {kind of weights: model} of those that the epoch's end knows, the averaged ones with statistics of their own."""
    config, models = run.config, {"raw": state.model}
    require_finite(state.model.state_dict(), config["checkpoint_dir"])
    distributed.average_bn_stats(state.model)
    with state.changing():
        averages = averaging.update_swa(state.averaged_model, state.model, config, state.epoch + 1)
    if averages:

        def some_batches():
            requests = training_requests(run.batches.splits["train"], config, state.epoch)
            count = min(config["swa_batch_norm_batches"], run.steps_per_epoch)
            run.monitor.start(f"epoch {state.epoch + 1}: batch-norm statistics of the averaged weights", count)
            return run.monitor.watch(run.batches.training(itertools.islice(requests, count), state.bad_images))

        context = autocast(state.device, state.precision)
        recompute = functools.partial(recompute_bn_stats, state.averaged_model, autocast=context)
        left_out, count = retry_pass_on_oom(recompute, some_batches, config["batch_size"], state.device)
        for line in remark_on_left_out(int(distributed.all_reduce_sum(left_out)), count * distributed.size()):
            run.monitor.log(line)
        distributed.average_bn_stats(state.averaged_model)
        models["averaged"] = state.averaged_model
    if state.ema_model is not None and state.ema_model.n_averaged:
        distributed.average_bn_stats(state.ema_model)
        models["ema"] = state.ema_model
    return models


def validate(models, resolution, state, run):
    """Return evaluate()'s figures of the models on every validation image, at a resolution in px."""
    num_images, config = len(run.batches.splits["val"]), run.config
    steps = math.ceil(num_images / config["batch_size"])
    run.monitor.start(f"epoch {state.epoch + 1}: validation at {resolution} px", steps)
    batches = run.monitor.watch(run.batches.validation(resolution))
    context, by_class = autocast(state.device, state.precision), are_uneven(run.batches.splits["train"])
    with eager_mode():  # a last batch of its own size would be compiled for one use
        return evaluate(models, batches, num_images, context, config["val_flip"], by_class=by_class)


def note_best(state, scores, on_disk):
    """Remember the best of the epoch's weights if it is better than what best.pt holds; of equals the earlier one stays.

    Args:
        scores: {kind of weights: figures}; none where they were not validated.
    """
    if not scores:
        return
    weights = max(scores, key=lambda name: scores[name]["top1"])
    if on_disk["epoch"] == 0 or scores[weights]["top1"] > on_disk["top1"]:
        state.best = {"top1": scores[weights]["top1"], "epoch": state.epoch + 1, "weights": weights}


def epoch_record(state, config, trained, scores):
    """Return the epoch's line of metrics.jsonl: loss in nats, accuracy in percent, sizes in px."""
    speed = state.speed
    record = {
        "epoch": state.epoch + 1,
        "train_loss": trained.loss,
        "train_top1": trained.top1,
        "train_images": trained.images,
        "train_resolution": resolution_of_epoch(config, state.epoch),
        "grad_norm": trained.grad_norm,
        "skipped_steps": trained.skipped_steps,
        "learning_rate": state.learning_rate,
    }
    for weights, figures in scores.at_val_resolution.items():
        record |= {f"{WEIGHTS[weights].column}_{name}": value for name, value in figures.items() if name != "images"}
    if scores.at_val_resolution:
        record |= {
            "val_images": scores.at_val_resolution["raw"]["images"],
            "val_resolution": config["val_resolution"],
            "test_time_augmentation": "none",
        }
    record |= {"best_top1": state.best["top1"], "bad_images": len(state.bad_images)}
    if scores.other_resolutions:
        record["more_val"] = [{"val_resolution": px, **figures} for px, figures in scores.other_resolutions.items()]
    # what follows depends on the machine and on interruptions, what precedes does not
    record |= {"images_per_s": speed.overall(), "seconds": speed.seconds(), "time": time.time()}
    record["data_wait_share"] = speed.waited() / max(speed.seconds(), 1e-9)
    if state.device.type == "cuda":
        record["gpu_memory_peak_mib"] = max(distributed.all_gather_object(torch.cuda.max_memory_allocated())) / 2**20
    if distributed.size() > 1:
        record["processes"] = distributed.size()
    return record


def stop_if_diverged(metrics, state, config):
    """Raise TrainingStopped if max_bad_steps steps in a row gave a loss or gradient that is not finite."""
    if metrics.longest_skipped_row < config["max_bad_steps"]:
        return
    raise TrainingStopped(
        f"{metrics.longest_skipped_row} steps in a row without a finite loss and gradient, in epoch {state.epoch + 1} before "
        f"step {state.batch}, at rate {state.learning_rate:.3g}: stopped. "
        f"{way_out(config['checkpoint_dir'])} with a lower --learning-rate, or --precision fp32"
    )
