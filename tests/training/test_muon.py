"""Muon: the Newton-Schulz steps against singular value decompositions, whole steps against torch's Muon and a plain loop."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, state_of
from torch.utils.flop_counter import FlopCounterMode

import train
from config import CONFIG
from engine.cli.keys import config_problems
from engine.system.device import AUTOCAST_DTYPES
from engine.training import muon
from engine.training.averaging import update_ema
from engine.training.muon import COEFFICIENTS, EPSILON, NEWTON_SCHULZ_STEPS, Muon, orthogonalize, split_groups
from engine.training.optim import build_optimizer, build_schedule, parameter_groups, peak_rates
from engine.training.range_test import find_learning_rate
from engine.training.state import new_state
from engine.training.trials import Trials
from model import build_model

MUON = CONFIG | {"optimizer": "muon", "momentum": 0.95, "learning_rate": 0.02, "adamw_learning_rate": 0.003}
MUON |= {
    "weight_decay": 0.1,
    "batch_size": 8,
    "epochs": 4,
    "warmup_epochs": 1,
    "swa_start_epoch": 0,
    "architecture": "resnet18",
}
SHAPES = [(24, 60), (60, 24), (32, 32)]
PRECISIONS = ["fp32", "bf16", "fp16"]


class SmallNetwork(torch.nn.Module):
    """Convolutions of a wide, two equal and a tall filter behind the first, without batch norm; always the same weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = [(3, 8, 3), (8, 6, 3), (6, 6, 3), (6, 6, 3), (6, 10, 1)]
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(i, o, side, padding=side // 2, bias=False) for i, o, side in shapes)
        self.norm = torch.nn.GroupNorm(2, 10)
        self.fc = torch.nn.Linear(10, 5)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        for conv in self.convs:
            images = F.relu(conv(images))
        return self.fc(self.norm(images).mean((2, 3)))


def some_batch(seed=1, resolution=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, resolution, resolution, generator=generator), torch.arange(8) % 5


def narrow_state(config, precision="fp32", steps_per_epoch=10):
    """The state at the start of a run of the narrow ResNet-18."""
    return new_state(train.build_model(config, 5), config, steps_per_epoch, precision)


def with_singular_values(rows, columns, values, seed=0):
    """Return (matrix, its polar factor U V^T, U, V) of given singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return u @ torch.diag(values) @ v, u @ v, u, v.mT


# The Newton-Schulz steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_singular_values_become_about_one_and_singular_vectors_stay(rows, columns, precision):
    values = torch.logspace(0, -1.3, min(rows, columns))
    made = [with_singular_values(rows, columns, values, seed) for seed in range(3)]
    results = orthogonalize(torch.stack([matrix for matrix, *_ in made]), AUTOCAST_DTYPES[precision])
    assert results.dtype == AUTOCAST_DTYPES[precision] and results.shape == (3, rows, columns)
    for result, (_, polar, u, v) in zip(results.float(), made, strict=True):
        reached = torch.linalg.svdvals(result)
        assert reached.min() > 0.65 and reached.max() < 1.25
        assert F.cosine_similarity(result.flatten(), polar.flatten(), dim=0) > 0.97
        inside = u.mT @ result @ v  # diagonal, if the singular vectors are the same
        assert (inside - torch.diag(inside.diagonal())).abs().max() < {"fp32": 1e-5, "fp16": 0.004, "bf16": 0.03}[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e4, 1e15])
@pytest.mark.parametrize(("rows", "columns"), [(16, 4608), (512, 64), (32, 32)])
def test_no_precision_overflows_however_tiny_or_huge_the_gradient(rows, columns, scale, precision):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(1, rows, columns, generator=generator)
    matrix[:, 0] *= 100  # a row that outweighs the others
    result = orthogonalize(matrix * scale, AUTOCAST_DTYPES[precision]).float()
    assert torch.isfinite(result).all() and result.abs().max() < 1.5
    if scale * matrix.norm() > EPSILON:
        similar = F.cosine_similarity(result.flatten(), orthogonalize(matrix, torch.float32).flatten(), dim=0)
        assert similar > 0.98
    assert not orthogonalize(torch.zeros_like(matrix), AUTOCAST_DTYPES[precision]).any()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 576), (512, 128)])
def test_rounding_lets_no_singular_value_grow_however_many_are_near_nothing(rows, columns, precision, monkeypatch):
    values = torch.full((min(rows, columns),), 1e-4)
    values[:8] = 1.0
    matrix = with_singular_values(rows, columns, values)[0][None]
    # 8 equal values of 1 / sqrt(8) come to about 1, and exact arithmetic takes none beyond 1.2.
    assert torch.linalg.svdvals(orthogonalize(matrix, AUTOCAST_DTYPES[precision]).float()).max() < 1.3
    monkeypatch.setattr(muon, "NEWTON_SCHULZ_STEPS", (5,))  # with no new Gram matrix
    assert torch.linalg.svdvals(orthogonalize(matrix, AUTOCAST_DTYPES["bf16"]).float()).max() > 1.5


def newton_schulz_flop(shapes):
    """Return what the steps take for filters of the shapes: products on the short side alone, but for the first and last."""
    flop = 0
    for shape in shapes:
        short, long = sorted((shape[0], math.prod(shape[1:])))
        for steps in NEWTON_SCHULZ_STEPS:  # a step squares the Gram matrix, multiplies it by P twice, and the product by P
            on_short_side = steps + 2 * (steps - 1) + (steps - 1)
            flop += 2 * 2 * short**2 * long + on_short_side * 2 * short**3
    return flop


def test_the_steps_of_resnet50_take_a_sixth_of_a_tflop_for_52_filters_in_19_shapes():
    model = build_model(MUON | {"architecture": "resnet50"}, 1000, "meta")
    filters, _ = split_groups(parameter_groups(model, 0.1, False))
    assert len(filters) == 52 and len({filter.shape for filter in filters}) == 19
    with FlopCounterMode(display=False) as counter:
        for filter in filters:
            orthogonalize(filter.detach().flatten(1)[None], torch.float16)
    calculated = newton_schulz_flop([filter.shape for filter in filters])
    assert counter.get_total_flops() == calculated
    assert calculated == pytest.approx(0.164e12, rel=0.01)


# Which weights, which rates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay_norms_and_biases", [False, True])
def test_filters_but_the_first_go_to_muon_and_all_else_to_adamw(decay_norms_and_biases):
    model = build_model(MUON, 10)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, MUON | {"decay_norms_and_biases": decay_norms_and_biases})
    filters, *others = optimizer.param_groups
    convolutions = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert [names[id(p)] for p in filters["params"]] == convolutions[1:] and convolutions[0] == "conv1.weight"
    by_adamw = [names[id(p)] for group in others for p in group["params"]]
    assert set(by_adamw) == set(names.values()) - set(convolutions[1:]) and len(by_adamw) == len(set(by_adamw))
    assert {"conv1.weight", "fc.weight"} <= {names[id(p)] for p in others[0]["params"]}
    assert [group["weight_decay"] for group in others] == [0.1] * len(others) if decay_norms_and_biases else [0.1, 0.0]
    assert (filters["lr"], filters["weight_decay"], filters["momentum"]) == (0.02, 0.1, 0.95)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "step", "constant"])
@pytest.mark.parametrize("swa_start_epoch", [0, 3])
def test_both_rates_follow_the_one_schedule_in_proportion(schedule, swa_start_epoch):
    config = MUON | {"schedule": schedule, "step_epochs": 2, "swa_start_epoch": swa_start_epoch, "scale_learning_rate": True}
    config |= {"swa_anneal_epochs": 1, "swa_learning_rate": 0.002}
    alone = build_schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0), config, 10)
    optimizer = build_optimizer(SmallNetwork(), config)
    ours, seen = build_schedule(optimizer, config, 10), []
    for step in range(40):
        alone.move_to(step)
        if step % 7 == 3:
            ours.move_to(step)
        filters, *others = ours.get_last_lr()
        assert filters == pytest.approx(alone.get_last_lr()[0], rel=1e-12, abs=1e-18)
        assert others == pytest.approx([filters * 0.003 / 0.02] * 2, rel=1e-9, abs=1e-18)
        assert [group["lr"] for group in optimizer.param_groups] == [filters, *others]
        seen.append(others[0])
        optimizer.step()
        ours.step()
    assert max(seen) == pytest.approx(0.003 * 8 / 256)


def test_the_range_test_looks_for_the_filters_rate_and_leaves_adamws():
    seen = []

    def step(state, images, labels, config):
        seen.append([group["lr"] for group in state.optimizer.param_groups])
        return train.train_step(state, images, labels, config)

    class Batches:
        splits = {"train": range(64)}

        def training(self, requests, bad):
            return [some_batch(resolution=32)] * 40

    class Monitor:
        start = finish = log = lambda *anything: None
        watch = lambda self, batches: batches  # noqa: E731

    config = MUON | {"train_resolution": 32, "compile": "off", "scale_learning_rate": True}
    found = find_learning_rate(
        Trials(step, train.build_model, 5, torch.device("cpu"), "fp32"), config, Batches(), Monitor(), 1e-4, 1e-2, 20
    )
    assert [rates[0] for rates in seen] == pytest.approx([1e-4 * 100 ** (n / 19) * 8 / 256 for n in range(20)])
    assert {tuple(rates[1:]) for rates in seen} == {(0.003 * 8 / 256,) * 2}
    assert found["suggestion"] is None and found["advice"].endswith("lower --adamw-learning-rate for the test")


def test_nesterov_is_no_choice_with_muon():
    assert config_problems(MUON) == []
    assert ["nesterov" in problem for problem in config_problems(MUON | {"nesterov": True})] == [True]


# Whole steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])  # of all that three steps change
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_steps_on_a_matrix_are_those_of_torchs_muon(rows, columns, precision, tolerance, monkeypatch):
    if precision == "fp32":  # torch's always multiplies in bfloat16
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(rows, columns, generator=generator)
    ours, theirs, beside = (torch.nn.Parameter(start.clone()) for _ in range(3))
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    rest = [{"params": [beside], "weight_decay": 0.0}]
    for optimizer, weight in (
        (Muon([ours], rest, adamw_lr=0.001, dtype=AUTOCAST_DTYPES[precision], **options), ours),
        (torch.optim.Muon([theirs], nesterov=True, **options), theirs),
    ):
        generator.manual_seed(3)
        for _ in range(3):
            weight.grad = torch.randn(rows, columns, generator=generator)
            optimizer.step()
    assert (ours - theirs).norm() < tolerance * (theirs - start).norm()
    assert torch.equal(beside, start)


def plain_newton_schulz(matrix):
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm()
    for _ in range(5):
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


def plain_steps(model, steps, config):
    """Train with the optimizer written out."""
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = copy.deepcopy(first)
    rate, adamw_rate, decay = config["learning_rate"], config["adamw_learning_rate"], config["weight_decay"]
    for number in range(1, steps + 1):
        model.zero_grad()
        F.cross_entropy(model(some_batch(number)[0]), some_batch()[1]).backward()
        for name, p in model.named_parameters():
            with torch.no_grad():
                if p.ndim == 4 and name != "convs.0.weight":
                    first[name] = 0.95 * first[name] + 0.05 * p.grad
                    ahead = (0.05 * p.grad + 0.95 * first[name]).flatten(1)
                    shape_factor = max(1, ahead.shape[0] / ahead.shape[1]) ** 0.5
                    update = plain_newton_schulz(ahead).view_as(p) * shape_factor * rate
                    p.copy_(p * (1 - rate * decay) - update)
                    continue
                first[name] = 0.9 * first[name] + 0.1 * p.grad
                second[name] = 0.999 * second[name] + 0.001 * p.grad**2
                mean, square = first[name] / (1 - 0.9**number), second[name] / (1 - 0.999**number)
                kept = 1 - adamw_rate * decay if p.ndim > 1 else 1
                p.copy_(p * kept - adamw_rate * mean / (square.sqrt() + 1e-8))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_whole_steps_are_those_of_a_plain_loop(layout):
    ours, plain = SmallNetwork().to(memory_format=layout), SmallNetwork()
    optimizer = build_optimizer(ours, MUON)
    for number in range(1, 5):
        optimizer.zero_grad()
        F.cross_entropy(ours(some_batch(number)[0]), some_batch()[1]).backward()
        optimizer.step()
    plain_steps(plain, 4, MUON)
    for weight, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_filters_of_one_shape_are_multiplied_together_and_in_the_precision_of_the_run(precision, monkeypatch):
    seen = []
    monkeypatch.setattr(muon, "orthogonalize", lambda x, dtype: (seen.append((len(x), dtype)), orthogonalize(x, dtype))[1])
    state = narrow_state(MUON, precision)
    for weight in state.model.parameters():
        weight.grad = torch.ones_like(weight)
    state.optimizer.step()
    filters = state.optimizer.param_groups[0]["params"]
    assert sum(count for count, _ in seen) == len(filters) == 20
    assert len(seen) == len({weight.shape for weight in filters}) == 12
    assert {dtype for _, dtype in seen} == {AUTOCAST_DTYPES[precision]}


def test_the_scaler_need_not_ask_the_host():
    optimizer = build_optimizer(SmallNetwork(), MUON)
    assert optimizer._step_supports_amp_scaling and all(group["fused"] for group in optimizer.param_groups[1:])


def test_a_channels_last_filter_is_a_matrix_without_a_copy():
    optimizer = build_optimizer(build_model(MUON, 10), MUON)
    for weight in optimizer.param_groups[0]["params"]:
        for tensor in (weight.detach(), optimizer.state[weight]["momentum_buffer"]):
            matrix = tensor.movedim(1, -1)
            assert matrix.is_contiguous() and matrix.flatten(1).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("clip", [math.inf, 1e-3])
def test_micro_batches_and_the_scale_of_a_clipped_gradient_change_nothing(clip):
    networks = [SmallNetwork(), SmallNetwork()]
    for network, micro_batch_size in zip(networks, (8, 3), strict=True):
        config = MUON | {"micro_batch_size": micro_batch_size, "grad_clip_value": clip, "schedule": "constant"}
        state = state_of(network, config)
        state.micro_batch_size = micro_batch_size
        for number in range(3):
            train.train_step(state, *some_batch(number), config)
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "changes"),
    [("fp32", {}), ("bf16", {"memory": "lowest", "micro_batch_size": 4}), ("fp32", {"sam_rho": 0.05, "sam_every_steps": 2})],
)
def test_it_learns_a_batch_by_heart(precision, changes):
    config = MUON | {"schedule": "constant", "warmup_epochs": 0, "ema_half_life_images": 32, "ema_every_images": 16} | changes
    state = narrow_state(config, precision)
    state.model.train()
    losses = [train.train_step(state, *some_batch(resolution=32), config).loss.item() for _ in range(15)]
    update_ema(state.ema_model, state.model, config, steps_done=16)
    assert losses[-1] < 0.3 * losses[0]


# Skipped steps, memory, resumption -----------------------------------------------------------------------------------


def everything(state):
    """Return copies of all that a step changes, as whole numbers: -0.0 is not 0.0, and NaN equals itself."""
    tensors = [*state.model.parameters(), *(t for of in state.optimizer.state.values() for t in of.values())]
    return [tensor.detach().clone().reshape(-1).view(torch.int32) for tensor in tensors]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_skipped_step_changes_no_bit(value, precision):
    state = narrow_state(MUON, precision)
    images, labels = some_batch(resolution=32)
    train.train_step(state, images, labels, MUON)
    with torch.no_grad():
        for weight in state.optimizer.param_groups[0]["params"]:
            weight[0], state.optimizer.state[weight]["momentum_buffer"][0] = -0.0, -0.0
    before = everything(state)
    for _ in range(2):
        train.train_step(state, images * value, labels, MUON)
    assert all(map(torch.equal, before, everything(state)))
    train.train_step(state, images, labels, MUON)
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
    assert not any(map(torch.equal, before, everything(state)))


def test_a_finite_gradient_whose_norm_overflows_changes_no_bit():
    config = MUON | {"grad_clip_value": math.inf}
    state = narrow_state(config)
    train.train_step(state, *some_batch(resolution=32), config)
    with torch.no_grad():
        state.model.fc.weight *= 1e25
    before = everything(state)
    train.train_step(state, *some_batch(resolution=32), config, probe=True)
    assert all(torch.isfinite(p.grad).all() for p in state.model.parameters())
    result = train.train_step(state, *some_batch(resolution=32), config)
    assert torch.isinf(result.grad_norm)
    assert all(map(torch.equal, before, everything(state)))


def test_one_bad_number_in_one_gradient_skips_the_whole_step():
    state = narrow_state(MUON)
    for weight in state.model.parameters():
        weight.grad = torch.ones_like(weight)
    state.model.layer2[0].conv1.weight.grad[0, 0, 0, 0] = math.nan
    before = everything(state)
    state.scaler.scale(torch.zeros(()))
    state.scaler.unscale_(state.optimizer)
    state.scaler.step(state.optimizer)
    assert all(map(torch.equal, before, everything(state)))


def test_its_state_is_there_before_the_first_step_and_smaller_than_adams():
    state = narrow_state(MUON)
    held = {id(t): t.data_ptr() for of in state.optimizer.state.values() for t in of.values()}
    assert len(held) == sum(
        1 if group["by_adamw"] is False else 3 for group in state.optimizer.param_groups for _ in group["params"]
    )
    train.train_step(state, *some_batch(resolution=32), MUON)
    assert {id(t): t.data_ptr() for of in state.optimizer.state.values() for t in of.values()} == held
    numbers = [
        sum(t.numel() for of in narrow_state(MUON | {"optimizer": name}).optimizer.state.values() for t in of.values())
        for name in ("sgd", "muon", "adamw")
    ]
    assert numbers[0] < numbers[1] < 0.6 * numbers[2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_state_that_was_saved_goes_on_to_the_same_bits(precision):
    config = MUON | {"swa_start_epoch": 3, "swa_learning_rate": 0.01, "swa_anneal_epochs": 1, "epochs": 6}
    batches = [some_batch(number, resolution=32) for number in range(8)]
    whole = narrow_state(config, precision, steps_per_epoch=2)
    for number, batch in enumerate(batches):
        if number == 5:
            file = io.BytesIO()
            whole.epoch, whole.batch = 2, 1
            torch.save(whole.state_dict(), file)
        train.train_step(whole, *batch, config)
    file.seek(0)
    resumed = narrow_state(config | {"seed": 7}, precision, steps_per_epoch=2)
    resumed.load_state_dict(torch.load(file, weights_only=True) | {"config": config}, config, steps_per_epoch=2)
    for batch in batches[5:]:
        train.train_step(resumed, *batch, config)
    assert_same(whole.model.state_dict(), resumed.model.state_dict(), "model")
    assert_same(whole.optimizer.state_dict(), resumed.optimizer.state_dict(), "optimizer")
    assert all(map(torch.equal, everything(whole), everything(resumed)))


def test_a_resumed_runs_rates_are_those_of_its_configuration_not_of_the_checkpoint():
    config = MUON | {"scale_learning_rate": True}
    optimizer = build_optimizer(SmallNetwork(), config)
    saved = build_optimizer(SmallNetwork(), config | {"batch_size": 4}).state_dict()
    optimizer.load_state_dict(saved)
    assert peak_rates(optimizer, config) == [0.02 * 8 / 256, *[0.003 * 8 / 256] * 2]
    assert max(build_schedule(optimizer, config, 10).get_last_lr()) == pytest.approx(0.02 * 8 / 256 / 25)
