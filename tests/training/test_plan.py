"""What a run will take is said before it begins, and can be chosen."""

import re

import pytest
import torch
from conftest import REPOSITORY, run_here, run_program, tiny_run

import train
from benchmarks.optimizer_results import newton_schulz_share
from config import CONFIG, RECIPES
from engine.cli.command_line import parse_command_line
from engine.cli.keys import config_problems
from engine.run.records import read_records
from engine.training.plan import PlanError, Rates, epochs_within, plan_run, rates_stated

FAST = CONFIG | RECIPES["fast"]
IMAGENET = (1_281_167, 50_000)


def sound(config):
    return not config_problems(config)


@pytest.mark.parametrize(("epochs", "hours"), [(16, 11.4), (32, 22.6), (88, 61.4)])
def test_the_fast_recipe_takes_the_hours_that_its_pixels_amount_to(epochs, hours):
    plan = plan_run(FAST | {"epochs": epochs}, rates_stated(282, FAST), *IMAGENET)
    assert sum(phase.hours for phase in plan.phases) == pytest.approx(hours, rel=0.01)
    assert [phase.resolution for phase in plan.phases] == [160, 192]
    assert plan.phases[-1].last_epoch == epochs


def hours_of_training(config, rate=282):
    """The phases' hours on ImageNet-1K, at a rate at 224 px."""
    return sum(phase.hours for phase in plan_run(config, rates_stated(rate, config), *IMAGENET).phases)


@pytest.mark.parametrize(("recipe", "epochs", "hours"), [("mild", 29, 12.2), ("mild", 60, 25.0), ("medium", 135, 62.0)])
def test_mosaics_recipes_take_the_hours_that_their_pixels_and_sam_amount_to(recipe, epochs, hours):
    """docs and FACTS: 9.7, 19.7 and 48.9 epochs' worth of 224 px, SAM at every tenth step included."""
    config = CONFIG | RECIPES[recipe] | {"epochs": epochs}
    assert hours_of_training(config) == pytest.approx(hours, rel=0.015)


def test_a_step_with_sam_costs_a_second_pass():
    config = CONFIG | {"epochs": 4, "swa_start_epoch": 0, "sam_every_steps": 4}
    plain = hours_of_training(config)
    assert hours_of_training(config | {"sam_rho": 0.5}) == pytest.approx(1.25 * plain)
    assert hours_of_training(config | {"sam_rho": 0.5, "sam_every_steps": 1}) == pytest.approx(2 * plain)
    with_sam = plan_run(config | {"sam_rho": 0.5}, rates_stated(500, config), *IMAGENET).phases[0]
    assert with_sam.images_per_s == pytest.approx(400)


def test_with_colout_the_network_sees_fewer_pixels_than_the_crop_has():
    config = CONFIG | {"epochs": 4, "swa_start_epoch": 0, "train_resolution": 176, "colout": 0.05}
    (phase,) = plan_run(config, rates_stated(500, config), *IMAGENET).phases
    assert phase.resolution == 176
    assert phase.images_per_s == pytest.approx(500 * (224 / 167) ** 2)


def test_between_two_measured_sizes_the_time_is_linear_in_the_pixels():
    rates = Rates({100: 1 / 3, 200: 1 / 9}, {1: 1.0}, 0.0, "")  # 1 + 2 (px / 100)^2 seconds an image
    assert rates.training_at(100) == pytest.approx(1 / 3)
    assert rates.training_at(200) == pytest.approx(1 / 9)
    assert rates.training_at(150) == pytest.approx(1 / 5.5)


def test_validation_is_counted_once_for_each_kind_of_weights_and_twice_with_flip():
    config = CONFIG | {"epochs": 10, "swa_start_epoch": 0, "warmup_epochs": 1}
    rates = rates_stated(1000 / 3, config)
    plain = plan_run(config, rates, 1000, 3600).validation_hours
    assert plain == pytest.approx(10 / 1000)
    flipped = config | {"val_flip": True}
    assert plan_run(flipped, rates_stated(1000 / 3, flipped), 1000, 3600).validation_hours == pytest.approx(2 * plain)
    assert plan_run(config | {"swa_start_epoch": 6}, rates, 1000, 3600).validation_hours == pytest.approx(1.5 * plain)
    both = config | {"swa_start_epoch": 6, "ema_half_life_images": 9, "ema_every_images": 256, "val_flip": True}
    assert plan_run(both, rates_stated(1000 / 3, both), 1000, 3600).validation_hours == pytest.approx(5 * plain)


