"""Images per second from JPEG files to views on one core, and to batches through worker processes.

Beside torchvision's reference pipeline and timm's, and beside the decoder alone.
"""

import collections
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.measuring import cpus_granted, in_processes, installed_timm, measured_in_rounds, rate_cell, ratio
from config import CONFIG
from engine.data import images
from engine.data.batches import training_requests
from engine.data.loader import IMAGENET_MEAN, IMAGENET_STD, BatchLoader
from engine.data.splits import open_splits
from engine.preparation import finding
from engine.preparation.packed import PackedSplit, write_split
from engine.system.interruption import StopRequest

IMAGENET_SIZES = [(375, 500)] * 5 + [(333, 500)] * 2 + [(500, 375)] * 2 + [(500, 500)]  # height, width; its commonest
PACKED_SIDE = 352  # px; prepare_data.py's default
LOADER_BATCH = 256
CPU = torch.device("cpu")


def input_benchmark(arguments):
    """Return the results of decode, crop, resize and flip on one core, and of the loaders with worker processes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        originals = read_originals(arguments.data_dir, arguments.images)
        packed = [images.packed_jpeg(content, PACKED_SIDE) for content in originals]
        loader_images = arguments.loader_batches * LOADER_BATCH
        write_image_tree(folder / "originals", originals, loader_images)
        write_split(folder / "train.arrow", packed_rows_of(packed, loader_images), ["a", "b"])
        results = {
            "images": len(originals),
            "rounds": arguments.rounds,
            "made_images": arguments.data_dir is None,
            "bytes_per_original": round(statistics.mean(map(len, originals))),
            "bytes_per_packed": round(statistics.mean(map(len, packed))),
            "packed_side": PACKED_SIDE,
            "one_core": {},
            "loaders": {},
        }
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        for resolution in arguments.resolutions:
            print(f"one core, {resolution} px ...", flush=True)
            contenders = one_core_contenders(originals, packed, resolution)
            rates = measured_in_rounds(contenders, arguments.rounds, len(originals), time.process_time)
            results["one_core"][str(resolution)] = rates
        os.sched_setaffinity(0, cores)
        resolution = arguments.resolutions[-1]
        print(f"loaders with {arguments.num_workers} workers, {resolution} px ...", flush=True)
        contenders = loader_contenders(folder, resolution, arguments.num_workers)
        rates = measured_in_rounds(contenders, arguments.rounds, loader_images, time.perf_counter)
        results["loaders"] = {
            "resolution": resolution,
            "workers": arguments.num_workers,
            "cpus_granted": round(cpus_granted(arguments.num_workers), 2),
            "rates": rates,
        }
    return results


def read_originals(data_dir, count):
    """Return the bytes of `count` image files: of data_dir's training images, or made ones of ImageNet's commonest sizes."""
    if data_dir is not None:
        split = open_splits(data_dir)["train"]
        return [split.read(index) for index in np.linspace(0, len(split) - 1, count).astype(int)]
    rng = np.random.default_rng(0)
    return [original_like(rng, *IMAGENET_SIZES[number % len(IMAGENET_SIZES)]) for number in range(count)]


def original_like(rng, height, width):
    """Return a JPEG of about ImageNet's size in pixels and bytes: clouds of colour, detail at every scale, noise."""
    pixels = rng.normal(0, 8, (height, width, 1))
    for cells, contrast, channels in ((4, 0.5, 3), (10, 0.25, 3), (32, 0.15, 1), (100, 0.1, 1), (250, 0.08, 1)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, channels), dtype=np.uint8).squeeze())
        layer = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
        pixels = pixels + contrast * layer.reshape(height, width, channels)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_image_tree(folder, contents, count):
    """Write `count` files, the contents over and over, as an ImageFolder of two classes."""
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:05d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number % len(contents)])


def packed_rows_of(contents, count):
    """Return `count` rows of a packed split of two classes, the contents over and over."""
    return [(contents[number % len(contents)], f"{number:05d}.JPEG", number % 2) for number in range(count)]


def torchvision_reference(resolution):
    """Return torchvision's own training transform, as its reference script builds it by default."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(resolution, antialias=True),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def timm_transform(timm, resolution):
    """Return timm's training transform with nothing but crop and flip, to uint8 as its loader has it."""
    return timm.data.create_transform(
        resolution, is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bilinear"
    )


def one_core_contenders(originals, packed, resolution):
    """Return {name: function that turns every image into its training view}."""

    def with_pil(transform):
        return lambda: [transform(Image.open(io.BytesIO(content)).convert("RGB")) for content in originals]

    def ours(contents):
        return lambda: [
            images.training_view(content, resolution, 0.08, np.random.default_rng([0, 0, index]))
            for index, content in enumerate(contents)
        ]

    def decode(contents):
        return lambda: [images.decode_rgb(content) for content in contents]

    contenders = {"torchvision": with_pil(torchvision_reference(resolution))}
    if timm := installed_timm():
        contenders["timm"] = with_pil(timm_transform(timm, resolution))
    return contenders | {
        "ours, originals": ours(originals),
        "ours, packed": ours(packed),
        "decode alone, originals": decode(originals),
        "decode alone, packed": decode(packed),
    }


