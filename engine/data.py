"""From a folder of images to normalised batches on the device.

A worker process makes a whole batch at a time, each image by engine/images.py. What happens to an image is a pure function of
(seed, epoch, index), so neither the number of workers nor a resumption changes it.
"""

import collections
import contextlib
import itertools
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from engine.augmentation import augmented, build_augmentation
from engine.buffers import BATCHES_HELD, BatchBuffers
from engine.distributed import largest_share, local_size, news_of_all, share, size
from engine.errors import DataError, UserError
from engine.finding import some
from engine.images import PACKED_SHORTER_SIDE, image_size, packed_jpeg, training_view, validation_view
from engine.interruption import Interrupted, ignore_signals
from engine.packed import PackedSplit, unfinished_files
from engine.sources import form_at, no_form
from engine.trees import SPLITS, all_names, open_folders
from engine.workers import WorkerDied, available_cores

IMAGENET_COUNTS = (1_281_167, 50_000)  # images for training and for validation
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCHES_AHEAD = 2  # that each worker has been asked for
TRIES_TO_REPLACE = 100  # images drawn for an unreadable one before the data set itself is called unreadable


# The images on disk --------------------------------------------------------------------------------------------------


def open_splits(data_dir, needed=SPLITS, say=print):
    """Return {'train': ..., 'val': ...} of the images in data_dir: each a packed file, or else images in folders.

    Args:
        needed: those to open. 'val' alone may also be a folder that holds the class folders themselves.
        say: called with each line on what was chosen or left out.
    Raises:
        DataError: with what is wrong with the folder, and what to run instead.
    """
    data_dir = Path(data_dir)
    packed = {split: data_dir / f"{split}.arrow" for split in needed}
    splits = {split: PackedSplit(path) for split, path in packed.items() if path.is_file()}
    if rest := tuple(split for split in needed if split not in splits):
        classes = splits["train"].classes if "train" in splits else None
        opened = open_folders(data_dir, rest, classes) if data_dir.is_dir() else None
        if opened is None:
            raise DataError(_nothing_there(data_dir, rest))
        folders, remarks = opened
        splits = {split: splits.get(split) or folders[split] for split in needed}
        for remark in remarks:
            say(remark)
    if "train" in splits and "val" in splits:
        _let_classes_agree(splits, data_dir)
    for split, images in splits.items():
        counts = np.bincount(images.labels, minlength=len(images.classes))
        if not counts.any():
            raise DataError(f"{data_dir} holds no {split} images")
        if empty := [images.classes[label] for label in np.flatnonzero(counts == 0)]:
            say(f"WARNING: {split} has no images of {len(empty):,} of the {len(counts):,} classes: {some(empty)}")
    return splits


def _let_classes_agree(splits, data_dir):
    """Let the validation labels count in the training classes; raise DataError where they know others."""
    train, val = splits["train"], splits["val"]
    if val.classes == train.classes:
        return
    seen = {val.classes[label] for label in np.unique(val.labels)}
    if unknown := sorted(seen - set(train.classes)):
        raise DataError(
            f"train and val of {data_dir} hold different classes (only in val: {some(unknown)}): name one data set's folder"
        )
    val.relabel(train.classes)


def _nothing_there(data_dir, splits):
    """Return in words what is missing in data_dir, and what to do."""
    advice = (
        "Prepare ImageNet there: python prepare_data.py SOURCE DATA_DIR. Or put images there as train/<class>/*.jpg and "
        "val/<class>/*.jpg, name another folder with --data-dir, or see a network learn without any download: "
        "python train.py --recipe demo"
    )
    if not data_dir.exists():
        return f"data_dir = {str(data_dir)!r} does not exist. {advice}"
    for split in splits:
        if unfinished_files(data_dir / f"{split}.arrow")[0].exists():
            return f"{data_dir} is being prepared ({split}.arrow is not finished): let prepare_data.py end first"
    if (form := form_at(data_dir)) is not None and not form.trains:
        return (
            f"{data_dir} holds {form.name}, to be packed first: python prepare_data.py {data_dir} PACKED, "
            "then name the folder PACKED with --data-dir"
        )
    missing = [split for split in splits if not any((data_dir / name).is_dir() for name in all_names(split))]
    if missing:
        what = " and ".join(f"neither {split}.arrow nor a folder {split}" for split in missing)
        what = f"data_dir = {str(data_dir)!r} has {what}"
    else:
        what = f"{' and '.join(splits)} in {data_dir} hold no class folders with images"
    return f"{what}. {no_form(data_dir)} {advice}"


