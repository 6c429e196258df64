"""MosaicML's recipes, held against figures worked out by hand from its YAML files (mosaicml/examples, blogs/resnet/recipes).

Theirs are written for batches of 2,048 on 8 GPUs: 625 steps an epoch of ImageNet-1K. At batches of 256 an epoch has 5,004.
"""

import copy

import pytest
import torch
from conftest import fresh_state

from config import CONFIG, RECIPES
from engine.cli.command_line import parse_command_line
from engine.data.batches import resolution_of_epoch
from engine.training.averaging import build_ema_model, ema_every_steps
from engine.training.optim import SGDW, build_optimizer, build_schedule
from model import build_model

STEPS = {256: 5004, 2048: 625}
# Of 90 epochs, by hand: epoch, share of the peak rate (8 epochs straight up, then (1 + cos(pi * (epoch - 8) / 82)) / 2), and
# the side in px: of mild and medium 88 for 36 epochs, then 88 + 88 * (epoch - 36) / 36 to 176 at 72; of hot 0.6 * 176 = 105.6
# for 18 epochs, then 105.6 + 70.4 * (epoch - 18) / 54.
BY_HAND = [
    (0, 0.0, 88, 105.6),
    (1, 0.125, 88, 105.6),
    (4, 0.5, 88, 105.6),
    (8, 1.0, 88, 105.6),
    (18, 0.9637, 88, 105.6),
    (28.5, 0.8536, 88, 119.3),
    (36, 0.7389, 88, 129.1),
    (49, 0.5, 119.8, 146.0),
    (54, 0.4048, 132, 152.5),
    (69.5, 0.1464, 169.9, 172.7),
    (72, 0.1143, 176, 176),
    (81, 0.0294, 176, 176),
    (90, 0.0, 176, 176),
]
PEAK = {256: 0.256, 2048: 2.048}
DECAY = {"mild": 5e-4, "medium": 5e-4, "hot": 3e-4}  # of a step of 2,048 images at the peak rate
SMOOTHING = {"mild": 0.08, "medium": 0.1, "hot": 0.13}


def configuration(recipe, *flags, epochs=90):
    return parse_command_line([f"--recipe={recipe}", f"--epochs={epochs}", *flags]).config


def tiny_optimizer(config):
    return build_optimizer(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), config)


@pytest.mark.parametrize("batch_size", [256, 2048])
@pytest.mark.parametrize("recipe", ["mild", "medium", "hot"])
def test_rate_and_size_are_those_of_the_yaml(recipe, batch_size):
    config = configuration(recipe, f"--batch-size={batch_size}")
    schedule = build_schedule(tiny_optimizer(config), config, STEPS[batch_size])
    for epoch, share, *sides in BY_HAND[:-1]:
        schedule.move_to(round(epoch * STEPS[batch_size]))
        a_step = 1 / (8 * STEPS[batch_size])  # our first step is not at rate 0
        assert schedule.get_last_lr()[0] / PEAK[batch_size] == pytest.approx(share, abs=a_step + 5e-5)
        exact = sides[recipe == "hot"]  # theirs follows the step, ours is that of the epoch's end, both in steps of 4 px
        assert exact - 2 - 1.6 <= resolution_of_epoch(config, int(epoch)) <= exact + 2 + 2.5
    schedule.move_to(90 * STEPS[batch_size])
    assert schedule.get_last_lr()[0] == 0


@pytest.mark.parametrize("recipe", ["mild", "medium", "hot"])
@pytest.mark.parametrize("epochs", [1, 9, 29, 60, 135, 400])
def test_durations_are_shares_of_the_run_at_any_length(recipe, epochs):
    config = configuration(recipe, epochs=epochs)
    assert config["warmup_epochs"] == pytest.approx(8 / 90 * epochs)
    ramp = (0.2 if recipe == "hot" else 0.4, 0.8)
    assert (config["resolution_ramp_start"], config["resolution_ramp_end"]) == ramp


@pytest.mark.parametrize("recipe", ["mild", "medium", "hot"])
def test_decay_smoothing_and_momentum_are_those_of_the_yaml(recipe):
    for batch_size, steps in ((2048, 1), (256, 8)):
        config = configuration(recipe, f"--batch-size={batch_size}")
        optimizer = tiny_optimizer(config)
        weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for weight in weights:
            torch.nn.init.ones_(weight)
        for group in optimizer.param_groups:
            group["lr"] = 0.75 * PEAK[batch_size]
        for _ in range(steps):
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
        for weight in weights:  # norms and biases, too
            torch.testing.assert_close(weight.detach(), torch.full_like(weight, 1 - 0.75 * DECAY[recipe]), rtol=0, atol=2e-7)
        assert {(group["momentum"], group["nesterov"], group["dampening"]) for group in optimizer.param_groups} == {
            (0.875, False, 0)
        }
        assert config["label_smoothing"] == SMOOTHING[recipe]


@pytest.mark.parametrize("recipe", ["mild", "medium", "hot"])
@pytest.mark.parametrize(("batch_size", "every"), [(2048, 20), (256, 160), (64, 640)])
def test_the_running_average_forgets_half_in_204_800_images_at_any_batch(recipe, batch_size, every):
    config = configuration(recipe, f"--batch-size={batch_size}")
    assert ema_every_steps(config) == every
    model = torch.nn.Linear(1, 1)
    average = build_ema_model(model, config)
    average.update_parameters(copy.deepcopy(model))
    first = average.module.weight.item()
    torch.nn.init.constant_(model.weight, first + 1)
    for _ in range(5):  # 204,800 images
        average.update_parameters(model)
    assert average.module.weight.item() - first == pytest.approx(0.5, abs=1e-5)


