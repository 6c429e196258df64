"""Whether a run would go well on this machine: python train.py --check, and its quick half at each start."""

import contextlib
import functools
import os
import platform
import random
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.cli.unused_keys import notes_on_unused
from engine.data.batches import resolution_of_epoch
from engine.data.fetching import images_folder
from engine.data.images import decode_rgb, training_view
from engine.data.loader import worker_count
from engine.inference.test_sets import classes_present
from engine.inference.weight_files import load_weights
from engine.preparation.trees import IMAGENET_COUNTS
from engine.run.checkpoint_files import refuse_to_overwrite
from engine.run.generations import read_manifest
from engine.run.published import SEED_RUN
from engine.system.device import choose_device, choose_precision, describe_device
from engine.system.disks import existing, free_bytes, why_it_goes_away, why_not_writable
from engine.system.distributed import local_size, refuse_several, size
from engine.system.errors import CheckpointError, MachineError, UserError
from engine.system.files import ADDRESS
from engine.system.interruption import spot_notice
from engine.system.micro_batches import network_px
from engine.system.object_store import ObjectStore, StorageError
from engine.system.workers import available_cores, require_semaphores
from engine.training.averaging import warning_of_ema
from engine.training.images import open_images, refuse_folders_among_classes
from engine.training.initial_weights import with_initial_weights
from engine.training.mirroring import IS_THE_SAME, is_same_folder, refuse_another_run
from engine.training.plan import positive
from engine.training.resuming import refuse_to_replace_others
from engine.training.settling import require_consistent_flags
from engine.training.size_rule import adapted

OK, NOTE, FAILS = "ok", "note", "FAILS"
LEAST_PYTHON, LEAST_TORCH = (3, 11), (2, 8)
SAMPLE = 64  # images of each split that are decoded
READING_SECONDS = 2.0
# MiB an image at the peak of a 16-bit step at 224 px, from the bytes alive on the stand-in for a GPU (docs/speed.md): 10.87,
# 5.97 and 4.54 GiB for 256 images, less weights and optimizer. BlurPool: 8.72 GiB at 192 px.
PEAK_MIB = {"fast": 42.0, "low": 22.4, "lowest": 16.6}
BLUR = 1.08
AROUND_MIB = 550  # context and workspaces: what NVML counted in the seed's run on a T4, above its tensors
OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "sgd": 1, "sgdw": 1, "muon": 1}  # of the weights
FILES_OF_A_WORKER, FILES_OF_A_RUN = 8, 64


class Finding(NamedTuple):
    """One line of the table."""

    verdict: str  # OK; NOTE, for what a run survives; FAILS
    what: str
    text: str


def check_run(command, build_model):
    """Print a table of what a new run finds on this machine, with a verdict each; return 1 where the run would fail, else 0."""
    refuse_several("train.py --check")
    require_consistent_flags(command)
    findings = list(whole_check(command, build_model))
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.verdict:5}  {finding.what:{width}}  {finding.text}")
    failing = [finding.what for finding in findings if finding.verdict == FAILS]
    print(f"this run would fail: {', '.join(failing)}" if failing else "this run can begin")
    return 1 if failing else 0


