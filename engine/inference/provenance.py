"""What the pictures of a gallery are of: which images, and which checkpoints, so that a report can tell its own from others."""

import os
from pathlib import Path

from engine.preparation.finding import ImageFolder
from engine.preparation.val_share import name_digests
from engine.run.checkpoint_files import checksum_at_end, position


def images_in_words(networks, split, training):
    """Return which images Networks are scored on: their runs' own, or those of a folder, which is named.

    Args:
        training: whether they are training images.
    """
    kind, folder = "training images" if training else "validation images", str(networks[0].config["data_dir"])
    if all(_is_of_run(network.checkpoint, folder, split) for network in networks):
        return kind
    return f"{kind} of {folder}" if training else f"images of {folder}"


def _is_of_run(checkpoint, folder, split):
    if not checkpoint:
        return False
    if os.path.realpath(checkpoint["config"]["data_dir"]) == os.path.realpath(folder):
        return True
    digests = checkpoint.get("share_digests") or {}  # of a share of a folder, which may have been moved
    return isinstance(split, ImageFolder) and name_digests({"": split})[""] in digests.values()


def checkpoints_of(networks, folder):
    """Return [{'file', 'epoch', 'sha256'}] of the files that Networks are from, those of a mean included.

    file: its path from the folder of the gallery. epoch: whole epochs done, None of weights alone. sha256: what the
    checkpoint ends with, None of weights alone and where the file holds another one by now.
    """
    members = [member for network in networks for member in network.checkpoint.get("members", [network])]
    return [
        {
            "file": os.path.relpath(os.path.realpath(path.parent) + os.sep + path.name, os.path.realpath(folder)),
            "epoch": checkpoint.get("epoch"),
            "sha256": _checksum(path, checkpoint),
        }
        for path, checkpoint in {member.path: member.checkpoint for member in members}.items()
    ]


def _checksum(path, checkpoint):
    try:
        with open(path, "rb") as file:
            found = checksum_at_end(file)
    except OSError:
        return None
    return found if checkpoint and position(path) == (checkpoint["epoch"], checkpoint["batch"]) else None


def is_of_folder(checkpoints):
    """Return whether one of the checkpoints_of a gallery lay in the gallery's folder; None: an older one, which tells none."""
    return checkpoints is None or any(len(Path(each["file"]).parts) == 1 for each in checkpoints)
