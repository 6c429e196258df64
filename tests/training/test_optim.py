import copy
import math

import pytest
import torch
from conftest import fresh_state
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import SWALR

from config import CONFIG, RECIPES
from engine.cli.command_line import parse_command_line
from engine.cli.keys import config_problems
from engine.training.optim import build_optimizer, build_schedule, parameter_groups
from model import build_model

STEPS = 7


def small_model():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.LazyLinear(5)
    )


def schedule_for(config, steps_per_epoch=STEPS, optimizer=None):
    optimizer = optimizer or torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0, momentum=0.9)
    return build_schedule(optimizer, CONFIG | config, steps_per_epoch)


def rates_of(schedule, steps):
    rates = []
    for _ in range(steps):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_the_rate_is_torchs_onecycle_over_the_whole_run(anneal):
    config = {"epochs": 20, "warmup_epochs": 4, "swa_start_epoch": 0, "onecycle_anneal": anneal}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    reference = OneCycleLR(
        optimizer, max_lr=0.0005, total_steps=20 * STEPS, pct_start=0.2, anneal_strategy=anneal, cycle_momentum=False
    )
    rates = rates_of(schedule_for(config), 20 * STEPS)
    assert rates == rates_of(reference, 20 * STEPS)
    assert max(rates) == pytest.approx(0.0005)
    assert rates.index(max(rates)) == 4 * STEPS - 1


def test_swa_learning_rate_zero_leaves_onecycle_untouched():
    config = {"epochs": 20, "warmup_epochs": 4}
    with_averaging = rates_of(schedule_for(config | {"swa_start_epoch": 10, "swa_learning_rate": 0}), 20 * STEPS)
    assert with_averaging == rates_of(schedule_for(config | {"swa_start_epoch": 0}), 20 * STEPS)


def test_swa_at_its_own_rate_passes_there_as_swalr_does_and_stays():
    config = {"epochs": 20, "warmup_epochs": 4, "swa_start_epoch": 11, "swa_learning_rate": 0.0002, "swa_anneal_epochs": 3}
    rates = rates_of(schedule_for(config), 20 * STEPS)
    plain = rates_of(schedule_for(config | {"swa_start_epoch": 0}), 20 * STEPS)
    start, passage = 10 * STEPS, 3 * STEPS
    assert rates[:start] == plain[:start]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=plain[start])
    reference = rates_of(SWALR(optimizer, swa_lr=0.0002, anneal_epochs=passage), 10 * STEPS)
    assert rates[start:] == pytest.approx(reference, rel=1e-9)
    assert rates[-1] == 0.0002


@pytest.mark.parametrize("epochs", range(1, 13))
@pytest.mark.parametrize("recipe", ["seed", "demo"])
def test_a_short_run_rises_to_the_rate_that_is_given(recipe, epochs):
    config = parse_command_line([f"--recipe={recipe}", f"--epochs={epochs}", "--learning-rate=0.02"]).config
    rates = rates_of(schedule_for(config, 50), epochs * 50)
    assert rates[0] == pytest.approx(0.02 / 25) and max(rates) == pytest.approx(0.02)


@given(
    epochs=st.integers(1, 12),
    warmup=st.integers(0, 12),
    steps_per_epoch=st.integers(1, 9),
    swa_start=st.integers(0, 12),
    swa_rate=st.sampled_from([0.0, 0.01]),
    anneal=st.integers(0, 3),
    schedule=st.sampled_from(["onecycle", "cosine", "step", "constant"]),
)
def test_every_run_has_a_finite_rate_at_every_step(epochs, warmup, steps_per_epoch, swa_start, swa_rate, anneal, schedule):
    config = {"epochs": epochs, "warmup_epochs": min(warmup, epochs), "swa_start_epoch": min(swa_start, epochs)}
    config |= {"swa_learning_rate": swa_rate, "swa_anneal_epochs": anneal, "schedule": schedule, "step_epochs": 2}
    rates = rates_of(schedule_for(config, steps_per_epoch), epochs * steps_per_epoch)
    assert all(math.isfinite(rate) and 0 <= rate <= 0.010001 for rate in rates)


@given(
    epochs=st.integers(1, 12),
    warmup=st.sampled_from([0, 0.1, 0.5, 0.9, 1, 1.5, 2, 3.4, 7]),
    swa_start=st.integers(0, 12),
    swa_rate=st.sampled_from([0.0, 1e-5]),
    anneal=st.integers(0, 2),
    schedule=st.sampled_from(["onecycle", "cosine", "constant"]),
)
def test_the_rate_reaches_its_peak_in_every_run_that_is_not_refused(epochs, warmup, swa_start, swa_rate, anneal, schedule):
    config = {"epochs": epochs, "warmup_epochs": warmup, "swa_start_epoch": swa_start, "swa_learning_rate": swa_rate}
    config |= {"swa_anneal_epochs": anneal, "schedule": schedule}
    if not config_problems(CONFIG | config):
        assert max(rates_of(schedule_for(config), epochs * STEPS)) >= 0.9 * CONFIG["learning_rate"]


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "step", "constant"])
def test_the_rate_is_a_pure_function_of_the_step(schedule):
    config = {"epochs": 20, "warmup_epochs": 4, "swa_start_epoch": 11, "swa_anneal_epochs": 2, "schedule": schedule}
    config |= {"step_epochs": 3}
    rates = rates_of(schedule_for(config), 20 * STEPS)
    for step in (0, 1, 30, 69, 70, 75, 139):
        resumed = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.123)  # a rate that a checkpoint brought along
        resumed.param_groups[0]["initial_lr"] = 0.456
        again = schedule_for(config, optimizer=resumed)
        again.move_to(step)
        assert rates_of(again, 20 * STEPS - step) == rates[step:]


