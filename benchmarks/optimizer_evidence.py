"""Muon beside AdamW and SGD on three kinds of made pictures, each at the best of its own rates, over runs of several lengths.

Every run is train.py itself in a process of its own, and a line of benchmarks/optimizers.jsonl. First come the rates, with
one seed at one length; a best one at the edge of its scan widens the scan. The best ones then go on with all seeds and
lengths. The same command goes on with the runs that are missing.
"""

import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.measuring import REPOSITORY, record, recorded, run_quietly
from benchmarks.other_pictures import DRAW
from benchmarks.recipe_evidence import some_classes
from engine.data.demo import make_demo_data
from engine.run.records import read_records
from engine.run.weights import PREFERENCE, WEIGHTS
from engine.system.environment import environment

NAME = "optimizers"
CLASSES = 20
SIDES = (60, 72)  # px
KINDS = {"shapes": (some_classes(CLASSES), None)} | DRAW
SHARED = {  # of all runs; what is not said here is CONFIG's
    "batch_size": 64,
    "train_resolution": 48,
    "val_resolution": 48,
    "min_crop_area": 0.5,
    "grad_clip_value": "inf",
    "label_smoothing": 0.1,
    "schedule": "cosine",
    "swa_start_epoch": 0,
    "checkpoint_every_epochs": 0,
    "compile": "off",
}
WARMUP_SHARE = 1 / 8
COLUMNS = [f"{WEIGHTS[kind].column}_top1" for kind in PREFERENCE]  # of an epoch's record, the first that it has counts
MUON = {"optimizer": "muon", "momentum": 0.95, "weight_decay": 0.1, "adamw_learning_rate": 0.003}
OPTIMIZERS = {  # name: what it sets, and the rates of its scan, each about three times the one before
    "AdamW": ({"optimizer": "adamw", "weight_decay": 0.05}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "SGD as in fast": ({"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4}, (0.03, 0.1, 0.3, 1.0)),
    "SGD as in mild": (
        {"optimizer": "sgdw", "momentum": 0.875, "weight_decay": 1.5625e-5, "decay_norms_and_biases": True},
        (0.03, 0.1, 0.3, 1.0),
    ),
    "Muon": (MUON, (0.03, 0.1, 0.3, 0.9)),
}
VARIANTS = {  # of Muon, at its best rate
    "Muon, no decay": {"weight_decay": 0.0},
    "Muon, decay 0.3": {"weight_decay": 0.3},
    "Muon, no warm-up": {"warmup_epochs": 0},
    "Muon, twice the warm-up": {"warmup_share": 2 * WARMUP_SHARE},
    "Muon, no label smoothing": {"label_smoothing": 0.0},
    "Muon, EMA": {"ema_half_life_images": 3200, "ema_every_images": 640},
    "Muon, SWA": {"swa_start_epoch": 6, "swa_anneal_epochs": 1},  # of 8, at a twentieth of the rate
    "Muon, AdamW's rate 0.001": {"adamw_learning_rate": 0.001},
    "Muon, AdamW's rate 0.01": {"adamw_learning_rate": 0.01},
}


def settings_of(name):
    """Return what an optimizer, or a variant of one, changes of SHARED."""
    return OPTIMIZERS[name][0] if name in OPTIMIZERS else MUON | VARIANTS[name]


def key_of(run):
    """Return what tells one run of a study from another."""
    return tuple(run[name] for name in ("kind", "optimizer", "rate", "epochs", "seed"))


def missing_runs(runs, arguments):
    """Return the runs that can be made now, the most valuable first; more come in sight as these are done."""
    done = {key_of(run) for run in runs}
    wanted = []
    for kind in arguments.kinds:
        for name in OPTIMIZERS:
            wanted += [(kind, name, rate, arguments.epochs, 0) for rate in scan_of(runs, kind, name, arguments.epochs)]
    compared = [(name, arguments.epochs, seed) for seed in range(arguments.seeds) for name in OPTIMIZERS]
    for seed in range(arguments.seeds):
        compared += [(name, epochs, seed) for epochs in arguments.lengths for name in OPTIMIZERS]
        compared += [(name, arguments.epochs, seed) for name in VARIANTS if arguments.variants]
    for name, epochs, seed in compared:
        for kind in arguments.kinds:
            rate = best_rate(runs, kind, name if name in OPTIMIZERS else "Muon", arguments.epochs)
            wanted += [(kind, name, rate, epochs, seed)] if rate else []
    return [run for run in dict.fromkeys(wanted) if run not in done]


def scan_of(runs, kind, name, epochs):
    """Return the rates to try: the optimizer's own, and three times more or less while the best one is at the edge."""
    rates, scores = list(OPTIMIZERS[name][1]), scores_of(runs, kind, name, epochs)
    while all(rate in scores for rate in rates):
        best = max(rates, key=scores.get)
        if best not in (rates[0], rates[-1]):
            break
        rates = [round(best / 3, 7), *rates] if best == rates[0] else [*rates, round(3 * best, 7)]
    return rates


def best_rate(runs, kind, name, epochs):
    """Return the rate with the highest top-1 of a scan that is complete, or None."""
    scores = scores_of(runs, kind, name, epochs)
    rates = scan_of(runs, kind, name, epochs)
    return max(rates, key=scores.get) if all(rate in scores for rate in rates) else None


def scores_of(runs, kind, name, epochs):
    """Return {rate: top-1 in %} of a scan."""
    return {
        run["rate"]: run["top1"][-1]
        for run in runs
        if (run["kind"], run["optimizer"], run["epochs"], run["seed"]) == (kind, name, epochs, 0)
    }


def optimizer_benchmark(arguments):
    """Run what is missing of the study that the arguments describe, several at a time; return its runs."""
    study = {key: getattr(arguments, key) for key in ("architecture", "train_images", "val_images")}
    for kind in arguments.kinds:
        classes, draw = KINDS[kind]
        make_demo_data(arguments.data_dir / kind, arguments.train_images, arguments.val_images, 0, classes, SIDES, draw)
    runs = [run for run in recorded(NAME) if run["study"] == study]
    ends = time.monotonic() + 60 * arguments.minutes
    with ThreadPoolExecutor(arguments.jobs) as pool:
        at_work, failed = {}, set()
        while True:
            for key in missing_runs(runs, arguments):
                if len(at_work) < arguments.jobs and key not in failed | set(at_work.values()) and time.monotonic() < ends:
                    at_work[pool.submit(one_run, key, study, arguments)] = key
            if not at_work:
                return runs
            for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                key = at_work.pop(future)
                try:
                    run = environment() | {"study": study} | future.result()
                except RuntimeError as error:  # one run costs no other
                    print(f"{key}: {error}", flush=True)
                    failed.add(key)
                    continue
                print(f"{key}: top-1 {run['top1'][-1]:.2f} % in {run['seconds']:.0f} s", flush=True)
                runs.append(run)
                if not arguments.no_record:
                    record(NAME, run)


def one_run(key, study, arguments):
    """Train once; return its key and the top-1 after each epoch."""
    kind, name, rate, epochs, seed = key
    flags = SHARED | settings_of(name)
    flags |= {"warmup_epochs": flags.get("warmup_epochs", epochs * flags.pop("warmup_share", WARMUP_SHARE))}
    with tempfile.TemporaryDirectory() as folder:
        flags |= {
            "architecture": study["architecture"],
            "learning_rate": rate,
            "epochs": epochs,
            "seed": seed,
            "data_dir": arguments.data_dir / kind,
            "checkpoint_dir": folder,
            "log_file": Path(folder) / "log",
            "device": arguments.device,
            "precision": arguments.precision,
            "num_workers": 0,
        }
        started = time.perf_counter()
        run_quietly([sys.executable, REPOSITORY / "train.py", *(f"--{key}={value}" for key, value in flags.items())])
        seconds = time.perf_counter() - started
        records = read_records(Path(folder) / "metrics.jsonl")
    return dict(zip(("kind", "optimizer", "rate", "epochs", "seed"), key, strict=True)) | {
        "top1": [line[next(column for column in COLUMNS if column in line)] for line in records],
        "train_loss": records[-1]["train_loss"],
        "precision": arguments.precision,
        "seconds": round(seconds, 1),
    }
