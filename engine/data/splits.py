"""The images of a data folder: a packed file for each split, or images in folders; labels in one order for both."""

import contextlib
import hashlib
import os
import time
from pathlib import Path

import numpy as np

from engine.data.images import PACKED_SHORTER_SIDE, image_size, packed_jpeg, training_view
from engine.preparation.finding import FolderTree
from engine.preparation.forms import ARCHIVES, form_at, no_form
from engine.preparation.names import some
from engine.preparation.packed import PackedSplit, unfinished_files
from engine.preparation.trees import SPLITS, all_names, open_folders
from engine.preparation.val_share import class_folders_alone, open_shares, refuse_other_levels
from engine.system.errors import DataError


def open_splits(data_dir, needed=SPLITS, log=print, val_share=0.0):
    """Return {'train': ..., 'val': ...} of the images in data_dir: each a packed file, or else images in folders.

    Args:
        needed: those to open. 'val' alone may also be a folder that holds the class folders themselves.
        log: called with each line on what was chosen or left out.
        val_share: of the images of each class that validate where the folder has no validation images of its own.
    Raises:
        DataError: with what is wrong with the folder, and what to run instead.
    """
    data_dir = Path(data_dir)
    packed = {split: data_dir / f"{split}.arrow" for split in needed}
    # os.path.isfile is False, too, where the folder must not be read
    splits = {split: PackedSplit(path) for split, path in packed.items() if os.path.isfile(path)}
    if rest := tuple(split for split in needed if split not in splits):
        classes = splits["train"].classes if "train" in splits else None
        opened = None
        if val_share and rest == SPLITS and data_dir.is_dir() and _has_class_folders_alone(data_dir):
            opened = open_shares(data_dir, val_share)
        if opened is None and data_dir.is_dir():
            opened = open_folders(data_dir, rest, classes)
            if opened is not None and val_share:
                log(f"note: {data_dir} has validation images of its own, and val_share is not used")
        if opened is None:
            raise DataError(_nothing_there(data_dir, rest))
        folders, remarks = opened
        splits = {split: splits.get(split) or folders[split] for split in needed}
        for remark in remarks:
            log(remark)
    if "train" in splits and "val" in splits:
        _let_classes_agree(splits, data_dir)
    for split, images in splits.items():
        counts = np.bincount(images.labels, minlength=len(images.classes))
        if not counts.any():
            raise DataError(f"{data_dir} holds no {split} images")
        if empty := [images.classes[label] for label in np.flatnonzero(counts == 0)]:
            log(f"WARNING: {split} has no images of {len(empty):,} of the {len(counts):,} classes: {some(empty)}")
    return splits


def _has_class_folders_alone(data_dir):
    """Return whether class folders are all that a folder has; DataError where they are likely no classes."""
    tree, where = FolderTree(data_dir), str(data_dir)
    folder = class_folders_alone(tree, where)
    if folder is not None:
        refuse_other_levels(tree, folder, where)
    return folder is not None


def _let_classes_agree(splits, data_dir):
    """Let the validation labels count in the training classes; raise DataError where they know others."""
    train, val = splits["train"], splits["val"]
    if val.classes == train.classes:
        return
    seen = {val.classes[label] for label in np.unique(val.labels)}
    if unknown := sorted(seen - set(train.classes)):
        raise DataError(
            f"train and val of {data_dir} hold different classes (only in val: {some(unknown)}): name one data set's folder"
        )
    val.relabel(train.classes)


def label_digests(splits):
    """Return {split: the SHA-256 of its images' labels in their order, in hex}."""
    return {split: hashlib.sha256(images.labels.astype("<i8").tobytes()).hexdigest() for split, images in splits.items()}


def _nothing_there(data_dir, splits):
    """Return in words what is missing in data_dir, and what to do."""
    advice = (
        "Prepare ImageNet there: python prepare_data.py SOURCE DATA_DIR. Or put images there as train/<class>/*.jpg and "
        "val/<class>/*.jpg, name another folder with --data-dir, or see a network learn without any download: "
        "python train.py --recipe demo"
    )
    if not data_dir.exists():
        return f"data_dir = {str(data_dir)!r} does not exist. {advice}"
    if data_dir.is_file() and not data_dir.name.endswith(ARCHIVES):
        return f"data_dir = {str(data_dir)!r} is a file. {advice}"
    for split in splits:
        if unfinished_files(data_dir / f"{split}.arrow")[0].exists():
            return f"{data_dir} is being prepared ({split}.arrow is not finished): let prepare_data.py end first"
    if (form := form_at(data_dir)) is not None and not form.trains:
        return (
            f"{data_dir} holds {form.name}, to be packed first: python prepare_data.py {data_dir} PACKED, "
            "then name the folder PACKED with --data-dir"
        )
    missing = [split for split in splits if not any((data_dir / name).is_dir() for name in all_names(split))]
    if missing == list(SPLITS) and _has_class_folders_alone(data_dir):
        return (
            f"data_dir = {str(data_dir)!r} holds class folders alone: --val-share 0.2 lets a fifth of each class validate, or "
            "move images to train/<class>/ and val/<class>/"
        )
    if missing:
        what = " and ".join(f"neither {split}.arrow nor a folder {split}" for split in missing)
        what = f"data_dir = {str(data_dir)!r} has {what}"
    else:
        what = f"{' and '.join(splits)} in {data_dir} hold no class folders with images"
    return f"{what}. {no_form(data_dir)} {advice}"


def log_packing_gain(split, config, log):
    """Say how much faster training views come from packed images on this machine, measured on a few of the originals.

    Nothing is said where there is nothing to gain: the images are packed already, or small.
    """
    if isinstance(split, PackedSplit):
        return
    originals, packed = [], []
    for index in np.linspace(0, len(split) - 1, min(12, len(split))).astype(int):
        with contextlib.suppress(Exception):  # an unreadable one is named where it is trained on
            content = split.read(index)
            if min(image_size(content)) > PACKED_SHORTER_SIDE:
                packed.append(packed_jpeg(content, PACKED_SHORTER_SIDE))
                originals.append(content)
    if not originals:
        return
    times = []
    for contents in (originals, packed, originals, packed):  # the first round warms up
        started = time.process_time()
        for number, content in enumerate(contents):
            training_view(content, config["train_resolution"], config["min_crop_area"], np.random.default_rng(number))
        times.append(1000 * (time.process_time() - started) / len(contents))
    original, small = times[2:]
    log(
        f"note: these images are read as they lie, in {original:.1f} ms each on one core; packed by python prepare_data.py it "
        f"would be {small:.1f} ms, {original / small:.1f} times as fast (measured here on {len(originals)} of them)"
    )
