"""The recipes do what their sources say, epoch by epoch."""

import math

import numpy as np
import pytest
import torch
from conftest import run_here, run_program, tiny_run

import train
from benchmarks.optimizer_evidence import MUON as MUON_IN_STUDY
from config import CONFIG, RECIPES
from engine.cli.command_line import parse_command_line
from engine.cli.keys import config_problems
from engine.data.batches import resolution_of_epoch, training_requests
from engine.data.loader import BatchLoader
from engine.data.splits import open_splits
from engine.inference.scoring import evaluate
from engine.run import checkpoint_files
from engine.run.records import read_records
from engine.system.interruption import StopRequest
from engine.training.optim import build_optimizer, build_schedule
from model import build_model

FAST = CONFIG | RECIPES["fast"]
STEPS = 5004  # of an ImageNet epoch at batch 256


def rates_of(config, steps_per_epoch):
    """Return the rate of every step of a run."""
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, config, steps_per_epoch)
    rates = []
    for _ in range(config["epochs"] * steps_per_epoch):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.array(rates)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_sound(recipe):
    assert config_problems(CONFIG | RECIPES[recipe]) == []
    assert set(RECIPES[recipe]) <= set(CONFIG)


def test_the_fast_recipe_has_ffcvs_resolution_and_rate_in_every_epoch_of_16():
    resolutions = [resolution_of_epoch(FAST, epoch) for epoch in range(16)]
    assert resolutions == [160] * 12 + [192] * 4
    rates = rates_of(FAST, 100) / 0.10625  # shares of the peak; 100 steps an epoch show the same plan
    published = np.interp(np.arange(16), [0, 2, 16], [1e-4, 1, 0])  # at the start of each epoch
    np.testing.assert_allclose(rates[::100], published, atol=0.011)  # OneCycleLR counts each phase less one step
    assert rates.max() == pytest.approx(1)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    second_differences = np.abs(np.diff(rates, 2))
    assert (second_differences > 1e-5).sum() <= 2  # straight up, straight down


@pytest.mark.parametrize(("epochs", "ramp"), [(16, (11, 13)), (24, (17, 20)), (32, (23, 27)), (40, (29, 34)), (88, (65, 76))])
def test_stretched_the_fast_recipe_has_ffcvs_resolution_in_every_epoch(epochs, ramp):
    config = FAST | {"epochs": epochs}
    for epoch in range(epochs):
        exact = np.interp(epoch, ramp, (160, 192))
        assert resolution_of_epoch(config, epoch) == int(np.round(exact / 32)) * 32


def test_the_fast_recipes_rate_is_1_7_at_batch_4096():
    for batch_size, peak in ((256, 0.10625), (1024, 0.425), (4096, 1.7)):
        assert rates_of(FAST | {"batch_size": batch_size}, 50).max() == pytest.approx(peak)
    assert rates_of(CONFIG | {"batch_size": 1024, "swa_start_epoch": 0}, 20).max() == pytest.approx(CONFIG["learning_rate"])


def test_the_fast_recipe_decays_weights_but_no_norm_and_no_bias():
    model = build_model(FAST, 10)
    groups = build_optimizer(model, FAST).param_groups
    decay_of = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 53  # those of the down-sample paths too, which a search for the name bn misses
    assert all(decay_of[norm.weight] == decay_of[norm.bias] == 0 for norm in norms)
    assert decay_of[model.fc.bias] == 0
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(decay_of[module.weight] == 1e-4 for module in [*convolutions, model.fc])


def test_the_mild_recipe_grows_from_88_to_176_px_in_steps_of_4_with_mosaics_shares_of_the_run():
    config = CONFIG | RECIPES["mild"]
    sizes = [resolution_of_epoch(config, epoch) for epoch in range(29)]
    assert sizes[: int(0.4 * 29)] == [88] * 11
    assert sizes[-6:] == [176] * 6  # the last fifth
    assert sizes == sorted(sizes)
    assert {size % 4 for size in sizes} == {0}
    worth = sum((size / 224) ** 2 for size in sizes)
    assert worth == pytest.approx(9.5, abs=0.6)


def test_the_mild_recipes_rate_is_2_048_at_batch_2048_and_falls_to_zero():
    rates = rates_of(CONFIG | RECIPES["mild"] | {"batch_size": 2048}, 50)
    assert rates.max() == pytest.approx(2.048)
    assert rates[-1] < 1e-3


def test_the_mild_recipes_decay_is_as_strong_as_its_decoupled_one():
    rate, decay, momentum = 2.048, 5e-4, 0.875
    coupled = CONFIG | RECIPES["mild"] | {"batch_size": 2048, "learning_rate": 0.256}
    weights = torch.nn.Linear(30, 30, bias=False)
    before = weights.weight.detach().clone()
    optimizer = build_optimizer(weights, coupled)
    for _ in range(200):
        weights.weight.grad = torch.zeros_like(weights.weight)  # nothing but decay, at the peak rate
        optimizer.step()
    left = (weights.weight.norm() / before.norm()).item()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    assert optimizer.param_groups[0]["momentum"] == momentum
    assert left == pytest.approx((1 - decay) ** 200, rel=0.01)  # decoupled: weights shrink by the decay itself at the peak


def test_a_resolution_that_does_not_grow_is_the_same_throughout():
    assert {resolution_of_epoch(CONFIG, epoch) for epoch in range(100)} == {224}


