"""When the GPU's memory does not suffice: an end in words, or the same pass in smaller parts."""

import contextlib

import torch

from engine.system.distributed import size
from engine.system.errors import TrainingStopped, first_line
from engine.system.random_state import random_state_restored_on_error

# What CUDA's libraries say when the allocator itself was not asked. cuDNN finds no engine when none gets its workspace; the
# libraries' handles take memory, and are 'not initialized' where they get none.
SIGNS = (
    "out of memory",
    "cudaerrormemoryallocation",
    "gpu memory allocation failed",
    "not enough memory for workspace",
    "_status_alloc_failed",
    "_status_not_initialized",
    "cufft_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    "was unable to find an engine to execute this computation",
    "unable to find a valid cudnn algorithm to run convolution",
    "no valid convolution algorithms available in cudnn",
)

OUTSIDE_STEPS = "outside of a training step: make room in the GPU's memory (nvidia-smi lists who holds it)"


def is_out_of_memory(error):
    """Return whether an exception says that a GPU's memory did not suffice.

    It comes as torch.OutOfMemoryError from PyTorch's allocator, as torch.AcceleratorError from the driver, and as a plain
    RuntimeError from cuBLAS, cuDNN or the compiler.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def reason_of(error):
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
        raise TrainingStopped(f"out of GPU memory {what} ({reason_of(error)})") from None


# The step ------------------------------------------------------------------------------------------------------------


def retry_in_parts_on_oom(work):
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
                reason = reason_of(error)
            if parts >= len(tensors[0]):
                raise TrainingStopped(f"out of GPU memory with a single image ({reason}): lower the resolution")
            parts *= 2
            torch.cuda.empty_cache()

    return work_in_parts


def retry_pass_on_oom(run_pass, batches, batch_size, device):
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
            reason = reason_of(error)
        if size() > 1 or 2 * parts > batch_size // 2:  # batch norm may need two images
            raise TrainingStopped(f"out of GPU memory in recomputing batch-norm statistics ({reason}): lower --batch-size")
        parts *= 2
        torch.cuda.empty_cache()


def _parts_of(batches, parts):
    for images, labels in batches:
        yield from zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
