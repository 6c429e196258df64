"""What a run has done, from its own records: results, curves, timeline with interruptions, use of the machine, cost.

python report.py                                  checkpoints/report.html and report.md, of the run in checkpoints/
python report.py checkpoints/demo --price-per-hour 0.752
python report.py runs/a runs/b --output compared  several runs on one page

Reads metrics.jsonl and training.log alone; the run may still be going on.
"""

import argparse
import statistics
import sys
from pathlib import Path

from config import CONFIG, RECIPES
from engine.report.figures import WEIGHTS, best_of, column, conditions, energy_kwh, is_imagenet, machine_hours, phases, read_run
from engine.report.history import SILENT_END, interruptions
from engine.report.page import as_html, as_markdown, chart, heading, paragraph, table, timeline
from engine.report.published import SEED_RUN, published_curve, published_result
from engine.system.console import protect_output
from engine.system.errors import run_program
from engine.system.files import path_argument, replacing
from engine.training.plan import duration

# Words ---------------------------------------------------------------------------------------------------------------


def percent(value):
    return None if value is None else f"{value:.2f} %"


def spread(values, digits=0):
    """Return 'mean (lowest to highest)' of some numbers, or None of none."""
    if not values:
        return None
    mean, low, high = (f"{value:,.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def clock(hours):
    """Return hours as text; of less than a second '0 seconds'."""
    return duration(max(hours, 0.0))


def interruptions_of(run):
    """Return how often a run was interrupted; only its log knows."""
    return len(run.sessions) - 1 if run.sessions else "unknown: no log"


# One run -------------------------------------------------------------------------------------------------------------


def report(run, price_per_hour=None):
    """Return (title, blocks) of the report of a run."""
    blocks = [paragraph(state_of(run))]
    for part in (results, drawings, course, machine, comparison, settings):
        blocks += part(run, price_per_hour)
    return f"Training report: {run.name}", blocks


def state_of(run):
    """Return where the run stands, in a sentence."""
    done, planned = (run.records[-1]["epoch"] if run.records else 0), run.config["epochs"]
    if not run.sessions:
        return f"{done} epochs are recorded; there is no log of the run, so sessions and configuration are unknown."
    last = run.sessions[-1]
    data = f"{last.images:,} images of {last.classes} classes"
    what = f"Recipe {run.recipe}: {run.config['architecture']} on {data}, {last.hardware}."
    if last.ended == "finished":
        return f"{what} Finished after {done} epochs."
    ended = f"{last.ended}, last heard of at {last.last_word:%Y-%m-%d %H:%M:%S}" if last.ended == SILENT_END else last.ended
    return f"{what} Not finished: {done} of {planned} epochs are done ({ended})."


def results(run, price_per_hour):
    """Return the best and the last figures, and the accuracy by phase."""
    if not run.records:
        return [paragraph("No epoch has been validated yet.")]
    last, (top1, epoch, weights) = run.records[-1], best_of(run.records)
    best = next(record for record in run.records if record["epoch"] == epoch)
    rows = [
        ("best validation top-1", f"{percent(top1)}, epoch {epoch}, {WEIGHTS[weights]}, {conditions(run)}"),
        ("its top-5", percent(best.get(f"{weights}_top5"))),
    ]
    if best.get(f"{weights}_flip_top1") is not None:
        rows.append(("the same with image and mirror image", percent(best[f"{weights}_flip_top1"])))
    for key, words in WEIGHTS.items():
        rows.append((f"last epoch, {words}", percent(last.get(f"{key}_top1"))))
    for other in last.get("more_val", ()):
        scores = ", ".join(f"{name} {percent(of['top1'])}" for name, of in other.items() if isinstance(of, dict))
        rows.append((f"last epoch at {other['val_resolution']} px", scores))
    rows.append(("last training loss", f"{last['train_loss']:.3f}" if last.get("train_loss") is not None else None))
    of_phases = []
    for name, records in phases(run):
        scores = [best_of([record])[0] for record in records]
        hours = sum(record.get("seconds", 0) for record in records) / 3600
        epochs = f"{records[0]['epoch']} to {records[-1]['epoch']}"
        speed = spread([record["images_per_s"] for record in records if record.get("images_per_s")])
        of_phases.append((name, epochs, percent(scores[0]), percent(scores[-1]), percent(max(scores)), speed, clock(hours)))
    header = (
        "phase",
        "epochs",
        "top-1 after its first",
        "after its last",
        "best",
        "images/s (lowest to highest)",
        "training time",
    )
    return [heading("Results"), table(("", ""), rows), heading("By phase"), table(header, of_phases)]


def drawings(run, price_per_hour):
    """Return the curves."""
    records = run.records
    top1 = [("validation", column(records, "val_top1")), ("averaged weights", column(records, "averaged_val_top1"))]
    top1 += [("running average", column(records, "ema_val_top1")), ("training, augmented", column(records, "train_top1"))]
    published = published_curve(run.recipe, run.config["epochs"]) if is_imagenet(run) else None
    if published is not None:
        top1.append((f"published: {published[1]}", published[0], "dashed"))
    loss = [("validation", column(records, "val_loss")), ("averaged weights", column(records, "averaged_val_loss"))]
    loss += [("training", column(records, "train_loss"))]
    waits = {epoch: 100 * share for epoch, share in column(records, "data_wait_share").items()}
    found = [
        chart("Top-1 accuracy", top1, "%"),
        chart("Loss", loss, "nats"),
        chart("Learning rate at the epoch's end", [("rate", column(records, "learning_rate"))], "rate"),
        chart("Training resolution", [("resolution", column(records, "train_resolution"))], "px", steps=True),
        chart("Throughput of training", [("images/s", column(records, "images_per_s"))], "images/s"),
        chart("Time spent waiting for data", [("share", waits)], "%"),
        chart("Gradient norm before clipping", [("mean", column(records, "grad_norm"))], "L2 norm"),
        chart("GPU utilisation", [("mean", column(records, "gpu_utilization_percent"))], "%"),
        chart("GPU power", [("mean", column(records, "gpu_power_w"))], "W"),
        chart("GPU temperature", [("highest", column(records, "gpu_temperature_highest_c"))], "°C"),
    ]
    found = [block for block in found if block is not None]
    if not found:
        return [paragraph("No curves: matplotlib is not installed.")] if records else []
    return [heading("Curves"), *found]


def course(run, price_per_hour):
    """Return the sessions, the interruptions and what they cost."""
    if not run.sessions:
        return []
    start = run.sessions[0].begun
    spans = [((s.begun - start).total_seconds(), (s.last_word - start).total_seconds()) for s in run.sessions]
    unit, size = ("hours", 3600) if spans[-1][1] > 2 * 3600 else ("minutes", 60)
    rows = []
    for number, session in enumerate(run.sessions, start=1):
        at = f"{session.begun:%Y-%m-%d %H:%M:%S}"
        rows.append(
            (number, at, clock(session.seconds / 3600), position(session.first_position), position(session.last_position))
        )
        rows[-1] += (session.ended, f"warnings: {len(session.warnings)}" if session.warnings else "")
    breaks = interruptions(run.sessions)
    lost_images = sum(one.images_lost for one in breaks)
    speeds = list(column(run.records, "images_per_s").values())
    lost = lost_images / statistics.median(speeds) / 3600 if speeds else 0
    away = sum(one.seconds_away for one in breaks) / 3600
    text = f"Sessions: {len(run.sessions)}; interruptions: {len(breaks)}."
    if breaks:
        steps = sum(one.steps_lost for one in breaks)
        twice = f"at least {steps:,} steps were done twice ({clock(lost)} of training)" if steps else "no step was done twice"
        text += f" Between sessions the run stood still for {clock(away)}; {twice}."
        if any(one.how == SILENT_END for one in breaks):
            text += " Of a session that was killed, the steps after its last word in the log are not known."
    header = ("session", "begun", "length", "from", "to", "end", "")
    bars = [(begin / size, end / size, number % 2) for number, (begin, end) in enumerate(spans)]
    found = [heading("Course"), paragraph(text), timeline("Sessions", bars, unit), table(header, rows)]
    warnings = [(f"{session.begun:%Y-%m-%d %H:%M}", text) for session in run.sessions for text in session.warnings]
    if warnings:
        found.append(table(("session of", f"warnings (the last {min(20, len(warnings))} of {len(warnings)})"), warnings[-20:]))
    return found


def position(of):
    """Return (whole epochs, batches) in words."""
    epochs, batches = of
    return f"epoch {epochs + 1}, batch {batches}" if batches else (f"end of epoch {epochs}" if epochs else "the beginning")


def machine(run, price_per_hour):
    """Return speed, use of the GPU, energy and cost."""
    records, hours = run.records, machine_hours(run)
    speeds, waits = list(column(records, "images_per_s").values()), list(column(records, "data_wait_share").values())
    energy, throttled = energy_kwh(run), {}
    for record in records:
        for reason, share in (record.get("gpu_throttled_share") or {}).items():
            throttled[reason] = max(throttled.get(reason, 0), share)
    reported = [record["gpu_memory_peak_mib"] for record in records if record.get("gpu_memory_peak_mib")]
    sampled = list(column(records, "gpu_memory_used_mib").values())
    lowest = list(column(records, "gpu_utilization_lowest_percent").values())
    busy = list(column(records, "gpu_utilization_percent").values())
    rows = [
        ("time of all sessions" if run.sessions else "training time", clock(hours)),
        ("images/s in training, mean of the epochs (lowest to highest)", spread(speeds)),
        ("their standard deviation", f"{statistics.stdev(speeds):,.1f}" if len(speeds) > 1 else None),
        ("share of training spent waiting for data", f"{100 * statistics.mean(waits):.1f} %" if waits else None),
        ("GPU memory, peak that PyTorch allocated", f"{max(reported):,.0f} MiB" if reported else None),
        ("GPU memory, peak as NVML counts it", f"{max(sampled):,.0f} MiB" if sampled else None),
        ("GPU utilisation, mean and lowest", f"{statistics.mean(busy):.0f} %, {min(lowest):.0f} %" if busy else None),
        ("GPU temperature, highest", _highest(records, "gpu_temperature_highest_c", "°C")),
        ("GPU power, mean", spread(list(column(records, "gpu_power_w").values()))),
        ("GPU energy of the recorded epochs", f"{energy:.3f} kWh" if energy is not None else None),
        ("clock held down, worst epoch", ", ".join(f"{why} {share:.0%}" for why, share in throttled.items()) or None),
        ("skipped steps", sum(record.get("skipped_steps", 0) for record in records)),
        ("unreadable training images", records[-1].get("bad_images", 0) if records else 0),
    ]
    if price_per_hour is not None:
        rows.append(("cost", f"{hours * price_per_hour:,.2f} at {price_per_hour:g} per hour"))
        if (best := best_of(records)) and hours:
            rows.append(("cost of a point of top-1", f"{hours * price_per_hour / best[0]:,.3f}"))
    note = [] if busy else [paragraph("No GPU figures were sampled: the run had no GPU, or NVML did not answer.")]
    return [heading("Machine"), table(("", ""), rows), *note]


def _highest(records, key, unit):
    values = column(records, key).values()
    return f"{max(values):.0f} {unit}" if values else None


def comparison(run, price_per_hour):
    """Return the run beside the seed's, and beside what was published for its recipe."""
    published = published_result(run.recipe, run.config["epochs"])
    speeds = list(column(run.records, "images_per_s").values())
    memory = list(column(run.records, "gpu_memory_used_mib").values())
    best = best_of(run.records)
    hours = machine_hours(run)
    rows = [
        ("best top-1", percent(best[0]) if best else "none yet", percent(SEED_RUN["top1"])),
        ("measured with", conditions(run), "224 px"),
        ("epochs", len(run.records), f"about {SEED_RUN['epochs']} of 100"),
        ("hours", f"{hours:.2f}", f"about {SEED_RUN['hours']}"),
        ("images/s in training", spread(speeds), SEED_RUN["images_per_s"]),
        ("GPU memory (NVML)", f"{max(memory):,.0f} MiB" if memory else "no GPU figures", f"{SEED_RUN['memory_mib']:,} MiB"),
        ("interruptions", interruptions_of(run), SEED_RUN["interruptions"]),
    ]
    if price_per_hour is not None:
        at = SEED_RUN["price_per_hour"]
        rows.append(("cost", f"{hours * price_per_hour:,.2f}", f"{SEED_RUN['hours'] * at:,.2f} at {at:g} per hour, on demand"))
    found = [heading("Beside the seed's run and what was published")]
    if not is_imagenet(run):
        found.append(paragraph("This run is not on ImageNet-1K's 50,000 validation images: the accuracies cannot be compared."))
    found.append(table(("", "this run", SEED_RUN["name"]), rows))
    if published is not None:
        found.append(
            paragraph(f"Published for this recipe at {run.config['epochs']} epochs: {published[0]} % ({published[1]}).")
        )
    return found


def settings(run, price_per_hour):
    """Return what the configuration changes of the defaults, and the environments of the sessions."""
    if not run.sessions:
        return []
    of_recipe = RECIPES.get(run.recipe, {})

    def set_by(key, value):
        if key == "learning_rate" and any(session.asked_config.get(key) == "auto" for session in run.sessions):
            return "range test, asked for by auto"
        return "recipe" if of_recipe.get(key) == value else "command line"

    changed = [
        (key, str(value), str(CONFIG[key]), set_by(key, value))
        for key, value in run.config.items()
        if key in CONFIG and value != CONFIG[key]
    ]
    environments = []
    for number, session in enumerate(run.sessions, start=1):
        known = session.environment
        versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items() if version)
        gpu = f"{known['gpu']}, CUDA {known['cuda']}" if known.get("gpu") else "no GPU"
        environments.append(
            (number, gpu, f"{known.get('cpu')}, {known.get('cores')} cores", versions, str(known.get("commit")))
        )
    return [
        heading("Configuration"),
        paragraph(f"What differs from the defaults of {len(CONFIG)} keys."),
        table(("key", "value", "default", "set by"), changed),
        heading("Environment"),
        table(("session", "GPU", "CPU", "versions", "commit"), environments),
    ]


