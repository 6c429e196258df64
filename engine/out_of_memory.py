"""When the GPU's memory does not suffice: the same step, or the same pass, in smaller parts, or an end in words."""

import contextlib
import math

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from engine.compiling import COMPILE_ERRORS, give_up_compiling
from engine.device import rebuilt_scaler
from engine.distributed import size
from engine.errors import TrainingStopped, first_line
from engine.micro_batches import enough_for_batch_norm
from engine.random_state import random_state, random_state_restored_on_error, set_random_state
from engine.sync_norm import SYNCED_NORMS

# What CUDA's libraries say when the allocator itself was not asked. cuDNN finds no engine when none gets its workspace.
SIGNS = (
    "out of memory",
    "cudaerrormemoryallocation",
    "cublas_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "cusparse_status_alloc_failed",
    "cufft_alloc_failed",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    "was unable to find an engine to execute this computation",
    "unable to find a valid cudnn algorithm to run convolution",
)


def is_out_of_memory(error):
    """Return whether an exception says that a GPU's memory did not suffice.

    It comes as torch.OutOfMemoryError from PyTorch's allocator, as torch.AcceleratorError from the driver, and as a plain
    RuntimeError from cuBLAS, cuDNN or the compiler.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def _reason(error):
    """Return what an error says, without the figures and the advice that follow in the allocator's."""
    return ". ".join(first_line(error).split(". ")[:2])


@contextlib.contextmanager
def stop_on_oom(what):
    """Turn an out-of-memory error of the block into TrainingStopped.

    Args:
        what: says what did not fit and what to do, as the end of 'out of GPU memory ...'.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingStopped(f"out of GPU memory {what} ({_reason(error)})") from None


# The step ------------------------------------------------------------------------------------------------------------


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
            give_up_compiling(state.model)
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


# Passes without a gradient -------------------------------------------------------------------------------------------


def in_parts_that_fit(work):
    """Return a function of tensors [B, ...] that gives the list of work's results, one for each of the parts that fit.

    That is one part, the whole batch, until the memory does not suffice: from then on twice as many. An image's result must
    not depend on the others of its part, and work must change nothing.

    Raises:
        TrainingStopped: a single image does not fit.
    """
    parts = 1

    def work_in_parts(*tensors):
        nonlocal parts
        while True:
            try:
                return [work(*part) for part in zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = _reason(error)
            if parts >= len(tensors[0]):
                raise TrainingStopped(f"out of GPU memory with a single image ({reason}): lower the resolution")
            parts *= 2
            torch.cuda.empty_cache()

    return work_in_parts


def pass_in_parts_that_fit(run_pass, batches, batch_size, device):
    """Return run_pass(batches()), a pass that a network learns from; where whole batches do not fit, begun anew with parts.

    Args:
        run_pass: function of an iterable of (images [B, ...], labels [B]); beginning anew, it forgets what it has learned.
        batches: function that returns such an iterable, the same each time.
        batch_size: images of a batch in this process.
    Raises:
        TrainingStopped: parts of two images do not fit; or whole batches, with several processes that must stay in step.
    """
    parts = 1
    while True:
        try:
            with random_state_restored_on_error(device):
                return run_pass(_parts_of(batches(), parts))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = _reason(error)
        if size() > 1 or 2 * parts > batch_size // 2:  # batch norm may need two images
            raise TrainingStopped(f"out of GPU memory in recomputing batch-norm statistics ({reason}): lower --batch-size")
        parts *= 2
        torch.cuda.empty_cache()


def _parts_of(batches, parts):
    for images, labels in batches:
        yield from zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
