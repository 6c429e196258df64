"""A run as its records and its log tell it, and the figures that they amount to."""

from pathlib import Path
from typing import NamedTuple

from engine.report.events import sessions_of_events
from engine.report.history import sessions_of_run
from engine.run.checkpoint_files import RECORDS
from engine.run.events import EVENTS
from engine.run.published import PUBLISHED_FOR, trains_on_imagenet, validates_on_imagenet
from engine.run.records import read_records
from engine.run.weights import WEIGHTS
from engine.system.errors import UserError

FIRST_EPOCHS = 10


class Run(NamedTuple):
    """Everything that is known of a run."""

    folder: Path
    log: Path | None
    records: list  # of metrics.jsonl, by epoch
    sessions: list  # of the log; empty where there is none
    config: dict

    @property
    def recipe(self):
        return self.sessions[-1].recipe if self.sessions else "unknown"

    @property
    def name(self):
        return str(self.folder)


def read_run(folder, defaults, log=None):
    """Return the Run in a folder.

    Args:
        defaults: the configuration, as far as no log names another.
        log: its log file; None takes events.jsonl, and for a run of old training.log in the folder, above it or here.
    Raises:
        UserError: there are no records.
    """
    folder = Path(folder)
    by_epoch = {record["epoch"]: record for record in read_records(folder / RECORDS)}
    records = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    if log is not None and not Path(log).exists():
        raise UserError(f"--log-file {log}: there is no such file")
    above = [parent / "training.log" for parent in (folder, folder.parent, folder.parent.parent, Path())]
    logs = [Path(log)] if log is not None else [path for path in above if path.exists()]
    recorded = sessions_of_events(folder / EVENTS) if log is None and (folder / EVENTS).is_file() else []
    if recorded and recorded[0].first_position == (0, 0):
        return Run(folder, None, records, recorded, defaults | recorded[-1].config)
    for path in logs:  # of a run that was begun when there were no events
        first = recorded[0].begun.replace(microsecond=0) if recorded else None
        sessions = [s for s in sessions_of_run(path, folder) if first is None or s.begun < first] + recorded
        if sessions:
            return Run(folder, path, records, sessions, defaults | sessions[-1].config)
    if not records:
        raise UserError(f"{folder} holds no {RECORDS}, and no log tells of a run there; name a run's checkpoint_dir")
    return Run(folder, None, records, [], dict(defaults))


def column(records, key):
    """Return {epoch: value} of a figure, where it was recorded."""
    return {record["epoch"]: record[key] for record in records if record.get(key) is not None}


def best_of(records):
    """Return (top-1 in %, epoch, kind of WEIGHTS) of the best validation, or None before the first one."""
    scores = [
        (record[f"{weights.column}_top1"], -record["epoch"], -order, kind)
        for record in records
        for order, (kind, weights) in enumerate(WEIGHTS.items())
        if record.get(f"{weights.column}_top1") is not None
    ]
    if not scores:
        return None
    top1, epoch, _, kind = max(scores)
    return top1, -epoch, kind


def phases(run):
    """Return [(name, records)]: the first ten epochs, the middle, and the averaging phase, as far as they were reached."""
    start = run.config["swa_start_epoch"] or float("inf")
    first = [r for r in run.records if r["epoch"] <= FIRST_EPOCHS and r["epoch"] < start]
    middle = [r for r in run.records if FIRST_EPOCHS < r["epoch"] < start]
    averaging = [r for r in run.records if r["epoch"] >= start]
    named = (("first ten epochs", first), ("middle", middle), ("averaging phase", averaging))
    return [(name, records) for name, records in named if records]


def machine_hours(run):
    """Return the hours that the run's processes existed, or without a log those of its epochs' training."""
    if run.sessions:
        return sum(session.seconds for session in run.sessions) / 3600
    return sum(record.get("seconds", 0) for record in run.records) / 3600


def energy_kwh(run):
    """Return the GPU's energy over all epochs, or None where it was not sampled."""
    energies = column(run.records, "gpu_energy_wh")
    return sum(energies.values()) / 1000 if energies else None


def why_not_comparable(run):
    """Return why the published figures, of ResNet-50 on ImageNet-1K, are not about the run: what it is; None if they are."""
    if not validates_on_imagenet(next(reversed(column(run.records, "val_images").values()), None)):
        return "not on ImageNet-1K's 50,000 validation images"
    if run.sessions and not trains_on_imagenet(run.sessions[-1].classes, run.sessions[-1].images):
        return "not trained on ImageNet-1K's images"
    return None if run.config["architecture"] == PUBLISHED_FOR else f"of a {run.config['architecture']}"


class Validated(NamedTuple):
    """What a run was validated on; None as far as its records and its log do not tell."""

    images: int | None
    classes: int | None
    px: int | None
    crop_ratio: float | None
    data_dir: str | None

    def __str__(self):
        of = f" of {self.classes:,} classes" if self.classes else ""
        ratio = f", crop ratio {self.crop_ratio:.4g}" if self.crop_ratio else ""
        return f"{self.images:,} images{of}, {self.px} px{ratio}"


def validated_on(run):
    """Return what a run was last Validated on, or None before."""
    validated = [record for record in run.records if record.get("val_images")]
    if not validated:
        return None
    images, px = (validated[-1].get(key) for key in ("val_images", "val_resolution"))
    if not run.sessions:
        return Validated(images, None, px, None, None)
    return Validated(images, run.sessions[-1].classes, px, run.config["val_crop_ratio"], str(run.config["data_dir"]))


def conditions(run):
    """Return what the accuracy was measured with, in words."""
    px = run.records[-1].get("val_resolution", run.config["val_resolution"]) if run.records else run.config["val_resolution"]
    return f"{px} px, no test-time augmentation"
