"""The recipes on a made data set that is hard enough to tell them apart, at equal compute, and each block left out.

Every run is train.py itself in a process of its own. Each finished run is a line of benchmarks/recipes.jsonl; the same
command goes on with the runs that are missing.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import REPOSITORY, record, recorded, run_quietly
from config import CONFIG, RECIPES
from engine.data.batches import resolution_of_epoch
from engine.data.demo import HARD_CLASSES, make_demo_data
from engine.preparation.trees import IMAGENET_COUNTS
from engine.run.records import read_records
from engine.run.weights import PREFERENCE, WEIGHTS
from engine.system.device import choose_device
from engine.system.environment import environment
from engine.system.plain_json import from_json, to_json
from engine.training.plan import passes_of_a_step

NAME = "recipes"
STEP = 8  # px, between resolutions


def contenders(resolution, epochs, train_images=IMAGENET_COUNTS[0]):
    """Return {name: what it changes of CONFIG}, all of about the compute of the fast recipe in so many epochs.

    Args:
        resolution: px; stands for the 224 px of ImageNet: every recipe's sizes shrink by the same factor.
        train_images: of the data set; what recipes count in images is the same share of an epoch as on ImageNet.
    """
    fast = fast_like(resolution, epochs)
    pixels = compute(fast)

    def mosaic(recipe, **changes):
        """Return a recipe of MosaicML's at about the compute of fast."""
        lengths = [mosaic_like(recipe, resolution, length, train_images) | changes for length in range(2, 6 * epochs)]
        return min(lengths, key=lambda config: abs(compute(config) - pixels))

    seed = seed_like(resolution, max(2, round(pixels / resolution**2)))
    small = {"start_resolution": 0, "train_resolution": fast["start_resolution"]}
    seeds_optimizer = {key: CONFIG[key] for key in ("optimizer", "learning_rate", "scale_learning_rate")}
    return {
        "seed": seed,
        "seed, no averaging": seed | {"swa_start_epoch": 0},
        "mild": mosaic("mild"),
        "mild, no BlurPool": mosaic("mild", blur_pool=False, blur_max_pool=False),
        "mild, no EMA": mosaic("mild", ema_half_life_images=0),
        "mild, no growing": mosaic("mild", start_resolution=0),
        "mild, cross-entropy": mosaic("mild", loss="cross_entropy"),
        "mild, no label smoothing": mosaic("mild", label_smoothing=0.0),
        "mild, initialised by fan-out": mosaic("mild", initialization="fan_out"),
        "mild, decay inside the gradient": mosaic("mild", optimizer="sgd", weight_decay=6.25e-5 * 0.125 / 0.256),
        "mild, no decay on norms and biases": mosaic("mild", decay_norms_and_biases=False),
        "medium": mosaic("medium"),
        "medium, no SAM": mosaic("medium", sam_rho=0.0),
        "medium, no mixup": mosaic("medium", mixup_alpha=0.0),
        "fast": fast,
        "fast, no label smoothing": fast | {"label_smoothing": 0.0},
        "fast, no BlurPool": fast | {"blur_pool": False},
        "fast, no growing": fast | small | {"epochs": round(pixels / small["train_resolution"] ** 2)},
        "fast, cosine": fast | {"onecycle_anneal": "cos"},
        "fast, decay on norms and biases": fast | {"decay_norms_and_biases": True},
        "fast, clipped at 1": fast | {"grad_clip_value": 1.0},
        "fast, twice the rate": fast | {"learning_rate": 2 * RECIPES["fast"]["learning_rate"]},
        "fast, seed's AdamW": fast | seeds_optimizer,
    }


def shrunk(px, resolution):
    """Return a size in px made smaller as 224 px are to the resolution."""
    return max(32, round(px * resolution / 224 / STEP) * STEP)


def fast_like(resolution, epochs):
    """Return what the fast recipe changes of CONFIG at such a size and length."""
    return RECIPES["fast"] | {
        "epochs": epochs,
        "warmup_epochs": max(1, round(epochs / 8)),
        "resolution_step": STEP,
        "start_resolution": shrunk(160, resolution),
        "train_resolution": shrunk(192, resolution),
        "val_resolution": shrunk(256, resolution),
        "more_val_resolutions": sorted({shrunk(px, resolution) for px in (192, 224)} - {shrunk(256, resolution)}),
    }


