"""What makes a configuration final before a run is built from it: compiled code, the epochs that fit, the recipe."""

import math
import time

from engine.cli.command_line import averaging_rate_in_words, with_averaging_rate
from engine.cli.keys import ConfigError, config_problems
from engine.preparation.trees import IMAGENET_COUNTS
from engine.run.monitor import Monitor
from engine.system import distributed
from engine.system.device import choose_device, choose_precision, set_up_arithmetic
from engine.system.errors import DataError, TrainingStopped, first_line
from engine.system.host_memory import keep_freed_memory
from engine.system.plain_json import to_json
from engine.training import frontier
from engine.training.compiling import choose_compile, choose_compiled, coarser_step, keep_compiled_code_in
from engine.training.images import open_images
from engine.training.initial_weights import with_initial_weights
from engine.training.measuring import measure_machine
from engine.training.plan import BUDGETS, asks_for_plan, budget_flag, budget_hours, overruled, plan_new_run, positive
from engine.training.range_test import USUAL_RANGE, describe_rates, find_learning_rate
from engine.training.size_rule import adapted, rate_for_length, rule_in_words
from engine.training.trials import Trials


def settle(command, config, checkpoint, splits, trials, monitor, begun):
    """Return (config, compile_choice, lines): how the network is compiled and, where a plan is asked for, the epochs that fit.

    The lines are to be logged. A learning rate that is to be found is found later, by with_found_rate.
    """
    sized = []
    if checkpoint is None:
        config, sized = adapted(command, config, splits["train"])
    config, choice, lines = settle_compiling(command, config, checkpoint, splits, trials, monitor)
    if not asks_for_plan(command) or checkpoint is not None:
        return config, choice, sized + lines + trials.remarks

    def measure():
        return measure_rates(command, config, choice, splits, trials, monitor, begun)

    config, planned = distributed.broadcast_from_rank0(plan_for(command, config, counts_of(splits), measure))
    return config, choice, of_length(sized, command, config, splits["train"]) + lines + planned + trials.remarks


def settle_compiling(command, config, checkpoint, splits, trials, monitor):
    """Return (config, compile_choice, lines) of choose_compiled, whose code is kept beside the checkpoints."""
    how, _ = choose_compile(config, trials.device)
    if how != "off":
        keep_compiled_code_in(config["checkpoint_dir"], create="plan" not in command.options)
    own_step = "resolution_step" in command.given or checkpoint is not None
    hours = budget_hours(command.options) or math.inf
    if how == "measure":
        monitor.start("choosing between the network as written and compiled", None)
    chosen = choose_compiled(config, checkpoint, own_step, len(splits["train"]), hours, trials)
    if how == "measure":
        monitor.finish()
    return chosen


def measure_rates(command, config, compile_choice, splits, trials, monitor, begun):
    """Return the Rates of this machine with a configuration; where a run follows, the measuring is part of its start."""
    started = time.perf_counter()
    state = trials.scratch_state(config, compiled=compile_choice["compiled"])
    step = lambda state, *batch: trials.step(state, *batch, config)  # noqa: E731
    rates = measure_machine(config, splits, state, step, monitor, begun)
    measuring = 0.0 if "plan" in command.options else time.perf_counter() - started
    trials.rates = rates._replace(start_seconds=rates.start_seconds + measuring)
    return trials.rates


def counts_of(splits):
    """Return how many images there are for training and for validation."""
    return len(splits["train"]), len(splits["val"])


def prospects_here(command, splits, trials, monitor, begun):
    """Return (prospects, remarks, compile_choice, lines): what each recipe would be on this machine.

    It is measured with one of them. Whether compiled code is faster is found out with that one, too: the network and the
    batch are the same.
    """
    commands, left_out = frontier.commands_with_recipes(command)
    recipe = frontier.recipe_to_measure(commands)
    config, choice, lines = settle_compiling(command, commands[recipe].config, None, splits, trials, monitor)
    rates_for = frontier.rates_stated_for(command)
    if rates_for is None:
        rates = distributed.broadcast_from_rank0(measure_rates(command, config, choice, splits, trials, monitor, begun))

        def rates_for(other):
            return frontier.rates_carried_over(rates, recipe, config, other)

    def adapt(other):
        few_sizes = choice["compiled"] and "resolution_step" not in command.given
        return other | {"resolution_step": coarser_step(other)} if few_sizes else other

    remarks = left_out + frontier.remarks_on_figures(command, splits["train"])
    return frontier.prospects_of(commands, rates_for, adapt), remarks, choice, lines


def settle_by_budget(command, splits, trials, monitor, begun):
    """Return (recipe, config, compile_choice, lines): those that the hours or dollars of a command are best spent on."""
    prospects, remarks, choice, lines = prospects_here(command, splits, trials, monitor, begun)
    chosen, said = frontier.choose(command, prospects, counts_of(splits), remarks)
    trials.rates = chosen.rates
    return chosen.recipe, chosen.config, choice, said + lines + trials.remarks


def plan_for(command, config, counts, measure):
    """Return (config, lines) of plan_new_run for a command: with the epochs of a budget also the rate for so many."""
    own = config if config["size_rule"] != "none" else None  # whose warm-up is the rule's
    config, lines = plan_new_run(
        config,
        command.options,
        counts,
        measure,
        lambda epochs: config | command.durations(epochs, own),
        lambda stretched: not config_problems(stretched),
    )
    if budget_flag(command.options) and "learning_rate" not in command.given:
        usual = command.config  # whose rate is the rule's
        config |= {"learning_rate": usual["learning_rate"]} | rate_for_length(usual, counts[0], config["epochs"])
        config = with_averaging_rate(config, command.recipe, command.given)
    return config, overruled(command) + lines


