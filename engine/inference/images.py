"""The images that networks from files are scored on, their labels in the order of the networks' outputs."""

from pathlib import Path

from engine.data.loader import BatchLoader
from engine.data.splits import open_splits
from engine.inference.class_matching import match_classes
from engine.inference.networks import class_labels
from engine.preparation.val_share import open_shares, share_digests
from engine.system.device import AUTOCAST_DTYPES
from engine.system.errors import DataError
from engine.system.interruption import StopRequest


def open_matching_splits(networks, data_dir, needed):
    """Return the splits of data_dir, with labels in the order of the networks' outputs.

    Raises:
        DataError: the order is not certain, or not the same for all networks; or some were trained on what others are to be
            scored on.
    """
    orders, remarks, shares = {}, {}, {}
    for network in networks:
        if (splits := _shares_of_run(network, data_dir, remarks.setdefault)) is not None:
            shares.setdefault(share_digests(splits)["val"], (splits, network.path))
    if len(shares) > 1:
        first, second, *_ = (path for _, path in shares.values())
        raise DataError(
            f"{first} and {second} have other images for validation: the one was trained on images that the other would be "
            "scored on; score one at a time"
        )
    splits = next(iter(shares.values()))[0] if shares else open_splits(data_dir, needed)
    for network in networks:
        outputs = len(class_labels(network))
        match_classes(splits["val"], network.classes, outputs, network.path, data_dir, remarks.setdefault)
        orders[network.path] = splits["val"].classes
    first_path, first = next(iter(orders.items()))
    for path, order in orders.items():
        if order != first:
            raise DataError(f"{first_path} and {path} know other classes, or in another order: score one at a time")
    if "train" in splits:
        match_classes(splits["train"], first, len(first), first_path, data_dir, remarks.setdefault)
    for remark in remarks:
        print(remark)
    return splits


def _shares_of_run(network, data_dir, remark):
    """Return the splits of a run whose validation images are a share of its folder, if that is what data_dir holds.

    They are told by their numbers, classes and names: another folder of class folders is a test set, and scored whole. Which
    of its images the run was trained on cannot be told.

    Args:
        remark: called with each line for the user.
    """
    run = network.share
    opened = open_shares(data_dir, run["val_share"]) if run and Path(data_dir).is_dir() else None
    if opened is None:
        return None
    splits, remarks = opened
    here = len(splits["train"]), len(splits["val"]), splits["train"].classes
    if here != (run["train_images"], run["val_images"], run["classes"]):
        if network.checkpoint and Path(data_dir).resolve() == Path(network.checkpoint["config"]["data_dir"]).resolve():
            raise DataError(
                f"{data_dir} holds other images than when {network.path} was trained: which of them it has not seen cannot be "
                "told; name other ones with --data-dir"
            )
        remark(
            f"WARNING: the images in {data_dir} are scored, but the run's own validation images were a share of another folder "
            "or of this one as it was: if it was trained on some of these, the accuracy is too high"
        )
        return None
    if run.get("share_digests") not in (None, share_digests(splits)):  # None: an older run
        raise DataError(
            f"{data_dir} holds as many images as when {network.path} was trained, under other names: which of them it has not "
            "seen cannot be told; give them their names back, or name other ones with --data-dir"
        )
    for line in remarks:
        remark(line)
    return splits


def open_loader(splits, config, device):
    """Return a BatchLoader of the splits in the precision of the configuration; whoever opens it closes it."""
    return BatchLoader(splits, config, device, AUTOCAST_DTYPES[config["precision"]], StopRequest(), log=print)
