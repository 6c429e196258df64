"""The one way in which every program here finds the images of a tree: the same images, labels and order everywhere.

A tree is a folder on disk or the members of an archive. A split of it holds `<class>/**/<image>`; classes, folders and files
come in the order of torchvision's ImageFolder, which also goes down into the folders of a class and follows symbolic links.
Two things differ from torchvision, and are printed: names that are numbers are sorted as numbers, and what is hidden, made
by the system or no regular file is no image.
"""

import os
from typing import NamedTuple

import numpy as np

from engine.preparation.archives import FileSlice
from engine.preparation.names import IMAGE_SUFFIXES, class_order, is_image_name, is_junk, path_bytes, some, text_of
from engine.system.errors import DataError

# Why something in a split is not taken as an image of it
JUNK = "hidden or made by the system"
OTHER_KIND = "not named as images"
OUTSIDE = "not in a class folder"
NOT_REGULAR = "no regular file"
DANGLING = "a symbolic link that leads nowhere"
LOOP = "a symbolic link to a folder around it"
FOLDER = "a folder that is named as an image"
UNKNOWN_CLASS = "of a class without training images"
NO_LABEL = "no label for it"
HOSTILE = "a path out of the archive"
EXAMPLES = 3  # names shown for each reason


# What is left out ----------------------------------------------------------------------------------------------------


class LeftOut:
    """Counts what is not taken, by reason, with a few names of each."""

    def __init__(self):
        self.counts, self.examples = {}, {}

    def add(self, reason, name):
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.examples.setdefault(reason, [])) < EXAMPLES:
            self.examples[reason].append(text_of(name))

    def add_refused(self, listing, where=""):
        """Count what a Listing of an archive does not take; `where` comes before each name."""
        for path, reason in listing.refused:
            self.add(reason, where + path)
        for path in listing.hostile:
            self.add(HOSTILE, where + path)

    def lines(self, split):
        """Return a line for each reason; what may have been meant as an image is a warning."""
        harmless = (JUNK, OTHER_KIND)
        return [
            f"{'note' if reason in harmless else 'WARNING'}: left out of {split}: {reason}: {count:,} "
            f"({', '.join(self.examples[reason])}{', ...' if count > EXAMPLES else ''})"
            for reason, count in self.counts.items()
        ]


# Trees ---------------------------------------------------------------------------------------------------------------


class FolderTree:
    """A folder on disk as a tree; paths in it are relative, with slashes, '' is the folder itself."""

    def __init__(self, root):
        self.root = os.fsencode(root)

    def path(self, path):
        """Return the path on disk, bytes."""
        return os.path.join(self.root, path_bytes(path)) if path else self.root

    def entries(self, path):
        """Return (folders, files, [(reason, name)] of the rest) right inside of a folder, names in order."""
        folders, files, rest = [], [], []
        try:
            with os.scandir(self.path(path)) as scan:
                inside = [(entry.name.decode("utf-8", "surrogateescape"), entry) for entry in scan]
            around = self._around(path) if any(entry.is_dir() for _, entry in inside) else ()
            for name, entry in inside:
                if is_junk(name):
                    rest.append((JUNK, name))
                elif entry.is_dir():
                    if _identity(os.stat(entry.path)) in around:
                        rest.append((LOOP, name))
                    else:
                        folders.append(name)
                elif entry.is_file():
                    files.append(name)
                else:
                    rest.append((DANGLING if entry.is_symlink() and not os.path.exists(entry.path) else NOT_REGULAR, name))
        except OSError as error:
            raise DataError(f"{text_of(os.fsdecode(self.path(path)))} cannot be read: {error.strerror}") from error
        return sorted(folders), sorted(files), sorted(rest)

    def _around(self, path):
        """Return what tells the folder and those that it was reached through from any others."""
        parts = path.split("/") if path else []
        return {_identity(os.stat(self.path("/".join(parts[:count])))) for count in range(len(parts) + 1)}

    def place(self, path):
        """Return the FileSlice of a file."""
        return FileSlice(self.path(path), 0, os.stat(self.path(path)).st_size)


