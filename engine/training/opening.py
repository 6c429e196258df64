"""Opening a run: everything that training works with is built once here, from a configuration that is final."""

import contextlib

import numpy as np
import torch

from engine.cli.command_line import averaging_rate_in_words
from engine.cli.unused_keys import notes_on_unused
from engine.data.loader import BatchLoader
from engine.inference.comparison import delete_details
from engine.preparation.packed import PackedSplit
from engine.run.checkpoint_files import delete_run
from engine.run.ledger import Ledger
from engine.run.monitor import Monitor
from engine.run.verdict import Data, Verdict
from engine.system import distributed
from engine.system.device import (
    AUTOCAST_DTYPES,
    choose_device,
    choose_precision,
    describe_device,
    precision_remarks,
    set_up_arithmetic,
)
from engine.system.environment import environment
from engine.system.interruption import StopRequest, watch_spot_notice
from engine.system.lock import folder_lock
from engine.system.plain_json import to_json
from engine.system.workers import available_cores
from engine.training import frontier
from engine.training.averaging import warning_of_ema
from engine.training.budget import for_what_is_left, open_ledger
from engine.training.check import FAILS, OK, quick_check
from engine.training.images import open_images, refuse_folders_among_classes
from engine.training.initial_weights import remarks_on_share, with_initial_weights
from engine.training.leaving import close_mirror, ending_before_training, leaving_together, saving_on_interruption
from engine.training.mirroring import clear_mirror, open_mirror
from engine.training.plan import positive
from engine.training.resuming import beginning_of_run, source_of_run
from engine.training.run import Run
from engine.training.settling import open_device, require_consistent_flags, settle, settle_by_budget, with_found_rate
from engine.training.trials import Trials


@contextlib.contextmanager
def open_run(command, train_step, build_model, begun):
    """Give the Run that a command asks for; what it holds is closed with the block, and an interruption saves.

    Args:
        command: Command.
        train_step, build_model: train.py's and model.py's, for what is measured before the run begins.
        begun: what time.perf_counter() showed when the program started.
    Raises:
        RunEnded: the run was asked to stop, and what could be saved is saved.
        UserError: it cannot begin, or cannot go on.
    """
    require_consistent_flags(command)
    stop = StopRequest(interrupting=True)
    with ending_before_training(stop), contextlib.ExitStack() as stack:
        run, trials = _open(stack, stop, command, train_step, build_model, begun)
        with saving_on_interruption(run):
            if run.config["learning_rate"] == "auto":
                run.config = with_found_rate(run.config, run.recipe, command.given, trials, run.batches, run.monitor)
            if run.checkpoint is None:  # refused before unless it is asked for or there is none
                distributed.run_on_rank0(delete_run, run.config["checkpoint_dir"])
                distributed.run_on_rank0(delete_details, run.config["checkpoint_dir"])
                if run.mirror is not None:
                    clear_mirror(run.mirror)
            torch.manual_seed(run.config["seed"] + distributed.rank())
            with distributed.detect_lost_ranks():  # here already, so that the log says it, too
                yield run


