"""Which recipe a budget is best spent on: the published top-1 of each, at the epochs that fit into the hours."""

from collections.abc import Callable
from typing import NamedTuple

from config import CONFIG, HYPERPARAMETERS, RECIPES
from engine.cli.keys import ConfigError, config_problems
from engine.preparation.trees import IMAGENET_COUNTS
from engine.run.published import POINTS, SEED_RUN, Published, published_result, top1_on_line, trains_on_imagenet
from engine.system.wording import duration
from engine.training.plan import (
    Rates,
    asks_for_plan,
    budget_hours,
    epochs_within,
    overruled,
    plan_lines,
    plan_run,
    positive,
    rates_stated,
    too_short,
)

CANDIDATES = ("fast", "mild", "medium", "hot")
LIKELIEST = "mild"  # what a machine is measured with; chosen, too, where nothing is published: the best at the shortest length
MENU_HOURS = (6, 12, 25, 65)
HALF = 0.5
UNPROVEN = "  below them, as nobody has published it: recipe muon, mild with another optimizer (docs/recipes.md#muon)"


class Prospect(NamedTuple):
    """What a recipe would be on this machine, with the command's flags."""

    recipe: str
    stretch: Callable  # epochs -> configuration
    rates: Rates


class Option(NamedTuple):
    """The run of a recipe that some hours allow."""

    recipe: str
    config: dict  # of that many epochs
    epochs: int  # 0: not a single one fits
    hours: float
    published: Published | None
    hours_of_shortest: float | None  # what the shortest published length would take
    rates: Rates


def leaves_recipe_open(command):
    """Return whether a budget or a plan is asked for, but neither a recipe nor epochs."""
    return asks_for_plan(command) and not (command.recipe or "epochs" in command.given)


# What each recipe is here ----------------------------------------------------------------------------------------------


def commands_with_recipes(command):
    """Return ({recipe: Command}, lines about the candidates that do not go with the command's flags).

    Raises:
        ConfigError: none goes with them.
    """
    commands = {recipe: command.with_recipe(recipe) for recipe in CANDIDATES}
    problems = {recipe: config_problems(of_recipe.config) for recipe, of_recipe in commands.items()}
    if all(problems.values()):
        reason = f"without --recipe one is chosen of {', '.join(CANDIDATES)}, and none goes with the flags:"
        raise ConfigError([reason, *(f"recipe {recipe}: {text}" for recipe, found in problems.items() for text in found)])
    lines = [f"  {recipe} does not go with the flags: {found[0]}" for recipe, found in problems.items() if found]
    return {recipe: of_recipe for recipe, of_recipe in commands.items() if not problems[recipe]}, lines


def recipe_to_measure(commands):
    """Return the recipe that stands for all in measuring, given commands_with_recipes."""
    return LIKELIEST if LIKELIEST in commands else next(iter(commands))


def prospects_of(commands, rates_for, adapt=lambda config: config):
    """Return the Prospect of each recipe.

    Args:
        commands: {recipe: Command}, of commands_with_recipes.
        rates_for: takes a configuration, returns its Rates on this machine.
        adapt: what becomes of a configuration before it is run.
    """

    def stretching(of_recipe):
        return lambda epochs: adapt(of_recipe.config | of_recipe.durations(epochs))

    return [Prospect(name, stretching(of_recipe), rates_for(of_recipe.config)) for name, of_recipe in commands.items()]


def rates_stated_for(command):
    """Return the function from a configuration to its Rates, or None where the command states no images_per_s."""
    images_per_s = positive("images_per_s", command.options)
    return None if images_per_s is None else lambda config: rates_stated(images_per_s, config)


def rates_carried_over(rates, recipe, measured, config):
    """Return the Rates of a machine for another configuration than `measured`, which it was measured with, of that recipe.

    Measuring each recipe would take minutes. What differs between them is the size of the images, in which seconds are linear,
    and SAM's second pass: training is known by the size and without SAM (Rates), the rest is scaled by its pixels here. Not
    known are the seconds that a CPU needs for an augmentation, and SAM's passes are counted in full also where images are
    waited for.
    """

    def validation_pixels(config):
        return config["val_resolution"] ** 2 * (2 if config["val_flip"] else 1)

    scale = validation_pixels(measured) / validation_pixels(config)
    return rates._replace(
        validation={networks: rate * scale for networks, rate in rates.validation.items()},
        statistics=rates.statistics * (measured["train_resolution"] / config["train_resolution"]) ** 2,
        source=f"{rates.source}; recipe {recipe}, others by their pixels and passes",
    )


# The choice ------------------------------------------------------------------------------------------------------------


def options_within(hours, prospects, counts):
    """Return the Option of each recipe, at most of its longest published length: beyond it a figure would be invented.

    `hot` is among them where it gets longer than that of `medium`, which is what it was made for.

    Args:
        counts: of the images for training and for validation.
    """
    options = []
    for recipe, stretch, rates in prospects:
        points = POINTS[recipe]
        most = {"most": max(points)} if points else {}
        epochs = epochs_within(hours, stretch, rates, *counts, lambda config: not config_problems(config), **most)
        if recipe == "hot" and epochs <= max(POINTS["medium"]):
            continue
        config = stretch(max(epochs, 1))
        of_shortest = plan_run(stretch(min(points)), rates, *counts).hours if points else None
        its_hours = plan_run(config, rates, *counts).hours
        options.append(Option(recipe, config, epochs, its_hours, published_result(recipe, epochs), of_shortest, rates))
    return options