def whole_check(command, build_model):
    """Yield the Findings of a Command."""
    yield _versions()
    (device, precision), failed = _tried("device", lambda: _device(command.config), (torch.device("cpu"), None))
    yield from failed or [Finding(OK, "device", f"{describe_device(device)}, {precision}")]
    no_weights = command, None, []
    (command, initial, lines), failed = _tried("initial weights", lambda: with_initial_weights(command), no_weights)
    yield from failed + [Finding(NOTE, "initial weights", line) for line in lines]
    config, lines, splits = command.config, [], None
    if config["make_demo_data"] and not Path(config["data_dir"]).exists():
        yield Finding(OK, "images", f"the demo's pictures will be made in {config['data_dir']}")
    else:
        splits, failed = _tried("images", lambda: open_images(config, None, lines.append))
        yield from failed
    if splits is not None:
        yield _counts(splits)
        for line in lines:
            yield Finding(NOTE, "images", line)
        yield from _decoded(splits, config)
        (config, lines), failed = _tried("size_rule", lambda: adapted(command, config, splits["train"]), (config, []))
        yield from failed + [Finding(NOTE, "size_rule", line) for line in lines]
        if of_ema := warning_of_ema(config, len(splits["train"]) // config["batch_size"]):
            yield Finding(NOTE, "EMA", of_ema.removeprefix("WARNING: "))
        yield from _loaded(initial, config, splits["train"].classes, build_model)
    yield from (Finding(NOTE, "flags", note) for note in notes_on_unused(config, command.given))
    yield from _tried("folders", lambda: refuse_folders_among_classes(config))[1]
    if "overwrite" not in command.options:
        yield from _tried("checkpoint_dir", lambda: refuse_to_overwrite(config["checkpoint_dir"]))[1]
    yield from _tried("checkpoint_dir", lambda: refuse_to_replace_others(config["checkpoint_dir"]))[1]
    classes = len(splits["train"].classes) if splits else 1000
    yield from quick_check(config, device, classes, build_model)
    if splits is not None:
        yield _reading(splits["train"], config, device, positive("images_per_s", command.options))
    if config["spot_notice"]:
        yield _metadata_service(config)
    if config["mirror"] != "none":
        yield _mirror(config["mirror"], command)


def _tried(what, ask, otherwise=None):
    """Return (ask(), []), or where that raises a UserError (otherwise, [the Finding])."""
    try:
        return ask(), []
    except UserError as error:
        return otherwise, [Finding(FAILS, what, " ".join(str(error).split()))]


def _device(config):
    device = choose_device(config)
    return device, choose_precision(config, device)


def _loaded(initial, config, classes, build_model):
    """Yield whether FoundWeights fit the network; nothing where a run begins with random ones."""
    if initial is not None:
        load = functools.partial(load_weights, build_model(config, len(classes), "cpu"), initial, classes)
        lines, failed = _tried("initial weights", load)
        yield from failed or [Finding(OK, "initial weights", "; ".join(lines))]


def quick_check(config, device, classes, build_model):
    """Yield the Findings that take no time; the same as in the whole check."""
    weights = count_weights(config, classes, build_model)
    yield _memory(config, device, weights)
    yield from _folders(config)
    yield _room(config, weights)
    yield from _processes(config, device)


def _versions():
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if sys.version_info < LEAST_PYTHON or found < LEAST_TORCH:
        least = "Python {}.{} and PyTorch {}.{}".format(*LEAST_PYTHON, *LEAST_TORCH)
        return Finding(FAILS, "versions", f"{versions}: needs {least}, pip install -r requirements.txt")
    return Finding(OK, "versions", versions)


# Images --------------------------------------------------------------------------------------------------------------


def _counts(splits):
    train, val = splits["train"], splits["val"]
    text = f"{len(train):,} for training, {len(val):,} for validation, {len(train.classes):,} classes"
    if all(len(classes_present(split)) == len(split.classes) for split in (train, val)):
        text += ", the same in both"
    if len(train.classes) == 1000 and len(train) > 1_000_000 and (len(train), len(val)) != IMAGENET_COUNTS:
        return Finding(NOTE, "images", text + "; ImageNet-1K has {:,} and {:,}".format(*IMAGENET_COUNTS))
    return Finding(OK, "images", text)


def _decoded(splits, config):
    for name, split in splits.items():
        bad, picked = [], np.unique(np.linspace(0, len(split) - 1, SAMPLE).astype(int))
        for index in picked:
            try:
                decode_rgb(split.read(int(index)))
            except Exception as error:  # decoders fail in their own ways
                bad.append(f"{split.name(int(index))} ({type(error).__name__}: {error})")
        if not bad:
            yield Finding(OK, f"{name} images", f"{len(picked)} of {len(split):,} decoded")
            continue
        stops = name == "val" or len(bad) > config["max_bad_images"]
        text = f"{len(bad)} of {len(picked)} cannot be read, the first: {bad[0]}"
        cure = "; mend or remove them" if stops else "; others will take their place"
        yield Finding(FAILS if stops else NOTE, f"{name} images", text + cure)


def _reading(split, config, device, images_per_s):
    """Return how fast images come from the disk and through the decoder, beside what the run needs."""
    workers = max(worker_count(config, device), 1)
    read = _images_read_per_s(split, workers)
    px = resolution_of_epoch(config, 0)
    began, numbers = time.process_time(), [random.randrange(len(split)) for _ in range(SAMPLE)]
    done = 0
    for number in numbers:
        try:
            training_view(split.read(number), px, config["min_crop_area"], np.random.default_rng(number))
            done += 1
        except Exception:  # named above
            continue
    decoded = workers * done / max(time.process_time() - began, 1e-9)
    text = (
        f"{read:,.0f} images/s read from {images_folder(config)} by {workers} at once, {decoded:,.0f} decoded at {px} px "
        "without augmentation (measured for a moment)"
    )
    if images_per_s is None and device.type == "cuda" and "T4" in describe_device(device):
        images_per_s = SEED_RUN["images_per_s"]
    if images_per_s is None:
        return Finding(OK, "disk speed", f"{text}; --images-per-s N, the card's at 224 px, tells whether that is enough")
    needed = images_per_s * (224 / network_px(config, px)) ** 2
    slow = [name for name, rate in (("the disk", read), ("decoding", decoded)) if rate < needed]
    text += f"; {needed:,.0f} needed in the first epochs (calculated from {images_per_s:g} at 224 px)"
    if slow:
        return Finding(NOTE, "disk speed", f"{text}: {' and '.join(slow)} will hold the run up; see docs/imagenet.md")
    return Finding(OK, "disk speed", text)


def _images_read_per_s(split, workers):
    """Return how many images of a random order are read in a second by so many threads, past what memory keeps."""
    end = time.perf_counter() + READING_SECONDS

    def read(seed):
        rng, count = random.Random(seed), 0
        while time.perf_counter() < end and count < len(split):
            index = rng.randrange(len(split))
            _forget(split, index)
            split.read(index)
            count += 1
        return count

    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        counts = list(pool.map(read, range(workers)))
    return sum(counts) / (time.perf_counter() - began)


def _forget(split, index):
    """Ask the system to forget an image's bytes, so that they come from the disk."""
    if hasattr(os, "posix_fadvise"):  # on Linux
        path, start, length = split.location(index)
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


# Memory and disks ----------------------------------------------------------------------------------------------------


def count_weights(config, classes, build_model):
    """Return the number of the network's parameters; nothing is computed."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config, classes, "meta").parameters())


def copies_of_weights(config):
    """Return how often a checkpoint holds the weights: raw, optimizer's state, averages."""
    averages = bool(config["swa_start_epoch"]) + bool(config["ema_half_life_images"])
    return 1 + OPTIMIZER_COPIES[config["optimizer"]] + averages


def needed_mib(config, images, precision, weights):
    """Return the MiB of GPU memory at the peak of a step on so many images, calculated; None for another network."""
    if config["architecture"] != "resnet50":
        return None
    px = network_px(config, config["train_resolution"])
    an_image = PEAK_MIB[config["memory"]] * (px / 224) ** 2
    an_image *= (BLUR if config["blur_pool"] else 1) * (2 if precision == "fp32" else 1)
    kept = (copies_of_weights(config) + 1 + (config["sam_rho"] > 0)) * 4 * weights / 2**20  # with the gradient
    return images * an_image + kept + AROUND_MIB


def _memory(config, device, weights):
    if device.type != "cuda":
        return Finding(OK, "GPU memory", "none needed: the run is on the CPU")
    precision = choose_precision(config, device)
    free = (
        torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    ) / 2**20  # what this process holds is its own
    images = -(-(config["batch_size"]) // size())
    images = min(images, config["micro_batch_size"] or images)
    needed = needed_mib(config, images, precision, weights)
    if needed is None:
        return Finding(OK, "GPU memory", f"{free:,.0f} MiB free; what a {config['architecture']} needs is not known beforehand")
    text = f"{images} images of {config['train_resolution']} px need about {needed:,.0f} MiB (calculated), {free:,.0f} are free"
    if needed <= free:
        return Finding(OK, "GPU memory", text)
    while images > 1 and needed_mib(config, images, precision, weights) > free:
        images = -(-images // 2)
    if needed_mib(config, images, precision, weights) > free:
        return Finding(FAILS, "GPU memory", f"{text}, not enough for one image: end what else runs there (nvidia-smi)")
    hint = "" if config["memory"] != "fast" else "; --memory low needs less"
    return Finding(NOTE, "GPU memory", f"{text}: the batch will go in micro-batches of about {images}{hint}")


def _folders(config):
    log = Path(config["log_file"]).absolute().parent if config["log_file"] else None
    for key, folder in (("checkpoint_dir", Path(config["checkpoint_dir"])), ("log_file", log)):
        if folder is None:
            continue
        if reason := why_not_writable(folder):
            yield Finding(FAILS, key, f"{folder} cannot be written to: {reason}")
        elif reason := why_it_goes_away(folder):
            yield Finding(NOTE, key, f"{folder}: {reason}; name another with --{key.replace('_', '-')}")
        else:
            yield Finding(OK, key, f"{folder} can be written to")
    yield from _disk_of_mirror(config["mirror"], config["checkpoint_dir"])


def _disk_of_mirror(mirror, folder):
    if mirror == "none" or ADDRESS.match(mirror):
        return
    if is_same_folder(mirror, folder):
        yield Finding(FAILS, "mirror's disk", f"{mirror} {IS_THE_SAME}")
    elif existing(mirror).stat().st_dev == existing(folder).stat().st_dev:
        yield Finding(NOTE, "mirror's disk", f"{mirror} lies on the disk of checkpoint_dir and is lost with it")


def _room(config, weights):
    """Return whether the checkpoints of a run fit on their disk."""
    one = copies_of_weights(config) * 4 * weights
    every, keep = config["checkpoint_every_epochs"], config["keep_checkpoints"]
    kept = config["epochs"] // every if every else 0
    kept = min(kept, keep) if keep else kept
    whole, free = (4 + kept) * one, free_bytes(config["checkpoint_dir"])  # last, previous, best, and one that is being written
    text = (
        f"{(3 + kept)} checkpoints of {one / 1e9:.2f} GB and room to write one: {whole / 1e9:.1f} GB, {free / 1e9:.1f} are free"
    )
    if free < 4 * one:
        return Finding(FAILS, "disk space", f"{text} at {existing(config['checkpoint_dir'])}; make room, or --checkpoint-dir")
    if free < whole:
        return Finding(NOTE, "disk space", f"{text}; --keep-checkpoints 2 needs {6 * one / 1e9:.1f}")
    return Finding(OK, "disk space", text)


# Processes -----------------------------------------------------------------------------------------------------------


def _processes(config, device):
    workers, cores = worker_count(config, device), available_cores()
    there = os.cpu_count() or cores
    quota = f" of {there} there" if cores < there else ""
    text = f"{cores}{quota}; {workers} data worker{'' if workers == 1 else 's'}" + (" a GPU" if local_size() > 1 else "")
    crowded = device.type == "cuda" and workers * local_size() > 2 * cores
    yield Finding(NOTE if crowded else OK, "cores", text + (": more than twice the cores" if crowded else ""))
    limit, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], FILES_OF_A_RUN + workers * FILES_OF_A_WORKER
    text = f"{limit:,} may be open, about {needed} will be"
    few = limit != resource.RLIM_INFINITY and limit < needed
    yield Finding(FAILS if few else OK, "open files", text + ("; ulimit -n 4096" if few else ""))
    try:
        require_semaphores()
        yield Finding(OK, "/dev/shm", "semaphores can be made there; batches take no room in it")
    except MachineError as error:
        yield Finding(FAILS if workers else NOTE, "/dev/shm", f"{error}; or --num-workers 0")


def _metadata_service(config):
    url = config["spot_notice_url"]
    try:
        spot_notice(url)
    except (OSError, ValueError) as error:
        return Finding(NOTE, "spot notice", f"the metadata service at {url} does not answer ({error}): no notice will come")
    return Finding(OK, "spot notice", f"the metadata service at {url} answers")


def _mirror(url, command):
    place = Path(url).absolute()
    new = [] if ADDRESS.match(url) else [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        store, name = ObjectStore(url, "mirror"), f"check_{os.getpid()}"
        store.put(name, b"")
        store.delete(name)
        refuse_another_run(url, read_manifest(store)[0], command)
    except (UserError, StorageError) as error:
        reason = "" if isinstance(error, CheckpointError) else f"{url} cannot be written to: "
        return Finding(FAILS, "mirror", f"{reason}{error}")
    finally:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
    return Finding(OK, "mirror", f"{url} can be written to")
