"""From requests for batches to normalised images on the device, by one pool of worker processes."""

import collections
import contextlib
import itertools
import signal
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from engine.data.batches import Batch, BatchMaker, largest_resolution, refuse_bad_images, report_bad_images, validation_requests
from engine.data.buffers import BATCHES_HELD, BatchBuffers
from engine.system.distributed import gather_events, largest_shard, local_size, shard, size
from engine.system.errors import DataError, UserError
from engine.system.interruption import Interrupted, ignore_signals
from engine.system.workers import WorkerDied, available_cores, require_semaphores

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCHES_AHEAD = 2  # that each worker has been asked for


class BatchLoader:
    """Serves batches on the device, made by one pool of worker processes that lives as long as the run.

    The workers are forked at once and then only told what to make, so that nothing is reloaded between epochs, and so that
    one pool serves training, validation and the statistics of averaged weights. One pass at a time. They write into a ring
    of buffers that they share with this process: no batch is copied or sent on its way to the device.

    Args:
        splits: {'train': ..., 'val': ...}.
        device, dtype: of the images handed out, see to_device.
        stop: StopRequest, heeded between two batches.
        log: called with each message for the user.
    """

    def __init__(self, splits, config, device, dtype, stop, log):
        workers = worker_count(config, device)
        ahead = workers * BATCHES_AHEAD
        self.splits = splits
        self.config = config
        self.workers, self.queued = workers, ahead  # processes, and batches that they have been asked for beforehand
        self.device, self.dtype = device, dtype
        self.stop, self.log = stop, log
        images = largest_shard(config["batch_size"])
        self._buffers = BatchBuffers(ahead + BATCHES_HELD, images, largest_resolution(config))
        self._queue = _Requests(len(self._buffers))
        self._loader = DataLoader(
            BatchMaker(splits, config, self._buffers),
            sampler=self._queue,
            batch_size=None,  # the requests are batches already
            collate_fn=_unchanged,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # the buffers are handed down, not sent
            persistent_workers=workers > 0,
            prefetch_factor=BATCHES_AHEAD if workers else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(0),  # else each pass would draw from the run's random state
        )
        self._met_bad = set()  # indices of the training images that could not be read in this process's time
        self.work = 0.0, 0.0, 0.0  # seconds of the workers so far: making batches, thereof reading files, and on a core
        if workers:
            require_semaphores()
        self._iterator = iter(self._loader) if workers else None  # forks
        if device.type == "cuda" and not self._buffers.pin():
            log("note: the batches' memory could not be pinned; copies to the GPU will not overlap with its work")

    def training(self, requests, bad_images):
        """Yield (images, labels) of each training request; unreadable images are replaced, named and added to bad_images."""
        batches, limit = self._in_step(self.iterate(requests)), self.config["max_bad_images"]
        batches = report_bad_images(batches, self.splits["train"], bad_images, self._met_bad, limit, self.log)
        return to_device(batches, self.device, self.dtype)

    def validation(self, resolution=None):
        """Yield (images, labels) of every validation image, each exactly once; at val_resolution, or another one in px."""
        requests = validation_requests(self.splits["val"], self.config, resolution or self.config["val_resolution"])
        batches = self._in_step(refuse_bad_images(self.iterate(requests), self.splits["val"]))
        return to_device(batches, self.device, self.dtype)

    def _in_step(self, batches):
        """Yield each Batch once every process has its own; its bad images are then those of all processes.

        Raises:
            Interrupted: a process is asked to stop, or another one has no next batch; everywhere before the same batch.
            UserError: why this process has no next batch.
        """
        batches = iter(batches)
        while True:
            batch, error, stopped = None, None, None
            try:
                batch = next(batches, None)
            except UserError as caught:
                error, stopped = caught, (str(caught), caught.exit_code)
            if self.stop.cause is not None:
                stopped = self.stop.cause, self.stop.exit_code
            bad_images = batch.bad_images if batch is not None else []
            news = gather_events((stopped, bad_images) if stopped or bad_images else None)
            if error is not None:
                raise error
            for number, (why, _) in news.items():
                if why is not None:
                    cause, exit_code = why
                    raise Interrupted(cause if size() == 1 else f"{cause} (process {number})", exit_code)
            if batch is None:
                return
            yield batch._replace(bad_images=[each for _, of_one in news.values() for each in of_one])

    def iterate(self, requests):
        """Yield a Batch for each request, in main memory; it is overwritten once the next batch but one is asked for.

        Each rank gets its shard of every batch; of a small batch that may be no image.

        Once the run is asked to stop it ends, without waiting for a batch that does not come.

        Raises:
            WorkerDied: a worker process ended, for example killed by the OS for its memory; between two batches.
            DataError: a batch cannot be made, since too many images in a row cannot be read.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # of an earlier pass, broken off, the last copies may still be under way
        self._queue.requests = (request._replace(indices=shard(request.indices)) for request in requests)
        try:
            for number, request, bad_images, seconds in self.stop.while_waiting(self._items()):
                self.work = tuple(map(sum, zip(self.work, seconds, strict=True)))
                yield Batch(*self._buffers.batch(number, len(request.indices), request.resolution), bad_images)
        except DataError as error:  # torch hands on a worker's with the traceback before its message
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
        except RuntimeError as error:
            dead = [worker for worker in getattr(self._iterator, "_workers", []) if not worker.is_alive()]
            if not dead:
                raise
            raise WorkerDied(
                f"a data worker died: process {dead[0].pid}, {_how_it_ended(dead[0].exitcode)}. "
                "Out of memory? Fewer --num-workers need less; so does a smaller --batch-size"
            ) from error

    def _items(self):
        """Yield what the workers return for each request; they have all ended the pass before."""
        self._iterator = iter(self._loader)
        # The DataLoader's handler of a worker's death would raise in the middle of a training step. Without it the death
        # is noticed at the next batch, within 5 seconds.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from self._iterator

    def wait_for_workers(self):
        """Return once the workers run and are done with what a pass that was broken off has asked for."""
        collections.deque(self.iterate(()), maxlen=0)  # a pass over nothing

    def worker_states(self):
        """Return {process id: letter of its state in /proc, such as R, S, D or T} of the worker processes."""
        states = {}
        for worker in getattr(self._iterator, "_workers", []):
            with contextlib.suppress(OSError):  # it is gone, or this is no Linux
                states[worker.pid] = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return states

    def close(self):
        """End the worker processes, also one that waits for a disk that does not answer."""
        for worker in getattr(self._iterator, "_workers", []):
            worker.kill()
        shut_down = getattr(self._iterator, "_shutdown_workers", None)  # absent where the main process decodes
        if shut_down is not None:
            shut_down()
        self._iterator = None
        self._buffers.unpin()


def _how_it_ended(exit_code):
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


class _Requests:
    """Numbers each request with the buffer that its batch goes to: one after the other, around the ring."""

    def __init__(self, buffers):
        self.requests = ()
        self._numbers = itertools.cycle(range(buffers))

    def __iter__(self):
        for request in self.requests:
            yield next(self._numbers), request


def _unchanged(batch):
    return batch


def _start_worker(worker_id):
    ignore_signals()  # a Ctrl-C reaches the whole process group: the main process decides when the workers end


def worker_count(config, device):
    """Return the number of this process's workers; for 'auto' one per core, shared by the processes on this machine."""
    if config["num_workers"] != "auto":
        return config["num_workers"]
    return max(1, available_cores() // local_size()) if device.type == "cuda" else 1  # on a CPU the cores are busy training


def build_normalise(device, dtype):
    """Return the function uint8 [B, 3, H, W] -> the same in `dtype`, zero mean and unit variance per channel over ImageNet."""
    mean = torch.tensor(IMAGENET_MEAN, device=device).mul(255).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).mul(255).view(1, 3, 1, 1)
    return lambda images: images.float().sub_(mean).div_(std).to(dtype)