def train_views(split, resolution, indices):
    """Make the training views of some images and forget them."""
    for index in indices:
        images.training_view(split.read(index), resolution, 0.08, np.random.default_rng([0, 0, index]))


def torchvision_loader(tree, resolution, workers):
    """Return torchvision's training loader of an ImageFolder tree, as its reference script builds it."""
    dataset = ImageFolder(tree, torchvision_reference(resolution))
    options = {"shuffle": True, "drop_last": True, "num_workers": workers, "persistent_workers": True}
    return DataLoader(dataset, LOADER_BATCH, **options)


def timm_loader(timm, tree, resolution, workers):
    """Return timm's training loader of an ImageFolder tree of two classes, with nothing but crop and flip."""
    return timm.data.create_loader(
        timm.data.create_dataset("", root=str(tree), class_map={"a": 0, "b": 1}),
        (3, resolution, resolution),
        LOADER_BATCH,
        is_training=True,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=workers,
        device=CPU,
    )


def loader_contenders(folder, resolution, workers):
    """Return {name: function that takes an epoch of batches}; the worker processes live through all rounds."""
    settings = CONFIG | {"batch_size": LOADER_BATCH, "train_resolution": resolution, "num_workers": workers}

    def without_loader(split):
        """The same work in as many processes, whose results nobody collects."""
        parts = [range(number, len(split), workers) for number in range(workers)]
        return lambda: in_processes(train_views, [(split, resolution, part) for part in parts])

    def ours(split):
        loader = BatchLoader({"train": split}, settings, CPU, torch.float32, StopRequest(), print)
        return lambda: collections.deque(loader.iterate(training_requests(split, settings, epoch=0)), maxlen=0)

    def theirs(loader):
        return lambda: collections.deque(loader, maxlen=0)

    tree = folder / "originals"
    contenders = {"torchvision": theirs(torchvision_loader(tree, resolution, workers))}
    if timm := installed_timm():
        contenders["timm"] = theirs(timm_loader(timm, tree, resolution, workers))
    splits = {"originals": finding.ImageFolder(tree), "packed": PackedSplit(folder / "train.arrow")}
    contenders |= {f"ours, {name}": ours(split) for name, split in splits.items()}
    return contenders | {f"no loader, {name}": without_loader(split) for name, split in splits.items()}


def input_tables(results):
    """Return the results as lines of Markdown: images/s, and the ratio to torchvision's pipeline in the same run."""
    kind = "synthetic images of ImageNet's commonest sizes" if results["made_images"] else "images"
    lines = [
        f"{results['images']} {kind} (originals {results['bytes_per_original'] / 1000:.0f} kB on average, packed to a shorter "
        f"side of {results['packed_side']} px {results['bytes_per_packed'] / 1000:.0f} kB), {results['cpu']}, "
        f"{results['cores']} cores, PyTorch {results['versions']['torch']}, {results['date']}; images/s, median of "
        f"{results['rounds']} rounds (lowest to highest), and the median ratio to torchvision's reference in the same round. "
        "One core's figures are per second of CPU time, the loaders' per second of the clock.",
        "",
        "| on one core | " + " | ".join(f"{resolution} px" for resolution in results["one_core"]) + " |",
        "|---" * (1 + len(results["one_core"])) + "|",
    ]
    names = next(iter(results["one_core"].values()))
    for name in names:
        cells = [rate_cell(rates[name], rates["torchvision"]) for rates in results["one_core"].values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    loaders = results["loaders"]
    title = f"{loaders['workers']} workers, batches of {LOADER_BATCH}, {loaders['resolution']} px"
    lines += ["", f"| {title} | images/s |", "|---|---|"]
    rates = loaders["rates"]
    lines += [f"| {name} | {rate_cell(rate, rates['torchvision'])} |" for name, rate in rates.items()]
    shares, workers = {}, loaders["workers"]
    for form in ("originals", "packed"):
        alone = workers * statistics.median(results["one_core"][str(loaders["resolution"])][f"ours, {form}"])
        bare = ratio(rates[f"ours, {form}"], rates[f"no loader, {form}"])
        share = statistics.median(rates[f"ours, {form}"]) / alone
        shares[form] = f"{share:.0%} of that ({bare:.0%} of the same processes)"
    lines += [
        "",
        f"{loaders['workers']} times one core's rate is the most there could be; as many processes without a loader come short "
        f"of it where cores share caches and clocks. The loader delivers {shares['originals']} from originals and "
        f"{shares['packed']} from packed files. The machine granted {loaders['workers']} busy processes "
        f"{loaders['cpus_granted']:.1f} CPUs' worth of time.",
    ]
    return lines