# Several runs --------------------------------------------------------------------------------------------------------


def compare(runs, price_per_hour=None):
    """Return (title, blocks) of a page that shows several runs side by side."""

    def row(name, value):
        return (name, *(value(run) for run in runs))

    def best(run):
        found = best_of(run.records)
        return f"{percent(found[0])} (epoch {found[1]}, {WEIGHTS[found[2]]})" if found else None

    rows = [
        row("recipe", lambda run: run.recipe),
        row("best top-1", best),
        row("measured with", conditions),
        row(
            "with image and mirror image, last",
            lambda run: percent(run.records[-1].get("val_flip_top1")) if run.records else None,
        ),
        row("epochs done", lambda run: f"{len(run.records)} of {run.config['epochs']}"),
        row("hours", lambda run: f"{machine_hours(run):.2f}"),
        row("images/s", lambda run: spread(list(column(run.records, "images_per_s").values()))),
        row("interruptions", interruptions_of),
        row("GPU energy", lambda run: f"{energy_kwh(run):.3f} kWh" if energy_kwh(run) is not None else None),
    ]
    if price_per_hour is not None:
        rows.append(row(f"cost at {price_per_hour:g} per hour", lambda run: f"{machine_hours(run) * price_per_hour:,.2f}"))
    keys = [
        key for key in CONFIG if len({str(run.config[key]) for run in runs}) > 1 and key not in ("checkpoint_dir", "log_file")
    ]
    header = ("", *(run.name for run in runs))

    def overlaid(key):
        return [(run.name, column(run.records, key)) for run in runs]

    best_so_far = [
        (run.name, {record["epoch"]: best_of([record])[0] for record in run.records if best_of([record])}) for run in runs
    ]
    drawn = [
        chart("Validation top-1, best of the weights", best_so_far, "%"),
        chart("Training loss", overlaid("train_loss"), "nats"),
        chart("Learning rate", overlaid("learning_rate"), "rate"),
        chart("Throughput of training", overlaid("images_per_s"), "images/s"),
    ]
    blocks = [heading("Results"), table(header, rows), heading("Curves"), *drawn]
    if keys:
        blocks += [
            heading("Where their configurations differ"),
            table(header, [row(key, lambda run, key=key: run.config[key]) for key in keys]),
        ]
    return f"{len(runs)} runs compared", blocks