def of_length(sized, command, config, images):
    """Return the lines on a size_rule, which were made before the epochs were known, for those of a final configuration."""
    return [rule_in_words(command, config, len(images), budget_flag(command.options) is not None)] if sized else []


def with_found_rate(config, recipe, given, trials, batches, monitor):
    """Return the configuration with the learning rate that a range test suggests, and what follows it.

    Raises:
        TrainingStopped: it suggests none; hours at a rate that nothing speaks for are not begun.
    """
    found = find_learning_rate(trials, config, batches, monitor, *USUAL_RANGE[config["optimizer"]])
    rate = distributed.broadcast_from_rank0(found["suggestion"])
    if rate is None:
        advice = "lr_finder.py with the same flags draws the curve; without --learning-rate the recipe's rate is trained with"
        raise TrainingStopped(f"--learning-rate auto: {describe_rates(found)}. {advice}")
    monitor.log(describe_rates(found))
    config = with_averaging_rate(config | {"learning_rate": rate}, recipe, given)
    for line in averaging_rate_in_words(config, recipe, given):
        monitor.log(line)
    monitor.log_to_file(f"configuration: {to_json(config)}")  # the final one
    monitor.event("configuration", config=config)
    return config


# A plan alone ---------------------------------------------------------------------------------------------------------


def require_consistent_flags(command):
    """Raise ConfigError where the program's own flags do not go together."""
    resume = command.options.get("resume")
    if resume is not None and "plan" in command.options:
        raise ConfigError(["--plan with --resume: a plan is made for a new run; change --epochs"])
    if command.options.keys() >= set(BUDGETS):
        raise ConfigError(["--hours and --dollars: each is a budget; give one of them"])
    if "dollars" in command.options and "price_per_hour" not in command.options:
        raise ConfigError(["--dollars without --price-per-hour: add what an hour of the machine costs"])
    if "images_per_s" in command.options and not asks_for_plan(command) and "check" not in command.options:
        raise ConfigError(["--images-per-s: belongs to a plan; add --plan or --hours, or --dollars"])
    if {"plan", "stop_after_hours"} <= command.options.keys():
        raise ConfigError(["--stop-after-hours: belongs to a run, and --plan only prints"])
    if frontier.leaves_recipe_open(command) and command.config["size_rule"] != "none" and resume in (None, "auto"):
        asked = budget_flag(command.options) or "plan"
        advice = "the one follows these images, the other what is published for ImageNet-1K; add --recipe finetune, or another"
        raise ConfigError([f"--size-rule {command.config['size_rule']} with --{asked} and no recipe: {advice}"])
    for name in (*BUDGETS, "images_per_s", "price_per_hour", "stop_after_hours"):
        positive(name, command.options)


def open_device(config):
    """Return the torch.device of a configuration, the process being set up for it."""
    device = choose_device(config)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def print_plan(command, train_step, build_model, begun):
    """Print what a new run would take; nothing is written. Arguments as of open_run."""
    require_consistent_flags(command)
    command, initial, found = with_initial_weights(command)
    device = open_device(command.config)
    config = command.config
    with distributed.process_group(device), Monitor(None, device) as monitor:
        set_up_arithmetic(config, device)
        if "images_per_s" in command.options:
            lines = stated_plan(command, monitor)
        else:
            splits = open_images(config, None, monitor.log)
            images, precision = splits["train"], choose_precision(config, device)
            trials = Trials(train_step, build_model, len(images.classes), device, precision, initial, images)
            if frontier.leaves_recipe_open(command):
                prospects, remarks, _, said = prospects_here(command, splits, trials, monitor, begun)
                lines = said + trials.remarks + open_plan(command, prospects, counts_of(splits), remarks)
            else:
                _, _, lines = settle(command, config, None, splits, trials, monitor, begun)
        monitor.log("\n".join(found + lines))
    return 0


def stated_plan(command, monitor):
    """Return the lines of a plan from a stated speed, for the images that are there, or else for ImageNet-1K."""
    config, counts, images, sized = command.config, IMAGENET_COUNTS, None, []
    try:
        splits = open_images(config, None, monitor.log)
        counts, images = counts_of(splits), splits["train"]
        config, sized = adapted(command, config, images)
    except DataError as error:
        monitor.log(f"planned for ImageNet-1K, as a run could not begin: {first_line(error)}")
    if not frontier.leaves_recipe_open(command):
        config, lines = plan_for(command, config, counts, None)
        return of_length(sized, command, config, images) + lines
    commands, left_out = frontier.commands_with_recipes(command)
    prospects = frontier.prospects_of(commands, frontier.rates_stated_for(command))
    return open_plan(command, prospects, counts, left_out + frontier.remarks_on_figures(command, images))


def open_plan(command, prospects, counts, remarks):
    """Return the lines of a plan that leaves the recipe open: the best for the budget, or the menu where there is none."""
    if budget_hours(command.options) is None:
        return frontier.menu(command, prospects, counts, remarks)
    return frontier.choose(command, prospects, counts, remarks)[1]
