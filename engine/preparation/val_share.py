"""Validation images from a folder that has none of its own: a share of each class, chosen by a hash of the names."""

import hashlib

from engine.preparation import trees
from engine.preparation.finding import (
    FolderTree,
    ImageFolder,
    Labelled,
    LeftOut,
    has_images,
    labelled_by_folder,
    path_bytes,
    text_of,
)


def open_shares(path, share):
    """Return ({'train': ImageFolder, 'val': ImageFolder}, remarks) of one folder's images; None where it has a val of its own.

    The folder holds the class folders, or a folder train/ with them.

    Args:
        share: of the images of each class that validate, see split_by_hash.
    Raises:
        DataError: a class has no images.
    """
    tree, left_out = FolderTree(path), LeftOut()
    folder = class_folders_alone(tree, str(path))
    if folder is None:
        return None
    found = labelled_by_folder(tree, folder, left_out)
    trees.refuse_empty_classes(found, f"{path}: {text_of(folder) or '.'}/")
    parts = dict(zip(("train", "val"), split_by_hash(found, share), strict=True))
    remark = (
        f"note: {path} has no validation images of its own: of its {len(found.labels):,} images {len(parts['val'].labels):,}, "
        f"val_share = {share:g} of each class chosen by a hash of their names, validate and are never trained on"
    )
    remarks = [remark, *trees.order_remarks(found.classes), *left_out.lines("train and val")]
    return {split: ImageFolder(tree.path(folder), part) for split, part in parts.items()}, remarks


def class_folders_alone(tree, where):
    """Return the path of the folder whose class folders are all that a tree has; None where it has splits, or no images."""
    root = trees.root_of_split(tree, where, "train")
    if root is not None:
        return None if trees.split_folders(tree, root, "val") else trees.split_folders(tree, root, "train")[0]
    names = (*trees.all_names("train"), *trees.all_names("val"))
    splits = [name for name in tree.entries("")[0] if name in names and has_images(tree, name, in_folders_only=True)]
    return "" if not splits and has_images(tree, "", in_folders_only=True) else None


def split_by_hash(found, share):
    """Return (Labelled for training, Labelled for validation): of each class those whose names' SHA-256 comes first validate.

    Their number is the rounded share, but at least one, and one image at least is left for training. So the same names give
    the same split on every machine and in any order, and another class changes nothing.
    """
    of_class = {}
    for index, label in enumerate(found.labels):
        of_class.setdefault(label, []).append(index)
    chosen = set()
    for members in of_class.values():
        count = min(max(1, int(share * len(members) + 0.5)), len(members) - 1)
        members.sort(key=lambda index: hashlib.sha256(path_bytes(found.paths[index])).digest())
        chosen.update(members[:count])

    def part(validates):
        indices = [index for index in range(len(found.labels)) if (index in chosen) == validates]
        return Labelled(found.classes, [found.paths[index] for index in indices], [found.labels[index] for index in indices])

    return part(False), part(True)
