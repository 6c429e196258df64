"""When the GPU's memory does not suffice for a training step: the same step in smaller micro-batches."""

import math

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from engine.system.device import rebuilt_scaler
from engine.system.distributed import size
from engine.system.errors import TrainingStopped
from engine.system.gpu_memory import _reason, is_out_of_memory
from engine.system.micro_batches import enough_for_batch_norm
from engine.system.random_state import random_state, set_random_state
from engine.training.compiling import COMPILE_ERRORS, fall_back_to_eager
from engine.training.sync_batch_norm import SYNCED_NORMS


class Snapshot:
    """What a step changes before its weights: the batch-norm statistics and the random state. A GPU is not waited for."""

    def __init__(self, model, device):
        norms = _norms_of(model)
        self._statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
        self._counters = [norm.num_batches_tracked for norm in norms]
        self._values = torch.cat(self._statistics) if norms else None  # one kernel
        self._counts = torch.stack(self._counters) if norms else None
        self._device = device
        self._random_state = random_state(device)

    @torch.no_grad()
    def restore(self):
        """Put everything back as it was."""
        set_random_state(self._random_state, self._device)
        if self._statistics:
            lengths = [len(tensor) for tensor in self._statistics]
            for tensor, value in zip(self._statistics, self._values.split(lengths), strict=True):
                tensor.copy_(value)
            for tensor, value in zip(self._counters, self._counts, strict=True):
                tensor.copy_(value)


def _norms_of(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def retry_on_oom(attempt, state, images, resolution, config, log):
    """Return attempt(), a step; where it fails, the state is put back, something is adapted, and it is taken again.

    Out of memory the micro-batch is halved. What cannot be compiled runs as written, unless `compile` is on. The step that
    succeeds is the one that would have been taken with these settings from the start.

    Args:
        images, resolution: of the step; the latter in px.
        log: called with each message for the user.
    Raises:
        TrainingStopped: nothing is left to adapt, or the weights may be changed in part (see train_step).
    """
    before = Snapshot(state.model, state.device)
    while True:
        try:
            return attempt()
        except (RuntimeError, *COMPILE_ERRORS) as error:
            out_of_memory, reason = is_out_of_memory(error), _reason(error)
            if not out_of_memory and not isinstance(error, COMPILE_ERRORS):
                raise
            if not out_of_memory and config["compile"] == "on":
                raise TrainingStopped(f"the network could not be compiled ({reason}); try --compile off") from error
        # outside the handler, where the failed step's tensors are no longer referenced
        state.optimizer.zero_grad(set_to_none=True)
        # the old scaler may have unscaled this step's gradients, and would refuse to unscale any others
        state.scaler = rebuilt_scaler(state.scaler, state.device, state.precision)
        before.restore()
        if out_of_memory:
            state.micro_batch_size = smaller_micro_batch(state, images, resolution, config, reason)
            torch.cuda.empty_cache()
            hint = " (--memory low needs less)" if config["memory"] == "fast" else ""
            parts = f"the batch of {images} now goes in micro-batches of {state.micro_batch_size}"
            log(f"out of GPU memory ({reason}){hint}: {parts}")
        else:
            fall_back_to_eager(state.model)
            log(f"WARNING: the network could not be compiled ({reason}); it runs as written from now on, more slowly")


def smaller_micro_batch(state, images, resolution, config, reason):
    """Return half of the micro-batch that did not fit, of a step on so many images.

    Raises:
        TrainingStopped: there is no smaller one.
    """
    present = min(state.micro_batch_size, images)
    if present == 1:
        raise TrainingStopped(f"out of GPU memory with a single image ({reason}): lower --train-resolution")
    half = math.ceil(present / 2)
    alone = any(size() == 1 or not isinstance(norm, SYNCED_NORMS) for norm in _norms_of(state.model))
    if alone and not enough_for_batch_norm(config, resolution, half, size()):
        raise TrainingStopped(
            f"out of GPU memory with micro-batches of {present} images of {resolution} px ({reason}), and smaller ones would "
            "leave a single image, of which batch norm knows no variance: make room in the GPU's memory"
        )
    return half