def parse_arguments(arguments=None):
    """Return what the command line asks for; ends the program with status 2 where that is impossible."""
    parser = argparse.ArgumentParser(
        "report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=path_argument,
        default=["checkpoints"],
        metavar="FOLDER",
        help="a run's checkpoint_dir; default checkpoints",
    )
    parser.add_argument(
        "--log", type=path_argument, help="the log of the runs; default training.log in the folder, above it or here"
    )
    parser.add_argument("--price-per-hour", type=float, help="what an hour of the machine costs")
    parser.add_argument("--output", type=path_argument, help="of the files OUTPUT.html and OUTPUT.md; default FOLDER/report")
    return parser.parse_args(arguments)


def main(arguments):
    runs = [read_run(folder, CONFIG, arguments.log) for folder in arguments.folders]
    title, blocks = report(runs[0], arguments.price_per_hour) if len(runs) == 1 else compare(runs, arguments.price_per_hour)
    output = arguments.output or str(runs[0].folder / "report")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("html", as_html(title, blocks)), ("md", as_markdown(title, blocks))):
        with replacing(f"{output}.{suffix}", "w") as file:
            file.write(text)
    print(f"wrote {output}.html and {output}.md")
    return 0


if __name__ == "__main__":
    protect_output()
    sys.exit(run_program("report.py", main, parse_arguments()))