def test_resolutions_are_multiples_of_32_that_never_shrink_and_end_at_train_resolution():
    for epochs in range(1, 60):
        config = FAST | {"epochs": epochs, "start_resolution": 96, "train_resolution": 224}
        sizes = [resolution_of_epoch(config, epoch) for epoch in range(epochs)]
        assert sizes == sorted(sizes)
        assert sizes[-1] == 224
        assert {size % 32 for size in sizes} == {0}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--start-resolution=150"], "multiples of resolution_step = 32"),
        (["--start-resolution=224"], "start_resolution = 224: must be from 32 to train_resolution = 192"),
        (["--resolution-ramp-start=0.9"], "after resolution_ramp_end"),
    ],
)
def test_impossible_resolutions_are_refused(flags, reason):
    with pytest.raises(ValueError, match=reason):
        parse_command_line(["--recipe", "fast", *flags])


def test_a_growing_run_crops_at_each_epochs_size_and_records_it(image_tree, tmp_path):
    folder = tmp_path / "run"
    changes = {"start_resolution": 32, "train_resolution": 64, "resolution_ramp_start": 0.3, "resolution_ramp_end": 0.9}
    assert run_here(tiny_run(image_tree, folder, **changes)) == 0
    records = read_records(folder / "metrics.jsonl")
    assert [record["train_resolution"] for record in records] == [32, 64, 64]
    config = parse_command_line(tiny_run(image_tree, folder, **changes)).config
    server = BatchLoader(open_splits(image_tree), config, torch.device("cpu"), torch.float32, StopRequest(), print)
    for epoch, size in enumerate((32, 64, 64)):
        requests = training_requests(server.splits["train"], config, epoch)
        assert {images.shape for images, _ in server.training(requests, set())} == {(8, 3, size, size)}


def test_the_fast_recipe_trains_from_the_command_line(image_tree, tmp_path):
    flags = [
        "--recipe=fast",
        "--architecture=resnet18",
        "--start-resolution=32",
        "--train-resolution=64",
        "--val-resolution=64",
    ]
    flags += [
        "--epochs=3",
        "--warmup-epochs=1",
        "--batch-size=16",
        f"--data-dir={image_tree}",
        "--device=cpu",
        "--num-workers=0",
    ]
    status, output = run_program("train.py", flags, cwd=tmp_path)
    assert status == 0, output
    record = read_records(tmp_path / "checkpoints/metrics.jsonl")[-1]
    assert math.isfinite(record["train_loss"])
    assert "val_flip_top1" in record
    assert ", with flip " in output


# Resolution at test time ----------------------------------------------------------------------------------------------


def test_the_finished_weights_are_scored_at_further_resolutions_as_evaluate_scores_them(image_tree, tmp_path):
    folder = tmp_path / "run"
    assert run_here(tiny_run(image_tree, folder, more_val_resolutions="48,64", val_flip=True)) == 0
    *earlier, last = read_records(folder / "metrics.jsonl")
    assert all("more_val" not in record for record in earlier)
    assert [other["val_resolution"] for other in last["more_val"]] == [48, 64]
    for other in last["more_val"]:
        size = other["val_resolution"]
        config = parse_command_line(tiny_run(image_tree, folder, val_resolution=size)).config
        model = train.build_model(config, 10)
        model.load_state_dict(checkpoint_files.read(folder / "last.pt")["model"])
        server = BatchLoader(open_splits(image_tree), config, torch.device("cpu"), torch.float32, StopRequest(), print)
        expected = evaluate({"raw": model}, server.validation(), 20, torch.no_grad(), flip=True)["raw"]
        assert other["raw"] == pytest.approx(expected)
        assert set(other) == {"val_resolution", "raw", "averaged"}
    assert "at 64 px" in (tmp_path / "run.log").read_text()


# Flip as test-time augmentation --------------------------------------------------------------------------------------


def test_with_flip_both_the_plain_figure_and_that_of_image_and_mirror_image_are_given():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 12))
    images, labels = torch.randn(50, 3, 8, 8), torch.randint(0, 12, (50,))
    batches = [(images[:30], labels[:30]), (images[30:], labels[30:])]
    plain = evaluate({"raw": model}, batches, 50, torch.no_grad())["raw"]
    both = evaluate({"raw": model}, batches, 50, torch.no_grad(), flip=True)["raw"]
    assert {name: both[name] for name in plain} == plain
    assert not any(name.startswith("flip") for name in plain)
    with torch.no_grad():
        logits = (model(images) + model(images.flip(3))) / 2
    assert both["flip_top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert both["flip_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert both["flip_top1"] != both["top1"]


def test_the_best_epoch_is_chosen_by_the_plain_figure(image_tree, tmp_path):
    folder = tmp_path / "run"
    assert run_here(tiny_run(image_tree, folder, val_flip=True)) == 0
    records = read_records(folder / "metrics.jsonl")
    plain = [value for record in records for name, value in record.items() if name in ("val_top1", "averaged_val_top1")]
    assert records[-1]["best_top1"] == max(plain)
    assert all("averaged_val_flip_top1" in record for record in records[1:])


def test_the_muon_recipe_is_mild_with_another_optimizer_and_decays_as_in_the_study():
    muon, mild = (CONFIG | RECIPES[name] for name in ("muon", "mild"))
    optimizers = {"optimizer", "learning_rate", "weight_decay", "momentum", "decay_norms_and_biases"}
    assert {key for key in CONFIG if muon[key] != mild[key]} == optimizers
    shrinking = STEPS * 29 * rates_of(muon, 50).mean() * muon["weight_decay"]  # the logarithm of what is left of a weight
    in_study = 400 * 0.3 * MUON_IN_STUDY["weight_decay"] / 2  # the mean of warm-up and cosine is a half
    assert shrinking == pytest.approx(in_study, rel=0.05)
