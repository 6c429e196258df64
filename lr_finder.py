"""Find a learning rate before training: python lr_finder.py [--recipe NAME] [--KEY VALUE ...]

Runs the learning-rate range test (arXiv:1506.01186) with train.py's own step on the same images, prints a suggestion for
`learning_rate` and writes lr_finder.png and lr_finder.json. It touches no run and no checkpoint. Where the curve tells no
rate, it says why and what to try, and ends with status 1.
"""

import sys

from engine.cli.keys import ConfigError
from engine.cli.command_line import command_from_terminal
from engine.cli.unused_keys import notes_on_unused

OWN_FLAGS = {
    "lowest-rate RATE": "where the test begins; default 1e-5, or 1e-4 for sgd and muon",
    "highest-rate RATE": "where it ends unless the loss diverges before; default 1, or 10 for sgd",
    "steps N": "optimizer steps of the test; default 100",
    "output PREFIX": "of the two files; default lr_finder",
}
if __name__ == "__main__":  # before torch is imported: --help and typing errors answer at once
    COMMAND = command_from_terminal("lr_finder.py", __doc__, OWN_FLAGS)

from engine.data.loader import BatchLoader
from engine.inference.outputs import (
    RANGE_TEST_MARK,
    RANGE_TEST_SOURCE,
    claim,
    named_prefix,
    picture_mark,
    user_error_on_failure,
)
from engine.run.curves import draw_range_test
from engine.system.device import (
    AUTOCAST_DTYPES,
    choose_device,
    choose_precision,
    describe_device,
    precision_remarks,
    set_up_arithmetic,
)
from engine.system.distributed import refuse_several
from engine.system.errors import TrainingStopped, run_program
from engine.system.files import replacing
from engine.system.gpu_memory import OUTSIDE_STEPS, stop_on_oom
from engine.system.interruption import Interrupted, StopRequest
from engine.run.monitor import Monitor
from engine.system.plain_json import to_json
from engine.training.images import open_images
from engine.training.initial_weights import with_initial_weights
from engine.training.range_test import USUAL_RANGE, describe_rates, find_learning_rate
from engine.training.size_rule import adapted
from engine.training.trials import Trials
from model import build_model
from train import train_step


def range_from(options, config):
    """Return (lowest rate, highest rate, steps) as the command line asks for."""
    values, problems = [], []
    kinds = {"lowest_rate": float, "highest_rate": float, "steps": int}
    for (name, kind), default in zip(kinds.items(), USUAL_RANGE[config["optimizer"]], strict=True):
        text = options.get(name, default)
        try:
            values.append(kind(text))
        except ValueError:
            problems.append(f"--{name.replace('_', '-')} {text}: not a number")
    if not problems:
        lowest, highest, steps = values
        if not 0 < lowest < highest < float("inf"):
            problems.append(f"rates from {lowest:g} to {highest:g}: they must be above 0 and rise")
        if not 20 <= steps <= 100_000:
            problems.append(f"--steps {steps}: from 20 to 100000 steps tell a curve")
    if problems:
        raise ConfigError(problems)
    return values


@stop_on_oom(OUTSIDE_STEPS)
def main(command):
    refuse_several("lr_finder.py")
    prefix = named_prefix("output", command.options.get("output", "lr_finder"))
    claim("output", {f"{prefix}.json": RANGE_TEST_MARK, f"{prefix}.png": picture_mark(RANGE_TEST_SOURCE)})
    command, initial, found = with_initial_weights(command)
    config = command.config
    lowest, highest, steps = range_from(command.options, config)
    device = choose_device(config)
    precision = choose_precision(config, device)
    set_up_arithmetic(config, device)
    with Monitor(None, device) as monitor, StopRequest() as stop:
        splits = open_images(config, None, monitor.log)
        config, sized = adapted(command, config, splits["train"])
        start = f"range test from {lowest:g} to {highest:g} in {steps} steps; {describe_device(device)}, {precision}"
        notes = [f"note: {note}" for note in notes_on_unused(config, command.given)]
        monitor.log("\n".join([start, *found, *sized, *notes, *precision_remarks(precision, device)]))
        images = splits["train"]
        trials = Trials(train_step, build_model, len(images.classes), device, precision, initial, images)
        batches = BatchLoader(splits, config, device, AUTOCAST_DTYPES[precision], stop, monitor.log)
        try:
            result = find_learning_rate(trials, config, batches, monitor, lowest, highest, steps)
        except Interrupted as cause:
            monitor.log(f"stopped by {cause}; nothing was written")
            return cause.exit_code
        finally:
            batches.close()
        if result["suggestion"] is not None:
            monitor.log(describe_rates(result))
        with user_error_on_failure("output", prefix):
            with replacing(f"{prefix}.json", "w") as file:
                file.write(to_json(result | {"config": config}) + "\n")
            drawn = draw_range_test(result, f"{prefix}.png", RANGE_TEST_SOURCE)
        picture = f" and {prefix}.png" if drawn else "; matplotlib is not installed, so no picture"
        monitor.log(f"wrote {prefix}.json{picture}")
        if result["suggestion"] is None:
            raise TrainingStopped(describe_rates(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("lr_finder.py", main, COMMAND))