def _identity(status):
    return status.st_dev, status.st_ino


class ArchiveTree:
    """The members of an archive as a tree.

    Args:
        listing: Listing of engine/preparation/archives.py.
    """

    def __init__(self, listing):
        self._files = listing.files
        self._inside = {"": (set(), set(), [])}
        for path in listing.folders:
            self._folder(path)
        for path in listing.files:
            self._enter(path, kind=1)
        for path, reason in listing.refused:
            folder, _, name = path.rpartition("/")
            self._folder(folder)[2].append((reason, name))

    def _folder(self, path):
        if path not in self._inside:
            self._inside[path] = (set(), set(), [])
            self._enter(path, kind=0)
        return self._inside[path]

    def _enter(self, path, kind):
        """Enter a folder (kind 0) or a file (1) in the folder around it; junk among the rest."""
        around, _, name = path.rpartition("/")
        inside = self._folder(around)
        if is_junk(name):
            inside[2].append((JUNK, name))
        else:
            inside[kind].add(name)

    def entries(self, path):
        """Return (folders, files, [(reason, name)] of the rest) right inside of a folder, names in order."""
        folders, files, rest = self._inside[path]
        return sorted(folders), sorted(files), sorted(rest)

    def place(self, path):
        """Return where a file's bytes lie."""
        return self._files[path]


def join_path(folder, name):
    """Return the path of something inside of a folder of a tree."""
    return f"{folder}/{name}" if folder else name


def folder_at(tree, path, name):
    """Return the path of the folder of this name right inside of `path`, or None."""
    return join_path(path, name) if name in tree.entries(path)[0] else None


def files_below(tree, path, left_out):
    """Return [(folder, [its files])] of the folder `path` and all below it, in the order of the folders' paths.

    Args:
        left_out: LeftOut that counts what is neither a file nor a folder to go into.
    """
    found, waiting = [], [path]
    while waiting:
        folder = waiting.pop()
        folders, files, rest = tree.entries(folder)
        for reason, name in rest:
            left_out.add(reason, join_path(folder, name))
        for name in filter(is_image_name, folders):
            left_out.add(FOLDER, join_path(folder, name))
        waiting += [join_path(folder, name) for name in folders]
        found.append((folder, files))
    return sorted(found)


def images_below(tree, path, left_out):
    """Return the paths of the images in the folder `path` and all below it, in order; other files are counted in left_out."""
    images = []
    for folder, files in files_below(tree, path, left_out):
        for name in files:
            if is_image_name(name):
                images.append(join_path(folder, name))
            else:
                left_out.add(OTHER_KIND, join_path(folder, name))
    return images


def has_images(tree, path, in_folders_only=False):
    """Return whether there is an image in the folder `path` or below it, or in a folder below it."""
    folders, files, _ = tree.entries(path)
    if not in_folders_only and any(map(is_image_name, files)):
        return True
    return any(has_images(tree, join_path(path, name)) for name in folders)


def in_place_of_classes(tree, splits):
    """Return in words which images lie outside of class folders, or else what is not named as an image; '' where nothing is.

    Args:
        splits: names of folders that hold class folders.
    """
    left_out = LeftOut()
    images = images_below(tree, "", left_out)
    if outside := [path for path in images if "/" not in path or path.count("/") == 1 and path.split("/")[0] in splits]:
        names = some([text_of(path) for path in outside], EXAMPLES)
        return f" {len(outside):,} {'image' if len(outside) == 1 else 'images'} outside of class folders ({names})."
    if images or not (count := left_out.counts.get(OTHER_KIND, 0)):
        return ""
    what = f"{count:,} files are not named as images" if count > 1 else "1 file is not named as an image"
    return f" {what} ({', '.join(left_out.examples[OTHER_KIND])}): these end in {', '.join(IMAGE_SUFFIXES)}."


