"""Measure this machine beside the pipelines and loops that people use today.

python benchmark.py            input, step and train, one after the other, and a picture of them
python benchmark.py input      images/s from JPEG files to batches, on one core and through worker processes
python benchmark.py step       images/s and memory of the train step on data that lies on the device
python benchmark.py train      images/s from JPEG files to trained weights, and the time spent waiting for data
python benchmark.py scaling    what several GPUs can give, calculated from the bytes that they exchange
python benchmark.py gpu        all that is worth knowing of a GPU in 25 minutes, to paste as a report; goes on when called again
python benchmark.py recipes    top-1 of the recipes on a made data set, each block left out, several seeds; takes hours

Contenders take turns in rounds, so that a busy machine slows all alike; the figures are medians over the rounds, and the
ratios are what to compare between machines. Results are appended to benchmarks/*.jsonl.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.gpu_sitting import gpu_tables, sit
from benchmarks.input_speed import input_benchmark, input_tables
from benchmarks.measuring import record
from benchmarks.picture import draw_benchmarks
from benchmarks.recipe_evidence import contenders, recipe_benchmark, recipe_tables
from benchmarks.scaling import scaling_tables
from benchmarks.step_speed import CPU_CONTENDERS, step_benchmark, step_tables
from benchmarks.train_speed import train_benchmark, train_tables
from engine.system.console import protect_output
from engine.system.device import choose_device
from engine.system.environment import environment
from engine.system.errors import run_program
from engine.system.files import path_argument
from engine.system.workers import available_cores

MEASURES = {
    "input": (input_benchmark, input_tables),
    "step": (step_benchmark, step_tables),
    "train": (train_benchmark, train_tables),
}


def parse_arguments(arguments=None):
    """Return what the command line asks for; ends the program with status 2 where that is impossible."""
    parser = argparse.ArgumentParser(
        "benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(what="all")
    commands = parser.add_subparsers(title="what to measure; each has its own --help")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--no-record", action="store_true", help="print only; append nothing to benchmarks/")
    on_device = argparse.ArgumentParser(add_help=False)
    on_device.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")

    def command(what, *parents):
        added = commands.add_parser(what, parents=[shared, *parents], allow_abbrev=False)
        added.set_defaults(what=what)
        return added

    def count(parser, flag, default, text):
        parser.add_argument(flag, type=at_least_one, default=default, help=f"{text}; default {default}")

    source = command("input")
    source.add_argument("--data-dir", type=path_argument, help="prepared or plain images to measure with; default: made ones")
    count(source, "--images", 200, "images of each round")
    count(source, "--rounds", 5, "rounds")
    source.add_argument("--resolutions", type=at_least_one, nargs="+", default=[128, 160, 192, 224], metavar="PX")
    count(source, "--num-workers", available_cores(), "worker processes of the loaders")
    count(source, "--loader-batches", 8, "batches of 256 images in each round")

    step = command("step", on_device)
    add_step_flags(step)
    step.add_argument("--resolutions", type=at_least_one, nargs="+", metavar="PX", help="default 128 160 192 224; 128 on a CPU")
    step.add_argument("--contenders", nargs="+", metavar="NAME", choices=CPU_CONTENDERS, help="default: all that can run here")

    train = command("train", on_device)
    add_step_flags(train)
    train.add_argument("--data-dir", type=path_argument, help="prepared or plain images to measure with; default: made ones")
    train.add_argument("--resolution", type=at_least_one, help="px; default 224; 128 on a CPU")
    train.add_argument("--steps", type=at_least_one, help="of an epoch; default 200; 8 on a CPU")
    train.add_argument("--compile", choices=("auto", "on", "off"), default="auto")

    command("scaling")

    sitting = commands.add_parser("gpu", allow_abbrev=False)
    sitting.set_defaults(what="gpu")
    sitting.add_argument("--minutes", type=at_least_one, default=25, help="that it may take; default 25")
    sitting.add_argument("--rehearse", action="store_true", help="go through everything at a tiny size on the CPU")
    sitting.add_argument("--anew", action="store_true", help="do not go on with this card's newest sitting")
    sitting.add_argument(
        "--parts", nargs="+", metavar="NAME", help="only those whose names begin so, such as step; default: all"
    )
    sitting.add_argument(
        "--results", type=path_argument, metavar="FILE", help="default benchmarks/gpu.jsonl, or gpu_rehearsal.jsonl"
    )

    recipes = command("recipes", on_device)
    recipes.add_argument(
        "--data-dir", type=path_argument, default=Path("data/hard"), help="where the images are made; default data/hard"
    )
    recipes.add_argument("--architecture", default="resnet50", help="default resnet50")
    recipes.add_argument("--num-workers", default="auto", help="of train.py; default auto")
    count(recipes, "--resolution", 128, "px, in place of 224")
    count(recipes, "--batch-size", 256, "images of a step")
    count(recipes, "--epochs", 16, "epochs of fast; the others get the same compute")
    count(recipes, "--train-images", 20_000, "training images")
    count(recipes, "--val-images", 5_000, "validation images")
    count(recipes, "--classes", 100, "classes of the images, at most 100")
    recipes.add_argument("--min-crop-area", type=float, default=0.25, help="of all recipes, as the pictures are small; 0.25")
    count(recipes, "--seeds", 3, "runs of each")
    recipes.add_argument("--contenders", nargs="+", metavar="NAME", choices=contenders(128, 16), help="default: all")

    parsed = parser.parse_args(arguments)
    if parsed.what in ("step", "train"):
        fill_in_step_flags(parsed)
    return parsed


def add_step_flags(parser):
    """Add the flags that the benchmarks of a device share; what is None depends on the device."""
    parser.add_argument("--batch-size", type=at_least_one, help="images of a step; default 256; 32 on a CPU")
    parser.add_argument("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="rounds; default 3")
    parser.add_argument("--seconds", type=at_least_one, default=10, help="of measuring the step at each size; default 10")


def fill_in_step_flags(arguments):
    """Put in the defaults that depend on the device: a CPU gets a job that it finishes."""
    on_cpu = choose_device({"device": arguments.device}).type == "cpu"
    defaults = {
        "batch_size": 32 if on_cpu else 256,
        "resolutions": [128] if on_cpu else [128, 160, 192, 224],
        "resolution": 128 if on_cpu else 224,
        "steps": 8 if on_cpu else 200,
    }
    for name, value in defaults.items():
        if getattr(arguments, name, value) is None:
            setattr(arguments, name, value)


def at_least_one(text):
    """Return the whole number of at least 1 that the text is."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: at least 1")
    return value


def main(arguments):
    if arguments.what == "recipes":
        print("\n".join(recipe_tables(recipe_benchmark(arguments))))
        return 0
    if arguments.what == "gpu":
        print("\n".join(["", *gpu_tables(sit(arguments))]))
        return 0
    if arguments.what == "scaling":
        print("\n".join(scaling_tables()))
        return 0
    measured = {}
    for what in MEASURES if arguments.what == "all" else [arguments.what]:
        measure, tables = MEASURES[what]
        own = arguments if arguments.what == what else parse_arguments([what])
        measured[what] = environment() | measure(own)
        print("\n".join(["", *tables(measured[what]), ""]), flush=True)
        if not own.no_record:
            record(what, measured[what])
    if arguments.what == "all":
        path = Path("benchmark.png")
        print(f"wrote {path}" if draw_benchmarks(measured, path) else "matplotlib is not installed: no picture")
    return 0


if __name__ == "__main__":
    protect_output()
    sys.exit(run_program("benchmark.py", lambda: main(parse_arguments())))
