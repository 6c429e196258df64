"""What a mirror costs the training: train.py with and without one, in turns, on the same images."""

import tempfile
from pathlib import Path

from benchmarks.measuring import rate_cell, ratio
from benchmarks.train_speed import last_record, write_images
from engine.run.checkpoint_files import LAST
from engine.run.events import EVENTS, read_events
from engine.system.device import choose_device


def mirror_benchmark(arguments):
    """Return images/s of train.py's second epoch with a mirror and without, the saves of each run and the bytes of one."""
    device = choose_device({"device": arguments.device})
    settings = {
        "batch_size": arguments.batch_size,
        "train_resolution": arguments.resolution,
        "val_resolution": arguments.resolution,
        "device": device.type,
        "precision": arguments.precision,
        "checkpoint_minutes": arguments.seconds / 60,
        "epochs": 2,  # the first one warms up
        "warmup_epochs": 1,
        "report": "false",
    }
    rates, saves = {"without": [], "with": []}, {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        place = arguments.mirror or str(folder / "mirror")
        write_images(folder, None, arguments.steps * arguments.batch_size)
        for number in range(arguments.rounds):
            order = ("without", "with") if number % 2 == 0 else ("with", "without")  # A B B A: drift cancels
            for which in order:
                run = folder / f"{which}{number}"
                mirrored = {"mirror": f"{place}/{number}" if which == "with" else "none"}
                last = last_record(settings | mirrored, folder, run)
                rates[which].append(round(last["images_per_s"], 2))
                saves[which].append(sum(event["event"] == "save" for event in read_events(run / EVENTS)))
                checkpoint_bytes = (run / LAST).stat().st_size
                print(f"round {number + 1}: {which} a mirror {rates[which][-1]} images/s", flush=True)
    keys = ("batch_size", "device", "precision", "checkpoint_minutes")
    shared = {key: settings[key] for key in keys} | {"resolution": arguments.resolution, "steps": arguments.steps}
    where = place.split(":")[0] if arguments.mirror and ":" in place else "folder"
    return shared | {"mirror": where, "rates": rates, "saves": saves, "checkpoint_bytes": checkpoint_bytes}


def mirror_tables(results):
    """Return the results as lines of Markdown."""
    rates, where = results["rates"], results["gpu"] or f"{results['cpu']}, {results['cores']} cores"
    megabytes = results["checkpoint_bytes"] / 1e6
    gigabytes_an_hour = 6 * megabytes / 1e3
    return [
        f"ResNet-50 at {results['resolution']} px, batches of {results['batch_size']}, {where}, PyTorch "
        f"{results['versions']['torch']}, {results['date']}; a save of {megabytes:,.0f} MB every "
        f"{60 * results['checkpoint_minutes']:.0f} s to a mirror ({results['mirror']}), {len(rates['with'])} rounds.",
        "",
        "| | images/s |",
        "|---|---|",
        f"| without a mirror | {rate_cell(rates['without'])} |",
        f"| with a mirror | {rate_cell(rates['with'], rates['without'])} |",
        "",
        f"Ratio {ratio(rates['with'], rates['without']):.3f}. At `checkpoint_minutes` 10 that is {gigabytes_an_hour:.1f} GB an "
        "hour, and one more such save after each epoch (calculated).",
    ]