def say_packing_gain(split, config, say):
    """Say how much faster training views come from packed images on this machine, measured on a few of the originals.

    Nothing is said where there is nothing to gain: the images are packed already, or small.
    """
    if isinstance(split, PackedSplit):
        return
    originals, packed = [], []
    for index in np.linspace(0, len(split) - 1, min(12, len(split))).astype(int):
        with contextlib.suppress(Exception):  # an unreadable one is named where it is trained on
            content = split.read(index)
            if min(image_size(content)) > PACKED_SHORTER_SIDE:
                packed.append(packed_jpeg(content, PACKED_SHORTER_SIDE))
                originals.append(content)
    if not originals:
        return
    times = []
    for contents in (originals, packed, originals, packed):  # the first round warms up
        started = time.process_time()
        for number, content in enumerate(contents):
            training_view(content, config["train_resolution"], config["min_crop_area"], np.random.default_rng(number))
        times.append(1000 * (time.process_time() - started) / len(contents))
    original, small = times[2:]
    say(
        f"note: these images are read as they lie, in {original:.1f} ms each on one core; packed by python prepare_data.py it "
        f"would be {small:.1f} ms, {original / small:.1f} times as fast (measured here on {len(originals)} of them)"
    )


# Batches -------------------------------------------------------------------------------------------------------------


class BatchRequest(NamedTuple):
    """One batch to make: everything that its content depends on, besides the files and the seed."""

    split: str  # 'train' draws random views, 'val' the centre crop
    epoch: int  # counted from 0
    resolution: int  # px
    indices: np.ndarray  # int64 [B], into the split


class Batch(NamedTuple):
    images: torch.Tensor  # uint8 [B, H, W, 3]
    labels: torch.Tensor  # int64 [B]
    bad_images: list  # (index, reason) of each image that could not be read


