"""Transfer on a made data set: from half of the hard classes to the other half.

At equal steps, beside training from scratch and beside timm's own train.py that begins with the same weights. Every run is a
program in a process of its own. Each finished run is a line of benchmarks/transfer.jsonl; the same command goes on with the
runs that are missing.
"""

import concurrent.futures
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import REPOSITORY, record, recorded, run_quietly
from benchmarks.recipe_evidence import mean_and_spread
from config import RECIPES
from engine.data.demo import HARD_CLASSES, make_demo_data
from engine.run.records import read_records
from engine.system.environment import environment

NAME = "transfer"
FINETUNE = {"recipe": "finetune"}
FROM_SCRATCH = {
    "learning_rate": 0.001,
    "grad_clip_value": 1.0,
    "swa_start_epoch": 0,
    "zero_init_residual": True,
    "min_crop_area": 0.25,
}
CONTENDERS = {  # name: flags of train.py beside those that all runs share; whether it begins with the weights of the other half
    "finetune": (FINETUNE, True),
    "finetune, BiT's rate at any length": (FINETUNE | {"learning_rate": RECIPES["finetune"]["learning_rate"]}, True),
    "finetune, smaller crops": (FINETUNE | {"min_crop_area": 0.25}, True),
    "finetune, backbone at 0.1 of the rate": (FINETUNE | {"backbone_rate_factor": 0.1}, True),
    "finetune, frozen to layer2": (FINETUNE | {"freeze": "layer2"}, True),
    "finetune, the last layer alone": (FINETUNE | {"freeze": "layer4"}, True),
    "from scratch": (FROM_SCRATCH, False),
    "from scratch, as in finetune": (FINETUNE, False),
}
TIMM = {  # name: flags of timm's train.py beside those that all runs share
    "timm's train.py": [],
    "timm's train.py, crops as in finetune": ["--scale", "0.73", "1.0"],
}


