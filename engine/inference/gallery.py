"""Pictures of what a network gets wrong: PREFIX_images.csv with every image, PREFIX_gallery.json for the report."""

import base64
import csv
import io

import numpy as np
import torch
from PIL import Image

from engine.data.images import validation_view
from engine.inference.calibration import calibration_of
from engine.inference.class_names import class_in_short
from engine.inference.confusion import pair_rows
from engine.preparation.finding import ImageFolder
from engine.system.files import replacing
from engine.system.plain_json import to_json

GALLERY = "_gallery.json"
THUMBNAIL, QUALITY = 96, 75  # px; of JPEG
SHOWN, MISLABELS_SHOWN, PAIRS, OF_A_PAIR = 24, 48, 8, 4


def write_gallery(prefix, seen, confusions, split, view, title, origin, training=False):
    """Write what a network sees in each image; return the names of the files written.

    Args:
        seen: Seen of every image, in the order of the split.
        confusions: int64 [C, C].
        split: whose images these are.
        view: (resolution in px, crop ratio) of the validation view.
        title: what was scored and how, in words.
        origin: {'images': which they are, in words, 'checkpoints': of checkpoints_of}.
        training: whether they are training images, among which wrong labels are looked for.
    """
    shares, classes, of_label = (np.asarray(of) for of in seen)
    labels, names = np.asarray(split.labels), names_of(split)
    people = [class_in_short(name, getattr(split, "class_names", {})) for name in split.classes]
    suspicion = suspicion_of(shares, classes, of_label, labels)
    order = np.argsort(-suspicion, kind="stable")
    with replacing(f"{prefix}_images.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "class", "predicted", "probability_of_class", "probability_of_predicted", "suspicion"])
        for i in order:
            predicted = split.classes[classes[i, 0]]
            figures = [f"{value:.4f}" for value in (of_label[i], shares[i, 0], suspicion[i])]
            writer.writerow([names[i], split.classes[labels[i]], predicted, *figures])

    def shot(i):
        best = [[people[label], round(float(share), 4)] for label, share in zip(classes[i], shares[i], strict=True)]
        return {
            "name": names[i],
            "label": people[labels[i]],
            "right": bool(classes[i, 0] == labels[i]),
            "best": best,
            "jpeg": thumbnail(split.read(int(i)), view[1]),
        }

    picked = pictures_to_show(shares, classes, labels, order, confusions, split.classes, people, training)
    sections = [{"title": name, "text": text, "shots": [shot(i) for i in indices]} for name, text, indices in picked]
    bins, error = reliability(shares[:, 0], classes[:, 0] == labels)
    counts, right = (
        np.bincount(labels, minlength=len(people)),
        np.bincount(labels[classes[:, 0] == labels], minlength=len(people)),
    )
    by_class = [[people[k], int(counts[k]), round(100 * right[k] / counts[k], 2)] for k in range(len(people)) if counts[k]]
    content = {
        "title": title,
        "training": training,
        "calibration_error": error,
        **origin,
        "reliability": bins,
        "classes": sorted(by_class, key=lambda row: row[2]),
        "sections": sections,
    }
    with replacing(f"{prefix}{GALLERY}", "w") as file:
        file.write(to_json(content) + "\n")
    return [f"{prefix}_images.csv", f"{prefix}{GALLERY}"]


def suspicion_of(shares, classes, of_label, labels):
    """Return how much more probable than its label another class is for each image, from -1 to 1.

    This is the normalised margin by which confident learning ranks labels (arXiv:1911.00068), the sign changed.

    Args:
        shares, classes: [N, K] of the K most probable classes, the most probable first.
        of_label: [N], probability of the label.
    """
    other = np.where(classes[:, 0] != labels, shares[:, 0], shares[:, 1] if shares.shape[1] > 1 else 0.0)
    return other - of_label


def pictures_to_show(shares, classes, labels, order, confusions, names, people, training):
    """Return [(title, text, indices of images)] of the gallery's sections."""
    right, best = classes[:, 0] == labels, shares[:, 0]
    errors, hits = np.flatnonzero(~right), np.flatnonzero(right)
    sections = []
    if training:
        text = "Those whose label the network finds least probable beside another class. The whole list is in the CSV file."
        sections.append(("Likely mislabels", text, [i for i in order[:MISLABELS_SHOWN] if not right[i]]))
    text = "Wrong, and sure of it: hard images, wrong labels, or several things in one picture."
    sections.append(("The most confident errors", text, errors[np.argsort(-best[errors], kind="stable")][:SHOWN]))
    text = "Right by a hair."
    sections.append(("The least confident hits", text, hits[np.argsort(best[hits], kind="stable")][:SHOWN]))
    seen_pairs, number = set(), {name: k for k, name in enumerate(names)}
    for row in pair_rows(confusions, names, {}):
        a, b = number[row["class"]], number[row["taken_for"]]
        if frozenset((a, b)) in seen_pairs or len(seen_pairs) == PAIRS:
            continue
        seen_pairs.add(frozenset((a, b)))
        taken = [np.flatnonzero((labels == x) & (classes[:, 0] == y)) for x, y in ((a, b), (b, a))]
        indices = [i for of_way in taken for i in of_way[np.argsort(-best[of_way], kind="stable")][:OF_A_PAIR]]
        text = f"{people[a]} taken for {people[b]}: {len(taken[0])} times; the other way round: {len(taken[1])}."
        sections.append((f"Confused: {people[a]} and {people[b]}", text, indices))
    return [section for section in sections if len(section[2])]


def reliability(confidence, right):
    """Return ([[mean confidence, accuracy, images], ...] of the bins that are not empty, expected calibration error)."""
    found = calibration_of(torch.as_tensor(confidence), torch.as_tensor(right))
    bins = zip(found.confidences.tolist(), found.accuracies.tolist(), found.counts.tolist(), strict=True)
    return [[round(mean, 4), round(accuracy, 4), count] for mean, accuracy, count in bins if count], round(found.error, 4)


def names_of(split):
    """Return every image's name as `class/file`, in the order of the split."""
    if isinstance(split, ImageFolder):
        return [split.name(index) for index in range(len(split))]
    return [f"{split.classes[label]}/{name}" for label, name in zip(split.labels, split.file_names(), strict=True)]


def thumbnail(data, crop_ratio):
    """Return an image's validation view in small, a JPEG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(validation_view(data, THUMBNAIL, crop_ratio)).save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
