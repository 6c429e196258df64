"""A page that shows several runs side by side."""

from config import CONFIG
from engine.report.charts import chart
from engine.report.figures import best_of, column, conditions, energy_kwh, machine_hours, validated_on
from engine.report.page import heading, paragraph, table
from engine.report.words import interruptions_of, percent, spread
from engine.run.weights import WEIGHTS


def report_of_runs(runs, price_per_hour=None):
    """Return (title, blocks) of a page that shows several runs side by side."""
    header = ("", *(run.name for run in runs))
    blocks = [heading("Results"), *map(paragraph, remarks(runs)), table(header, result_rows(runs, price_per_hour))]
    blocks += [heading("Curves"), *curves(runs)]
    values = {key: [run.config[key] for run in runs] for key in CONFIG if key not in ("checkpoint_dir", "log_file")}
    rows = [(key, *of_runs) for key, of_runs in values.items() if len(set(map(str, of_runs))) > 1]
    if rows:
        blocks += [heading("Where their configurations differ"), table(header, rows)]
    return f"{len(runs)} runs compared", blocks


DIFFERENCES = {"images": "number of images", "classes": "number of classes", "px": "resolution", "crop_ratio": "crop ratio"}


def remarks(runs):
    """Return sentences on why the accuracies of the runs are not of the same thing, or may not be; [] if they are."""
    known = [found for run in runs if (found := validated_on(run)) is not None]

    def differ(field):
        return len({getattr(found, field) for found in known} - {None}) > 1

    if names := [name for field, name in DIFFERENCES.items() if differ(field)]:
        return [f"The runs were not validated on the same ({', '.join(names)}): the accuracies cannot be compared."]
    if differ("data_dir"):
        return ["The data_dir of the runs differs: whether their images are the same is not recorded."]
    return []


def result_rows(runs, price_per_hour):
    """Return the rows of results: a name, and a cell for each run."""

    def row(name, value):
        return (name, *(value(run) for run in runs))

    def best(run):
        found = best_of(run.records)
        return f"{percent(found[0])} (epoch {found[1]}, {WEIGHTS[found[2]].in_words})" if found else None

    def mirrored(run):
        return percent(run.records[-1].get("val_flip_top1")) if run.records else None

    def energy(run):
        return f"{energy_kwh(run):.3f} kWh" if energy_kwh(run) is not None else None

    rows = [
        row("recipe", lambda run: run.recipe),
        row("best top-1", best),
        row("measured with", conditions),
        row("validated on", validated_on),
        row("with image and mirror image, last", mirrored),
        row("epochs done", lambda run: f"{len(run.records)} of {run.config['epochs']}"),
        row("hours", lambda run: f"{machine_hours(run):.2f}"),
        row("images/s", lambda run: spread(list(column(run.records, "images_per_s").values()))),
        row("interruptions", interruptions_of),
        row("GPU energy", energy),
    ]
    if price_per_hour is not None:
        rows.append(row(f"cost at {price_per_hour:g} per hour", lambda run: f"{machine_hours(run) * price_per_hour:,.2f}"))
    return rows


def curves(runs):
    """Return the charts with a line for each run."""

    def line_of_each(key):
        return [(run.name, column(run.records, key)) for run in runs]

    def best_by_epoch(run):
        return {record["epoch"]: best[0] for record in run.records if (best := best_of([record]))}

    return [
        chart("Validation top-1, best of the weights", [(run.name, best_by_epoch(run)) for run in runs], "%"),
        chart("Training loss", line_of_each("train_loss"), "nats"),
        chart("Learning rate", line_of_each("learning_rate"), "rate"),
        chart("Throughput of training", line_of_each("images_per_s"), "images/s"),
    ]
