"""Validation images from a folder that has none of its own: a share of each class, chosen by a hash of the names."""

import hashlib

from engine.preparation import trees
from engine.preparation.finding import FolderTree, ImageFolder, Labelled, LeftOut, has_images, join_path, labelled_by_folder
from engine.preparation.names import is_image_name, path_bytes, some, text_of
from engine.system.errors import DataError

SPLIT_WORDS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation"}  # in any case


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
    trees.refuse_empty_classes(found, f"{path}: {text_of(folder) or '.'}/", left_out)
    parts = dict(zip(("train", "val"), split_by_hash(found, share), strict=True))
    remark = (
        f"note: {path} has no validation images of its own: of its {len(found.labels):,} images {len(parts['val'].labels):,}, "
        f"val_share = {share:g} of each class chosen by a hash of their names, validate and are never trained on"
    )
    test = trees.unlabelled_test(tree, folder.rpartition("/")[0]) if folder else None
    remarks = [
        remark,
        *([f"note: {trees.remark_on_test(test)}"] if test else []),
        *trees.order_remarks(found.classes),
        *left_out.lines("train and val"),
    ]
    return {split: ImageFolder(tree.path(folder), part) for split, part in parts.items()}, remarks


def class_folders_alone(tree, where):
    """Return the path of the folder whose class folders are all that a tree has; None where it has splits, or no images."""
    root = trees.root_of_split(tree, where, "train")
    if root is not None:
        return None if trees.split_folders(tree, root, "val") else trees.split_folders(tree, root, "train")[0]
    names = (*trees.all_names("train"), *trees.all_names("val"))
    splits = [name for name in tree.entries("")[0] if name in names and has_images(tree, name, in_folders_only=True)]
    return "" if not splits and has_images(tree, "", in_folders_only=True) else None


def folders_of_classes(tree, where):
    """Return the paths of the folders right inside of which each folder is taken as a class."""
    alone = class_folders_alone(tree, where)
    if alone is not None:
        return [alone]
    root = trees.root_of_split(tree, where, "train")
    return [] if root is None else [path for split in trees.SPLITS for path in trees.split_folders(tree, root, split)]


def refuse_other_levels(tree, folder, where):
    """Raise DataError where the class folders in `folder`, of class_folders_alone, are likely none; says what to do.

    A folder without an image right inside of it, but in folders below, may be a split under another name, the one folder
    around all classes, or one of several around them. A folder train/ says itself where the classes lie.
    """
    around = folder.rpartition("/")[0]
    known = folder, trees.unlabelled_test(tree, around)
    if splits := [
        each for each in _folders_of_folders(tree, around) if _name(each).lower() in SPLIT_WORDS and each not in known
    ]:
        looks = "looks like a split, not a class" if len(splits) == 1 else "look like splits, not classes"
        raise DataError(
            f"{where}: {_some(splits)} {looks}: rename the folders with the training and validation images to train and val, "
            "and move others away"
        )
    if folder:
        return
    inside = _with_images(tree, "")
    if len(inside) > 1 and all(_name(each).lower() in SPLIT_WORDS for each in inside):
        raise DataError(
            f"{where}: {_some(inside)} look like splits, not classes, and their images lie outside of class folders: sort them "
            "into train/<class>/ and val/<class>/"
        )
    while len(inside) == 1 and inside == _folders_of_folders(tree, folder):
        (folder,) = inside
        inside = _with_images(tree, folder)
    if folder and len(inside) > 1:
        raise DataError(f"{where}: its class folders lie in one folder around them: --data-dir {where}/{text_of(folder)}")
    if len(inside) > 1 and inside == _folders_of_folders(tree, ""):
        deeper = [path for each in inside for path in _with_images(tree, each)]
        if len(deeper) > len(inside):  # not <class>/images/, as tiny-imagenet-200 has it
            raise DataError(
                f"{where}: all {len(inside)} folders ({_some(inside)}) hold folders alone ({_some(deeper)}): if those are the "
                "classes, bring them together in one folder; if the outer ones are, put these into a folder train"
            )


def _with_images(tree, path):
    """Return the paths of the folders right inside of `path` that have images in them or below."""
    inside = [join_path(path, name) for name in tree.entries(path)[0]]
    return [each for each in inside if has_images(tree, each)]


def _folders_of_folders(tree, path):
    """Return those of _with_images that have no image right inside."""
    return [each for each in _with_images(tree, path) if not any(map(is_image_name, tree.entries(each)[1]))]


def _name(path):
    return path.rpartition("/")[2]


def _some(paths):
    return some([text_of(path) for path in paths], 3)


def name_digests(splits):
    """Return {split: the SHA-256 of its images' names, in hex}, whatever their order."""
    names = {split: sorted(map(images.name, range(len(images)))) for split, images in splits.items()}
    return {split: hashlib.sha256("\0".join(of_split).encode()).hexdigest() for split, of_split in names.items()}


def share_digests(splits):
    """Return name_digests of splits that open_shares has opened; None of any others."""
    folders = {getattr(images, "folder", split) for split, images in splits.items()}
    return name_digests(splits) if len(folders) == 1 else None


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
