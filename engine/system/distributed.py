"""Several processes that train one network: torchrun starts them, PyTorch's process group joins them.

In a process that torchrun has not started the world has size 1, and every function here gives back what it was given.
"""

import contextlib
import os
import re
import signal
import threading
import time
import uuid
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from engine.system.device import require_usable_gpu
from engine.system.errors import UserError
from engine.system.interruption import RunEnded
from engine.system.torchrun import check_launch, launch_number, launched

ANSWER_WITHIN = timedelta(minutes=5)  # a process that does not is lost; one that has ended is noticed at once
ANSWER_EVERY = 1.0  # seconds, while others wait for a process at work


class ProcessLost(UserError):
    """Another process of the job has ended or does not answer."""


class EndedElsewhere(UserError):
    """Another process of the job has ended it, and says why."""


# Who is there --------------------------------------------------------------------------------------------------------


def restarted():
    """Return whether torchrun has started this process in place of one that had ended."""
    return launched() and launch_number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def end_launcher():
    """Ask this machine's torchrun to end, if it is what has started this process: else it would start its processes again."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:  # it is gone, or this is no Linux
        return
    words = [os.fsdecode(word) for word in command.removesuffix(b"\0").split(b"\0")]
    if launched() and "TORCHELASTIC_RUN_ID" in os.environ and is_torchrun(words):
        os.kill(parent, signal.SIGTERM)


def is_torchrun(words):
    """Return whether a process's command line, a list of str, is Python's that runs torchrun, the script or the module."""
    if not os.path.basename(words[0]).startswith(("python", "pypy")):
        return False
    rest = iter(words[1:])
    for word in rest:
        if word in ("-X", "-W", "--check-hash-based-pycs"):
            next(rest, None)  # their value
        elif module := re.fullmatch(r"-[bBdEiIOPqRsSuvx]*m(.*)", word):
            return (module[1] or next(rest, "")) in ("torch.distributed.run", "torch.distributed.launch")
        elif not word.startswith("-"):
            return os.path.basename(word) == "torchrun"
        elif re.fullmatch(r"-[bBdEiIOPqRsSuvx]*c.*", word):
            return False
    return False


def size():
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank():
    """Return this process's number on its machine, from 0."""
    return launch_number("LOCAL_RANK", 0) if launched() else 0


def local_size():
    """Return the number of processes on this machine."""
    return launch_number("LOCAL_WORLD_SIZE", 1) if launched() else 1


def describe():
    """Return the processes in words, for the log."""
    count = "1 process" if size() == 1 else f"{size()} processes"
    return f"{count}, {local_size()} of them on this machine, {dist.get_backend_config()}"


def refuse_several(program):
    """Raise UserError if torchrun has started several processes of a program that is made for one.

    What else the environment says of torchrun does not matter to such a program.
    """
    if launched() and launch_number("WORLD_SIZE", 1) > 1:
        raise UserError(f"{program} works in one process: start it with python instead of torchrun")


@contextlib.contextmanager
def process_group(device):
    """Join the processes that torchrun has started: gloo between CPUs, nccl between GPUs.

    Args:
        device: torch.device of the run; of a machine's GPUs each process takes the one of its local rank.
    Raises:
        UserError: what torchrun would have set in the environment is there in part only, or makes no sense; or this process's
            GPU cannot be used.
    """
    if not launched():
        yield
        return
    check_launch()
    if device.type == "cuda":
        there = torch.cuda.device_count()
        if local_rank() >= there:
            raise UserError(f"{local_size()} processes on a machine with {there} GPUs: --nproc_per_node={there} gives each one")
        torch.cuda.set_device(local_rank())
        require_usable_gpu()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with detect_lost_ranks():
        store, number, count = next(dist.rendezvous("env://", timeout=ANSWER_WITHIN))
        store = dist.PrefixStore(_generation(store, number, count), store)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=ANSWER_WITHIN)
        try:
            yield
        except RunEnded:  # everywhere, in step
            dist.destroy_process_group()
            raise
    dist.destroy_process_group()  # not after another exception: the others may be gone


def _generation(store, number, count):
    """Return a name that all processes which torchrun has started together share, and no others.

    torchrun keeps the store in which processes find each other when it starts them again, so that a quick process finds the
    address of one that is gone (seen with PyTorch 2.14; related: pytorch issue 135712). So the first process asks under a
    new name, and a name holds for those who have given a word of their own under it and have seen it confirmed.
    """
    if number == 0:
        name = uuid.uuid4().hex
        store.set("generation", name)
        words = [store.get(f"{name}/{other}").decode() for other in range(1, count)]  # get waits
        store.set(f"{name}/words", " ".join(words))
        return name
    word = uuid.uuid4().hex
    while True:
        name = store.get("generation").decode()
        store.set(f"{name}/{number}", word)
        if store.check([f"{name}/words"]) and word in store.get(f"{name}/words").decode():
            return name
        time.sleep(0.02)  # for the others, or because the name is one of an earlier generation


