"""A budget is spent on the recipe with the highest published top-1 of what fits, and what is not published is not invented."""

import re

import pytest
from conftest import run_here, run_program

import train
from config import CONFIG, RECIPES
from engine.cli.command_line import parse_command_line
from engine.cli.keys import ConfigError
from engine.run import checkpoint_files
from engine.run.published import published_result
from engine.training import frontier, settling
from engine.training.plan import PlanError, Rates, plan_run, rates_stated

IMAGENET = (1_281_167, 50_000)


class Images:
    """So many training images of so many classes."""

    def __init__(self, classes, count):
        self.classes, self.count = range(classes), count

    def __len__(self):
        return self.count


def command_of(*words):
    return parse_command_line(["--plan", "--images-per-s=282", *words], train.OWN_FLAGS)


def chosen_by(*words, counts=IMAGENET):
    """The Option that is chosen, and all lines."""
    command = command_of(*words)
    commands, remarks = frontier.commands_with_recipes(command)
    prospects = frontier.prospects_of(commands, frontier.rates_stated_for(command))
    chosen, lines = frontier.choose(command, prospects, counts, remarks)
    return chosen, "\n".join(lines)


@pytest.mark.parametrize(
    ("hours", "recipe", "epochs", "said"),
    [
        (6, "mild", 12, "nothing published (76.19 % at 29 epochs, 13.3 hours)"),
        (12.5, "mild", 27, "nothing published"),  # fast has 73.76 %, and mild lacks an hour to its 76.19 %
        (13.5, "mild", 29, "76.19 % published"),
        (25, "mild", 55, "%, interpolated between 29 and 60 epochs"),
        (29, "mild", 60, "78.10 % published, its longest published length"),  # medium would get 58 epochs
        (65, "medium", 131, "%, interpolated between 60 and 240 epochs"),
        (130, "medium", 240, "79.50 % published, its longest published length"),
        (200, "hot", 341, "no figure is published; its authors' recipe for more than 240 epochs"),
    ],
)
def test_the_best_published_recipe_of_what_fits_is_chosen(hours, recipe, epochs, said):
    chosen, text = chosen_by(f"--hours={hours}")
    assert (chosen.recipe, chosen.epochs) == (recipe, epochs)
    assert chosen.config["epochs"] == epochs and chosen.hours <= hours
    first = text.splitlines()[0]
    assert first.startswith(f"chosen for {hours:.1f} hours: recipe {recipe}, {epochs} epochs in ")
    assert said in first
    assert f"\nplan: {epochs} epochs of 1,281,167 images" in text
    others = {"fast", "mild", "medium"} - {recipe}
    assert set(re.findall(r"^  instead: (\w+),", text, flags=re.MULTILINE)) == others


def test_what_is_chosen_is_the_recipe_stretched_over_its_epochs():
    chosen, _ = chosen_by("--hours=65", "--weight-decay=1e-5")
    expected = CONFIG | RECIPES["medium"] | {"epochs": 131, "warmup_epochs": 8 * 131 / 90, "weight_decay": 1e-5}
    assert chosen.config == expected
    assert chosen.published == published_result("medium", 131)


def test_dollars_are_hours_at_a_price():
    by_dollars, text = chosen_by("--dollars=18.8", "--price-per-hour=0.752")
    assert by_dollars[:4] == chosen_by("--hours=25")[0][:4]
    assert "18.76 at 0.752 per hour" in text


def test_recipes_that_do_not_go_with_the_flags_are_left_out_and_it_is_said():
    chosen, text = chosen_by("--hours=40", "--train-resolution=128")
    assert chosen.recipe == "medium"
    assert "fast does not go with the flags: start_resolution = 160" in text
    with pytest.raises(ConfigError) as refused:
        chosen_by("--hours=12", "--train-resolution=64")
    reason, *of_recipes = refused.value.problems
    assert reason.startswith("without --recipe one is chosen of fast, mild, medium, hot, and none goes with the flags")
    assert "recipe mild: start_resolution = 88" in of_recipes[1] and "--start-resolution 0" in of_recipes[1]
    assert chosen_by("--hours=12", "--train-resolution=64", "--start-resolution=0")[0].recipe == "medium"


