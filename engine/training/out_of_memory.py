"""When the GPU's memory does not suffice for a training step: the same step in smaller micro-batches."""

import math

import torch

from engine.inference.batch_norm import norms_of
from engine.system.device import rebuilt_scaler
from engine.system.distributed import all_gather_object, size
from engine.system.errors import TrainingStopped
from engine.system.gpu_memory import is_out_of_memory, reason_of, stop_on_oom
from engine.system.micro_batches import enough_for_batch_norm
from engine.system.random_state import random_state, set_random_state
from engine.training.activation_checkpointing import frozen_bn_stats
from engine.training.compiling import COMPILE_ERRORS, fall_back_to_eager
from engine.training.sync_batch_norm import SYNCED_NORMS, local_batch_norm


def retry_on_oom(train_step, state, images, targets, config, log):
    """Yield contexts in which to take a step, one after the other until it has been taken: see attempts.

    Across ranks a step whose gradients are half exchanged cannot be taken again. So each rank first tries each resolution out
    alone, and the step is then attempted once.

    Args:
        train_step: as train.py's; with probe=True it exchanges nothing and changes no weights.
        images: [B, 3, H, W].
        log: called with each message for the user.
    """
    resolution = images.shape[3]
    if size() == 1:
        yield from attempts(state, len(targets), resolution, config, log)
        return
    if resolution not in state.probed_resolutions:
        state.probed_resolutions.add(resolution)
        probe_memory(train_step, state, images, targets, config, log)
    yield stop_on_oom(f"in a step that had fitted before; {cure(state, len(targets))}")


def take_step(train_step, state, images, targets, config, log):
    """Return train_step's result, taken as retry_on_oom has it."""
    for attempt in retry_on_oom(train_step, state, images, targets, config, log):
        with attempt:
            result = train_step(state, images, targets, config)
    return result


def attempts(state, images, resolution, config, log):
    """Yield contexts for a step; where it fails, the state is put back, something is adapted, and the next one comes.

    The batch-norm statistics are put back by the step itself, which has them for the gradient that is not finite, too.
    Out of memory the micro-batch is halved. What cannot be compiled runs as written, unless `compile` is on. The step that
    succeeds is the one that would have been taken with these settings from the start.

    Args:
        images, resolution: of the step; the latter in px.
    Raises:
        TrainingStopped: nothing is left to adapt, or the weights may be changed in part (see train_step).
    """
    before = random_state(state.device)
    while True:
        attempt = _Attempt(may_run_eagerly=config["compile"] != "on")
        yield attempt
        if attempt.failure is None:
            return
        # outside of the context, where the failed step's tensors are no longer referenced
        state.optimizer.zero_grad(set_to_none=True)
        # the old scaler may have unscaled this step's gradients, and would refuse to unscale any others
        state.scaler = rebuilt_scaler(state.scaler, state.device, state.precision)
        set_random_state(before, state.device)
        if attempt.out_of_memory:
            state.micro_batch_size = smaller_micro_batch(state, images, resolution, config, attempt.failure)
            torch.cuda.empty_cache()
            hint = " (--memory low needs less)" if config["memory"] == "fast" else ""
            parts = f"the batch of {images} now goes in micro-batches of {state.micro_batch_size}"
            log(f"out of GPU memory ({attempt.failure}){hint}: {parts}")
        else:
            fall_back_to_eager(state.model)
            state.compile_failed = True
            log(f"WARNING: the network could not be compiled ({attempt.failure}); it runs as written from now on, more slowly")


class _Attempt:
    """A context that takes an out-of-memory or compiler error and remembers what it said."""

    def __init__(self, may_run_eagerly):
        self.may_run_eagerly = may_run_eagerly
        self.failure, self.out_of_memory = None, False

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.out_of_memory = is_out_of_memory(error)
        if not self.out_of_memory and not isinstance(error, COMPILE_ERRORS):
            return False
        self.failure = reason_of(error)
        if not self.out_of_memory and not self.may_run_eagerly:
            raise TrainingStopped(f"the network could not be compiled ({self.failure}); try --compile off") from error
        return True


def probe_memory(train_step, state, images, targets, config, log):
    """Adapt to the memory and the compiler by a step that leaves no trace, then agree on the smallest micro-batch."""
    device = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(device), frozen_bn_stats(state.model), local_batch_norm(state.model):
        for attempt in attempts(state, len(targets), images.shape[3], config, log):
            with attempt:
                train_step(state, images, targets, config, probe=True)
    state.micro_batch_size = min(all_gather_object(state.micro_batch_size))


def cure(state, images):
    """Return what helps a run whose memory did not suffice where a step of so many images cannot be retried."""
    smaller = math.ceil(min(state.micro_batch_size, images) / 2)
    return f"the last checkpoint is whole: start again with --micro-batch-size {smaller} --resume auto"


def smaller_micro_batch(state, images, resolution, config, reason):
    """Return half of the micro-batch that did not fit, of a step on so many images.

    Raises:
        TrainingStopped: there is no smaller one.
    """
    present = min(state.micro_batch_size, images)
    if present == 1:
        raise TrainingStopped(f"out of GPU memory with a single image ({reason}): lower --train-resolution")
    half = math.ceil(present / 2)
    alone = any(size() == 1 or not isinstance(norm, SYNCED_NORMS) for norm in norms_of(state.model))
    if alone and not enough_for_batch_norm(config, resolution, half, size()):
        raise TrainingStopped(
            f"out of GPU memory with micro-batches of {present} images of {resolution} px ({reason}), and smaller ones would "
            "leave a single image, of which batch norm knows no variance: make room in the GPU's memory"
        )
    return half