class Labelled(NamedTuple):
    """The images of a split and their labels."""

    classes: list  # text, in the order of the labels
    paths: list  # of names, below the split's folder
    labels: list  # int, each an index into classes


def class_folders(tree, path):
    """Return the names of the class folders in the folder `path`, in the order of their labels."""
    return class_order(tree.entries(path)[0])


def labelled_by_folder(tree, path, left_out):
    """Return the Labelled of `<class>/**/<image>` in the folder `path`, grouped by class, as torchvision's ImageFolder."""
    _, files, rest = tree.entries(path)
    for name in files:
        left_out.add(OUTSIDE if is_image_name(name) else OTHER_KIND, join_path(path, name))
    for reason, name in rest:
        left_out.add(reason, join_path(path, name))
    classes, paths, labels = class_folders(tree, path), [], []
    for label, name in enumerate(classes):
        images = images_below(tree, join_path(path, name), left_out)
        paths += [image[len(path) + 1 :] if path else image for image in images]
        labels += [label] * len(images)
    return Labelled([text_of(name) for name in classes], paths, labels)


# A split on disk -----------------------------------------------------------------------------------------------------


class ImageFolder:
    """The images of one split below a folder on disk.

    The paths lie in one byte array: a list of 1.28 million str would grow every worker's memory, page by page, as its
    reference counts are touched (pytorch issue 13246).

    Args:
        folder: str, bytes or Path.
        found: Labelled; default: `<class>/**/<image>` in the folder.
    Attributes:
        classes: list of str, in the order of the labels.
        class_names: {class: what people call it}, as far as known.
        labels: int64 [N].
    """

    def __init__(self, folder, found=None, class_names=None):
        self.folder = os.fsencode(folder)
        found = found or labelled_by_folder(FolderTree(folder), "", LeftOut())
        self.classes, self.class_names = found.classes, class_names or {}
        self.labels = np.array(found.labels, dtype=np.int64)
        paths = [path_bytes(path) for path in found.paths]
        self._paths = np.frombuffer(b"".join(paths), dtype=np.uint8)
        self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)

    def __len__(self):
        return len(self.labels)

    def _path(self, index):
        start = self._ends[index - 1] if index else 0
        return self._paths[start : self._ends[index]].tobytes()

    def name(self, index):
        """Return the image's path below the split's folder as text: `class/file` where there are class folders."""
        return text_of(self._path(index).decode("utf-8", "surrogateescape"))

    def file_names(self):
        """Return every image's file name in the order of the images."""
        return [self.name(index).rpartition("/")[2] for index in range(len(self))]

    def read(self, index):
        """Return the bytes of the image's file."""
        with open(os.path.join(self.folder, self._path(index)), "rb") as file:
            return file.read()

    def location(self, index):
        """Return (path, start, length) of the image's bytes; length 0 is all of the file."""
        return os.path.join(self.folder, self._path(index)), 0, 0

    def relabel(self, classes):
        """Let the labels count in another list of classes, which has all of them; the images are grouped in its order."""
        self.labels, order = relabelled(self, classes)
        self.classes = classes
        if order is not None:
            paths = [self._path(index) for index in order]
            self._paths = np.frombuffer(b"".join(paths), dtype=np.uint8)
            self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)


def relabelled(split, classes):
    """Return (labels that count in `classes`, order of the images in which they are grouped by class, or None).

    Images that lie in no order of classes stay where they are; so do those that are grouped already.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of.get(name, -1) for name in split.classes], dtype=np.int64)[split.labels]
    assert labels.min(initial=0) >= 0
    grouped_before, grouped_now = (bool((np.diff(each) >= 0).all()) for each in (split.labels, labels))
    if grouped_now or not grouped_before:
        return labels, None
    order = np.argsort(labels, kind="stable")
    return labels[order], order