def halves(classes):
    """Return two tuples of so many of HARD_CLASSES, evenly spaced; as on a chessboard, each half of all has every form."""
    of_all = [tuple(name for n, name in enumerate(HARD_CLASSES) if (n // 10 + n) % 2 == half) for half in (0, 1)]
    return [tuple(half[number * len(half) // classes] for number in range(classes)) for half in of_all]


def transfer_benchmark(arguments):
    """Run what is missing of the study that the arguments describe; return its runs."""
    study = {
        key: getattr(arguments, key)
        for key in (
            "architecture",
            "resolution",
            "batch_size",
            "classes",
            "pretrain_images",
            "pretrain_epochs",
            "images",
            "epochs",
        )
    }
    sides = (round(1.25 * arguments.resolution), 2 * arguments.resolution)
    folders = [arguments.data_dir / half for half in ("first_half", "second_half")]
    for folder, classes, images in zip(
        folders, halves(arguments.classes), (arguments.pretrain_images, arguments.images), strict=True
    ):
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_demo_data(folder, images, arguments.val_images, 0, classes, sides)
    weights = arguments.data_dir / "first_half.pt"
    if not weights.exists():
        print("training on the first half of the classes ...", flush=True)
        changes = FROM_SCRATCH | {"epochs": study["pretrain_epochs"], "data_dir": folders[0]}
        print(f"  top-1 {our_run(changes, 0, study, arguments, weights):.2f} % on the first half", flush=True)
    runs = [run for run in recorded(NAME) if run["study"] == study]
    names = arguments.contenders or [*CONTENDERS, *(TIMM if arguments.timm else ())]
    there = {(run["contender"], run["seed"]) for run in runs}
    missing = [(name, seed) for seed in range(arguments.seeds) for name in names if (name, seed) not in there]

    def one(name, seed):
        started = time.perf_counter()
        if name in TIMM:
            top1 = timm_run(TIMM[name], seed, study, arguments, folders[1], weights)
        else:
            changes, transfers = CONTENDERS[name]
            changes = changes | {"epochs": study["epochs"], "data_dir": folders[1]}
            top1 = our_run(changes | ({"initial_weights": weights} if transfers else {}), seed, study, arguments)
        return {
            "study": study,
            "contender": name,
            "seed": seed,
            "top1": top1,
            "seconds": round(time.perf_counter() - started, 1),
        }

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(one, *each) for each in missing]):
            runs.append(environment() | {"val_images": arguments.val_images} | done.result())
            print(f"{runs[-1]['contender']}, seed {runs[-1]['seed']}: top-1 {runs[-1]['top1']:.2f} %", flush=True)
            if not arguments.no_record:
                record(NAME, runs[-1])
    return runs


def our_run(changes, seed, study, arguments, export=None):
    """Train once with train.py; return the top-1 of the last epoch's weights; `export` gets them if it is named."""
    with tempfile.TemporaryDirectory() as folder:
        flags = changes | {
            "architecture": study["architecture"],
            "batch_size": study["batch_size"],
            "train_resolution": study["resolution"],
            "val_resolution": study["resolution"],
            "warmup_epochs": changes["epochs"] / 5,
            "seed": seed,
            "checkpoint_dir": folder,
            "log_file": Path(folder) / "log",
            "checkpoint_every_epochs": 0,
            "device": arguments.device,
            "num_workers": arguments.num_workers,
            "compile": "off",
        }
        run_quietly([sys.executable, REPOSITORY / "train.py", *(f"--{key}={value}" for key, value in flags.items())])
        if export:
            run_quietly([sys.executable, REPOSITORY / "evaluate.py", f"{folder}/last.pt", "--weights=raw", "--export", export])
        return read_records(Path(folder) / "metrics.jsonl")[-1]["val_top1"]


def timm_run(flags, seed, study, arguments, data_dir, weights):
    """Train once with timm's train.py, whose --pretrained-path names the weights; return the top-1 of the last epoch."""
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "data-dir": data_dir,
            "val-split": "val",
            "model": study["architecture"],
            "pretrained-path": weights,
            "num-classes": study["classes"],
            "batch-size": study["batch_size"],
            "epochs": study["epochs"],
            "crop-pct": 0.875,
            "seed": seed,
            "workers": max(1, int(arguments.num_workers)),
            "output": folder,
            "experiment": "run",
            "device": arguments.device,
        }
        flags = [*(f"--{key}={value}" for key, value in shared.items()), *flags]
        command = [sys.executable, arguments.timm / "train.py", "--pretrained", *flags]
        command += ["--input-size", "3", str(study["resolution"]), str(study["resolution"])]
        command += ["--amp", "--amp-dtype=bfloat16"] if arguments.device == "cuda" else []
        places = os.pathsep.join(filter(None, [str(arguments.timm), os.environ.get("PYTHONPATH")]))
        variables = os.environ | {"PYTHONPATH": places}
        done = subprocess.run([*map(str, command)], cwd=folder, env=variables, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"timm's train.py ended with status {done.returncode}: {done.stderr[-2000:]}")
        with open(Path(folder) / "run/summary.csv", encoding="utf-8") as file:
            return float(list(csv.DictReader(file))[-1]["eval_top1"])


def transfer_tables(runs):
    """Return the runs of one study as lines of Markdown: mean and standard deviation over the seeds."""
    study, first = runs[0]["study"], runs[0]
    where = first["gpu"] or f"{first['cpu']}, {first['cores']} cores"
    of = {}
    for run in runs:
        of.setdefault(run["contender"], {})[run["seed"]] = run["top1"]
    ours = of.get("finetune", {})
    lines = [
        f"{study['architecture']}, trained on {study['pretrain_images']:,} synthetic images of {study['classes']} hard classes "
        f"for {study['pretrain_epochs']} epochs, then on {study['images']:,} of {study['classes']} others for "
        f"{study['epochs']} epochs of batches of {study['batch_size']}; {study['resolution']} px, {first['val_images']:,} "
        f"validation images, {where}, PyTorch {first['versions']['torch']}, {first['date']}. Top-1 in % after the last epoch, "
        "mean and standard deviation over n seeds, and the mean difference to finetune with the same seed.",
        "",
        "| run | top-1 | to finetune | n |",
        "|---|---|---|---|",
    ]
    for name in (*CONTENDERS, *TIMM):
        if name in of:
            shared = [seed for seed in of[name] if seed in ours and name != "finetune"]
            gap = f"{statistics.mean(of[name][seed] - ours[seed] for seed in shared):+.2f}" if shared else ""
            lines.append(f"| {name} | {mean_and_spread(list(of[name].values()))} | {gap} | {len(of[name])} |")
    return lines
