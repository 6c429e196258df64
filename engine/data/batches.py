"""Which images make a batch, and how a worker makes it.

What happens to an image is a pure function of (seed, epoch, index), so neither the number of workers nor a resumption changes
it.
"""

import time
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from engine.data.augmentation import augmented, build_augmentation
from engine.data.images import training_view, validation_view
from engine.system.errors import DataError

TRIES_TO_REPLACE = 100  # images drawn for an unreadable one before the data set itself is called unreadable
REPLACE_IT = "mend a damaged image, or put another image of its class there, under its name"


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

    From start_resolution it grows linearly between the two shares of the epochs to train_resolution, rounded to whole steps
    of resolution_step. The defaults of the shares give FFCV's schedules for 16 to 88 epochs.
    """
    start, end = config["start_resolution"] or config["train_resolution"], config["train_resolution"]
    if start == end:
        return end
    ramp = config["resolution_ramp_start"], config["resolution_ramp_end"]
    exact, step = np.interp((epoch + 1) / config["epochs"], ramp, (start, end)), config["resolution_step"]
    beside = start % step  # 0 but where a compiled run grows in coarser steps
    return beside + int((exact - beside) / step + 0.5) * step


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

    Item (number, request) is (number, request, the batch's bad images, seconds): the pixels and labels stay in the buffer. The
    seconds are those of making the batch, and of these the ones spent reading files, and on a core.
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
        began, on_core, self._reading = time.perf_counter(), time.thread_time(), 0.0
        images, labels = self.buffers.batch(number, len(request.indices), request.resolution)
        bad_images = []
        pixels = images.numpy()
        for place, index in enumerate(request.indices):
            pixels[place], labels[place] = self._view(request, int(index), bad_images)
        seconds = time.perf_counter() - began, self._reading, time.thread_time() - on_core
        return number, request, bad_images, seconds

    def _read(self, split, index):
        began = time.perf_counter()
        try:
            return split.read(index)
        finally:
            self._reading += time.perf_counter() - began

    def _view(self, request, index, bad_images):
        """Return (uint8 [H, W, 3], label); an unreadable training image is replaced by one drawn from the same RNG."""
        split = self.splits[request.split]
        rng = np.random.default_rng([self.seed, request.epoch, index])
        for _ in range(TRIES_TO_REPLACE):
            try:
                data = self._read(split, index)
                if request.split == "val":
                    return validation_view(data, request.resolution, self.val_crop_ratio), split.labels[index]
                view = training_view(data, request.resolution, self.min_crop_area, rng)
                return augmented(view, self.augmentation, rng) if self.augmentation else view, split.labels[index]
            except Exception as error:  # decoders fail in their own ways: each is the image's fault, not the run's
                bad_images.append((index, f"{type(error).__name__}: {error}"))
                if request.split == "val":
                    return 0, split.labels[index]  # the reader of the batch stops the run
                index = int(rng.integers(len(split)))
        index, reason = bad_images[-1]
        raise DataError(f"{TRIES_TO_REPLACE} images in a row could not be read, the last: {split.name(index)} ({reason})")


def report_bad_images(batches, split, known, met, limit, log):
    """Yield the training batches; say each unreadable image's name once.

    Args:
        known: set of the indices found bad so far; grows.
        met: likewise, of this process alone: a resumed run goes on once its images have been mended.
        limit: DataError is raised when more than this many have been met.
    """
    for batch in batches:
        for index, reason in batch.bad_images:
            met.add(index)
            if index not in known:
                known.add(index)
                log(f"bad image {split.name(index)} ({reason}): another one takes its place; {len(known)} so far")
        if len(met) > limit:
            raise DataError(f"{len(met)} training images cannot be read, more than max_bad_images = {limit}: see the log")
        yield batch


def refuse_bad_images(batches, split):
    """Yield the validation batches; raise DataError at an unreadable image: accuracy is never that of fewer images."""
    for batch in batches:
        for index, reason in batch.bad_images:
            raise DataError(f"validation image {split.name(index)} cannot be read ({reason}); {REPLACE_IT}")
        yield batch
