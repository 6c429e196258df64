"""Opening and closing a run: everything that training works with is built once here, from a configuration that is final."""

import contextlib
import functools
import signal
import traceback
import types

import numpy as np
import torch

from engine.data.loader import BatchLoader
from engine.preparation.packed import PackedSplit
from engine.run.checkpoint_files import LAST, delete_run
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
from engine.system.errors import TRY_LATER, CheckpointError, DataError, InUse, UserError, first_line
from engine.system.interruption import Interrupted, RunEnded, StopRequest, watch_spot_notice
from engine.system.lock import folder_lock
from engine.system.plain_json import to_json
from engine.system.workers import WorkerDied, available_cores
from engine.training import frontier
from engine.training.budget import for_what_is_left, open_ledger
from engine.training.check import FAILS, OK, quick_check
from engine.training.images import open_images, refuse_folders_among_classes
from engine.training.initial_weights import remarks_on_share, with_initial_weights
from engine.training.mirroring import clear_mirror, open_mirror
from engine.training.plan import positive
from engine.training.resuming import beginning_of_run, source_of_run
from engine.training.run import Run
from engine.training.settling import open_device, require_consistent_flags, settle, settle_by_budget, with_found_rate
from engine.training.trials import Trials

TORCHRUN_SECONDS = 20.0  # for the last upload: torchrun kills 30 s after it was asked to stop


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
                run.config = with_found_rate(run.config, trials, run.batches, run.monitor)
            if run.checkpoint is None:  # refused before unless it is asked for or there is none
                distributed.run_on_rank0(delete_run, run.config["checkpoint_dir"])
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
    of_budget = distributed.run_on_rank0(open_ledger, ledger, command, beginning, folder, mirror)
    initial = None
    if checkpoint is None:
        command = distributed.run_on_rank0(for_what_is_left, command, ledger)
        command, initial, found = distributed.run_on_rank0(with_initial_weights, command)
        config, remarks = command.config, remarks + found
    device = choose_device(config)
    precision = choose_precision(config, device)
    set_up_arithmetic(config, device)
    monitor = stack.enter_context(Monitor(config["log_file"], device))
    splits = open_images(config, checkpoint, monitor.log)
    remarks = remarks + remarks_on_share(initial, splits)
    stack.callback(ledger.close)
    if distributed.rank() == 0:
        ledger.keep(folder)
    images = splits["train"]
    trials = Trials(train_step, build_model, len(images.classes), device, precision, initial, images)
    if checkpoint is None and frontier.leaves_recipe_open(command):
        recipe, config, compile_choice, lines = settle_by_budget(command, splits, trials, monitor, begun)
    else:
        config, compile_choice, lines = settle(command, config, checkpoint, splits, trials, monitor, begun)
    first = frontier.remark_on_default(command) if checkpoint is None else None
    stop.begin()
    remarks = [
        *lines,
        *([lock.note] if lock.note else []),
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
        stack.callback(_close_mirror, mirror, stop)
    batches = BatchLoader(splits, config, device, AUTOCAST_DTYPES[precision], stop, monitor.log)
    stack.callback(batches.close)
    monitor.judge_with(verdict_of(config, recipe, splits, batches), batches)
    if config["spot_notice"] and distributed.local_rank() == 0:
        watch_spot_notice(stop, config["spot_notice_url"], monitor.log)
    opened = device, precision, batches, monitor, lock, stop, ledger, mirror
    return Run(config, recipe, checkpoint, initial, compile_choice, *opened), trials


def _open_mirror(stack, command, source, folder, ledger):
    """Return (Mirror or None, lines to log); only the first process has it."""
    opened = []

    def open_or_refuse():
        try:
            return open_mirror(opened, stack, command, source, folder, ledger)
        except CheckpointError as error:
            if not opened:  # its lock comes before everything else that can be wrong with it
                raise InUse(str(error)) from error
            raise

    remarks = distributed.run_on_rank0(open_or_refuse)
    return (opened or [None])[0], remarks


def _close_mirror(mirror, stop):
    """Wait for the mirror's last upload.

    Raises:
        RunEnded: the run has come to its end, and the mirror has not got it.
    """
    if not mirror.close(seconds_to_upload(stop)) and mirror.finished:
        raise RunEnded(TRY_LATER)


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


# Leaving a run ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending_before_training(stop):
    """Turn the KeyboardInterrupt of a StopRequest into the run's end; Ctrl-C's is left to run_program."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        if stop.cause is None or stop.exit_code == 128 + signal.SIGINT:
            raise
        print(f"stopped by {stop.cause}, before the training began", flush=True)
        raise RunEnded(stop.exit_code) from interruption


@contextlib.contextmanager
def saving_on_interruption(run):
    """Save the run's state where something ends the block early, and log how to go on.

    Raises:
        RunEnded: it was asked to stop, or cannot go on for a reason that has been logged.
    """
    try:
        yield
    except (Interrupted, WorkerDied, DataError) as cause:
        exit_code = save_and_leave(cause, run)
        raise RunEnded(exit_code) from cause
    except UserError as error:
        run.monitor.log_to_file(f"stopped: {error}")
        run.monitor.event("error", reason=str(error))
        if run.lock.lost_to is not None or (run.mirror is not None and run.mirror.lock.lost_to is not None):
            error.exit_code = TRY_LATER
        raise
    except Exception as error:
        run.monitor.log_to_file(traceback.format_exc())
        with contextlib.suppress(Exception):  # the first error is the one to show
            save_and_leave(f"{type(error).__name__}: {first_line(error)}", run)
        raise


@contextlib.contextmanager
def leaving_together(stop, mirrored):
    """Let the processes of a run that was asked to stop leave once the first has uploaded what it saved.

    As soon as one has ended, or has asked this machine's torchrun to end, torchrun gives the others 30 s.
    """
    try:
        yield
    except RunEnded:
        if mirrored:
            with contextlib.suppress(RuntimeError):  # another one is gone
                distributed.any_process(False)
        if stop.machine_goes_away:
            distributed.end_launcher()
        raise


def seconds_to_upload(stop):
    """Return how long the last upload may take, or None: as long as the mirror has it."""
    torchrun_was_asked = distributed.launched() and stop.exit_code > 128 and not stop.machine_goes_away
    return TORCHRUN_SECONDS if torchrun_was_asked else None


def save_and_leave(cause, run):
    """Save the state of a run that is asked to stop, log how to go on, and return the exit status."""
    exit_code, state, log = getattr(cause, "exit_code", 1), run.state, run.monitor.log
    if state is None:
        log(f"stopped by {cause}, before the training began")
        return exit_code
    folder = run.checkpoints.folder
    stopped = functools.partial(run.monitor.event, "interruption", reason=str(cause), epoch=state.epoch, batch=state.batch)
    where = f"in epoch {state.epoch + 1} after {state.batch} batches"
    program = "torchrun ... train.py" if distributed.launched() else "python train.py"
    alone = isinstance(cause, str) and distributed.size() > 1  # an error of this process: the others do not save with it
    if not state.is_whole or alone:
        exit_code = exit_code or 1
        stopped(saved=False)
        log(
            f"stopped by {cause} {where}; NOT saved, {'alone with it' if alone else 'in the middle of a step'}. "
            f"Go on from the last save with: {program} --resume {folder / LAST}"
        )
    elif run.checkpoints.save(state):
        stopped(saved=True)
        log(f"stopped by {cause} {where}; saved. Go on with: {program} --resume {folder / LAST}")
    else:
        exit_code = exit_code or 1
        stopped(saved=False)
        log(f"stopped by {cause} {where}; NOT saved, an earlier checkpoint may be in {folder}")
    return exit_code


@contextlib.contextmanager
def exit_status():
    """Give an object whose `code` is 0, or once a RunEnded has ended the block its exit status."""
    status = types.SimpleNamespace(code=0)
    try:
        yield status
    except RunEnded as end:
        status.code = end.exit_code