@pytest.mark.parametrize("changes", [RECIPES["fast"], RECIPES["long"], {"schedule": "step", "step_epochs": 2}, {}])
def test_the_rate_that_is_shown_is_that_of_the_last_step(changes):
    """Not of the step to come: OneCycleLR's would be negative after the last one, and one after a drop below what was taken."""
    config = CONFIG | changes | {"architecture": "resnet18"}
    state = fresh_state(config, steps_per_epoch=2)
    first, taken = state.learning_rate, []
    for _ in range(2 * config["epochs"]):
        taken += rates_of(state.schedule, 1)
        assert state.learning_rate == taken[-1] >= 0
    assert first == taken[0]
    assert state.schedule.get_last_lr()[0] == state.optimizer.param_groups[0]["lr"]  # of the step to come, as before
    state.schedule.move_to(7)
    assert (state.learning_rate, state.optimizer.param_groups[0]["lr"]) == (taken[6], taken[7])


def test_cosine_rises_straight_and_falls_along_a_half_cosine_to_zero():
    config = {"epochs": 20, "warmup_epochs": 4, "swa_start_epoch": 0, "schedule": "cosine", "learning_rate": 2.0}
    rates = rates_of(schedule_for(config), 20 * STEPS)
    warmup, length = 4 * STEPS, 16 * STEPS
    assert rates[:warmup] == pytest.approx([2 * (step + 1) / warmup for step in range(warmup)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=2.0)
    reference = rates_of(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length), length)
    assert rates[warmup:] == pytest.approx(reference, abs=1e-9)


def test_step_drops_at_its_epochs_and_constant_never():
    config = {"epochs": 9, "warmup_epochs": 1, "swa_start_epoch": 0, "learning_rate": 2.0, "step_epochs": 3, "step_factor": 0.1}
    rates = rates_of(schedule_for(config | {"schedule": "step"}), 9 * STEPS)
    assert rates[STEPS:] == pytest.approx([2.0] * 2 * STEPS + [0.2] * 3 * STEPS + [0.02] * 3 * STEPS)
    rates = rates_of(schedule_for(config | {"schedule": "constant"}), 9 * STEPS)
    assert rates[STEPS - 1 :] == [2.0] * (8 * STEPS + 1)


def test_momentum_is_left_alone():
    schedule = schedule_for({"epochs": 20, "warmup_epochs": 4, "swa_start_epoch": 0})
    rates_of(schedule, 50)
    assert schedule.optimizer.param_groups[0]["momentum"] == 0.9


def test_norms_and_biases_get_no_weight_decay():
    model = build_model(CONFIG, 10)
    decayed, spared = parameter_groups(model, 0.1, decay_norms_and_biases=False)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} >= {"bn1.weight", "layer1.0.downsample.1.weight", "fc.bias"}
    assert all(
        names[id(p)].endswith(("conv1.weight", "conv2.weight", "conv3.weight", "0.weight", "fc.weight"))
        for p in decayed["params"]
    )
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    (everything,) = parameter_groups(model, 0.1, decay_norms_and_biases=True)
    assert len(everything["params"]) == len(names)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "nesterov"])
def test_optimizers_step_as_torchs_plain_ones(name):
    torch.manual_seed(0)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    model = small_model()
    model(images)
    twin = copy.deepcopy(model)
    config = CONFIG | {"optimizer": name, "weight_decay": 0.1, "learning_rate": 0.01}
    if name == "nesterov":
        config |= {"optimizer": "sgd", "nesterov": True}
    groups = parameter_groups(twin, 0.1, decay_norms_and_biases=False)
    plain = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.01),
        "adam": lambda: torch.optim.Adam(groups, lr=0.01),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
        "nesterov": lambda: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    }[name]()
    for network, optimizer in ((model, build_optimizer(model, config)), (twin, plain)):
        for _ in range(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_sgd_has_its_momentum_as_zeros_before_the_first_step():
    model = small_model()
    model(torch.randn(1, 3, 8, 8))
    optimizer = build_optimizer(model, CONFIG | {"optimizer": "sgd"})
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimizers_are_fused_so_that_the_scaler_needs_no_host(name):
    optimizer = build_optimizer(build_model(CONFIG, 3), CONFIG | {"optimizer": name})
    assert all(group["fused"] for group in optimizer.param_groups)
    assert optimizer._step_supports_amp_scaling
