"""Measure this machine beside the pipelines and loops that people use today.

python benchmark.py            input, step and train, one after the other, and a picture of them
python benchmark.py input      images/s from JPEG files to batches, on one core and through worker processes
python benchmark.py step       images/s and memory of the train step on data that lies on the device
python benchmark.py train      images/s from JPEG files to trained weights, and the time spent waiting for data
python benchmark.py mirror     images/s of training with and without a mirror
python benchmark.py scaling    what several GPUs can give, calculated from the bytes that they exchange
python benchmark.py gpu        all that is worth knowing of a GPU in 25 minutes, to paste as a report; goes on when called again
python benchmark.py transfer   top-1 of finetune from half of a synthetic data set's classes to the other half; minutes to hours
python benchmark.py recipes    top-1 of the recipes on a synthetic data set, each block left out, several seeds; takes hours
python benchmark.py optimizers top-1 of Muon, AdamW and SGD at the best of their rates on three kinds of synthetic images; hours

Contenders take turns in rounds, so that a busy machine slows all alike; the figures are medians over the rounds, and the
ratios are what to compare between machines. Results are appended to benchmarks/*.jsonl.
"""

import signal
import sys
from pathlib import Path

from benchmarks.flags import FLAGS, fill_in_step_flags
from benchmarks.gpu_results import gpu_tables
from benchmarks.gpu_sitting import sit
from benchmarks.input_speed import input_benchmark, input_tables
from benchmarks.measuring import record
from benchmarks.mirror_cost import mirror_benchmark, mirror_tables
from benchmarks.optimizer_evidence import optimizer_benchmark
from benchmarks.optimizer_results import draw_optimizers, optimizer_tables
from benchmarks.picture import draw_benchmarks
from benchmarks.recipe_evidence import recipe_benchmark, recipe_tables
from benchmarks.scaling import scaling_tables
from benchmarks.step_speed import step_benchmark, step_tables
from benchmarks.train_speed import train_benchmark, train_tables
from benchmarks.transfer import transfer_benchmark, transfer_tables
from engine.cli.command_line import FlagsParser
from engine.system.console import protect_output
from engine.system.environment import environment
from engine.system.errors import run_program

MEASURES = {
    "input": (input_benchmark, input_tables),
    "step": (step_benchmark, step_tables),
    "train": (train_benchmark, train_tables),
}
MORE_MEASURES = {"mirror": (mirror_benchmark, mirror_tables)}  # not among those that are taken where none is named
STUDIES = {  # each goes on with the runs that are missing
    "recipes": (recipe_benchmark, recipe_tables),
    "optimizers": (optimizer_benchmark, optimizer_tables),
    "transfer": (transfer_benchmark, transfer_tables),
}


def main(arguments):
    if arguments.what in STUDIES:
        study, tables = STUDIES[arguments.what]
        runs = study(arguments)
        print("\n".join(tables(runs)))
        if runs and arguments.what == "optimizers" and draw_optimizers(runs, Path("optimizers.png")):
            print("wrote optimizers.png")
        return 0
    if arguments.what == "gpu":
        print("\n".join(["", *gpu_tables(sit(arguments))]))
        return 0
    if arguments.what == "scaling":
        print("\n".join(scaling_tables()))
        return 0
    measured = {}
    for what in MEASURES if arguments.what == "all" else [arguments.what]:
        measure, tables = (MEASURES | MORE_MEASURES)[what]
        own = arguments if arguments.what == what else parse_arguments([what])
        measured[what] = environment() | measure(own)
        print("\n".join(["", *tables(measured[what]), ""]), flush=True)
        if not own.no_record:
            record(what, measured[what])
    if arguments.what == "all":
        path = Path("benchmark.png")
        print(f"wrote {path}" if draw_benchmarks(measured, path) else "matplotlib is not installed: no picture")
    return 0


def parse_arguments(arguments=None):
    """Return what the command line asks for; ends the program with status 2 where that is impossible."""
    parser = FlagsParser("benchmark.py", description=__doc__)
    parser.set_defaults(what="all")
    commands = parser.add_subparsers(title="what to measure; each has its own --help")
    for what, add_flags in FLAGS.items():
        command = commands.add_parser(what)
        command.set_defaults(what=what)
        if what != "gpu":
            command.add_argument("--no-record", action="store_true", help="print only; append nothing to benchmarks/")
        if what in ("step", "train", "mirror", *STUDIES):
            command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
        add_flags(command.add_argument)
    parsed = parser.parse_args(arguments)
    if parsed.what in ("step", "train"):
        fill_in_step_flags(parsed)
    return parsed


if __name__ == "__main__":
    protect_output()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C does: with the processes it started
    sys.exit(run_program("benchmark.py", lambda: main(parse_arguments())))
