"""The state of torch's random number generators: what stochastic depth and the mixing of images draw from."""

import contextlib

import torch


def random_state(device):
    """Return the state of the CPU's generator and, for a GPU, of its own; a GPU is not waited for."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(saved, device):
    """Go on drawing where random_state() was asked, as far as that knew this kind of device."""
    torch.set_rng_state(saved["cpu"])
    if device.type == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"], device)


@contextlib.contextmanager
def drawing_from(seed):
    """Let a block draw on the CPU from a seed; torch's random state, a GPU's too, then is what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed each GPU's generator, too
        yield


@contextlib.contextmanager
def random_state_restored_on_error(device):
    """Let a block that is broken off have drawn nothing, so that whoever begins it anew draws the same numbers."""
    before = random_state(device)
    try:
        yield
    except BaseException:
        set_random_state(before, device)
        raise
