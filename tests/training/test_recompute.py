"""Less memory, the same bits: what is computed again gives what was kept."""

import copy
import ctypes
import gc
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import fresh_state
from torchvision.models.resnet import BasicBlock

from config import CONFIG
from engine.training.activation_checkpointing import with_activation_checkpointing
from model import build_model
from train import train_step

CPU = torch.device("cpu")
QUICK = CONFIG | {"batch_size": 8, "epochs": 4, "warmup_epochs": 1, "swa_start_epoch": 0}


def images_and_labels(resolution=64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, resolution, resolution, generator=generator)
    return images.to(memory_format=torch.channels_last), torch.arange(8) % 10


def trained(memory, precision="fp32", steps=3, **changes):
    """Return (losses, the state's tensors, gradients of the last step) of a few steps."""
    config = QUICK | {"memory": memory} | changes
    torch.manual_seed(0)
    state = fresh_state(config, precision, 10)
    state.model.train()
    losses = [train_step(state, *images_and_labels(), config).loss for _ in range(steps)]
    gradients = {name: p.grad.clone() for name, p in state.model.named_parameters()}
    return torch.stack(losses), state.model.state_dict(), gradients


@pytest.mark.parametrize("memory", ["low", "lowest"])
@pytest.mark.parametrize(
    ("architecture", "precision", "changes"),
    [
        ("resnet18", "fp32", {}),
        pytest.param("resnet50", "fp32", {"micro_batch_size": 4, "blur_pool": True}, marks=pytest.mark.slow),
        pytest.param("resnet50", "bf16", {"stochastic_depth": 0.3}, marks=pytest.mark.slow),
    ],
)
def test_losses_gradients_weights_and_statistics_are_the_same_to_the_last_bit(memory, architecture, precision, changes):
    plain, less = (trained(kind, precision, architecture=architecture, **changes) for kind in ("fast", memory))
    assert torch.equal(plain[0], less[0])
    for ours, theirs in zip(plain[1:], less[1:], strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert int(less[1]["bn1.num_batches_tracked"]) == int(less[1]["layer1.0.bn1.num_batches_tracked"]) > 0


@pytest.mark.slow
def test_each_mode_holds_less_memory_between_forward_and_backward():
    held = {}
    for memory in ("lowest", "low", "fast"):
        model = build_model(QUICK | {"memory": memory}, 10).train()
        images = torch.randn(32, 3, 64, 64).to(memory_format=torch.channels_last)
        before = resident_bytes()
        logits = model(images)
        held[memory] = resident_bytes() - before
        logits.sum().backward()
        del logits, model
    assert held["low"] < 0.7 * held["fast"]
    assert held["lowest"] < 0.85 * held["low"]


class Dropping(BasicBlock):
    """A block of a reader's own."""

    def forward(self, images):
        return F.dropout(super().forward(images), 0.5)


def test_a_block_with_a_forward_of_its_own_gives_the_same_in_every_mode():
    images, gradients = torch.randn(2, 4, 8, 8, requires_grad=True), []
    for memory in ("fast", "low", "lowest"):
        torch.manual_seed(0)
        block = with_activation_checkpointing(Dropping, memory)(4, 4)
        gradients += torch.autograd.grad(block(images).square().sum(), images)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def resident_bytes():
    """Return the memory that this process really holds: freed heap is given back first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_without_gradients_nothing_is_computed_again():
    model = build_model(QUICK | {"memory": "lowest", "architecture": "resnet18"}, 10)
    calls = []
    model.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        model.eval()(images_and_labels()[0])
    assert len(calls) == 1


def test_a_copy_as_averages_keep_it_is_whole():
    model = build_model(QUICK | {"memory": "low", "architecture": "resnet18"}, 10)
    twin = copy.deepcopy(model).train()
    assert list(twin.state_dict()) == list(build_model(QUICK | {"architecture": "resnet18"}, 10).state_dict())
    twin(images_and_labels()[0]).sum().backward()
    assert twin.layer1[0].conv1.weight.grad is not None
    assert model.layer1[0].conv1.weight.grad is None
