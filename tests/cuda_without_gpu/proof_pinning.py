"""Batches in pinned memory, and what is left behind where the system does not allow it."""

import pytest
import torch
from conftest import make_demo_data

from config import CONFIG
from engine.data.batches import training_requests
from engine.data.buffers import BatchBuffers
from engine.data.loader import BatchLoader
from engine.data.splits import open_splits
from engine.system.interruption import StopRequest


def test_pinned_buffers_are_pinned_until_they_are_unpinned():
    buffers = BatchBuffers(3, 8, 64)
    images, labels = buffers.batch(1, 8, 64)
    assert not images.is_pinned()
    assert buffers.pin()
    assert images.is_pinned() and labels.is_pinned()
    buffers.unpin()
    assert not images.is_pinned()


@pytest.mark.parametrize("admitted", ["0", "1"])
def test_where_nothing_can_be_pinned_it_is_said_and_the_gpu_is_used_without(monkeypatch, tmp_path, admitted):
    monkeypatch.setenv("STANDIN_REGISTERED", admitted)
    make_demo_data(tmp_path / "images", 20, 20)
    splits = open_splits(tmp_path / "images")
    config = CONFIG | {"batch_size": 8, "train_resolution": 32, "val_resolution": 32, "num_workers": 0}
    said = []
    server = BatchLoader(splits, config, torch.device("cuda"), torch.float16, StopRequest(), said.append)
    assert len(said) == 1 and "could not be pinned" in said[0]
    torch.empty(2**26, device="cuda").fill_(1.0)  # raises the error that an earlier call has left behind
    requests = training_requests(splits["train"], config, epoch=0)
    assert [len(labels) for _, labels in server.training(requests, set())] == [8, 8]
    server.close()
    torch.ones(1, device="cuda")


def test_memory_that_cannot_be_unpinned_ends_no_run():
    buffers = BatchBuffers(1, 8, 64)
    assert buffers.pin()
    assert int(torch.cuda.cudart().cudaHostUnregister(buffers.batch(0, 8, 64)[1].data_ptr())) == 0
    buffers.unpin()
    torch.ones(1, device="cuda")
