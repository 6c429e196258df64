"""The images that networks from files are scored on, their labels in the order of the networks' outputs."""

from pathlib import Path

from engine.data.loader import BatchLoader
from engine.data.splits import open_splits
from engine.inference.class_matching import match_classes
from engine.preparation.val_share import open_shares
from engine.system.device import AUTOCAST_DTYPES
from engine.system.errors import DataError
from engine.system.interruption import StopRequest


def open_matching_splits(networks, data_dir, needed):
    """Return the splits of data_dir, with labels in the order of the networks' outputs.

    Raises:
        DataError: the order is not certain, or not the same for all networks.
    """
    orders, remarks = {}, {}
    splits = _shares_of_run(networks[0], data_dir) or open_splits(data_dir, needed)
    for network in networks:
        outputs = network.model.fc.out_features
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


def _shares_of_run(network, data_dir):
    """Return the splits of a run whose validation images are a share of its folder, if that is what data_dir holds.

    They are told by their numbers and classes: another folder of class folders is a test set, and scored whole.
    """
    run, share = network.checkpoint, network.config["val_share"]
    opened = open_shares(data_dir, share) if run and share and Path(data_dir).is_dir() else None
    if opened is None:
        return None
    splits, remarks = opened
    here = len(splits["train"]), len(splits["val"]), splits["train"].classes
    if here != (run["train_images"], run["val_images"], run["classes"]):
        if Path(data_dir).resolve() == Path(run["config"]["data_dir"]).resolve():
            raise DataError(
                f"{data_dir} holds other images than when {network.path} was trained: which of them it has not seen cannot be "
                "told; name other ones with --data-dir"
            )
        print(f"note: all images in {data_dir} are scored; the run's own validation images were a share of another folder")
        return None
    print("\n".join(remarks))
    return splits


def open_loader(splits, config, device):
    """Return a BatchLoader of the splits in the precision of the configuration; whoever opens it closes it."""
    return BatchLoader(splits, config, device, AUTOCAST_DTYPES[config["precision"]], StopRequest(), log=print)