@contextlib.contextmanager
def detect_lost_ranks():
    """Turn the errors of a broken connection into ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in text.lower() and "NCCL" not in text:
            raise
        reason = text.strip().splitlines()[0].partition("] ")[2].partition(". ")[0] or text.strip().splitlines()[0]
        raise ProcessLost(
            f"another process of the job has ended or does not answer ({reason}). Its own message, or torchrun's, says why; "
            "the last checkpoint on disk is whole: go on with --resume auto"
        ) from error


# What they tell each other -------------------------------------------------------------------------------------------


def any_process(flag):
    """Return whether the flag is true in any process; each must ask."""
    if not dist.is_initialized():
        return bool(flag)
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def all_gather_object(value):
    """Return the list of every process's value, by rank; values are pickled."""
    values = [value] * size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(value):
    """Return the first process's value: what was measured differs, what follows from it must not."""
    return all_gather_object(value)[0]


def gather_events(news):
    """Return {rank: news} of the processes that have any; None is none. Costs one small message while there is none."""
    if not any_process(news is not None):
        return {}
    return {number: told for number, told in enumerate(all_gather_object(news)) if told is not None}


def all_reduce_sum(tensor):
    """Return the sum of the processes' tensors, computed in place and the same to the last bit everywhere."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def at_work():
    """Leave the block when all processes have come to its end, however long one is at work in it; each must enter.

    Who has come to the end asks again and again whether another is still at work. A thread answers there, so that a process
    that has ended is noticed at once and one that is silent after ANSWER_WITHIN, as everywhere.
    """
    if not dist.is_initialized():
        yield
        return
    done, lost = threading.Event(), []

    def answer():
        try:
            while not done.wait(ANSWER_EVERY):
                any_process(True)
        except RuntimeError as error:  # another process is gone
            lost.append(error)

    thread = threading.Thread(target=answer, name="at-work", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if lost:
        raise lost[0]
    while any_process(False):
        pass


def run_on_rank0(function, *arguments):
    """Return what function(*arguments) returns in the process of rank 0, the only one that calls it, and may take long.

    Raises:
        UserError: the first process's, there; EndedElsewhere in the others.
    """
    if not dist.is_initialized():
        return function(*arguments)
    answer, error = None, None
    with at_work():
        if rank() == 0:
            try:
                answer = function(*arguments)
            except UserError as caught:
                error = caught
    told = [answer, error.exit_code if error else None]
    dist.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    if told[1] is not None:
        raise _ended_elsewhere(told[1])
    return told[0]


def run_on_all_ranks(function, *arguments):
    """Return function(*arguments), which may take long and asks no other process; where it fails in any, all of them end.

    Raises:
        UserError: the process's own, in the first that failed; EndedElsewhere in the others.
    """
    answer, error = None, None
    with at_work():
        try:
            answer = function(*arguments)
        except UserError as caught:
            error = caught
    failed = gather_events(error.exit_code if error else None)
    if not failed:
        return answer
    first, exit_code = next(iter(failed.items()))
    raise error if first == rank() else _ended_elsewhere(exit_code)


def _ended_elsewhere(exit_code):
    error = EndedElsewhere("")
    error.exit_code = exit_code
    return error


# Who does what -------------------------------------------------------------------------------------------------------


def shard(indices):
    """Return this process's part of an array: the parts are disjoint, contiguous, and differ in length by one at most."""
    return np.array_split(indices, size())[rank()]


def largest_shard(count):
    """Return the length of the largest part of so many."""
    return -(-count // size())


def wrap_ddp(model):
    """Return the model as it is to be called in training: its gradients become the mean over the processes.

    The batch-norm statistics stay each process's own, see average_bn_stats.
    """
    if not dist.is_initialized():
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames broadcast_buffers; 2.11 knows only this name
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def gradient_sync(network, now):
    """Return a context for a forward and backward pass of wrap_ddp()'s network whose gradients are exchanged, or only kept."""
    if now or not isinstance(network, DistributedDataParallel):
        return contextlib.nullcontext()
    return network.no_sync()


@torch.no_grad()
def average_bn_stats(model):
    """Set the batch-norm statistics of a model, but for those of frozen norms, to their mean over the processes.

    A running mean is linear in what enters it, so it does not matter how often and when this is done.
    """
    if size() == 1:
        return
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.weight.requires_grad]
    if not norms:
        return
    statistics = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    mean = all_reduce_sum(torch.cat(statistics)) / size()
    for buffer, values in zip(statistics, mean.split([len(buffer) for buffer in statistics]), strict=True):
        buffer.copy_(values)