def _open(stack, stop, command, train_step, build_model, begun):
    """Return the Run and its Trials; the stack closes what they hold."""
    stack.enter_context(stop)
    stack.enter_context(stop.after(positive("stop_after_hours", command.options), begun))
    stack.enter_context(distributed.process_group(open_device(command.config)))
    source, folder = distributed.run_on_rank0(source_of_run, command)
    if source in (None, "auto"):  # before they are made
        distributed.run_on_rank0(refuse_folders_among_classes, command.config)
    advice = "train elsewhere: --checkpoint-dir OTHER"
    lock = stack.enter_context(folder_lock(folder, "checkpoint_dir", print, advice))
    ledger = Ledger(begun, positive("price_per_hour", command.options))
    mirror, of_mirror = _open_mirror(stack, command, source, folder, ledger)
    beginning = distributed.run_on_rank0(beginning_of_run, command, source, folder)
    config, recipe, checkpoint, remarks = beginning
    of_budget = distributed.run_on_rank0(open_ledger, ledger, command, source, beginning, folder, mirror)
    initial = None
    if checkpoint is None:
        command = distributed.run_on_rank0(for_what_is_left, command, ledger)
        command, initial, found = distributed.run_on_rank0(with_initial_weights, command)
        config, remarks = command.config, remarks + found
    device = choose_device(config)
    precision = choose_precision(config, device)
    set_up_arithmetic(config, device)
    monitor = stack.enter_context(Monitor(config["log_file"], device))
    stack.callback(ledger.close)
    if config["spot_notice"] and distributed.local_rank() == 0:
        watch_spot_notice(stop, config["spot_notice_url"], monitor.log)
    if distributed.rank() == 0:
        ledger.keep(folder, mirror)  # fetching images may take an hour
    splits = open_images(config, checkpoint, monitor.log)
    remarks = remarks + remarks_on_share(initial, splits)
    images = splits["train"]
    trials = Trials(train_step, build_model, len(images.classes), device, precision, initial, images)
    if checkpoint is None and frontier.leaves_recipe_open(command):
        recipe, config, compile_choice, lines = settle_by_budget(command, splits, trials, monitor, begun)
    else:
        config, compile_choice, lines = settle(command, config, checkpoint, splits, trials, monitor, begun)
    if checkpoint is None:
        lines = lines + averaging_rate_in_words(config, recipe, command.given)
    if trials.rates is not None:
        ledger.rates = trials.rates.as_plain()
    first = frontier.remark_on_default(command) if checkpoint is None else None
    of_ema = warning_of_ema(config, len(images) // config["batch_size"]) if checkpoint is None else None  # resumed, it stays
    stop.begin()
    remarks = [
        *lines,
        *(f"note: {note}" for note in notes_on_unused(config, command.given)),
        *([lock.note] if lock.note else []),
        *([of_ema] if of_ema else []),
        *of_mirror,
        *remarks,
        *of_budget,
        *precision_remarks(precision, device),
    ]
    log_beginning(config, recipe, splits, device, precision, remarks, monitor, first)
    for finding in quick_check(config, device, len(splits["train"].classes), build_model):
        if finding.verdict != OK:
            monitor.log(f"{'WARNING: ' if finding.verdict == FAILS else ''}check: {finding.what}: {finding.text}")
    stack.enter_context(leaving_together(stop, config["mirror"] != "none"))
    if mirror is not None:
        mirror.start(folder, config["log_file"], config["keep_checkpoints"], monitor.log)
        stack.callback(close_mirror, mirror, stop)
    batches = BatchLoader(splits, config, device, AUTOCAST_DTYPES[precision], stop, monitor.log)
    stack.callback(batches.close)
    monitor.judge_with(verdict_of(config, recipe, splits, batches), batches)
    opened = device, precision, batches, monitor, lock, stop, ledger, mirror
    return Run(config, recipe, checkpoint, initial, compile_choice, *opened), trials


def _open_mirror(stack, command, source, folder, ledger):
    """Return (Mirror or None, lines to log); only the first process has it."""
    opened = []
    remarks = distributed.run_on_rank0(open_mirror, opened, stack, command, source, folder, ledger)
    return (opened or [None])[0], remarks


def verdict_of(config, recipe, splits, batches):
    """Return the Verdict that a run's figures are held against."""
    images, val_labels = splits["train"], splits["val"].labels
    cores = max(1, available_cores() // distributed.local_size())
    guess_top1 = 100 * np.bincount(val_labels).max() / len(val_labels)
    data = Data(batches.workers, cores, isinstance(images, PackedSplit), batches.device.type == "cuda")
    return Verdict(config, recipe, len(images.classes), len(images), data, guess_top1)


def log_beginning(config, recipe, splits, device, precision, remarks, monitor, first=None):
    """Log what the run works with, and the remarks of its opening; `first` is a remark to come before all, or None."""
    images = splits["train"]
    here, steps = environment(), len(images) // config["batch_size"]
    hardware = f"{describe_device(device)}, {precision}, PyTorch {torch.__version__}"
    monitor.log_to_file(f"environment: {to_json(here)}")
    monitor.log_to_file(f"configuration: {to_json(config)}")
    monitor.event(
        "start",
        recipe=recipe,
        images=len(images),
        classes=len(images.classes),
        steps_per_epoch=steps,
        hardware=hardware,
        environment=here,
        config=config,
        judged=True,
    )
    if first is not None:
        monitor.log(first)
    monitor.log(
        f"recipe {recipe}: {config['architecture']} on {len(images):,} images of {len(images.classes)} classes, "
        f"{steps} steps an epoch; {hardware}"
    )
    if distributed.launched():
        monitor.log(f"{distributed.describe()}; batches of {config['batch_size']} over all of them")
    for remark in remarks:
        monitor.log(remark)