def seed_like(resolution, epochs):
    """Return what the seed's recipe changes of CONFIG at such a size and length."""
    warmup = max(1, round(epochs * CONFIG["warmup_epochs"] / CONFIG["epochs"]))
    return {
        "train_resolution": resolution,
        "val_resolution": resolution,
        "epochs": epochs,
        "warmup_epochs": warmup,
        "swa_start_epoch": max(warmup + 1, round(epochs * CONFIG["swa_start_epoch"] / CONFIG["epochs"])),
        "swa_anneal_epochs": max(1, round(epochs * CONFIG["swa_anneal_epochs"] / CONFIG["epochs"])),
    }


def mosaic_like(recipe, resolution, epochs, train_images):
    """Return what a recipe of MosaicML's changes of CONFIG at such a size, length and number of images."""
    usual = RECIPES[recipe]
    in_images = {
        key: max(1, round(usual[key] * train_images / IMAGENET_COUNTS[0]))
        for key in ("ema_half_life_images", "ema_every_images")
    }
    return (
        usual
        | in_images
        | {
            "epochs": epochs,
            "warmup_epochs": usual["warmup_epochs"] * epochs / usual["epochs"],
            "resolution_step": STEP,
            "start_resolution": shrunk(usual["start_resolution"], resolution),
            "train_resolution": shrunk(usual["train_resolution"], resolution),
            "val_resolution": resolution,
        }
    )