def rank_of(option):
    """Return a top-1 in % that ranks an Option, or None.

    What is published; or for LIKELIEST, down to HALF of its shortest published length, the line in the logarithm of the epochs
    through its two shortest. That is no figure, and is never shown as one.
    """
    points = POINTS[option.recipe]
    if option.published:
        return option.published.top1
    if option.recipe != LIKELIEST or not HALF * min(points) <= option.epochs < min(points):
        return None
    return top1_on_line(points, *sorted(points)[:2], option.epochs)


def best_option(options):
    """Return (Option, why): hot where it is one, else the highest published top-1, else LIKELIEST."""
    by_recipe = {option.recipe: option for option in options}
    if "hot" in by_recipe:
        return by_recipe["hot"], f"its authors' recipe for more than {max(POINTS['medium'])} epochs"
    known = [option for option in options if rank_of(option) is not None]
    if known:
        best = max(known, key=lambda option: (rank_of(option), -option.hours))
        if best.published:
            return best, "the highest published top-1 of what fits"
        return best, "the best of what fits, if it loses below its shortest published length as it does above"
    if LIKELIEST in by_recipe:
        return by_recipe[LIKELIEST], f"nothing that fits is published, and {LIKELIEST} leads at the shortest length that is"
    return options[0], "nothing that fits is published"


def top1_in_words(option):
    """Return an Option's published figure as text, or what is published instead."""
    points = POINTS[option.recipe]
    if option.published is None:
        if not points:
            return "no figure is published"
        shortest = min(points)
        return f"nothing published ({points[shortest].top1:.2f} % at {shortest} epochs, {duration(option.hours_of_shortest)})"
    text = f"{option.published.top1:.2f} %"
    if option.published.between:
        return text + ", interpolated between {} and {} epochs".format(*option.published.between)
    longest = ", its longest published length" if option.epochs == max(points) else ""
    return f"{text} published{longest}"


def option_in_words(option):
    """Return an Option as text."""
    length = f"{option.epochs} epochs in {duration(option.hours)}" if option.epochs else "not one epoch fits"
    return f"{option.recipe}, {length}: {top1_in_words(option)}"


def choose(command, prospects, counts, remarks=()):
    """Return (Option, lines): what the budget of a command is best spent on; why, what else there is, and the plan.

    Args:
        prospects: list of Prospect.
        counts: of the images for training and for validation.
        remarks: lines on the choice.
    Raises:
        PlanError: not one epoch fits.
    """
    hours = budget_hours(command.options)
    options = options_within(hours, prospects, counts)
    chosen, why = best_option(options)
    if chosen.epochs == 0:
        raise too_short(command.options, chosen.rates)
    lines = [f"chosen for {duration(hours)}: recipe {option_in_words(chosen)}; {why}"]
    lines += [f"  instead: {option_in_words(option)}" for option in options if option is not chosen]
    lines += [*remarks, *overruled(command)]
    plan, price = plan_run(chosen.config, chosen.rates, *counts), positive("price_per_hour", command.options)
    return chosen, lines + plan_lines(plan, chosen.config, chosen.rates, *counts, price)


def remarks_on_figures(command, images):
    """Return lines on what the published figures are not about: these training images (None: ImageNet-1K's), these flags."""
    lines = []
    if images is not None and not trains_on_imagenet(len(images.classes), len(images)):
        lines.append("note: these images are not ImageNet-1K's, whose figures these are: here they only rank the recipes")
    if changed := [f"--{key.replace('_', '-')}" for key in command.given if key in HYPERPARAMETERS]:
        lines.append(f"note: the figures are those of the recipes without {', '.join(changed)}")
    return lines


# The menu --------------------------------------------------------------------------------------------------------------


def menu(command, prospects, counts, remarks=()):
    """Return lines: a table of what MENU_HOURS are best spent on. Arguments as of choose."""
    price = positive("price_per_hour", command.options)
    rows = [("budget", "recipe", "epochs", "hours", *(["dollars"] if price else []), "top-1 on ImageNet-1K")]
    for hours in MENU_HOURS:
        option, _ = best_option(options_within(hours, prospects, counts))
        took = option.hours if option.epochs else 0.0
        cost = [f"{took * price:.2f}"] if price else []
        rows.append((f"{hours} hours", option.recipe, f"{option.epochs}", f"{took:.1f}", *cost, top1_in_words(option)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left_aligned = (1, len(widths) - 1)
    lines = [f"the published recipes on {counts[0]:,} images ({prospects[0].rates.source})"]
    for row in rows:
        cells = [
            text.ljust(width) if place in left_aligned else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return [*lines, UNPROVEN, *remarks, "start one: python train.py --hours 12"]


# A plain run -----------------------------------------------------------------------------------------------------------


def remark_on_default(command):
    """Return a line for a new run without a named recipe: what `mild` would give on ImageNet-1K instead; or None."""
    if command.recipe is not None or leaves_recipe_open(command):
        return None
    config, (epochs, mild) = CONFIG | RECIPES["mild"], min(POINTS["mild"].items())
    plan = plan_run(config | {"epochs": epochs}, rates_stated(SEED_RUN["images_per_s"], config), *IMAGENET_COUNTS)
    hours = sum(phase.hours for phase in plan.phases)
    return (
        f"note: this is the seed's recipe, on ImageNet-1K {SEED_RUN['top1']} % after about {SEED_RUN['hours']} hours on a T4; "
        f"--recipe mild: {mild.top1} % published, about {hours:.0f} hours of training at the same speed, "
        f"{SEED_RUN['images_per_s']} images/s at 224 px (calculated)"
    )
