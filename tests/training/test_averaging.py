import copy
import re

import pytest
import torch
from conftest import run_here, tiny_run
from torch.optim.swa_utils import update_bn

from config import CONFIG, RECIPES
from engine.inference.batch_norm import recompute_bn_stats
from engine.inference.freezing import FrozenBatchNorm2d
from engine.run import checkpoint_files
from engine.system.device import autocast
from engine.training.averaging import (
    build_ema_model,
    build_swa_model,
    epochs_to_average,
    update_ema,
    update_swa,
    warning_of_ema,
)

CONFIG_FROM_2 = CONFIG | {"swa_start_epoch": 2}


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 5))


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))


def test_averaging_begins_with_the_final_weights_of_swa_start_epoch():
    assert [epochs_to_average(CONFIG, epochs) for epochs in (0, 31, 32, 33, 100)] == [0, 0, 1, 2, 69]
    assert epochs_to_average(CONFIG | {"swa_start_epoch": 0}, 50) == 0


def test_the_average_is_the_equal_mean_of_the_epochs_weights():
    model = network()
    average = build_swa_model(model)
    seen = []
    for epoch in range(1, 5):
        randomise(model)
        holds = update_swa(average, model, CONFIG_FROM_2, epoch)
        assert holds == (epoch >= 2)
        if holds:
            seen.append(copy.deepcopy(model))
    for averaged, *parts in zip(average.module.parameters(), *(m.parameters() for m in seen), strict=True):
        torch.testing.assert_close(averaged, torch.stack(parts).mean(0))


def test_an_epoch_enters_the_average_once_even_if_the_run_is_resumed_after_it():
    model = network()
    average = build_swa_model(model)
    for epoch in (2, 3, 3, 3):
        update_swa(average, model, CONFIG_FROM_2, epoch)
    assert average.n_averaged == 2


def test_averaged_weights_get_batch_norm_statistics_of_their_own():
    model = network()
    average = build_swa_model(model)
    randomise(model)
    update_swa(average, model, CONFIG_FROM_2, 2)
    batches = [(torch.randn(8, 3, 8, 8) * 3 + 1, torch.zeros(8)) for _ in range(5)]
    recompute_bn_stats(average, batches, autocast(torch.device("cpu"), "fp32"))
    with torch.no_grad():
        outputs = [average.module[0](images) for images, _ in batches]
    norm = average.module[1]
    torch.testing.assert_close(
        norm.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(norm.running_var, torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1
    assert not average.training
    assert not torch.equal(norm.running_mean, model[1].running_mean)


def test_refreshed_statistics_do_not_remember_earlier_ones():
    average = build_swa_model(network())
    batches = [(torch.randn(8, 3, 8, 8), torch.zeros(8))]
    context = autocast(torch.device("cpu"), "bf16")
    recompute_bn_stats(average, batches, context)
    first = average.module[1].running_var.clone()
    average.module[1].running_var.fill_(1e6)
    recompute_bn_stats(average, batches, context)
    assert torch.equal(average.module[1].running_var, first)


def test_the_running_average_halves_a_steps_share_after_its_half_life():
    config = CONFIG | {"batch_size": 10, "ema_half_life_images": 120, "ema_every_images": 30}
    model = network()
    average = build_ema_model(model, config)
    expected = None
    for step in range(1, 40):
        randomise(model)
        model[1].running_mean.normal_()
        update_ema(average, model, config, step)
        if step % 3 == 0:
            now = [tensor.clone() for tensor in (*model.parameters(), model[1].running_mean)]
            decay = 0.5 ** (3 / 12)
            expected = now if expected is None else [decay * a + (1 - decay) * b for a, b in zip(expected, now, strict=True)]
    ours = [*average.module.parameters(), average.module[1].running_mean]
    for tensor, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5)


def test_without_a_half_life_there_is_no_running_average():
    assert build_ema_model(network(), CONFIG) is None
    update_ema(None, network(), CONFIG, 20)


def flags_named(text):
    """{key: value} of the first flags that a line names."""
    return {key: int(value) for key, value in re.findall(r"(ema_\w+) (\d+)", text.replace("--", "").replace("-", "_"))[:2]}


@pytest.mark.parametrize("recipe", ["mild", "medium", "hot"])
@pytest.mark.parametrize("images", [300, 1000, 5000, 10_000, 1_281_167])
def test_an_ema_that_keeps_its_first_weights_is_warned_of_with_what_would_suit(recipe, images):
    config = CONFIG | RECIPES[recipe]
    steps = images // config["batch_size"]
    warned = warning_of_ema(config, steps)
    average, raw = build_ema_model(torch.nn.Linear(1, 1), config), torch.nn.Linear(1, 1)
    for step in range(1, min(config["epochs"] * steps, 5000) + 1):  # the first weights are 1, all later ones 0
        raw.weight.data.fill_(float(average.n_averaged == 0))
        update_ema(average, raw, config, step)
    share = average.module.weight.item() if average.n_averaged else None
    if share is None:
        assert warned.startswith(
            f"WARNING: no weights enter the EMA: they do every 160 steps, and the run has {config['epochs'] * steps}; "
        )
    elif share > 0.05:
        assert warned.startswith(f"WARNING: the EMA keeps {share:.0%} of the first weights that enter it: ")
    else:
        assert warned is None
    if warned:
        assert warning_of_ema(config | flags_named(warned), steps) is None


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "ema_half_life_images" not in RECIPES[name]])
def test_a_recipe_without_an_ema_is_not_warned_of_one(recipe):
    assert warning_of_ema(CONFIG | RECIPES[recipe], 1) is None


