"""The images of a run: those of its checkpoint, the same on each machine, and enough for a batch."""

import os
from pathlib import Path

from engine.cli.command_line import flag_of
from engine.cli.keys import ConfigError
from engine.data.batches import REPLACE_IT
from engine.data.demo import make_demo_data
from engine.data.fetching import fetch_images, images_folder
from engine.data.splits import label_digests, log_packing_gain, open_splits
from engine.preparation.finding import FolderTree
from engine.preparation.names import some
from engine.preparation.val_share import folders_of_classes, name_digests, share_digests
from engine.system import distributed
from engine.system.errors import DataError
from engine.system.files import ADDRESS


def open_images(config, checkpoint, log):
    """Return the splits {'train': ..., 'val': ...} of a run.

    Args:
        checkpoint: to go on from, or None.
        log: called with each message for the user.
    Raises:
        DataError: they are not those of the checkpoint, or too few for a batch.
    """
    if config["make_demo_data"]:
        made = distributed.run_on_all_ranks(lambda: distributed.local_rank() == 0 and make_demo_data(config["data_dir"]))
        if made:
            log(f"made the demo's pictures in {config['data_dir']}")
    distributed.run_on_all_ranks(lambda: distributed.local_rank() == 0 and fetch_images(config, log, checkpoint is not None))
    folder, val_share = images_folder(config), config["val_share"]
    splits = distributed.run_on_all_ranks(lambda: open_splits(folder, log=log, val_share=val_share))
    images = splits["train"]
    if checkpoint is not None:
        _keep_order_of_classes(splits, checkpoint, log)
    seen = distributed.all_gather_object((images.classes, len(images), len(splits["val"]), share_digests(splits)))
    if seen.count(seen[0]) < len(seen):
        raise DataError(f"{config['data_dir']} holds other images on one machine than on another")
    if checkpoint is not None:
        _require_same_images(splits, checkpoint, config, log)
    elif images.labels.min() == images.labels.max():
        raise DataError(
            f"{config['data_dir']} holds images of one class alone, {images.classes[images.labels[0]]!r}: there is nothing to "
            "tell apart. The folders right inside of train/ and val/ are the classes"
        )
    if len(images) < config["batch_size"]:
        raise DataError(
            f"{len(images)} training images make no batch of batch_size = {config['batch_size']}: lower --batch-size"
        )
    if config["batch_size"] < distributed.size():
        raise ConfigError([f"batch_size = {config['batch_size']}: too few for {distributed.size()} processes"])
    if checkpoint is None and distributed.rank() == 0:
        log_packing_gain(images, config, log)
    return splits


def refuse_folders_among_classes(config):
    """Raise DataError where a folder that the run will make would lie among the class folders, and count as one of them."""
    folder = images_folder(config)
    if not Path(folder).is_dir() or Path(folder, "train.arrow").is_file():
        return
    tree = FolderTree(folder)
    roots = [os.path.realpath(tree.path(root)) + b"/" for root in folders_of_classes(tree, folder)]
    places = {"checkpoint_dir": config["checkpoint_dir"], "log_file": os.path.dirname(config["log_file"] or "")}
    if not ADDRESS.match(config["mirror"]) and config["mirror"] != "none":
        places["mirror"] = config["mirror"]
    for key, place in places.items():
        if os.fsencode(os.path.realpath(place)).startswith(tuple(roots)):
            raise DataError(
                f"{key} = {config[key]!r} lies among the class folders of data_dir = {folder!r}, and would count as one: name "
                f"another place with {flag_of(key)}"
            )


def _keep_order_of_classes(splits, checkpoint, log):
    classes = splits["train"].classes
    if classes != checkpoint["classes"] and sorted(classes) == sorted(checkpoint["classes"]):
        log("note: the classes stay in the order that the run recorded when it began")
        for split in splits.values():
            split.relabel(checkpoint["classes"])


def _require_same_images(splits, checkpoint, config, log):
    images, val_images = splits["train"], len(splits["val"])
    then = checkpoint.get("share_digests")  # None: not of a share, or of an older run
    here = then and name_digests(splits)
    if (images.classes, len(images)) != (checkpoint["classes"], checkpoint["train_images"]):
        share = (
            "; with val_share a removed image moves others between the splits: put one there, under its name" if then else ""
        )
        ours, theirs = images.classes, checkpoint["classes"]
        differing = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        new, lost = (f", with {some(names, 3)}" if names else "" for names in differing)
        raise DataError(
            f"{config['data_dir']} holds {len(images):,} training images of {len(ours)} classes{new}; the run to resume saw "
            f"{checkpoint['train_images']:,} of {len(theirs)}{lost}. Name its images with --data-dir{share}"
        )
    labels = label_digests(splits)
    labels_then = checkpoint.get("label_digests", labels)  # not in older runs
    if labels["train"] != labels_then["train"]:
        raise DataError(
            f"{config['data_dir']} holds as many training images as the run to resume saw, but their labels are others, or "
            "in another order. Name its images with --data-dir"
        )
    if then and here["train"] != then["train"]:
        raise DataError(
            f"{config['data_dir']} holds its images under other names than when the run to resume began, and the split of "
            "val_share goes by them: it would be scored on images that it was trained on. Give them their names back"
        )
    were = checkpoint.get("val_images", val_images)  # new in format 1
    if (val_images, here, labels["val"]) == (were, then, labels_then["val"]):
        return
    if checkpoint["best"]["epoch"] == 0:
        log(f"note: {val_images:,} validation images now, {were:,} when the run began: it has not been scored on any yet")
        return
    raise DataError(
        f"{config['data_dir']} holds {'other' if val_images == were else f'{val_images:,}'} validation images; the run to "
        f"resume was scored on {were:,}, and its best so far would mean nothing. Name its images with --data-dir; {REPLACE_IT}"
    )
