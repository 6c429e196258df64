"""The training step on a GPU: the host reads nothing of the device, copies nothing, and the fast layout is kept."""

import os

import pytest
import torch
from conftest import fresh_state
from fake_cuda import QUICK, Copies, batch, fake_cuda, steps
from torch._subclasses.fake_tensor import DataDependentOutputException

from config import CONFIG, RECIPES
from engine.inference.batch_norm import recompute_bn_stats
from engine.inference.scoring import evaluate, topk_correct
from engine.system.device import autocast

NATIVE_BF16 = int(os.environ["STANDIN_CAPABILITY"]) >= 80
VARIANTS = {
    "micro-batches": {"micro_batch_size": 5},
    "no clipping": {"grad_clip_value": float("inf")},
    "mixup": {"mixup_alpha": 0.2},
    "cutmix": {"cutmix_alpha": 1.0},
    "mixup and cutmix, bce, micro-batches": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "loss": "bce", "micro_batch_size": 5},
    "colout": {"colout": 0.05},
    "colout, mixup and cutmix, micro-batches": {"colout": 0.3, "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "micro_batch_size": 5},
    "bce": {"loss": "bce", "label_smoothing": 0.1},
    "blur": {"blur_pool": True, "blur_max_pool": True},
    "stochastic depth": {"stochastic_depth": 0.2},
    "running average": {"ema_half_life_images": 1600, "ema_every_images": 16},
    "SAM in micro-batches, sgdw": {"sam_rho": 0.5, "sam_every_steps": 1, "micro_batch_size": 5, "optimizer": "sgdw"},
    "low": {"memory": "low"},
    "lowest": {"memory": "lowest"},
    "class weights, frozen, backbone slower, nesterov": {
        "class_weights": "balanced",
        "freeze": "layer2",
        "backbone_rate_factor": 0.1,
        "optimizer": "sgd",
        "nesterov": True,
        "memory": "low",
    },
    "class weights, bce, mixup, SAM": {
        "class_weights": "balanced",
        "loss": "bce",
        "mixup_alpha": 0.2,
        "sam_rho": 0.5,
        "sam_every_steps": 1,
    },
    "low, stochastic depth, blur": {"memory": "low", "stochastic_depth": 0.2, "blur_pool": True, "architecture": "resnet50"},
}


def require_device_alone(state, copies, mixed):
    assert copies == []
    held = [*state.model.parameters(), *state.model.buffers()]
    trained = [p for p in state.model.parameters() if p.requires_grad]
    held += [p.grad for p in trained]
    held += [t for of_one in state.optimizer.state.values() for t in of_one.values()]
    assert {tensor.device.type for tensor in held} == {"cuda"}
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    if NATIVE_BF16 or state.precision != "bf16":  # PyTorch has no channels-last convolution in emulated bf16
        assert all(p.grad.stride() == p.stride() for p in trained)


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        *(("fp16", optimizer) for optimizer in ("sgd", "sgdw", "adamw", "adam", "muon")),
        ("bf16", "sgd"),
        ("bf16", "muon"),
        ("fp32", "sgd"),
    ],
)
def test_the_host_reads_and_copies_nothing_in_any_precision_with_any_optimizer(precision, optimizer):
    require_device_alone(*steps(precision, optimizer=optimizer))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_host_reads_and_copies_nothing_whatever_is_switched_on(variant):
    require_device_alone(*steps(**VARIANTS[variant]))


@pytest.mark.parametrize("recipe", ["seed", "fast", "medium", "hot", "finetune"])  # mild is in medium, long is fast for longer
def test_the_host_reads_and_copies_nothing_in_any_recipe(recipe):
    quick = ("batch_size", "epochs", "warmup_epochs", "compile", "architecture")
    settings = CONFIG | RECIPES[recipe] | {key: QUICK[key] for key in quick}
    settings |= {"swa_start_epoch": 3 if settings["swa_start_epoch"] else 0, "ema_every_images": 16, "sam_every_steps": 1}
    del settings["precision"]
    require_device_alone(*steps("fp16", **settings))


def test_control_a_value_read_in_the_step_is_noticed(monkeypatch):
    real = topk_correct
    monkeypatch.setattr("train.topk_correct", lambda *a: (real(*a), float(real(*a)))[0])
    with pytest.raises(DataDependentOutputException):
        steps()


def test_control_a_tensor_on_the_cpu_is_noticed(monkeypatch):
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: real(*a, **(k | {"device": "cpu"} if a == ((),) else k)))
    with pytest.raises(RuntimeError, match="found cpu"):
        steps()


def test_control_a_copy_to_the_host_is_noticed(monkeypatch):
    real = topk_correct
    monkeypatch.setattr("train.topk_correct", lambda *a: real(*a).cpu().to("cuda"))
    _, copies, _ = steps()
    assert len(copies) == 4


def test_recomputing_batch_norm_statistics_reads_nothing_on_the_host():
    with fake_cuda():
        state = fresh_state(CONFIG | QUICK, "fp16", 1000, 50, "cuda")
        batches = (batch(16, 32, "fp16") for _ in range(3))
        recompute_bn_stats(state.averaged_model, batches, autocast(state.device, "fp16"))


@pytest.mark.parametrize(
    ("flip", "asked"),
    [
        (False, {}),
        (True, {"by_class": True, "ensemble": True}),  # as a run of uneven classes
        (False, {"confusions_of": "ema", "logits_of": ("raw", "averaged")}),  # as evaluate.py
    ],
)
def test_scoring_waits_for_the_device_once_at_its_end(flip, asked):
    with fake_cuda():
        state = fresh_state(CONFIG | QUICK | {"ema_half_life_images": 1600}, "fp16", 1000, 50, "cuda")
        served = []

        def batches():
            for images in (16, 16, 4):
                served.append(images)
                yield batch(images, 32, "fp16")
            served.append(list(copies.found))

        models = {"raw": state.model, "averaged": state.averaged_model, "ema": state.ema_model}
        with pytest.raises(DataDependentOutputException), Copies(asynchronous=True) as copies:  # the sums, read at the end
            evaluate(models, batches(), 36, autocast(state.device, "fp16"), flip, **asked)
        assert served == [16, 16, 4, []]
