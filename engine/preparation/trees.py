"""Trees of images, on disk or in an archive: where their splits lie, what their labels are, and whether they are whole.

An ImageFolder (train/<class>/*, val/<class>/*), Kaggle's ILSVRC/Data/CLS-LOC with its flat val, tiny-imagenet-200. Training
reads those on disk as they lie; preparation reads the same ones, and those in archives.
"""

import csv
import gzip
import io
import os
import tarfile
import zlib
from pathlib import PurePosixPath
from typing import NamedTuple

from engine.preparation import finding
from engine.preparation.archives import FileSlice
from engine.preparation.finding import FolderTree, ImageFolder, Labelled, LeftOut, folder_at, join_path, some, text_of
from engine.system.errors import DataError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_LABELS, TRAIN_BOXES, SYNSETS = "LOC_val_solution.csv", "LOC_train_solution.csv", "LOC_synset_mapping.txt"  # Kaggle's
TINY_LABELS, TINY_CLASSES, TINY_WORDS = "val_annotations.txt", "wnids.txt", "words.txt"  # of tiny-imagenet-200
KAGGLES_LISTS = "ImageSets/CLS-LOC"  # beside Data/CLS-LOC: every image, by name
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
    files = _SideFiles(tree, root, beside)
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
    if sorted(classes) == classes or not finding.are_numbers(classes):
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
    if classes_of is None and not all(map(finding.WNID.fullmatch, classes_of_train or ())):
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
    classes = finding.class_order({wnid for wnid, _ in images})
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    images.sort(key=lambda image: (label_of[image[0]], image[1]))
    return Labelled(classes, [path for _, path in images], [label_of[wnid] for wnid, _ in images])


def stem(path):
    """Return a path's file name up to the first dot."""
    return path.rpartition("/")[2].split(".")[0]


def require_all(promised, paths, what, source):
    """Raise DataError unless there is a path for each stem of a file name that `source` promises."""
    if promised and (missing := sorted(set(promised) - {stem(path) for path in paths})):
        raise DataError(
            f"{what}: {len(missing):,} of the {len(promised):,} that {source} lists are missing ({some(missing, 3)}): copy or "
            f"unpack them again; if they are missing on purpose, take them out of {source}"
        )


def tiny_labels(tree, folder):
    """Return ({stem of a validation image: wnid}, the file's name) of tiny-imagenet-200, or None where it is not that."""
    if TINY_LABELS not in tree.entries(folder)[1]:
        return None
    found = {}
    lines = _text_at(tree.place(join_path(folder, TINY_LABELS)), TINY_LABELS).splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name, wnid, *_ = (*line.split("\t"), "")
            if not wnid:
                raise DataError(f"{TINY_LABELS}, line {number}: an image, a tab and its class are expected, not {line[:80]!r}")
            found[stem(name)] = wnid
    return found, TINY_LABELS


def _text_at(place, name):
    """Return the text at a place of engine/preparation/archives.py; raise DataError where it is none in UTF-8."""
    where = f"{name} ({text_of(os.fsdecode(place.file))})"
    try:
        text = place.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except (OSError, zlib.error) as error:
        raise DataError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if "\0" in text:  # as in UTF-16
        raise DataError(f"{where} is no text in UTF-8: save it as that")
    return text