def test_a_run_and_its_check_warn_of_an_ema_that_no_weights_enter_and_a_resumed_run_does_not(image_tree, tmp_path, capfd):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=1, warmup_epochs=0, swa_start_epoch=0, ema_half_life_images=100)
    said = (
        "no weights enter the EMA: they do every 640 steps, and the run has 7; --ema-half-life-images 5 --ema-every-images 1 "
    )
    assert run_here([*arguments, "--check"]) == 0
    assert re.search(f"^note   EMA +{said}", capfd.readouterr().out, re.M)
    assert run_here(arguments) == 0
    assert f"\nWARNING: {said}" in capfd.readouterr().out
    assert run_here([f"--resume={tmp_path}/run"]) == 0  # which keeps its EMA
    assert "no weights enter" not in capfd.readouterr().out


def test_refreshed_statistics_have_the_bits_of_torchs_own():
    ours, theirs = network(), network()
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 3, 8, 8, generator=generator), torch.zeros(8)) for _ in range(7)]
    recompute_bn_stats(ours, batches, autocast(torch.device("cpu"), "fp32"))
    update_bn(batches, theirs)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def batch_of(seed, scale=1.0):
    return scale * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.zeros(8)


def test_a_batch_that_overflows_in_fp16_is_left_out_of_the_statistics_of_averaged_weights():
    ours, theirs = network(), network()
    good, overflowing = [batch_of(seed) for seed in range(4)], batch_of(4, scale=6e4)
    context = autocast(torch.device("cpu"), "fp16")
    assert recompute_bn_stats(theirs, good, context) == (0, 4)
    batches = [overflowing, good[0], overflowing, *good[1:3], overflowing, good[3]]
    assert recompute_bn_stats(ours, batches, context) == (3, 7)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-5, atol=1e-6)
    before = [tensor.clone() for tensor in (ours[1].running_mean, ours[1].running_var)]
    assert recompute_bn_stats(ours, [overflowing] * 2, context) == (2, 2)
    assert torch.equal(ours[1].running_mean, before[0]) and torch.equal(ours[1].running_var, before[1])


def test_averaged_weights_with_all_norms_frozen_read_no_batch_and_keep_their_statistics():
    model = network()
    model[1].__class__ = FrozenBatchNorm2d
    before = [tensor.clone() for tensor in model.buffers()]
    unread = iter([batch_of(0)])
    assert recompute_bn_stats(model, unread, autocast(torch.device("cpu"), "fp32")) == (0, 0)
    assert len(list(unread)) == 1 and all(map(torch.equal, model.buffers(), before))


@pytest.mark.slow
def test_averaged_weights_that_overflow_throughout_are_said_and_the_run_is_saved(image_tree, tmp_path, capfd):
    arguments = tiny_run(image_tree, tmp_path / "run", optimizer="sgd")
    assert run_here([*arguments, "--epochs=2"]) == 0
    saved = checkpoint_files.read(tmp_path / "run/last.pt")
    saved["averaged_model"]["module.layer1.0.conv1.weight"] *= 1e30  # finite, and so is its mean with the next weights
    checkpoint_files.write(tmp_path / "run/last.pt", saved)
    assert run_here([*arguments, "--epochs=3", "--resume=auto"]) == 0
    said = "WARNING: 3 of 3 batches overflow in the averaged weights, and are left out of their batch-norm statistics"
    assert said in capfd.readouterr().out
    after = checkpoint_files.read(tmp_path / "run/last.pt")
    assert (after["epoch"], int(after["averaged_model"]["n_averaged"])) == (3, 2)


def test_statistics_that_could_not_be_finished_leave_the_norms_momentum_as_it_was():
    model = network()

    def broken_off():
        yield torch.randn(8, 3, 8, 8), torch.zeros(8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recompute_bn_stats(model, broken_off(), autocast(torch.device("cpu"), "fp32"))
    assert model[1].momentum == 0.1


def test_the_running_average_has_the_bits_of_torchs_own():
    config = CONFIG | {"batch_size": 1, "ema_half_life_images": 7, "ema_every_images": 1}
    model = network()
    ours, theirs = build_ema_model(model, config), build_ema_model(model, config)
    for step in range(1, 9):
        randomise(model)
        model(torch.randn(8, 3, 8, 8))
        update_ema(ours, model, config, step)
        theirs.update_parameters(model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