def test_what_the_figures_are_not_about_is_said():
    images = Images(1000, 1_281_167)
    assert frontier.remarks_on_figures(command_of("--data-dir=elsewhere"), images) == []
    assert frontier.remarks_on_figures(command_of(), None) == []
    assert frontier.remarks_on_figures(command_of(), Images(1000, 1_270_000)) == []
    for other in (Images(1000, 60), Images(1000, 1_100_000), Images(1000, 2_000_000), Images(999, 1_281_167)):
        (line,) = frontier.remarks_on_figures(command_of(), other)
        assert "only rank the recipes" in line
    (line,) = frontier.remarks_on_figures(command_of("--batch-size=512"), images)
    assert line.endswith("without --batch-size")


def test_rates_are_carried_over_by_pixels_and_passes():
    mild, fast, medium = (CONFIG | RECIPES[name] for name in ("mild", "fast", "medium"))
    of_mild = Rates({88: 282 * (224 / 88) ** 2, 176: 282 * (224 / 176) ** 2}, {1: 846.0}, 0.0, "measured")
    for config in (mild, fast, medium):
        carried = frontier.rates_carried_over(of_mild, "mild", mild, config)
        stated = plan_run(config, rates_stated(282, config), *IMAGENET)
        assert plan_run(config, carried, *IMAGENET).hours == pytest.approx(stated.hours)


# Command lines ---------------------------------------------------------------------------------------------------------


def test_a_plan_without_a_recipe_is_a_menu(tmp_path):
    flags = ["--plan", "--images-per-s=282", "--price-per-hour=0.752"]
    status, output = run_program("train.py", flags, cwd=tmp_path)
    assert status == 0, output
    *rows, unproven = [re.split(r" {2,}", line.strip()) for line in output.splitlines() if line.startswith("  ")]
    assert "nobody has published it: recipe muon" in unproven[0]
    assert rows[0] == ["budget", "recipe", "epochs", "hours", "dollars", "top-1 on ImageNet-1K"]
    assert [row[:3] for row in rows[1:]] == [
        ["6 hours", "mild", "12"],
        ["12 hours", "mild", "26"],
        ["25 hours", "mild", "55"],
        ["65 hours", "medium", "131"],
    ]
    for budget, _, _, hours, dollars, top1 in rows[1:]:
        assert float(hours) <= float(budget.split()[0])
        assert float(dollars) == pytest.approx(0.752 * float(hours), abs=0.04)
        assert top1.startswith("nothing published") or "interpolated" in top1
    assert output.rstrip().endswith("start one: python train.py --hours 12")
    status, output = run_program("train.py", flags[:2], cwd=tmp_path)
    assert status == 0 and "dollars" not in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--recipe=fast", "--epochs=10"])
def test_a_plan_of_a_named_recipe_or_of_given_epochs_is_no_menu(flag, tmp_path):
    status, output = run_program("train.py", ["--plan", "--images-per-s=282", flag], cwd=tmp_path)
    assert status == 0, output
    assert "plan: " in output and "budget" not in output and "chosen" not in output


@pytest.mark.slow
def test_a_plan_for_other_images_than_those_that_are_there_says_why(image_tree, tmp_path, capsys):
    for folder, reason in ((image_tree, "60 training images make no batch"), (tmp_path / "nowhere", "does not exist")):
        assert run_here([f"--data-dir={folder}", "--recipe=mild", "--plan", "--images-per-s=100"]) == 0
        assert re.search(f"planned for ImageNet-1K, as a run could not begin: .*{reason}", capsys.readouterr().out)