def to_device(batches, device, dtype):
    """Yield (images, labels) of each Batch on the device, ready for the network.

    The copy from pinned memory and the normalisation run on a side stream, while the device still computes the
    previous step.

    Args:
        batches: iterable of Batch.
        dtype: of the images; the autocast dtype, since the first convolution would cast them to it anyway.
    Yields:
        images [B, 3, H, W] channels-last, zero mean and unit variance per channel over ImageNet; labels int64 [B].
    """
    normalise = build_normalise(device, dtype)
    side_stream = None
    if device.type == "cuda":
        side_stream = torch.cuda.Stream(device)
        side_stream.wait_stream(torch.cuda.current_stream(device))  # for normalise
    copies = collections.deque()
    for batch in batches:
        with torch.cuda.stream(side_stream):  # None leaves everything as it is
            images = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)  # [B, 3, H, W], channels-last
            labels = batch.labels.to(device, non_blocking=True, copy=True)
            if side_stream is not None:
                copies.append(side_stream.record_event())
            images = normalise(images)
        if side_stream is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_stream(side_stream)
            images.record_stream(stream)  # else the side stream's allocator could hand the memory out again too early
            labels.record_stream(stream)
        yield images, labels
        if len(copies) == BATCHES_HELD:
            copies.popleft().synchronize()  # done long ago: its buffer may be filled anew from the next batch on