def test_the_blocks_of_medium_and_hot_are_those_of_the_yaml():
    keys = "mixup_alpha sam_rho sam_every_steps colout augmentation randaugment_ops randaugment_magnitude stochastic_depth"
    of = {recipe: tuple((CONFIG | RECIPES[recipe])[key] for key in keys.split()) for recipe in ("mild", "medium", "hot")}
    assert of["mild"] == (0.0, 0.0, 10, 0.0, "none", 2, 9, 0.0)
    assert of["medium"] == (0.2, 0.5, 10, 0.0, "none", 2, 9, 0.0)
    assert of["hot"] == (0.25, 0.5, 5, 0.05, "composer_randaugment", 1, 30, 0.1)
    differs = {key for key in RECIPES["hot"] if RECIPES["hot"][key] != RECIPES["mild"].get(key)}
    more = {"label_smoothing", "weight_decay", "resolution_ramp_start", "start_resolution", "epochs", "warmup_epochs"}
    assert differs == set(keys.split()) | more


# The first weights ---------------------------------------------------------------------------------------------------


def test_the_first_weights_are_drawn_as_the_initializers_of_the_yaml_draw_them():
    model = build_model(CONFIG | RECIPES["mild"], 1000)
    for name, fan_in in {"conv1": 3 * 49, "layer3.1.conv2": 256 * 9, "layer4.0.conv3": 512, "fc": 2048}.items():
        weight = model.get_submodule(name).weight
        assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)
        assert weight.mean().item() == pytest.approx(0, abs=0.02 * (2 / fan_in) ** 0.5 * 10)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    weights = torch.cat([norm.weight.detach() for norm in norms])
    assert len(norms) == 53 and weights.min() >= 0 and weights.max() <= 1
    torch.testing.assert_close(
        weights.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([0.1, 0.5, 0.9]), atol=0.02, rtol=0
    )
    assert all(not norm.bias.any() for norm in norms)
    torch.testing.assert_close(model.fc.bias.detach(), torch.full((1000,), -6.907755))  # -log(1000)


def test_drawn_by_fan_in_the_blocks_can_still_start_as_the_identity():
    model = build_model(CONFIG | RECIPES["mild"] | {"zero_init_residual": True}, 10)
    assert not any(block.bn3.weight.any() for block in model.layer3)
    assert model.layer3[0].bn2.weight.any()


# SGDW ----------------------------------------------------------------------------------------------------------------


def test_sgdw_is_the_update_written_out():
    """momentum * buffer + gradient; weights shrink by decay * rate / peak, then follow the buffer at the rate."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    optimizer = SGDW([{"params": [weight], "weight_decay": 0.1}], 2.0, momentum=0.875)
    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    expected, buffer = weight.detach().clone(), torch.zeros_like(weight)
    for number in range(7):
        gradient, rate = torch.randn(6, 5, dtype=torch.float64), 2.0 * (7 - number) / 7
        optimizer.param_groups[0]["lr"], weight.grad = rate, gradient.clone()
        optimizer.step()
        buffer = 0.875 * buffer + gradient
        expected = expected * (1 - 0.1 * rate / 2.0) - rate * buffer
        torch.testing.assert_close(weight.detach(), expected)


def test_a_step_that_the_scaler_skips_shrinks_nothing():
    config = CONFIG | RECIPES["mild"] | {"batch_size": 8, "architecture": "resnet18"}
    state = fresh_state(config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    state.scaler.scale(torch.zeros(()))
    state.scaler.step(state.optimizer)
    assert all(torch.equal(p, old) for p, old in zip(state.model.parameters(), before, strict=True))


def decayed_weights(optimizer, steps=3000):
    """Weights of a toy on which decay and gradient pull against each other, over a straight warm-up and a straight fall."""
    weight = optimizer.param_groups[0]["params"][0]
    curvature = torch.linspace(0.01, 1.0, 50)
    generator = torch.Generator().manual_seed(3)
    peak = optimizer.param_groups[0]["lr"]
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = peak * min(number / 300, (steps - number) / (steps - 300))
        weight.grad = curvature * (weight.detach() - 1) + 0.1 * torch.randn(50, generator=generator)
        optimizer.step()
    return weight.detach()


def test_on_a_toy_decay_inside_the_gradient_ends_where_the_decoupled_one_does():
    """5e-4 apart from the gradient, and 5e-4 * (1 - momentum) / rate inside of it: one optimum, slightly other ways."""
    apart, inside = (torch.nn.Parameter(torch.zeros(50)) for _ in range(2))
    ours = decayed_weights(SGDW([{"params": [apart], "weight_decay": 5e-4}], 0.1, momentum=0.875))
    theirs = decayed_weights(torch.optim.SGD([inside], lr=0.1, momentum=0.875, weight_decay=5e-4 * 0.125 / 0.1))
    plain = decayed_weights(torch.optim.SGD([torch.nn.Parameter(torch.zeros(50))], lr=0.1, momentum=0.875))
    assert (ours - theirs).norm() < 0.02 * (plain - ours).norm()