def test_a_run_is_of_the_recipe_that_was_chosen(image_tree, tmp_path):
    """60 images: 56 in batches; 0.02 s are an epoch of mild at 10,000 images/s at 224 px."""
    folder = tmp_path / "run"
    flags = ["--hours=0.0000055", "--images-per-s=10000", f"--data-dir={image_tree}", f"--checkpoint-dir={folder}"]
    flags += [f"--log-file={folder}.log", "--architecture=resnet18", "--batch-size=8", "--device=cpu", "--precision=fp32"]
    status, output = run_program("train.py", [*flags, "--num-workers=0", "--val-resolution=32"], cwd=tmp_path)
    assert status == 0, output
    epochs = int(re.search(r"recipe mild, (\d+) epochs in 0 seconds: nothing published", output)[1])
    assert "recipe mild: resnet18 on 60 images of 10 classes" in output
    assert "only rank the recipes" in output
    assert f"plan: {epochs} epochs of 60 images in batches of 8 (calculated from 10000 images/s at 224 px)" in output
    assert "the seed's recipe" not in output
    checkpoint = checkpoint_files.read(folder / "last.pt")
    assert (checkpoint["recipe"], checkpoint["epoch"]) == ("mild", epochs)
    expected = CONFIG | RECIPES["mild"] | {"epochs": epochs, "batch_size": 8, "architecture": "resnet18", "val_resolution": 32}
    assert {key: checkpoint["config"][key] for key in RECIPES["mild"] if key != "warmup_epochs"} == {
        key: expected[key] for key in RECIPES["mild"] if key != "warmup_epochs"
    }


@pytest.mark.slow
def test_the_machine_is_measured_once_for_all_recipes(image_tree, tmp_path):
    flags = ["--plan", f"--data-dir={image_tree}", f"--checkpoint-dir={tmp_path}", "--architecture=resnet18"]
    flags += ["--batch-size=8", "--device=cpu", "--num-workers=0"]
    status, output = run_program("train.py", flags, cwd=tmp_path)
    assert status == 0, output
    assert "measured on CPU" in output and "recipe mild, others by their pixels and passes" in output
    assert re.search(r"^ +65 hours +\w+ ", output, flags=re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--dollars=5"], "--dollars without --price-per-hour"),
        (["--dollars=5", "--hours=5", "--price-per-hour=1"], "--hours and --dollars: each is a budget"),
        (
            ["--plan", "--dollars=5", "--price-per-hour=1", "--resume=auto"],
            "--plan with --resume: a plan is made for",
        ),
        (["--plan", "--stop-after-hours=1"], "--stop-after-hours: belongs to a run"),
        (["--hours=5", "--size-rule=bit"], "--size-rule bit with --hours and no recipe: "),
        (["--plan", "--size-rule=bit"], "--size-rule bit with --plan and no recipe: "),
    ],
)
def test_budgets_that_contradict_are_refused(flags, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        settling.require_consistent_flags(parse_command_line(flags, train.OWN_FLAGS))


@pytest.mark.parametrize("flag", ["--hours", "--images-per-s", "--price-per-hour", "--stop-after-hours"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "12h"])
def test_numbers_that_are_none_are_refused_before_images_are_fetched(flag, value):
    words = [f"{flag}={value}", *(["--plan"] if flag == "--images-per-s" else [])]
    with pytest.raises(PlanError, match=f"{flag} {value}: must be a number above 0"):
        settling.require_consistent_flags(parse_command_line(words, train.OWN_FLAGS))


def test_dollars_that_are_too_few_are_refused():
    with pytest.raises(PlanError, match="--dollars 0.001: too short for this recipe"):
        chosen_by("--dollars=0.001", "--price-per-hour=1")


# A plain run -----------------------------------------------------------------------------------------------------------


def test_a_plain_run_says_what_mild_would_give_on_imagenet():
    line = frontier.remark_on_default(parse_command_line([], train.OWN_FLAGS))
    assert line.startswith("note: this is the seed's recipe, on ImageNet-1K 59.21 % after about 65 hours on a T4; ")
    assert "--recipe mild: 76.19 % published, " in line
    assert "about 12 hours of training at the same speed, 282 images/s at 224 px (calculated)" in line
    assert frontier.remark_on_default(parse_command_line(["--recipe=seed"], train.OWN_FLAGS)) is None


@pytest.mark.slow
def test_it_is_the_first_line_of_the_run_and_only_of_a_new_one(tiny_arguments, tmp_path, capsys):
    assert run_here(tiny_arguments) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("note: this is the seed's recipe") and second.startswith("recipe seed: ")
    assert run_here([f"--resume={tmp_path / 'run'}", "--epochs=4"]) == 0
    assert "the seed's recipe" not in capsys.readouterr().out
