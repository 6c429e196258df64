"""Bytes alive at the peak of the program's own step, by torch's MemTracker: no allocator rounding, no workspaces of cuDNN,
no CUDA context."""

import contextlib
from unittest import mock

import pytest
from conftest import fresh_state
from fake_cuda import CUDA, batch, fake_cuda
from torch.distributed._tools.mem_tracker import MemTracker

from config import CONFIG
from engine.training import sam
from train import train_step

GIB = 2**30


@contextlib.contextmanager
def two_passes(tracker):
    """Let the tracker see SAM's second pass through the network, which it takes for an error otherwise."""
    uphill = sam.uphill

    @contextlib.contextmanager
    def noticed(state, config):
        with uphill(state, config):
            tracker.reset_mod_stats()
            yield

    with mock.patch.object(sam, "uphill", noticed):
        yield


def peak_bytes(memory, optimizer, **changes):
    """Return the bytes alive at the peak of a step in a run's middle: batch 256, 224 px, fp16, with an average."""
    config = CONFIG | {"optimizer": optimizer, "memory": memory, "compile": "off"} | changes
    assert config["swa_start_epoch"] and config["batch_size"] == 256
    with fake_cuda():
        state = fresh_state(config, "fp16", 1000, 5000, CUDA)
        state.ddp_model.train()
        images, labels = batch(256, 224, "fp16")
        if optimizer == "adamw":
            train_step(state, images, labels, config)  # makes its moments
            state.optimizer.zero_grad()
        tracker = MemTracker()
        tracker.track_external(state.model, state.optimizer, state.averaged_model, images, labels, state.sums.values)
        with tracker, two_passes(tracker):
            result = train_step(state, images, labels, config)
            state.sums.add(result.loss, result.correct, result.grad_norm, 256)
        return tracker.get_tracker_snapshot("peak")[next(iter(state.model.parameters())).device]["Total"]


@pytest.mark.parametrize(
    ("memory", "sgd_gib", "adamw_gib"), [("fast", 10.87, 10.96), ("low", 5.97, 6.07), ("lowest", 4.54, 4.63)]
)
def test_the_memory_of_a_step_is_what_the_documentation_says(memory, sgd_gib, adamw_gib):
    assert peak_bytes(memory, "sgd") / GIB == pytest.approx(sgd_gib, rel=0.02)
    assert peak_bytes(memory, "adamw") / GIB == pytest.approx(adamw_gib, rel=0.02)


def test_sam_takes_a_copy_of_the_weights_more():
    assert peak_bytes("fast", "sgd", sam_rho=0.5, sam_every_steps=1) / GIB == pytest.approx(10.87 + 0.10, rel=0.005)
