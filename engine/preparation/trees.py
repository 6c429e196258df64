"""Trees of images, on disk or in an archive: where their splits lie, what their labels are, and whether they are whole.

An ImageFolder (train/<class>/*, val/<class>/*), Kaggle's ILSVRC/Data/CLS-LOC with its flat val, tiny-imagenet-200. Training
reads those on disk as they lie; preparation reads the same ones, and those in archives.
"""

from pathlib import PurePosixPath
from typing import NamedTuple

from engine.preparation import finding
from engine.preparation.finding import FolderTree, ImageFolder, Labelled, LeftOut, folder_at, join_path
from engine.preparation.label_files import DEVKIT, TINY_LABELS, VAL_LABELS, SideFiles, require_all, stem, tiny_labels
from engine.preparation.names import WNID, are_numbers, class_order, some, text_of
from engine.system.errors import DataError

SPLITS = ("train", "val")
IMAGENET_COUNTS = (1_281_167, 50_000)  # images for training and for validation
# Names of the splits' folders and files. Those of one group mean the same; a later group counts where there is none before it.
SPLIT_NAMES = {"train": (("train",),), "val": (("val", "validation", "valid"), ("test",))}
NO_VALIDATION_IMAGES = (
    "train.py --val-share 0.2 lets a fifth of each class validate where there are none; prepare_data.py needs val/<class>/"
)
DEPTH = 4  # folders to go down in search of train/; Kaggle's tree lies at 3


class ImageTree(NamedTuple):
    """A tree that was understood."""

    tree: object  # FolderTree or ArchiveTree
    where: str  # in words
    folders: dict  # {'train': path in the tree, 'val': ...}
    found: dict  # {'train': Labelled, 'val': ...}, both with the same classes
    class_names: dict  # {class: what people call it}
    left_out: dict  # {'train': LeftOut, 'val': ...}
    remarks: list  # lines for the user

    def place(self, split, path):
        """Return where the bytes of an image of a split lie."""
        return self.tree.place(join_path(self.folders[split], path))


def all_names(split):
    """Return every name that a split's folder or files may have."""
    return tuple(name for group in SPLIT_NAMES[split] for name in group)


def open_folders(path, splits=SPLITS, classes=None):
    """Return ({split: ImageFolder}, remarks) of a tree on disk, or None where there is no such tree."""
    found = open_tree(FolderTree(path), str(path), None, splits, classes)
    if found is None:
        return None
    names = {name: found.class_names[name] for name in next(iter(found.found.values())).classes if name in found.class_names}
    folders = {
        split: ImageFolder(found.tree.path(found.folders[split]), labelled, names) for split, labelled in found.found.items()
    }
    return folders, remarks_of(found)


def has_tree(tree, where):
    """Return whether there are training images in class folders somewhere in a tree."""
    return root_of_split(tree, where, "train") is not None


def remarks_of(found):
    """Return the remarks on an ImageTree, as lines for the user."""
    return found.remarks + [line for split, left_out in found.left_out.items() for line in left_out.lines(split)]


def open_tree(tree, where, beside, splits=SPLITS, classes=None):
    """Return the ImageTree of a tree, or None where it holds none.

    Args:
        tree: FolderTree or ArchiveTree.
        where: the folder or archive in words, for messages.
        beside: Path of a folder in which files with labels may lie, too; or None.
        splits: those that are needed. For 'val' alone `tree` may also be the class folders themselves.
        classes: those of the training images, where they lie elsewhere.
    Raises:
        DataError: there is more than one such tree in it, or it is not whole; says what is missing.
    """
    root = root_of_split(tree, where, splits[0])
    if root is None:
        if tuple(splits) == ("val",) and classes is None and not split_folders(tree, "", "train"):
            return _class_folders_themselves(tree, where)
        return None
    files = SideFiles(tree, root, beside)
    folders, found, left_out, remarks = {}, {}, {split: LeftOut() for split in splits}, []
    if "train" in splits:
        folders["train"] = split_folders(tree, root, "train")[0]
        found["train"] = finding.labelled_by_folder(tree, folders["train"], left_out["train"])
        refuse_empty_classes(found["train"], f"{where}: {text_of(folders['train'])}/", left_out["train"])
        classes = found["train"].classes
        files.require_classes(classes, where)
        files.require_training_images(found["train"], where)
    elif classes is None and (train := split_folders(tree, root, "train")):
        classes = [text_of(name) for name in finding.class_folders(tree, train[0])]
    if "val" in splits:
        folders["val"], found["val"] = _validation_images(tree, root, where, files, classes, left_out["val"])
        if PurePosixPath(folders["val"]).name != "val":
            remarks.append(f"note: the validation images are those in {text_of(folders['val'])}/")
    remarks += order_remarks(next(iter(found.values())).classes)
    return ImageTree(tree, where, folders, found, files.class_names(), left_out, remarks)


def _validation_images(tree, root, where, files, classes, left_out):
    """Return (path of the folder, Labelled) of the validation images; arguments as in open_tree."""
    candidates = split_folders(tree, root, "val")
    if not candidates:
        test = unlabelled_test(tree, root)
        raise DataError(
            f"no images in {text_of(join_path(root, 'val'))}/ of {where}: validation images are needed as well. "
            f"{f'{remark_on_test(test)}. ' if test else ''}{NO_VALIDATION_IMAGES}"
        )
    _refuse_ties(candidates, where)
    folder = candidates[0]
    found = _labelled_validation(tree, folder, files, where, left_out, classes)
    if classes:
        found = _with_classes(found, classes, folder, left_out)
    if not found.labels:
        reasons = "; ".join(left_out.lines("val"))
        raise DataError(f"{where} holds no validation images with a label of the training images' classes. {reasons}")
    return folder, found


