"""The program's own code on torch's FakeTensorMode, with the stand-in below it: every tensor has a device, a type, a shape
and a storage, and no content. Whatever reads a value of the device on the host raises, and so does an operator whose
tensors lie on different devices."""

import contextlib
import copy
import traceback

import pytest
import torch
import torchvision.transforms.v2 as v2
from conftest import fresh_state
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import CONFIG
from engine.system.device import AUTOCAST_DTYPES
from engine.training import averaging, mixing
from engine.training.mixing import build_mixing
from engine.training.out_of_memory import take_step
from train import train_step

CUDA = torch.device("cuda")
QUICK = {"batch_size": 16, "epochs": 4, "warmup_epochs": 1, "swa_start_epoch": 3, "compile": "off", "architecture": "resnet18"}


@contextlib.contextmanager
def fake_cuda():
    """A context whose CUDA tensors are fake ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "_apply", _apply)
        patch.setattr(swa_utils, "deepcopy", _copied)
        for mixer in (v2.MixUp, v2.CutMix):
            patch.setattr(mixer, "__init__", _outside(mixer.__init__))
            patch.setattr(mixer, "make_params", _drawn_outside(mixer.make_params))
        patch.setattr(v2.RandomChoice, "forward", _choice)
        patch.setattr(mixing, "draw_kept_runs", _outside(mixing.draw_kept_runs))
        torch.autograd.set_multithreading_enabled(False)  # the backward pass in this thread, where the mode is
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                yield
        finally:
            torch.autograd.set_multithreading_enabled(True)


def _apply(self, function, recurse=True):
    """Module._apply without swapping tensors, which fake ones refuse."""
    for child in self.children():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            self._parameters[name] = torch.nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def _copied(model):
    """copy.deepcopy, which fails at fake tensors on a device: it is handed the copies."""
    copies = {id(p): torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in model.parameters()}
    copies |= {id(b): b.detach().clone() for b in model.buffers()}
    return copy.deepcopy(model, copies)


# What mixing draws by chance, it draws on the CPU, where a run has real tensors: outside of the fake mode.


def _outside(function):
    def real(*arguments, **options):
        with unset_fake_temporarily():
            return function(*arguments, **options)

    return real


def _drawn_outside(make_params):
    return lambda self, inputs: _outside(make_params)(self, [torch.empty(i.shape, device="meta") for i in inputs])


def _choice(self, *inputs):
    with unset_fake_temporarily():
        number = int(torch.multinomial(torch.tensor(self.p), 1))
    return self.transforms[number](*inputs)


def batch(images, resolution, precision, classes=1000):
    """Return (images, labels) as a run's batches arrive."""
    size = (images, 3, resolution, resolution)
    pixels = torch.empty(size, device=CUDA, dtype=AUTOCAST_DTYPES[precision], memory_format=torch.channels_last)
    return pixels, torch.zeros(images, dtype=torch.int64, device=CUDA)


class Copies(TorchDispatchMode):
    """Notes each operator between the host and the device: a GPU waits in most of them, and fake tensors let them pass.

    Args:
        asynchronous: let the copies pass, too, for which the host does not wait, since they say non_blocking.
    """

    def __init__(self, asynchronous=False):
        super().__init__()
        self.found, self.asynchronous = [], asynchronous

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        out = operator(*arguments, **(options or {}))
        if self.asynchronous and (options or {}).get("non_blocking"):
            return out
        copies = "copy" in str(operator) or "to" in str(operator)
        tensors = [
            t for t in tree_leaves((arguments, options or {}, out)) if isinstance(t, torch.Tensor) and (t.ndim or copies)
        ]
        if len({tensor.device.type for tensor in tensors}) > 1:
            caller = next(
                f for f in reversed(traceback.extract_stack()) if "_dispatch" not in f.name and f.filename != __file__
            )
            self.found.append(f"{operator} in {caller.filename}:{caller.lineno}")
        return out


def steps(precision="fp16", resolutions=(32, 64), **changes):
    """Take a training step at each resolution, and all that an epoch does after one; return (state, copies, mixed images)."""
    config = CONFIG | QUICK | changes
    images = config["batch_size"]
    with fake_cuda():
        state = fresh_state(config, precision, 1000, 50, CUDA)
        state.ddp_model.train()
        if config["class_weights"] != "none":
            state.class_weights = torch.ones(1000, device=CUDA)
        mix = build_mixing(config, 1000)
        batches = [batch(images, resolution, precision) for resolution in resolutions]
        with Copies() as copies:
            for pixels, labels in batches:
                mixed, targets = mix(pixels, labels)
                result = take_step(train_step, state, mixed, targets, config, print)
                state.sums.add(result.loss, result.correct, result.grad_norm, images)
                averaging.update_ema(state.ema_model, state.model, config, steps_done=state.schedule.last_epoch)
    return state, copies.found, mixed