def some_classes(count):
    """Return so many of HARD_CLASSES, evenly spaced: of few the textures are all there, the shapes are not."""
    return tuple(HARD_CLASSES[number * len(HARD_CLASSES) // count] for number in range(count))


def compute(config):
    """Return the pixels that an image takes through a run: the sum of the squares of its epochs' resolutions, SAM included."""
    config = CONFIG | config
    return passes_of_a_step(config) * sum(resolution_of_epoch(config, epoch) ** 2 for epoch in range(config["epochs"]))


def recipe_benchmark(arguments):
    """Run what is missing of the study that the arguments describe; return its runs."""
    study = {
        "architecture": arguments.architecture,
        "resolution": arguments.resolution,
        "batch_size": arguments.batch_size,
        "epochs": arguments.epochs,
        "train_images": arguments.train_images,
        "val_images": arguments.val_images,
        "classes": arguments.classes,
        "min_crop_area": arguments.min_crop_area,
    }
    folder = arguments.data_dir
    sides = (round(1.25 * arguments.resolution), 2 * arguments.resolution)
    if make_demo_data(folder, arguments.train_images, arguments.val_images, 0, some_classes(arguments.classes), sides):
        print(f"made {arguments.train_images:,} training and {arguments.val_images:,} validation images in {folder}")
    gpu = environment()["gpu"] if choose_device({"device": arguments.device}, in_this_process=False).type == "cuda" else None
    runs = [run for run in recorded(NAME) if (run["study"], run["gpu"]) == (study, gpu)]
    changes = contenders(arguments.resolution, arguments.epochs, arguments.train_images)
    for seed in range(arguments.seeds):
        for name in arguments.contenders or changes:
            if any((run["contender"], run["seed"]) == (name, seed) for run in runs):
                continue
            print(f"{name}, seed {seed} ...", flush=True)
            run = {"study": study, "contender": name, "seed": seed, **one_run(changes[name], seed, study, arguments)}
            print(f"  top-1 {run['top1']:.2f} % in {run['seconds']:.0f} s", flush=True)
            runs.append(environment() | run)
            if not arguments.no_record:
                record(NAME, runs[-1])
    return runs


def one_run(changes, seed, study, arguments):
    """Train once; return the figures of the last epoch."""
    with tempfile.TemporaryDirectory() as folder:
        flags = changes | {
            "architecture": study["architecture"],
            "batch_size": study["batch_size"],
            "min_crop_area": study["min_crop_area"],
            "seed": seed,
            "data_dir": arguments.data_dir,
            "checkpoint_dir": folder,
            "log_file": Path(folder) / "log",
            "checkpoint_every_epochs": 0,
            "device": arguments.device,
            "num_workers": arguments.num_workers,
        }
        texts = {key: ",".join(map(str, value)) or "none" if isinstance(value, list) else value for key, value in flags.items()}
        started = time.perf_counter()
        run_quietly([sys.executable, REPOSITORY / "train.py", *(f"--{key}={value}" for key, value in texts.items())])
        seconds = time.perf_counter() - started
        last = read_records(Path(folder) / "metrics.jsonl")[-1]
    columns = [WEIGHTS[kind].column for kind in PREFERENCE]
    weights = next(column for column in columns if f"{column}_top1" in last)
    other_resolutions = {str(other["val_resolution"]): other["raw"]["top1"] for other in last.get("more_val", ())}
    return {
        "config": from_json(to_json(changes)),
        "pixels_per_image": compute(changes),
        "top1": last[f"{weights}_top1"],
        "flip_top1": last.get(f"{weights}_flip_top1"),
        "top1_elsewhere": other_resolutions,
        "train_loss": last["train_loss"],
        "seconds": round(seconds, 1),
    }


def recipe_tables(runs):
    """Return the runs of one study as lines of Markdown: mean and standard deviation over the seeds."""
    study, first = runs[0]["study"], runs[0]
    where = first["gpu"] or f"{first['cpu']}, {first['cores']} cores"
    lines = [
        f"{study['architecture']}, {study['train_images']:,} synthetic training images of {study['classes']} classes, "
        f"{study['val_images']:,} for validation, {study['resolution']} px in place of 224, batches of {study['batch_size']}, "
        f"{where}, PyTorch {first['versions']['torch']}, {first['date']}; top-1 in % after the last epoch, mean and standard "
        "deviation over n seeds, and the mean difference to fast with the same seed. Compute is the sum of the squared "
        "resolutions of all epochs, over that of fast.",
        "",
        "| recipe | epochs | compute | top-1 | to fast | n |",
        "|---|---|---|---|---|---|",
    ]
    of = {}
    for run in runs:
        of.setdefault(run["contender"], {})[run["seed"]] = run
    fast = of.get("fast", {})
    for name in contenders(study["resolution"], study["epochs"]):
        if name not in of:
            continue
        its = of[name]
        shared = [seed for seed in its if seed in fast]
        difference = statistics.mean(its[seed]["top1"] - fast[seed]["top1"] for seed in shared) if shared else None
        one = next(iter(its.values()))
        share = f"{one['pixels_per_image'] / next(iter(fast.values()))['pixels_per_image']:.2f}" if fast else ""
        gap = f"{difference:+.2f}" if shared and name != "fast" else ""
        epochs = one["config"].get("epochs", CONFIG["epochs"])
        lines.append(
            f"| {name} | {epochs} | {share} | {mean_and_spread([r['top1'] for r in its.values()])} | {gap} | {len(its)} |"
        )
    if fast:
        lines += ["", *scores_at_other_resolutions(list(fast.values()))]
    return lines


def scores_at_other_resolutions(runs):
    """Return what the weights of fast score at other resolutions and with flip, in words."""
    own = runs[0]["config"]["val_resolution"]
    parts = [f"at {own} px {mean_and_spread([run['top1'] for run in runs])}"]
    parts += [f"with flip {mean_and_spread([run['flip_top1'] for run in runs])}"]
    for resolution in runs[0]["top1_elsewhere"]:
        scores = [run["top1_elsewhere"][resolution] for run in runs]
        same = " (its training resolution)" if int(resolution) == runs[0]["config"]["train_resolution"] else ""
        parts.append(f"at {resolution} px{same} {mean_and_spread(scores)}")
    return [f"The same weights of fast: {', '.join(parts)}."]


def mean_and_spread(values):
    """Return 'mean ± standard deviation', without the latter for a single value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
