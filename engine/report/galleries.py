"""The gallery of a report: what evaluate.py --details has found out about single images."""

import contextlib
from pathlib import Path

from engine.report.charts import chart
from engine.report.page import gallery_block, heading, paragraph, table
from engine.report.words import percent
from engine.run.checkpoint_files import checksum_at_end
from engine.system.plain_json import from_json

WORST_CLASSES = 10


def galleries_in(folder):
    """Return the contents of the files *_gallery.json of a folder, the run's validation first; damaged ones are passed over."""
    found = []
    for path in sorted(folder.glob("*_gallery.json")):
        try:
            content = from_json(path.read_text(encoding="utf-8", errors="replace"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and isinstance(content.get("sections"), list):
            found.append(content)
    return sorted(found, key=lambda content: (bool(content.get("training")), content.get("images") != "validation images"))


def blocks_of_galleries(folder):
    """Return the blocks of a folder's galleries; one that is damaged is passed over."""
    blocks = []
    for content in galleries_in(folder):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            blocks += blocks_of_gallery(content, folder)
    return blocks


def subject_in_words(content, folder):
    """Return of which images a gallery's pictures are, and of which checkpoints, where they are not the folder's as it is."""
    if "checkpoints" not in content:
        return "of which images and checkpoint is not recorded"
    checkpoints = content["checkpoints"]
    if all(_is_there(each, folder) for each in checkpoints):
        return content["images"]
    return f"{content['images']}, of {' and '.join(_checkpoint_in_words(each, folder) for each in checkpoints)}"


def _is_there(checkpoint, folder):
    try:
        with open(folder / Path(checkpoint["file"]).name, "rb") as file:
            return checksum_at_end(file) == checkpoint["sha256"]
    except OSError:
        return False


def _checkpoint_in_words(checkpoint, folder):
    """Return which checkpoint that is, in words; one that lay in the folder may be another by now, or gone."""
    path, epoch = Path(checkpoint["file"]), checkpoint["epoch"]
    name = f"{path} (epoch {epoch})" if epoch is not None else f"{path}"
    if len(path.parts) > 1 or _is_there(checkpoint, folder):
        return name
    if not (folder / path).is_file():
        return f"{name}, which is not there any more"
    return f"an earlier {name}" if epoch is not None else name


def blocks_of_gallery(content, folder):
    """Return the blocks of one gallery that lies in a run's folder."""
    bins = {mean: accuracy for mean, accuracy, _ in content["reliability"]}
    rows = content["classes"]
    worst = [(name, images, percent(top1)) for name, images, top1 in rows[:WORST_CLASSES]]
    by_class = {place: top1 for place, (_, _, top1) in enumerate(rows, start=1)}
    text = (
        f"{content['title']}. A click on an image shows its file and the most probable classes. Expected calibration "
        f"error {100 * content['calibration_error']:.1f} points (15 bins)."
    )
    found = [
        heading(f"Pictures: {subject_in_words(content, Path(folder))}"),
        paragraph(text),
        chart(
            "Reliability: accuracy by confidence",
            [("this network", bins), ("as sure as right", {0.0: 0.0, 1.0: 1.0}, "dotted")],
            "accuracy",
            "confidence",
        ),
        chart("Accuracy by class, the worst first", [("top-1", by_class)], "%", "classes"),
        table(("the worst classes", "images", "top-1"), worst),
    ]
    return found + [gallery_block(each["title"], each["text"], each["shots"]) for each in content["sections"]]
