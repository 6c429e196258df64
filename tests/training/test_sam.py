"""SAM (arXiv:2010.01412), against the formula written out with torch.autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import WithoutBatchNorm, state_of

import train
from config import CONFIG

SAM = CONFIG | {"batch_size": 8, "epochs": 4, "warmup_epochs": 0, "swa_start_epoch": 0, "architecture": "resnet18"}
SAM |= {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "learning_rate": 0.1}
SAM |= {"grad_clip_value": math.inf, "sam_rho": 0.5, "sam_every_steps": 1}


class WithBatchNorm(WithoutBatchNorm):
    """The same small network with batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(8)


def some_batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 5


def gradient_of(model, weights, images, labels):
    weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    loss = F.cross_entropy(torch.func.functional_call(model, weights, images), labels)
    return loss.item(), dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def after_a_step_of_the_paper(model, images, labels, rho=0.5, rate=0.1):
    """Return (loss at the weights, the weights after a step): w - rate * gradient(w + rho * g / |g|), g the gradient at w."""
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    loss, there = gradient_of(model, weights, images, labels)
    length = math.sqrt(sum((g.double() ** 2).sum().item() for g in there.values()))
    uphill = {name: weight + rho * there[name] / length for name, weight in weights.items()}
    _, gradient = gradient_of(model, uphill, images, labels)
    return loss, {name: weight - rate * gradient[name] for name, weight in weights.items()}


def step(state, config, batch):
    state.model.train()
    return train.train_step(state, *batch, config)


@pytest.mark.parametrize(("micro_batch_size", "scale"), [(8, 1.0), (3, 2.0**16)])
def test_the_step_is_that_of_the_paper_at_any_loss_scale_and_in_micro_batches(micro_batch_size, scale):
    state = state_of(WithoutBatchNorm(), SAM)
    state.micro_batch_size, state.scaler = micro_batch_size, torch.amp.GradScaler("cpu", init_scale=scale)
    loss, expected = after_a_step_of_the_paper(state.model, *some_batch())
    plain = gradient_of(state.model, dict(state.model.named_parameters()), *some_batch())[1]
    before = {name: weight.detach().clone() for name, weight in state.model.named_parameters()}
    result = step(state, SAM, some_batch())
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    for name, weight in state.model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-5, atol=1e-6)
    moved = {name: before[name] - weight.detach() for name, weight in state.model.named_parameters()}
    assert any((moved[name] - 0.1 * plain[name]).norm() > 0.05 * moved[name].norm() for name in moved)  # not the plain step


def test_each_nth_step_alone_looks_uphill():
    config = SAM | {"sam_every_steps": 4}
    state, passes = state_of(WithoutBatchNorm(), config), []
    state.model.register_forward_hook(lambda *_: passes.append(state.schedule.last_epoch + 1))
    for seed in range(12):
        step(state, config, some_batch(seed))
    assert passes == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]


def test_batch_norm_counts_the_batch_once_and_at_the_weights():
    state, plain = state_of(WithBatchNorm(), SAM), state_of(WithBatchNorm(), SAM)
    step(state, SAM, some_batch())
    step(plain, SAM | {"sam_rho": 0.0}, some_batch())
    statistics = dict(plain.model.named_buffers())
    assert statistics["norm.num_batches_tracked"] == 1
    for name, buffer in state.model.named_buffers():
        assert torch.equal(buffer, statistics[name]), name


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_gradient_that_is_not_finite_in_either_pass_skips_the_step_whole(bad_pass):
    state, passes = state_of(WithBatchNorm(), SAM | {"momentum": 0.9}), []
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def spoil(gradient):
        passes.append(1)
        return gradient * (math.inf if len(passes) == bad_pass else 1.0)

    state.model.fc.weight.register_hook(spoil)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    result = step(state, SAM, some_batch())
    assert len(passes) == 2
    assert not torch.isfinite(result.grad_norm)
    assert state.scaler.get_scale() == 512.0
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_error_on_the_way_back_from_uphill_leaves_the_weights_as_they_were():
    state, passes = state_of(WithBatchNorm(), SAM), []

    def fail_uphill(*_):
        passes.append(1)
        if len(passes) == 2:
            raise torch.OutOfMemoryError("uphill")

    state.model.fc.register_forward_hook(fail_uphill)
    before = [p.detach().clone() for p in state.model.parameters()]
    with pytest.raises(torch.OutOfMemoryError, match="uphill"):
        step(state, SAM, some_batch())
    assert all(torch.equal(p, old) for p, old in zip(state.model.parameters(), before, strict=True))


def test_a_probe_of_the_memory_goes_uphill_whatever_the_step():
    config = SAM | {"sam_every_steps": 100}
    state, passes = state_of(WithBatchNorm(), config), []
    state.model.register_forward_hook(lambda *_: passes.append(1))
    train.train_step(state, *some_batch(), config, probe=True)
    assert len(passes) == 2