def epoch_order(num_images, seed, epoch):
    """Return the epoch's order of the training images, int64 [N], a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(num_images)


def resolution_of_epoch(config, epoch):
    """Return the side of the training crops in px in an epoch, counted from 0.

    From start_resolution it grows linearly between the two shares of the epochs to train_resolution, rounded to multiples
    of resolution_step. The defaults of the shares give FFCV's schedules for 16 to 88 epochs.
    """
    start, end = config["start_resolution"] or config["train_resolution"], config["train_resolution"]
    if start == end:
        return end
    ramp = config["resolution_ramp_start"], config["resolution_ramp_end"]
    exact = np.interp((epoch + 1) / config["epochs"], ramp, (start, end))
    return int(exact / config["resolution_step"] + 0.5) * config["resolution_step"]


def largest_resolution(config):
    """Return the largest side in px of any view that a run with this configuration asks for."""
    return max(config["train_resolution"], config["val_resolution"], *config["more_val_resolutions"])


def training_requests(split, config, epoch, start_batch=0):
    """Yield the epoch's BatchRequests from start_batch on; the last, incomplete batch is left out."""
    order = epoch_order(len(split), config["seed"], epoch)
    size, resolution = config["batch_size"], resolution_of_epoch(config, epoch)
    for batch in range(start_batch, len(order) // size):
        yield BatchRequest("train", epoch, resolution, order[batch * size : (batch + 1) * size])


def validation_requests(split, config, resolution):
    """Yield the BatchRequests that cover every validation image exactly once, in order, at a resolution in px."""
    for indices in np.split(np.arange(len(split)), range(config["batch_size"], len(split), config["batch_size"])):
        yield BatchRequest("val", 0, resolution, indices)


class BatchMaker(Dataset):
    """Makes the batch of a BatchRequest in the buffer of a given number; runs inside the workers.

    Item (number, request) is (number, request, the batch's bad images): the pixels and labels stay in the buffer.
    """

    def __init__(self, splits, config, buffers):
        self.splits = splits
        self.buffers = buffers
        self.seed = config["seed"]
        self.min_crop_area = config["min_crop_area"]
        self.val_crop_ratio = config["val_crop_ratio"]
        self.augmentation = build_augmentation(config)

    def __getitem__(self, item):
        number, request = item
        images, labels = self.buffers.batch(number, len(request.indices), request.resolution)
        bad_images = []
        pixels = images.numpy()
        for place, index in enumerate(request.indices):
            pixels[place], labels[place] = self._view(request, int(index), bad_images)
        return number, request, bad_images

    def _view(self, request, index, bad_images):
        """Return (uint8 [H, W, 3], label); an unreadable training image is replaced by one drawn from the same RNG."""
        split = self.splits[request.split]
        rng = np.random.default_rng([self.seed, request.epoch, index])
        for _ in range(TRIES_TO_REPLACE):
            try:
                data = split.read(index)
                if request.split == "val":
                    return validation_view(data, request.resolution, self.val_crop_ratio), split.labels[index]
                view = training_view(data, request.resolution, self.min_crop_area, rng)
                return augmented(view, self.augmentation, rng) if self.augmentation else view, split.labels[index]
            except Exception as error:  # decoders fail in their own ways: each is the image's fault, not the run's
                bad_images.append((index, f"{type(error).__name__}: {error}"))
                if request.split == "val":
                    return 0, split.labels[index]  # the reader of the batch stops the run
                index = int(rng.integers(len(split)))
        raise DataError(f"{TRIES_TO_REPLACE} images in a row could not be read, the last: {bad_images[-1]}")


def report_bad_images(batches, split, known, limit, say):
    """Yield the training batches; say each unreadable image's name once.

    Args:
        known: set of the indices found bad so far; grows.
        limit: DataError is raised when more than this many are known.
    """
    for batch in batches:
        for index, reason in batch.bad_images:
            if index not in known:
                known.add(index)
                say(f"bad image {split.name(index)} ({reason}): another one takes its place; {len(known)} so far")
        if len(known) > limit:
            raise DataError(f"{len(known)} training images cannot be read, more than max_bad_images = {limit}: see the log")
        yield batch


def refuse_bad_images(batches, split):
    """Yield the validation batches; raise DataError at an unreadable image: accuracy is never that of fewer images."""
    for batch in batches:
        for index, reason in batch.bad_images:
            raise DataError(f"validation image {split.name(index)} cannot be read ({reason}); mend or remove it")
        yield batch


class BatchServer:
    """Serves batches on the device, made by one pool of worker processes that lives as long as the run.

    The workers are forked at once and then only told what to make, so that nothing is reloaded between epochs, and so that
    one pool serves training, validation and the statistics of averaged weights. One pass at a time. They write into a ring
    of buffers that they share with this process: no batch is copied or sent on its way to the device.

    Args:
        splits: {'train': ..., 'val': ...}.
        device, dtype: of the images handed out, see to_device.
        stop: StopRequest, heeded between two batches.
        say: called with each message for the user.
    """

    def __init__(self, splits, config, device, dtype, stop, say):
        workers = worker_count(config, device)
        ahead = workers * BATCHES_AHEAD
        self.splits = splits
        self.config = config
        self.workers, self.queued = workers, ahead  # processes, and batches that they have been asked for beforehand
        self.device, self.dtype = device, dtype
        self.stop, self.say = stop, say
        images = largest_share(config["batch_size"])
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
        self._iterator = iter(self._loader) if workers else None  # forks
        if device.type == "cuda" and not self._buffers.pin():
            say("note: the batches' memory could not be pinned; copies to the GPU will not overlap with its work")

    def training(self, requests, bad_images):
        """Yield (images, labels) of each training request; unreadable images are replaced, named and added to bad_images."""
        batches, limit = self._in_step(self.serve(requests)), self.config["max_bad_images"]
        batches = report_bad_images(batches, self.splits["train"], bad_images, limit, self.say)
        return to_device(batches, self.device, self.dtype)

    def validation(self, resolution=None):
        """Yield (images, labels) of every validation image, each exactly once; at val_resolution, or another one in px."""
        requests = validation_requests(self.splits["val"], self.config, resolution or self.config["val_resolution"])
        batches = self._in_step(refuse_bad_images(self.serve(requests), self.splits["val"]))
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
            news = news_of_all((stopped, bad_images) if stopped or bad_images else None)
            if error is not None:
                raise error
            for number, (why, _) in news.items():
                if why is not None:
                    cause, exit_code = why
                    raise Interrupted(cause if size() == 1 else f"{cause} (process {number})", exit_code)
            if batch is None:
                return
            yield batch._replace(bad_images=[each for _, of_one in news.values() for each in of_one])

    def serve(self, requests):
        """Yield a Batch for each request, in main memory; it is overwritten once the next batch but one is asked for.

        Of several processes each gets its share of every batch, be it none of a small one.

        Raises:
            WorkerDied: a worker process ended, for example killed by the OS for its memory; between two batches.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # of an earlier pass, broken off, the last copies may still be under way
        self._queue.requests = (request._replace(indices=share(request.indices)) for request in requests)
        try:
            self._iterator = iter(self._loader)
            # The DataLoader's handler of a worker's death would raise in the middle of a training step. Without it the death
            # is noticed at the next batch, within 5 seconds.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, request, bad_images in self._iterator:
                yield Batch(*self._buffers.batch(number, len(request.indices), request.resolution), bad_images)
        except RuntimeError as error:
            dead = [worker for worker in getattr(self._iterator, "_workers", []) if not worker.is_alive()]
            if not dead:
                raise
            raise WorkerDied(
                f"a data worker died: process {dead[0].pid}, {_how_it_ended(dead[0].exitcode)}. "
                "Out of memory? Fewer --num-workers need less; so does a smaller --batch-size"
            ) from error

    def close(self):
        """End the worker processes."""
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
