"""Training end to end from JPEG files, by train.py itself, beside its step on data that lies on the device.

What training loses against the step is what data, records and checkpoints cost.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.input_speed import PACKED_SIDE, packed_rows_of, read_originals
from benchmarks.measuring import REPOSITORY, rate_cell, run_quietly
from benchmarks.step_speed import run_job
from engine.data import images
from engine.preparation.packed import write_split
from engine.run.records import read_records
from engine.system.device import choose_device

DIFFERENT_IMAGES = 200
VAL_IMAGES = 64


def train_benchmark(arguments):
    """Return images/s of train.py's second epoch and of the bare step, and the share of time waited for data, in rounds."""
    device = choose_device({"device": arguments.device}, in_this_process=False)
    settings = {
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "batch_size": arguments.batch_size,
        "train_resolution": arguments.resolution,
        "val_resolution": arguments.resolution,
        "device": device.type,
        "precision": arguments.precision,
        "compile": arguments.compile,
        "epochs": 2,  # the first one warms up
        "warmup_epochs": 1,
        "swa_start_epoch": 0,
    }
    rates, waits = {"step": [], "training": []}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_images(folder, arguments.data_dir, arguments.steps * arguments.batch_size)
        job = {"loop": "ours", "resolutions": [arguments.resolution], "seconds": arguments.seconds}
        job |= {"warmup_steps": 2, "steps_at_once": 1 if device.type == "cpu" else 10} | settings
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds} ...", flush=True)
            done = run_job(job)
            if isinstance(done, str):
                raise RuntimeError(f"the step could not be measured: {done}")
            rates["step"].append(done["figures"][str(arguments.resolution)]["images_per_s"])
            last = last_record(settings, folder, folder / f"run{number}")
            rates["training"].append(round(last["images_per_s"], 1))
            waits.append(round(last["data_wait_share"], 4))
            print(f"  step {rates['step'][-1]}, training {rates['training'][-1]} images/s, waiting {waits[-1]:.1%}", flush=True)
    keys = ("batch_size", "device", "precision", "compile")
    shared = {key: settings[key] for key in keys} | {"resolution": arguments.resolution, "rounds": arguments.rounds}
    return shared | {"steps": arguments.steps, "rates": rates, "waits": waits, "made_images": arguments.data_dir is None}


def write_images(folder, data_dir, train_images):
    """Write packed splits to a folder: so many training images, made of a few different ones, and some for validation."""
    print(f"making {DIFFERENT_IMAGES} images ...", flush=True)
    contents = [images.packed_jpeg(content, PACKED_SIDE) for content in read_originals(data_dir, DIFFERENT_IMAGES)]
    write_split(folder / "train.arrow", packed_rows_of(contents, train_images), ["a", "b"])
    write_split(folder / "val.arrow", packed_rows_of(contents, VAL_IMAGES), ["a", "b"])


def last_record(settings, data_dir, run):
    """Run train.py with these settings in the folder `run`; return the record of its last epoch."""
    flags = settings | {"data_dir": data_dir, "checkpoint_dir": run, "log_file": run.with_suffix(".log")}
    run_quietly([sys.executable, REPOSITORY / "train.py", *(f"--{key}={value}" for key, value in flags.items())])
    return read_records(run / "metrics.jsonl")[-1]


def train_tables(results):
    """Return the results as lines of Markdown."""
    rates, where = results["rates"], results["gpu"] or f"{results['cpu']}, {results['cores']} cores"
    return [
        f"ResNet-50 at {results['resolution']} px, batches of {results['batch_size']}, packed JPEGs of {PACKED_SIDE} px, "
        f"{where}, PyTorch {results['versions']['torch']}, {results['date']}; images/s, median of {results['rounds']} rounds "
        "(lowest to highest), and the median ratio to the step in the same round.",
        "",
        "| | images/s |",
        "|---|---|",
        f"| the step alone | {rate_cell(rates['step'], rates['step'])} |",
        f"| training, end to end | {rate_cell(rates['training'], rates['step'])} |",
        "",
        f"Of the time of an epoch {statistics.median(results['waits']):.1%} was spent waiting for data.",
    ]
