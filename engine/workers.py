"""Processes that work for a program's main process."""

import contextlib
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from engine.errors import UserError


class WorkerDied(UserError):
    """A worker process ended unasked."""


def available_cores():
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextlib.contextmanager
def worker_pool(processes):
    """Give a ProcessPoolExecutor; on leaving, jobs that are not begun are dropped and the processes have ended.

    Raises:
        WorkerDied: a worker process ended, for example killed by the OS for its memory.
    """
    pool = ProcessPoolExecutor(processes, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise WorkerDied("a worker process was killed; out of memory? Fewer processes need less") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole process group: the main process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends the others when one has died
