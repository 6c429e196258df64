"""ImageNet in the tar files in which it was published: the official three, and the Hugging Face Hub's archives of 2022."""

import itertools
from pathlib import PurePosixPath

from engine.preparation import trees
from engine.preparation.archives import FileSlice, delete_uncompressed, tar_listing, uncompressed
from engine.preparation.finding import NO_LABEL, OTHER_KIND, FolderTree, LeftOut
from engine.preparation.label_files import DEVKIT, read_devkit, require_all, stem
from engine.preparation.names import WNID, class_order, is_image_name, some, text_of
from engine.preparation.source import Entry, Source
from engine.preparation.trees import SPLITS
from engine.system.errors import DataError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
OLD_TRAIN, OLD_VAL = tuple(f"train_images_{part}.tar.gz" for part in range(5)), "val_images.tar.gz"


# The official tars ---------------------------------------------------------------------------------------------------


def _has_both_splits(path):
    tree, where = FolderTree(path), str(path)
    root = trees.root_of_split(tree, where, "train")
    return root is not None and bool(trees.split_folders(tree, root, "val"))


def is_official(path):
    """Return whether the official tars lie in the folder `path`, and are not left over beside the tree that they hold."""
    there = [(path / name).is_file() for name in (TRAIN_TAR, VAL_TAR, DEVKIT)] if path.is_dir() else []
    return any(there[:2]) and (all(there) or not _has_both_splits(path))  # else it is a tree with a tar left over


def open_official(folder, options):
    """Return the Source of a folder with the official tars and the development kit."""
    missing = [name for name in (TRAIN_TAR, VAL_TAR, DEVKIT) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} holds a part of the official ImageNet; missing: {', '.join(missing)}")
    kit = read_devkit(FileSlice(str(folder / DEVKIT), 0, (folder / DEVKIT).stat().st_size))
    left_out = {split: LeftOut() for split in SPLITS}
    outer = tar_listing(folder / TRAIN_TAR)
    left_out["train"].add_refused(outer)
    train, remarks = [], []
    for name, place in sorted(outer.files.items()):
        wnid = PurePosixPath(name).stem
        if wnid not in kit.classes or not name.endswith(".tar"):
            left_out["train"].add("not the tar of a class", name)
            continue
        inner = tar_listing(folder / TRAIN_TAR, place.start, place.length, f"{name} in {folder / TRAIN_TAR}")
        images = [(wnid, member, at) for member, at in inner.files.items() if is_image_name(member)]
        left_out["train"].add_refused(inner, f"{name}: ")
        for member in sorted(set(inner.files) - {member for _, member, _ in images}):
            left_out["train"].add(OTHER_KIND, f"{name}: {member}")
        if len(images) != (promised := kit.train_images.get(wnid, len(images))):
            remarks.append(f"WARNING: {name} holds {len(images):,} images; {DEVKIT} promises {promised:,}")
        train += images
    if missing := sorted(kit.classes - {wnid for wnid, _, _ in train}):
        raise DataError(
            f"{folder / TRAIN_TAR} holds no images of {len(missing):,} of the {len(kit.classes):,} classes of {DEVKIT} "
            f"({some(missing, 3)}): download it again"
        )
    val_listing = tar_listing(folder / VAL_TAR)
    left_out["val"].add_refused(val_listing)
    val = []
    for name, place in val_listing.files.items():
        wnid = kit.wnids_of_val.get(stem(name))
        if wnid is None or not is_image_name(name):
            left_out["val"].add(NO_LABEL, name)
        else:
            val.append((wnid, name, place))
    require_all(kit.wnids_of_val, [name for _, name, _ in val], f"{folder / VAL_TAR}: validation images", DEVKIT)
    return _of_classes("official tar files", {"train": train, "val": val}, kit.class_names, remarks, left_out)


def _of_classes(kind, images, class_names, remarks, left_out):
    """Return the Source of {split: [(class, name, place)]}."""
    classes = class_order({name for name, _, _ in images["train"]})
    label_of = {name: label for label, name in enumerate(classes)}
    splits = {}
    for split, of_split in images.items():
        for name, path, _ in of_split:
            if name not in label_of:
                left_out[split].add(NO_LABEL, path)
        entries = [
            Entry(text_of(PurePosixPath(path).name), label_of[name], at) for name, path, at in of_split if name in label_of
        ]
        splits[split] = sorted(entries, key=lambda entry: (entry.label, entry.name))
    remarks = remarks + [line for split in SPLITS for line in left_out[split].lines(split)]
    return Source(kind, [text_of(name) for name in classes], splits, class_names, remarks)


# The Hub's archives of 2022: train_images_0.tar.gz to 4, val_images.tar.gz -------------------------------------------


def old_hub_folder(path):
    """Return the folder with the Hub's archives of 2022: `path` or its data/; None where they are in neither."""
    folders = (path, path / "data")
    return next((folder for folder in folders if any((folder / name).exists() for name in OLD_TRAIN)), None)


def open_old_hub(path, options):
    """Return the Source of the Hub's archives of 2022; they are uncompressed first."""
    folder = old_hub_folder(path)
    archives = {"train": [folder / name for name in OLD_TRAIN], "val": [folder / OLD_VAL]}
    if missing := [path.name for paths in archives.values() for path in paths if not path.is_file()]:
        raise DataError(f"{folder} holds a part of the Hub's archives; missing: {', '.join(missing)}")
    delete_uncompressed(options.scratch, but=itertools.chain(*archives.values()))
    images, left_out = {split: [] for split in SPLITS}, {split: LeftOut() for split in SPLITS}
    for split, paths in archives.items():
        for archive in paths:
            listing = tar_listing(uncompressed(archive, options.scratch, options.log), what=str(archive))
            left_out[split].add_refused(listing)
            for name, place in listing.files.items():
                wnid = stem(name).rpartition("_")[2]  # n01440764_10026_n01440764.JPEG
                if is_image_name(name) and WNID.fullmatch(wnid):
                    images[split].append((wnid, name, place))
                else:
                    left_out[split].add(NO_LABEL, name)
    return _of_classes("archives of the Hugging Face Hub", images, {}, [], left_out)
