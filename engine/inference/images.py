"""The images that networks from files are scored on, their labels in the order of the networks' outputs."""

from engine.data.loader import BatchLoader
from engine.data.splits import open_splits
from engine.inference.class_matching import match_classes
from engine.system.device import AUTOCAST_DTYPES
from engine.system.errors import DataError
from engine.system.interruption import StopRequest


def open_matching_splits(networks, data_dir, needed):
    """Return the splits of data_dir, with labels in the order of the networks' outputs.

    Raises:
        DataError: the order is not certain, or not the same for all networks.
    """
    orders, remarks = {}, {}
    splits = open_splits(data_dir, needed)
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


def open_loader(splits, config, device):
    """Return a BatchLoader of the splits in the precision of the configuration; whoever opens it closes it."""
    return BatchLoader(splits, config, device, AUTOCAST_DTYPES[config["precision"]], StopRequest(), log=print)