class _SideFiles:
    """The text files that come with a data set: around its root in the tree, or beside its archive."""

    def __init__(self, tree, root, beside):
        self._tree, self._beside = tree, beside
        parts = root.split("/") if root else []
        self._folders = ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]
        self._is_kaggles = root.endswith("CLS-LOC")

    def _place(self, name, beside=False):
        folder, _, file = name.rpartition("/")
        for around in self._folders:
            at = around
            for part in filter(None, folder.split("/")):
                at = folder_at(self._tree, at, part) if at is not None else None
            if at is not None and file in self._tree.entries(at)[1]:
                return self._tree.place(join_path(at, file))
        if beside and self._beside is not None and (path := self._beside / name).is_file():
            return FileSlice(str(path), 0, path.stat().st_size)
        return None

    def _text(self, name, beside=False):
        place = self._place(name, beside)
        return _text_at(place, name) if place is not None else ""

    def class_names(self):
        """Return {wnid: what people call it}."""
        if text := self._text(SYNSETS, self._is_kaggles):
            pairs = [line.split(maxsplit=1) for line in text.splitlines()]
            return dict(pair for pair in pairs if len(pair) == 2)
        if text := self._text(TINY_WORDS):
            return dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
        if (place := self._place(DEVKIT)) is not None:
            return read_devkit(place).class_names
        return {}

    def kaggles_validation_labels(self, beside):
        """Return {stem of a validation image: wnid} as Kaggle's file says."""
        return dict(self._kaggles_rows(VAL_LABELS, beside))

    def _kaggles_rows(self, name, beside):
        """Yield (stem of an image, its wnid) of one of Kaggle's two lists of them."""
        rows = csv.DictReader(io.StringIO(self._text(name, beside)))
        try:
            for row in rows:
                image, prediction = (row.get(column) or "" for column in ("ImageId", "PredictionString"))
                if not image or not prediction.split():
                    raise csv.Error("an image and its class are expected, under the header ImageId,PredictionString")
                yield image, prediction.split()[0]
        except csv.Error as error:
            raise DataError(f"{name}, line {rows.line_num}: {error}") from error

    def validation_labels(self):
        """Return ({stem of a validation image: wnid}, the file that says so), or (None, None)."""
        if labels := self.kaggles_validation_labels(beside=True):
            return labels, VAL_LABELS
        if (place := self._place(DEVKIT, beside=True)) is not None:
            return read_devkit(place).wnids_of_val, DEVKIT
        return None, None

    def require_classes(self, classes, where):
        """Raise DataError unless all classes that the data set's own lists name are there."""
        for name in (SYNSETS, TINY_CLASSES):
            promised = [line.split()[0] for line in self._text(name, self._is_kaggles).splitlines() if line.strip()]
            if missing := sorted(set(promised) - set(classes)):
                raise DataError(
                    f"{where}: {len(missing):,} of the {len(promised):,} classes that {name} lists have no training images "
                    f"({some(missing, 3)}): copy or unpack them again"
                )

    def require_training_images(self, labelled, where):
        """Raise DataError unless all training images that Kaggle's lists name are there."""
        list_of_all = f"{KAGGLES_LISTS}/train_cls.txt"
        images = {line.split()[0].rpartition("/")[2] for line in self._text(list_of_all).splitlines() if line.strip()}
        with_boxes = {image for image, _ in self._kaggles_rows(TRAIN_BOXES, self._is_kaggles)}
        for promised, source in ((images, list_of_all), (with_boxes, TRAIN_BOXES)):
            require_all(promised, labelled.paths, f"{where}: training images", source)


# The official development kit ----------------------------------------------------------------------------------------


class Devkit(NamedTuple):
    """What ILSVRC2012_devkit_t12.tar.gz says."""

    class_names: dict  # {wnid: what people call it}, of classes and of groups of them
    classes: set  # wnids of those that have images
    train_images: dict  # {wnid: how many there are}, as far as stated
    wnids_of_val: dict  # {stem of a validation image: wnid}


def read_devkit(place):
    """Return the Devkit at a place of engine/preparation/archives.py."""
    try:
        import scipy.io
    except ImportError:
        raise DataError(
            f"the class numbers of {DEVKIT} are a MATLAB file, and scipy is not installed: pip install scipy"
        ) from None
    try:
        content = gzip.decompress(place.read())  # all of it, and so its checksum, which tarfile would not come to
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as kit:
            members = {PurePosixPath(member.name).name: member for member in kit if member.isreg()}
            synsets = scipy.io.loadmat(io.BytesIO(kit.extractfile(members["meta.mat"]).read()), squeeze_me=True)["synsets"]
            numbers = kit.extractfile(members["ILSVRC2012_validation_ground_truth.txt"]).read().split()
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        class_names = {str(synset["WNID"]): str(synset["words"]) for synset in synsets}
        leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
        counts = {}
        if "num_train_images" in synsets.dtype.names:
            counts = {str(synset["WNID"]): int(synset["num_train_images"]) for synset in leaves}
        val = {f"ILSVRC2012_val_{row:08d}": wnids[int(number)] for row, number in enumerate(numbers, start=1)}
    except Exception as error:  # a damaged kit fails in as many ways as there are readers: gzip, tar, MATLAB
        raise DataError(f"{place.file} is damaged or another kit ({type(error).__name__}: {error})") from error
    return Devkit(class_names, {str(synset["WNID"]) for synset in leaves}, counts, val)