@pytest.mark.parametrize(("every_steps", "epochs_with_it"), [(1, 10), (4, 9), (30, 1), (31, 0)])
def test_an_ema_is_counted_from_the_epoch_on_in_which_weights_enter_it(every_steps, epochs_with_it):
    config = CONFIG | {"epochs": 10, "swa_start_epoch": 0, "warmup_epochs": 1}  # of 3 steps each
    config |= {"ema_half_life_images": 9, "ema_every_images": 256 * every_steps}
    hours = plan_run(config, rates_stated(1000 / 3, config), 1000, 3600).validation_hours
    assert hours == pytest.approx((10 + epochs_with_it) / 1000)


def test_epochs_that_are_not_validated_cost_no_validation_and_the_last_one_always_is():
    config = CONFIG | {"epochs": 10, "swa_start_epoch": 0, "warmup_epochs": 1, "validate_every_epochs": 4}
    assert plan_run(config, rates_stated(1000 / 3, config), 1000, 3600).validation_hours == pytest.approx(3 / 1000)


def test_reading_the_validation_images_is_counted_once_for_all_kinds_of_weights():
    config = CONFIG | {"epochs": 10, "swa_start_epoch": 6, "warmup_epochs": 1}
    rates = Rates({224: 1000.0}, {1: 1000.0, 2: 800.0}, 1000.0, "")
    assert plan_run(config, rates, 1000, 3600).validation_hours == pytest.approx(5 / 1000 + 5 / 800)
    assert plan_run(config | {"more_val_resolutions": [448]}, rates, 1000, 3600).validation_hours == pytest.approx(
        5 / 1000 + 5 / 800 + 4 / 800
    )


def test_a_plan_counts_statistics_saves_first_steps_and_start_up():
    config = CONFIG | {"batch_size": 10, "epochs": 6, "swa_start_epoch": 5, "warmup_epochs": 1, "checkpoint_minutes": 0.5}
    config |= {"start_resolution": 112, "train_resolution": 224, "resolution_step": 112, "swa_batch_norm_batches": 36}
    rates = Rates({112: 40.0, 224: 10.0}, {1: 1e9}, 30.0, "", 7.0, 3.0, 0.5, 2.0, 1.0)
    plan = plan_run(config, rates, 364, 1)  # 36 steps; epochs of 9, 9, 9, 9, 36 and 36 s
    assert [phase.resolution for phase in plan.phases] == [112, 224]
    assert sum(phase.hours for phase in plan.phases) * 3600 == pytest.approx(4 * 9 + 2 * 36)
    assert plan.statistics_hours * 3600 == pytest.approx(2 * 360 / 30)
    assert plan.start_hours * 3600 == pytest.approx(7 + 2 * 3 + 6 * 0.5)
    assert plan.saves == 6 + 2
    assert plan.keeping_hours * 3600 == pytest.approx(8 * 2 + 6 * 1)
    assert plan.hours * 3600 == pytest.approx(108 + 24 + 16 + 22, abs=0.1)


def test_the_steps_that_look_for_a_learning_rate_are_counted(capsys, tmp_path):
    config = CONFIG | {"epochs": 4, "swa_start_epoch": 0, "start_resolution": 112, "resolution_step": 112}
    rates = rates_stated(100, config)  # 400 at 112 px
    given, found = (plan_run(config | {"learning_rate": rate}, rates, *IMAGENET) for rate in (0.1, "auto"))
    assert (found.hours - given.hours) * 3600 == pytest.approx(100 * 256 / 400)
    flags = ["--plan", "--images-per-s=100", f"--data-dir={tmp_path / 'none'}", "--recipe=seed"]
    assert run_here([*flags, "--learning-rate=auto"]) == 0
    assert "  finding the learning rate: at most 100 steps, 4.3 minutes" in capsys.readouterr().out


