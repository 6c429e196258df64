"""Scores by the rules of other test sets: by the classes that are present alone, and by the reassessed labels (ReaL)."""

import re
from pathlib import Path

import torch

from engine.inference.class_matching import all_of_imagenet
from engine.inference.scoring import scores_of_logits
from engine.preparation.names import class_order
from engine.system.errors import DataError
from engine.system.plain_json import from_json

SUBSET_RULE = (
    "note: scored by the logits of the classes present alone, as the authors of ImageNet-A and ImageNet-R do (eval.py of "
    "hendrycks/natural-adv-examples and hendrycks/imagenet-r), and then by all logits"
)
VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.")


def classes_present(split):
    """Return the labels that images of a split have, int64, in order."""
    return torch.unique(torch.from_numpy(split.labels))


def subset_logits(logits, present):
    """Return the logits [N, C] with those of all classes but the present ones at minus infinity: no softmax counts them."""
    among = torch.full_like(logits, -torch.inf)
    among[:, present] = logits[:, present]
    return among


def subset_scores(logits, labels, present):
    """Return evaluate()'s figures among the present classes alone."""
    return scores_of_logits(subset_logits(logits, present), labels, len(present))


# ReaL ----------------------------------------------------------------------------------------------------------------


def read_real_labels(path, split):
    """Return bool [N, C]: whether a class, an output of the network, is among the reassessed labels of an image.

    The file is real.json of google-research/reassessed-imagenet (arXiv:2006.07159): a list, whose n-th entry, from 1, has
    the labels of ILSVRC2012_val_0000000n, as numbers in the order of the sorted wnids.

    Args:
        split: the validation images, their classes in the order of the network's outputs.
    Raises:
        DataError: the file is another, or the images are not ImageNet's validation images.
    """
    try:
        of_images = from_json(Path(path).read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"--real-labels {path} cannot be read: {error}") from error
    if not isinstance(of_images, list) or not all(isinstance(labels, list) for labels in of_images):
        raise DataError(f"--real-labels {path} is no list with a list of labels for each image")
    if not all_of_imagenet(split.classes):
        raise DataError(f"--real-labels: they are of ImageNet's 1,000 classes, the images have {len(split.classes):,} others")
    output_of = {label: split.classes.index(name) for label, name in enumerate(class_order(split.classes))}
    real = torch.zeros(len(split), len(split.classes), dtype=torch.bool)
    for row, name in enumerate(split.file_names()):
        number = VAL_NUMBER.search(name)
        if number is None or not 1 <= int(number[1]) <= len(of_images):
            raise DataError(f"--real-labels: {name or 'an image without a name'} is none of the {len(of_images):,} of {path}")
        try:
            real[row, [output_of[label] for label in of_images[int(number[1]) - 1]]] = True
        except (KeyError, TypeError) as error:
            raise DataError(f"--real-labels {path}: {error} is the number of no class") from error
    return real


def real_in_words(logits, real):
    """Return the ReaL accuracy in words: an image counts if the prediction is among its labels; one without labels is left out.

    Args:
        logits: float [N, C].
        real: of read_real_labels.
    """
    labelled = real.any(dim=1)
    count, images = int(labelled.sum()), len(real)
    if not count:
        raise DataError("--real-labels: none of the images has a label there")
    hits = real[torch.arange(images), logits.argmax(dim=1)].sum().item()
    classes = int(real.any(dim=0).sum())
    return (
        f"ReaL top-1 {100 * hits / count:.2f} % on {count:,} images of {classes:,} classes, {images - count:,} without a label "
        "left out (arXiv:2006.07159)"
    )
