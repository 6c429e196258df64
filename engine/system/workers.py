"""Processes that work for a program's main process."""

import contextlib
import math
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath

from engine.system.errors import MachineError, UserError

NOTICED_SECONDS = 5.0  # after the death of a worker, by which the pool has usually noticed


class WorkerDied(UserError):
    """A worker process ended unasked."""


def available_cores(root="/"):
    """Return how many CPU cores this process may use: those that it may run on, or fewer where a container has a quota of time.

    Args:
        root: folder below which /proc and /sys lie.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [math.ceil(quota) for quota in _cpu_quotas(Path(root))]  # of one and a half cores two can be kept busy
    return max(1, min([cores, *quotas]))


def _cpu_quotas(root):
    """Yield the CPUs' worth of time that each of this process's control groups may take, as far as they have a limit."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            mounts, limit_of = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, limit_of = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu"], _quota_v1
        else:
            continue
        # A container may see its own group as the root, under whatever path the machine knows it.
        inside = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            quotas = [limit_of(mount / group) for group in (inside, *inside.parents)]
            yield from (quota for quota in quotas if quota is not None)


def _quota_v2(group):
    quota, _, period = _text(group / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and int(quota) else None


def _quota_v1(group):
    quota, period = _text(group / "cpu.cfs_quota_us").strip(), _text(group / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdecimal() and int(quota) and period.isdecimal() else None  # -1 is no limit


def _text(path):
    """Return a file's text, or none where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def require_semaphores():
    """Raise MachineError where no worker processes can be worked with; PyTorch's loader would end in a traceback."""
    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        raise MachineError(
            f"worker processes need semaphores, and none can be made in /dev/shm ({error}): mount it, or make room in it"
        ) from error


@contextlib.contextmanager
def worker_pool(processes):
    """Give a ProcessPoolExecutor; on leaving, jobs that are not begun are dropped and the processes have ended.

    Raises:
        WorkerDied: a worker process ended, for example killed by the OS for its memory.
        MachineError: no semaphore can be made.
    """
    require_semaphores()
    pool, ended = ProcessPoolExecutor(processes, initializer=_start_worker), threading.Event()
    pool.submit(int)  # begins the workers, before there is a second thread
    threading.Thread(target=_end_with_the_first, args=(pool._processes, pool._result_queue, ended), daemon=True).start()
    try:
        yield pool
    except BrokenProcessPool as error:
        raise WorkerDied("a worker process was killed; out of memory? Fewer processes need less") from error
    finally:
        pool.shutdown(cancel_futures=True)
        ended.set()


def _end_with_the_first(workers, answers, ended):
    """Kill the other workers if one has died unnoticed: the pool may wait without end for the rest of its answer."""
    while not ended.wait(0.5):
        if any(worker.exitcode not in (None, 0) for worker in list(workers.values())):
            if not ended.wait(NOTICED_SECONDS):
                for worker in list(workers.values()):
                    worker.kill()
                answers._writer.close()  # the last end that something could come from
            return


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole process group: the main process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends the others when one has died
