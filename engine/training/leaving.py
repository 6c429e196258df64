"""Closing a run: saved where it was asked to stop, mirrored, and the process ended with the status that says so."""

import contextlib
import functools
import signal
import traceback
import types

from engine.run.checkpoint_files import LAST
from engine.system import distributed
from engine.system.errors import TRY_LATER, DataError, UserError, first_line
from engine.system.interruption import Interrupted, RunEnded
from engine.system.workers import WorkerDied

TORCHRUN_SECONDS = 20.0  # for the last upload: torchrun kills 30 s after it was asked to stop


@contextlib.contextmanager
def ending_before_training(stop):
    """Turn the KeyboardInterrupt of a StopRequest into the run's end; Ctrl-C's is left to run_program."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        if stop.cause is None or stop.exit_code == 128 + signal.SIGINT:
            raise
        print(f"stopped by {stop.cause}, before the training began", flush=True)
        if stop.machine_goes_away:
            distributed.end_launcher()
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
        exit_code = _save_and_leave(cause, run)
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
            _save_and_leave(f"{type(error).__name__}: {first_line(error)}", run)
        raise


@contextlib.contextmanager
def leaving_together(stop, mirrored):
    """Let the processes of a run that was asked to stop leave once the first has uploaded what it saved.

    As soon as one has ended, or has asked this machine's torchrun to end, torchrun gives the others 30 s.
    """
    try:
        yield
    except RunEnded as end:
        if mirrored and end.exit_code != TRY_LATER:  # which is of the first process alone
            with contextlib.suppress(RuntimeError):  # another one is gone
                distributed.any_process(False)
        if stop.machine_goes_away:
            distributed.end_launcher()
        raise


def close_mirror(mirror, stop):
    """Wait for the mirror's last upload.

    Raises:
        RunEnded: the run has come to its end, and the mirror has not got it.
    """
    if not mirror.close(_seconds_to_upload(stop)) and mirror.finished:
        raise RunEnded(TRY_LATER)


def _seconds_to_upload(stop):
    """Return how long the last upload may take, or None: as long as the mirror has it."""
    torchrun_was_asked = distributed.launched() and stop.exit_code > 128 and not stop.machine_goes_away
    return TORCHRUN_SECONDS if torchrun_was_asked else None


def _save_and_leave(cause, run):
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
