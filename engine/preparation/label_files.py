"""The files that come with a data set and say its labels, its classes or all of its images.

Kaggle's lists, those of tiny-imagenet-200, and the official development kit.
"""

import csv
import gzip
import io
import os
import tarfile
import zlib
from pathlib import PurePosixPath
from typing import NamedTuple

from engine.preparation.archives import FileSlice
from engine.preparation.finding import folder_at, join_path
from engine.preparation.names import some, text_of
from engine.system.errors import DataError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_LABELS, TRAIN_BOXES, SYNSETS = "LOC_val_solution.csv", "LOC_train_solution.csv", "LOC_synset_mapping.txt"  # Kaggle's
TINY_LABELS, TINY_CLASSES, TINY_WORDS = "val_annotations.txt", "wnids.txt", "words.txt"  # of tiny-imagenet-200
KAGGLES_LISTS = "ImageSets/CLS-LOC"  # beside Data/CLS-LOC: every image, by name


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


class SideFiles:
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
