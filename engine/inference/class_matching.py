"""Which output of a network belongs to which class of the images: known or asked for, never assumed."""

import numpy as np

from engine.preparation.names import WNID, are_numbers, class_order, some
from engine.system.errors import DataError

IMAGENET_CLASSES = 1000
WAY_OUT = "name a file with one class per line, in the order of the network's outputs: --classes FILE"


def read_class_file(path, outputs):
    """Return the classes that a text file names, one per line, in the order of a network's outputs.

    Raises:
        DataError: there is no such file, or it does not name as many different classes as there are outputs.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            classes = [line.strip() for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"--classes {path} cannot be read: {error}") from error
    if len(classes) != outputs or len(set(classes)) != outputs:
        different = "" if len(set(classes)) == len(classes) else f", {len(set(classes)):,} of them different"
        raise DataError(f"--classes {path} names {len(classes):,} classes{different}; the network has {outputs:,} outputs")
    return classes


def match_classes(images, known, outputs, weights, where, log):
    """Let the labels of a split count in the order of a network's outputs.

    Certain are: classes of the same names; 1000 wnids, whose order is that of all who train on ImageNet; and the numbers of
    all outputs.

    Args:
        images: a split with `classes`, `labels` and `relabel`.
        known: the network's classes in the order of its outputs, or None.
        outputs: their number.
        weights, where: the network's file and the images' folder, for messages.
        log: called with a line where the order had to be found.
    Raises:
        DataError: the order is not certain; says how to state it.
    """
    if known is not None:
        _match_to_known(images, known, weights, where, log)
    else:
        _match_to_numbers(images, outputs, weights, where, log)


def _match_to_known(images, known, weights, where, log):
    """match_classes for a network whose classes are known."""
    there = [images.classes[label] for label in np.unique(images.labels)]
    if set(there) <= set(known):
        images.relabel(known)
        if len(there) < len(known):
            log(f"note: {where} holds images of {len(there):,} of the {len(known):,} classes that {weights} tells apart")
    elif all_of_imagenet(known) and all_of_imagenet(images.classes):  # one by wnids, the other by numbers
        images.relabel(class_order(images.classes))
        images.classes = known
        log(f"note: the classes in {where} are matched to those of {weights}: number n is the n-th wnid, counted from 0")
    else:
        unknown = some(sorted(set(there) - set(known)))
        raise DataError(f"the classes in {where} are not the {len(known):,} of {weights} (unknown: {unknown}); {WAY_OUT}")


def _match_to_numbers(images, outputs, weights, where, log):
    """match_classes for a network of which only the number of outputs is known."""
    names = some(images.classes, 3)
    if len(images.classes) != outputs:
        raise DataError(
            f"{weights} tells {outputs:,} classes apart and does not name them; {where} has {len(images.classes):,} ({names}): "
            f"{WAY_OUT}"
        )
    if are_numbers(images.classes) and {int(name) for name in images.classes} == set(range(outputs)):
        images.relabel(class_order(images.classes))
        log(f"note: {weights} does not name its classes; the numbers in {where} are taken as those of its outputs, from 0 on")
    elif all_of_imagenet(images.classes):
        images.relabel(class_order(images.classes))
        log(f"note: {weights} does not name its classes; its outputs are taken to be the sorted wnids in {where}")
    else:
        raise DataError(f"{weights} does not name its {outputs:,} classes; those in {where} ({names}) do not tell: {WAY_OUT}")


def all_of_imagenet(classes):
    """Return whether these are 1000 wnids, or the numbers from 0 to 999."""
    if len(classes) != IMAGENET_CLASSES:
        return False
    return all(map(WNID.fullmatch, classes)) or (are_numbers(classes) and {int(name) for name in classes} == set(range(1000)))
