"""What a run will take is said before it begins, and can be chosen."""

import re

import pytest
import torch
from conftest import REPOSITORY, run_program, tiny_run

import train
from config import CONFIG, RECIPES, ConfigError, config_problems, parse_command_line
from engine import data, metrics
from engine.monitor import Monitor
from engine.plan import Rates, epochs_within, plan_run, rates_stated

FAST = CONFIG | RECIPES["fast"]
IMAGENET = (1_281_167, 50_000)


def sound(config):
    return not config_problems(config)


@pytest.mark.parametrize(("epochs", "hours"), [(16, 11.4), (32, 22.6), (88, 61.4)])
def test_the_fast_recipe_takes_the_hours_that_its_pixels_amount_to(epochs, hours):
    plan = plan_run(FAST | {"epochs": epochs}, rates_stated(282, 256), *IMAGENET)
    assert sum(phase.hours for phase in plan.phases) == pytest.approx(hours, rel=0.01)
    assert [phase.resolution for phase in plan.phases] == [160, 192]
    assert plan.phases[-1].last_epoch == epochs


def test_between_two_measured_sizes_the_time_is_linear_in_the_pixels():
    rates = Rates({100: 1 / 3, 200: 1 / 9}, 1.0, "")  # 1 + 2 (px / 100)^2 seconds an image
    assert rates.training_at(100) == pytest.approx(1 / 3)
    assert rates.training_at(200) == pytest.approx(1 / 9)
    assert rates.training_at(150) == pytest.approx(1 / 5.5)


def test_validation_is_counted_once_for_each_kind_of_weights_and_twice_with_flip():
    rates = Rates({224: 1000.0}, 1000.0, "")
    config = CONFIG | {"epochs": 10, "swa_start_epoch": 0, "warmup_epochs": 1}
    plain = plan_run(config, rates, 1000, 3600).validation_hours
    assert plain == pytest.approx(10 / 1000)
    assert plan_run(config | {"val_flip": True}, rates, 1000, 3600).validation_hours == pytest.approx(2 * plain)
    assert plan_run(config | {"swa_start_epoch": 6}, rates, 1000, 3600).validation_hours == pytest.approx(1.5 * plain)
    both = config | {"swa_start_epoch": 6, "ema_half_life_steps": 9, "val_flip": True}
    assert plan_run(both, rates, 1000, 3600).validation_hours == pytest.approx(5 * plain)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("hours", [5, 12, 70, 200])
def test_the_epochs_chosen_fit_and_one_more_would_not(recipe, hours):
    config = CONFIG | RECIPES[recipe]
    rates = rates_stated(282, config["val_resolution"])
    epochs = epochs_within(hours, config, rates, *IMAGENET, sound)

    def fits(epochs):
        stretched = config | {"epochs": epochs}
        return sound(stretched) and plan_run(stretched, rates, *IMAGENET).hours <= hours

    assert not fits(epochs + 1)
    assert fits(epochs) if epochs else not any(map(fits, range(1, 40)))


def test_the_readme_shows_the_plan_as_it_is_printed(tmp_path):
    readme = (REPOSITORY / "README.md").read_text()
    (command,) = re.findall(r"^    python train\.py (.*--plan .*)$", readme, flags=re.MULTILINE)
    status, output = run_program("train.py", command.split(), cwd=tmp_path)
    assert status == 0, output
    for line in output.splitlines()[1:]:
        assert f"    {line.split('; begun now')[0]}" in readme
    assert list(tmp_path.iterdir()) == []


def test_a_machines_rates_are_measured_at_the_smallest_and_largest_size_and_in_validation(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", start_resolution=32, train_resolution=96, epochs=8)
    config = parse_command_line(arguments).config
    splits = data.open_splits(image_tree)
    with Monitor(config | {"log_file": None}, torch.device("cpu")) as monitor:
        rates = train.measure(config, splits, torch.device("cpu"), "fp32", monitor, seconds=0.5)
    assert list(rates.training) == [32, 96]
    assert rates.training[32] > rates.training[96] > 0
    assert rates.validation > rates.training[96]


@pytest.mark.slow
def test_plan_measures_this_machine_and_writes_nothing(image_tree, tmp_path):
    arguments = [*tiny_run(image_tree, tmp_path / "run", start_resolution=32, train_resolution=64), "--plan"]
    status, output = run_program("train.py", arguments, cwd=tmp_path)
    assert status == 0, output
    assert "plan: 3 epochs of 60 images in batches of 8 (measured on CPU" in output
    assert "data included" in output
    assert re.search(r"epochs 1 to 2: 32 px, [\d,]+ images/s", output)
    assert list(tmp_path.iterdir()) == []


def test_hours_chooses_the_epochs_and_trains(image_tree, tmp_path):
    flags = [
        "--hours",
        "0.0001",
        "--price-per-hour=100",
        "--images-per-s",
        "25",
    ]  # 0.36 s, at 25 images/s at 224 px: 1,225 at 32 px
    arguments = tiny_run(image_tree, tmp_path / "run", swa_start_epoch=0)
    status, output = run_program("train.py", [*arguments, *flags], cwd=tmp_path)
    assert status == 0, output
    epochs = int(re.search(r"plan: (\d+) epochs", output)[1])
    assert epochs > 3
    assert "0.01 at 100 per hour" in output
    assert len(metrics.read_records(tmp_path / "run/metrics.jsonl")) == epochs
    assert f"epoch {epochs}/{epochs}: " in output
    status, output = run_program("train.py", ["--resume", tmp_path / "run/last.pt", "--hours=1"], cwd=tmp_path)
    assert status == 2
    assert "a plan is made for a new run" in output


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--hours=-1"], "--hours -1: must be a number above 0"),
        (["--hours=1e-9"], "too short for this recipe"),
        (["--price-per-hour=much"], "--price-per-hour much: must be a number"),
    ],
)
def test_impossible_budgets_are_refused(flags, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = parse_command_line(["--plan", "--images-per-s=282", *flags], train.OWN_FLAGS)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        train.main(command)
    assert list(tmp_path.iterdir()) == []


def test_a_flag_of_the_plan_without_a_plan_is_refused(tmp_path):
    status, output = run_program("train.py", ["--price-per-hour=0.752", "--images-per-s=282"], cwd=tmp_path)
    assert status == 2, output
    assert output.count("belongs to a plan; add --plan or --hours") == 2