def order_remarks(classes):
    """Return a line on the order of classes where it is not that of text."""
    if sorted(classes) == classes or not are_numbers(classes):
        return []
    return [f"note: the classes' names are numbers, in the order of numbers: {', '.join(classes[:2])}, ... {classes[-1]}"]


# Where the splits lie ------------------------------------------------------------------------------------------------


def split_folders(tree, root, split):
    """Return the paths of the split's folders right inside of `root`, of the first group of names with images in them."""
    for group in SPLIT_NAMES[split]:
        there = [path for name in group if (path := folder_at(tree, root, name))]
        if "test" in group and unlabelled_test(tree, root):
            continue
        if there := [path for path in there if finding.has_images(tree, path, in_folders_only=split == "train")]:
            return there
    return []


def unlabelled_test(tree, root):
    """Return the path of a folder test/ beside train/ whose images have no labels, as competitions give them, or None."""
    train, test = (folder_at(tree, root, name) for name in ("train", "test"))
    if train is None or test is None or not finding.has_images(tree, test):
        return None
    folders, files, _ = tree.entries(test)
    has_file = TINY_LABELS in files or any(name in tree.entries(root)[1] for name in (VAL_LABELS, DEVKIT))
    return None if has_file or set(folders) & set(tree.entries(train)[0]) else test


def remark_on_test(test):
    """Return a line on the folder of unlabelled_test."""
    return f"{text_of(test)}/ is no validation split: its images lie in no folder of a class"


def root_of_split(tree, where, split):
    """Return the path of the folder that holds the split's folder, the one that is least deep, or None."""
    level = [""]
    for _ in range(DEPTH + 1):
        roots = {path: folders for path in level if (folders := split_folders(tree, path, split))}
        _refuse_ties([folders[0] for folders in roots.values()], where)
        if roots:
            return next(iter(roots))
        level = [join_path(path, name) for path in level for name in tree.entries(path)[0]]
    return None


def _refuse_ties(paths, where):
    if len(paths) > 1:
        raise DataError(
            f"{where} holds more than one set of images ({some([text_of(path) for path in paths])}): name the folder of the "
            "one that is meant, or move the others away"
        )


def _class_folders_themselves(tree, where):
    """Return the ImageTree of a folder that holds the class folders of validation images, or None."""
    if not finding.has_images(tree, "", in_folders_only=True):
        return None
    left_out = LeftOut()
    found = finding.labelled_by_folder(tree, "", left_out)
    return ImageTree(tree, where, {"val": ""}, {"val": found}, {}, {"val": left_out}, order_remarks(found.classes))


def refuse_empty_classes(labelled, where, left_out):
    """Raise DataError unless there are classes and each has images; says what was left out that may have been one."""
    if not labelled.classes:
        raise DataError(f"{where} holds no class folders")
    if empty := sorted(set(range(len(labelled.classes))) - set(labelled.labels)):
        names = some([labelled.classes[label] for label in empty])
        why = "".join(f"\n{line}" for line in left_out.lines("train") if line.startswith("WARNING"))
        raise DataError(f"{where} has classes without images: {names}. Copy their images, or remove their folders{why}")


# Labels --------------------------------------------------------------------------------------------------------------


def _with_classes(labelled, classes, folder, left_out):
    """Return the Labelled with the labels counting in `classes`, grouped by class; images of others are left out, counted."""
    label_of = {name: label for label, name in enumerate(classes)}
    known = []
    for path, label in zip(labelled.paths, labelled.labels, strict=True):
        name = labelled.classes[label]
        if name in label_of:
            known.append((label_of[name], path))
        else:
            left_out.add(finding.UNKNOWN_CLASS, join_path(folder, path))
    known.sort(key=lambda image: image[0])
    return Labelled(list(classes), [path for _, path in known], [label for label, _ in known])


def _labelled_validation(tree, folder, files, where, left_out, classes_of_train):
    """Return the Labelled of the validation images: by their folders, or by a file with the labels where they lie flat."""
    annotations = tiny_labels(tree, folder)
    if annotations is None and finding.has_images(tree, folder, in_folders_only=True):
        labelled = finding.labelled_by_folder(tree, folder, left_out)
        require_all(files.kaggles_validation_labels(False), labelled.paths, f"{where}: validation images", VAL_LABELS)
        return labelled
    classes_of, source = annotations or files.validation_labels()
    if classes_of is None and not all(map(WNID.fullmatch, classes_of_train or ())):
        raise DataError(
            f"{text_of(folder)}/ in {where} is flat, and nothing says its labels: sort its images into folders of their "
            f"classes, {text_of(folder)}/<class>/, or move it away. {NO_VALIDATION_IMAGES}"
        )
    if classes_of is None:
        raise DataError(
            f"{text_of(folder)}/ in {where} is flat: its labels are in {VAL_LABELS} (Kaggle) or {DEVKIT} (official); put "
            "either beside it"
        )
    images = []
    for path in finding.images_below(tree, folder, left_out):
        wnid = classes_of.get(stem(path))
        if wnid is None:
            left_out.add(finding.NO_LABEL, path)
        else:
            images.append((wnid, path[len(folder) + 1 :]))
    require_all(classes_of, [path for _, path in images], f"{where}: validation images", source)
    classes = class_order({wnid for wnid, _ in images})
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    images.sort(key=lambda image: (label_of[image[0]], image[1]))
    return Labelled(classes, [path for _, path in images], [label_of[wnid] for wnid, _ in images])
