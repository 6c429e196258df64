"""Which classes a network gets right, and which it takes for which."""

import csv

import numpy as np
import torch

from engine.inference.class_names import class_in_short
from engine.inference.outputs import DETAILS_SOURCE
from engine.run.curves import AVERAGED, RAW, as_written, new_figure, save_figure, tick_whole_numbers
from engine.system.files import replacing

PAIRS_DRAWN = 20


def count_confusions(logits, labels):
    """Return int64 [C, C] on the device of logits: images of each class (row) that were taken for each class (column).

    Args:
        logits: float [B, C].
        labels: int64 [B].
    """
    classes = logits.shape[1]
    return count_each(labels * classes + logits.argmax(dim=1), classes**2).view(classes, classes)


def count_each(numbers, count):
    """Return int64 [count] on the device of numbers: how often each of 0, 1, ..., count - 1 is among them.

    As torch.bincount does it, for which the host reads the smallest and the largest number of a GPU.

    Args:
        numbers: int64 [N], each in [0, count).
    """
    counts = torch.zeros(count, dtype=torch.int64, device=numbers.device)
    return counts.index_add_(0, numbers, torch.ones_like(numbers))


def class_rows(confusions, classes, class_names):
    """Return one dict for each class, the worst first: its images, how many were right, and what it is taken for most."""
    rows = []
    for label, name in enumerate(classes):
        taken = confusions[label].copy()
        images, right = int(taken.sum()), int(taken[label])
        taken[label] = 0
        other = int(taken.argmax())
        rows.append(
            {
                "class": name,
                "name": class_names.get(name, name),
                "images": images,
                "correct": right,
                "top1": round(100 * right / images, 2) if images else None,
                "most_taken_for": classes[other] if taken[other] else "",
                "times": int(taken[other]),
            }
        )
    return sorted(rows, key=lambda row: (row["top1"] is None, row["top1"]))


def pair_rows(confusions, classes, class_names):
    """Return one dict for each pair of classes that were confused, the most frequent first."""
    wrong = confusions.copy()
    np.fill_diagonal(wrong, 0)
    pairs = np.argwhere(wrong)
    counts = wrong[tuple(pairs.T)]
    rows = []
    for index in np.argsort(-counts, kind="stable"):
        true, taken = pairs[index]
        share = 100 * counts[index] / confusions[true].sum()
        rows.append(
            {
                "class": classes[true],
                "name": class_names.get(classes[true], classes[true]),
                "taken_for": classes[taken],
                "taken_for_name": class_names.get(classes[taken], classes[taken]),
                "times": int(counts[index]),
                "percent_of_class": round(float(share), 2),
            }
        )
    return rows


def write_details(prefix, confusions, classes, class_names, title):
    """Write PREFIX_classes.csv, PREFIX_confusions.csv and the picture; return the names of the files written.

    Args:
        confusions: int64 [C, C] on any device, of count_confusions.
    """
    confusions = confusions.cpu().numpy()
    of_classes, of_pairs = class_rows(confusions, classes, class_names), pair_rows(confusions, classes, class_names)
    written = []
    for name, rows in (("classes", of_classes), ("confusions", of_pairs)):
        path = f"{prefix}_{name}.csv"
        with replacing(path, "w") as file:
            if rows:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        written.append(path)
    if _draw(picture_path(prefix), of_classes, of_pairs[:PAIRS_DRAWN], class_names, title):
        written.append(picture_path(prefix))
    return written


def picture_path(prefix):
    """Return the path of the picture, PREFIX.png; a folder/ gets one with a name, since folder/.png would be hidden."""
    return f"{prefix}_confusions.png" if prefix.endswith("/") else f"{prefix}.png"


def _draw(path, of_classes, of_pairs, class_names, title):
    def short(name):
        words = class_in_short(name, class_names)
        return as_written(words if len(words) <= 24 else words[:23] + "…")

    drawing = new_figure(1, 2, (13, 6))
    if drawing is None:
        return False
    figure, ((accuracies, pairs),) = drawing
    values = [row["top1"] for row in of_classes if row["top1"] is not None]
    accuracies.plot(range(1, len(values) + 1), values, color=RAW)
    accuracies.set_ylim(0, 101)
    accuracies.set_title("Top-1 of each class in %, the worst first", loc="left")
    accuracies.set_xlabel("classes")
    tick_whole_numbers(accuracies)
    worst = [f"{short(row['class'])} {row['top1']:.0f} %" for row in of_classes[:8] if row["top1"] is not None]
    accuracies.text(0.98, 0.03, "worst:\n" + "\n".join(worst), transform=accuracies.transAxes, ha="right", fontsize=8)
    names = [f"{short(row['class'])} → {short(row['taken_for'])}" for row in of_pairs][::-1]
    pairs.barh(range(len(names)), [row["percent_of_class"] for row in of_pairs][::-1], color=AVERAGED)
    pairs.set_yticks(range(len(names)), names, fontsize=8)
    pairs.grid(axis="y", visible=False)
    pairs.set_title("Most confused pairs: % of the first class taken for the second", loc="left")
    figure.suptitle(as_written(title), fontsize=10, x=0.01, ha="left")
    save_figure(figure, path, DETAILS_SOURCE)
    return True
