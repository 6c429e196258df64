"""Measure this machine beside the pipelines that people use today.

python benchmark.py input     images/s from JPEG files to batches, on one core and through worker processes

Everything runs side by side in rounds, so that a busy machine slows all alike; the figures are medians over the rounds, and
the ratios are what to compare between machines. Results are appended to benchmarks/*.jsonl.
"""

import argparse
import collections
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import config
from engine import data, images
from engine.errors import run_program
from engine.packed import END_OF_STREAM, packed_rows, packed_schema
from engine.workers import available_cores

try:
    import timm
except ImportError:  # one contender less
    timm = None

RESULTS = Path(__file__).resolve().parent / "benchmarks"
IMAGENET_SIZES = [(375, 500)] * 5 + [(333, 500)] * 2 + [(500, 375)] * 2 + [(500, 500)]  # height, width; its commonest
PACKED_SIDE = 352  # px; prepare_data.py's default
LOADER_BATCH = 256
CPU = torch.device("cpu")


def parse_arguments(arguments=None):
    """Return what the command line asks for; ends the program with status 2 where that is impossible."""
    parser = argparse.ArgumentParser(
        "benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=["input"], help="what to measure")
    parser.add_argument("--data-dir", type=Path, help="prepared or plain images to measure with; default: made ones")
    parser.add_argument("--images", type=int, default=200, help="images of each round; default 200")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; default 5")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[128, 160, 192, 224], metavar="PX")
    parser.add_argument("--num-workers", type=int, default=available_cores(), help="of the loaders; default one per CPU core")
    parser.add_argument("--loader-batches", type=int, default=8, help=f"of {LOADER_BATCH} images in each round; default 8")
    parser.add_argument("--no-record", action="store_true", help="print only; append nothing to benchmarks/")
    arguments = parser.parse_args(arguments)
    for name, lowest in (("images", 1), ("rounds", 1), ("num_workers", 1), ("loader_batches", 1)):
        if getattr(arguments, name) < lowest:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least {lowest}")
    return arguments


def main(arguments):
    results = environment() | input_benchmark(arguments)
    print("\n".join(input_tables(results)))
    if not arguments.no_record:
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / "input.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(results) + "\n")
    return 0


def environment():
    """Return what a figure depends on besides the code measured: date, commit, hardware, versions."""
    import PIL
    import simplejpeg
    import torchvision

    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
            "simplejpeg": simplejpeg.__version__,
        },
    }


def commit():
    """Return the commit measured, with a + if files were changed since; None outside of a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changes.stdout.strip() else "")


def cpu_name():
    """Return the CPU's name as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def measured_in_rounds(contenders, rounds, count, clock):
    """Run every contender once a round, in turn; return {name: [images/s of each round]}.

    Args:
        contenders: {name: function without arguments that handles `count` images}.
        clock: time.perf_counter; or time.process_time for work of this process alone, which a busy machine disturbs less.
    """
    rates = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            started = clock()
            run()
            if round_number:  # the first round warms up
                rates[name].append(round(count / (clock() - started), 1))
    return rates


def ratio(rates, reference):
    """Return the median over the rounds of one contender's images/s over another's in the same round."""
    return statistics.median(ours / theirs for ours, theirs in zip(rates, reference, strict=True))


# Input ---------------------------------------------------------------------------------------------------------------


def input_benchmark(arguments):
    """Return the results of decode, crop, resize and flip on one core, and of the loaders with worker processes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        originals = read_originals(arguments.data_dir, arguments.images)
        packed = [images.packed_jpeg(content, PACKED_SIDE) for content in originals]
        loader_images = arguments.loader_batches * LOADER_BATCH
        write_image_tree(folder / "originals", originals, loader_images)
        write_packed(folder / "train.arrow", packed, loader_images)
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
        split = data.open_splits(data_dir)["train"]
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


def write_packed(path, contents, count):
    """Write `count` rows, the contents over and over, as a packed split of two classes."""
    schema = packed_schema(["a", "b"], {})
    rows = [(contents[number % len(contents)], f"{number:05d}.JPEG", number % 2) for number in range(count)]
    path.write_bytes(schema.serialize().to_pybytes() + packed_rows(schema, rows).to_pybytes() + END_OF_STREAM)


def torchvision_reference(resolution):
    """Return torchvision's own training transform, as its reference script builds it by default."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(resolution, antialias=True),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD),
        ]
    )


def timm_transform(resolution):
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
    if timm is not None:
        contenders["timm"] = with_pil(timm_transform(resolution))
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


def in_processes(work, argument_lists):
    """Run work(*arguments) in a process of its own for each of the lists, all at once."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=arguments) for arguments in argument_lists]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def cpus_granted(processes, seconds=1.0):
    """Return how many CPUs' worth of time so many busy processes get: fewer than the cores where a machine is shared."""
    before = os.times()
    in_processes(_spin, [(seconds,)] * processes)
    after = os.times()
    return (after.children_user + after.children_system - before.children_user - before.children_system) / seconds


def _spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def loader_contenders(folder, resolution, workers):
    """Return {name: function that takes an epoch of batches}; the worker processes live through all rounds."""
    settings = config.CONFIG | {"batch_size": LOADER_BATCH, "train_resolution": resolution, "num_workers": workers}

    def without_loader(split):
        """The same work in as many processes, whose results nobody collects."""
        parts = [range(number, len(split), workers) for number in range(workers)]
        return lambda: in_processes(train_views, [(split, resolution, part) for part in parts])

    def ours(split):
        server = data.BatchServer({"train": split}, settings, CPU, torch.float32, iter, print)
        return lambda: collections.deque(server.serve(data.training_requests(split, settings, epoch=0)), maxlen=0)

    def theirs(loader):
        return lambda: collections.deque(loader, maxlen=0)

    tree = folder / "originals"
    reference = DataLoader(
        ImageFolder(tree, torchvision_reference(resolution)),
        LOADER_BATCH,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
    )
    contenders = {"torchvision": theirs(reference)}
    if timm is not None:
        loader = timm.data.create_loader(
            timm.data.create_dataset("", root=str(tree), class_map={"a": 0, "b": 1}),
            (3, resolution, resolution),
            LOADER_BATCH,
            is_training=True,
            color_jitter=None,
            interpolation="bilinear",
            num_workers=workers,
            device=CPU,
        )
        contenders["timm"] = theirs(loader)
    splits = {"originals": data.ImageFolder(tree), "packed": data.PackedSplit(folder / "train.arrow")}
    contenders |= {f"ours, {name}": ours(split) for name, split in splits.items()}
    return contenders | {f"no loader, {name}": without_loader(split) for name, split in splits.items()}


def input_tables(results):
    """Return the results as lines of Markdown: images/s, and the ratio to torchvision's pipeline in the same run."""
    kind = "made images of ImageNet's commonest sizes" if results["made_images"] else "images"
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
    originals, packed = (ratio(rates[f"ours, {form}"], rates[f"no loader, {form}"]) for form in ("originals", "packed"))
    lines += [
        "",
        f"Of the same work in as many processes without a loader, the loader delivers {originals:.0%} from originals and "
        f"{packed:.0%} from packed files. The machine granted {loaders['workers']} busy processes "
        f"{loaders['cpus_granted']:.1f} CPUs' worth of time.",
    ]
    return lines


def rate_cell(rates, reference):
    """Return a table's cell: median and range of images/s, and the ratio to the reference."""
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}), {ratio(rates, reference):.2f}x"


if __name__ == "__main__":
    sys.exit(run_program("benchmark.py", main, parse_arguments()))