@pytest.mark.parametrize("px", [128, 176, 224])
def test_a_step_of_muon_takes_its_matrix_products_beside_what_the_stated_speed_says(px):
    muon, mild = (rates_stated(282, CONFIG | RECIPES[name]).training_at(px) for name in ("muon", "mild"))
    assert mild / muon - 1 == pytest.approx(newton_schulz_share("resnet50", px, 256), rel=0.04)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("hours", [5, 12, 70, 200])
def test_the_epochs_chosen_fit_and_one_more_would_not(recipe, hours):
    config = CONFIG | RECIPES[recipe]
    rates = rates_stated(282, config)
    epochs = epochs_within(hours, lambda epochs: config | {"epochs": epochs}, rates, *IMAGENET, sound)

    def fits(epochs):
        stretched = config | {"epochs": epochs}
        return sound(stretched) and plan_run(stretched, rates, *IMAGENET).hours <= hours

    assert not fits(epochs + 1)
    assert fits(epochs) if epochs else not any(map(fits, range(1, 40)))


def test_the_readme_shows_the_plan_as_it_is_printed(tmp_path):
    readme = (REPOSITORY / "docs/recipes.md").read_text()
    (command,) = re.findall(r"^    python train\.py (.*--plan .*)$", readme, flags=re.MULTILINE)
    status, output = run_program("train.py", command.split(), cwd=tmp_path)
    assert status == 0, output
    for line in output.splitlines()[1:]:
        assert f"    {line.split('; begun now')[0]}" in readme
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_plan_measures_this_machine_and_writes_nothing(image_tree, tmp_path):
    arguments = [*tiny_run(image_tree, tmp_path / "run", start_resolution=32, train_resolution=64), "--plan"]
    status, output = run_program("train.py", arguments, cwd=tmp_path)
    assert status == 0, output
    assert "plan: 3 epochs of 60 images in batches of 8 (measured on CPU" in output
    assert "data included" in output
    assert re.search(r"epochs 1 to 2: 32 px, [\d,]+ images/s", output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", [["--recipe=seed"], []])
def test_epochs_that_a_budget_overrules_are_said(recipe, capsys, tmp_path):
    flags = ["--plan", "--images-per-s=282", f"--data-dir={tmp_path / 'none'}", *recipe]
    for budget, said in ((["--hours=30"], "--hours"), (["--dollars=30", "--price-per-hour=1"], "--dollars"), ([], None)):
        assert run_here([*flags, *budget, "--epochs=3"]) == 0
        note = f"note: --epochs 3 is not used: {said} chooses the epochs"
        assert (note in capsys.readouterr().out) == (said is not None)


@pytest.mark.slow
def test_hours_chooses_the_epochs_and_trains(image_tree, tmp_path):
    flags = [
        "--hours",
        "0.0001",
        "--price-per-hour=100",
        "--images-per-s",
        "25",
    ]  # 0.36 s, at 25 images/s at 224 px: 1,225 at 32 px
    arguments = [word for word in tiny_run(image_tree, tmp_path / "run", swa_start_epoch=0) if "--epochs" not in word]
    arguments.append("--recipe=seed")
    status, output = run_program("train.py", [*arguments, *flags], cwd=tmp_path)
    assert status == 0, output
    epochs = int(re.search(r"plan: (\d+) epochs", output)[1])
    assert epochs > 3
    assert "0.01 at 100 per hour" in output
    assert len(read_records(tmp_path / "run/metrics.jsonl")) == epochs
    assert f"epoch {epochs}/{epochs}: " in output
    status, output = run_program("train.py", [*arguments, *flags, "--resume=auto"], cwd=tmp_path)  # the same line, later on
    assert status == 0, output
    assert f"finished {epochs} epochs" in output and "used so far, with 1 earlier session" in output


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
    with pytest.raises(PlanError, match=re.escape(reason)):
        train.main(command)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_measured_with_the_convolutions_of_a_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert train.main(parse_command_line(["--plan", "--images-per-s=282"], train.OWN_FLAGS)) == 0
    assert torch.backends.cudnn.benchmark  # cuDNN tries its algorithms, as in a run


def test_a_flag_of_the_plan_without_a_plan_is_refused(tmp_path):
    status, output = run_program("train.py", ["--images-per-s=282"], cwd=tmp_path)
    assert status == 2, output
    assert output.count("belongs to a plan; add --plan or --hours") == 1
