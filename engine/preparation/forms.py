"""ImageNet, and other sets of labelled images, in each published form, seen as one: named, labelled images per split.

Nothing is unpacked to disk, but a compressed tar. A name inside an archive becomes a name in the packed split and never a path.
"""

import contextlib
import itertools
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from engine.preparation import tables, trees
from engine.preparation.archives import (
    FileSlice,
    ParquetRow,
    Zipped,
    delete_uncompressed,
    opener_of_compressed,
    tar_listing,
    uncompressed,
    zip_listing,
)
from engine.preparation.finding import (
    NO_LABEL,
    OTHER_KIND,
    WNID,
    ArchiveTree,
    FolderTree,
    LeftOut,
    class_order,
    in_place_of_classes,
    is_image_name,
    is_junk,
    some,
    text_of,
)
from engine.preparation.trees import DEVKIT, SPLITS
from engine.system.errors import DataError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
MOST_CLASSES = 1_000_000  # by numbers as labels
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
OLD_TRAIN, OLD_VAL = tuple(f"train_images_{part}.tar.gz" for part in range(5)), "val_images.tar.gz"


class Entry(NamedTuple):
    """One image of a split."""

    name: str  # text: a file name, or a path below the class's folder
    label: int  # index into the source's classes
    place: FileSlice | Zipped | ParquetRow


@dataclass
class Source:
    """A data set as it was found."""

    kind: str  # in words
    classes: list  # text, in the order of the labels: sorted wnids, for ImageNet
    splits: dict  # {'train': [Entry], 'val': [Entry]}, sorted by label and name, parquet as it lies
    class_names: dict = field(default_factory=dict)  # {class: what people call it}, as far as known
    remarks: list = field(default_factory=list)  # lines for the user: what was left out, and what was chosen


class Options(NamedTuple):
    """What a source may need besides its path."""

    scratch: Path | None = None  # folder for uncompressed archives
    image_column: str | None = None  # of parquet files
    label_column: str | None = None
    log: Callable = print


class Form(NamedTuple):
    """One way in which data sets are published."""

    name: str
    lies_there: str  # for people
    labels: str  # where they come from, for people
    trains: bool  # whether train.py reads it without preparation
    is_there: Callable  # function of a Path
    open: Callable  # function of a Path and Options -> Source


def open_source(path, options=None):
    """Return the Source at `path`, a folder or an archive, whatever its form.

    Raises:
        DataError: nothing there, no known form, or a form that is not complete; says what is missing.
    """
    path, options = Path(path).absolute(), options or Options()  # not resolved: a link's own name tells the form
    with _in_words(path):
        source = _form_of(path, options).open(path, options)
    for split in SPLITS:
        if not source.splits[split]:
            raise DataError(f"the {source.kind} holds no {split} images with a label. {'; '.join(source.remarks)}")
    source.class_names = {name: source.class_names[name] for name in source.classes if name in source.class_names}
    return source


def _form_of(path, options):
    if not path.exists():
        raise DataError(f"no data set at {path}: there is no such file or folder")
    form = form_at(path)
    if form is None:
        raise DataError(f"{no_form(path)}\n{known_forms()}")
    for flag in ("image_column", "label_column"):
        if getattr(options, flag) is not None and form.open is not _open_parquet:
            raise DataError(f"--{flag.replace('_', '-')} is for parquet files; {path} holds {form.name}")
    return form


@contextlib.contextmanager
def _in_words(path):
    """Raise DataError in place of what the system says of a file at `path` or in it that cannot be read."""
    try:
        yield
    except OSError as error:
        file = os.fsdecode(error.filename) if error.filename is not None else str(path)
        raise DataError(f"{text_of(file)} cannot be read: {error.strerror or error}") from error


def form_at(path):
    """Return the Form of what lies at a path, or None where it is none that is known."""
    with _in_words(path):
        if path.is_dir():
            os.scandir(path).close()  # a folder that must not be read is named, not one of the files that could lie in it
        return next((form for form in FORMS if form.is_there(path)), None)


def no_form(path):
    """Return in words why a path is no data set of a known form, with a way out where there is one."""
    names = [entry.name for entry in [path, *(sorted(path.iterdir())[:1000] if path.is_dir() else [])]]
    for pattern, kind, way_out in FOREIGN:
        if found := next((name for name in names if re.fullmatch(pattern, name)), None):
            return f"{path} holds {kind} ({text_of(found)}), which is not read here. {way_out}"
    if path.is_file():
        return f"{path} is no archive of a known form."
    archives = [text_of(name) for name in names if name.endswith(ARCHIVES) and not is_junk(name)]
    if len(archives) > 1:
        return f"no images in train/<class>/ in {path}, but {len(archives)} archives ({some(archives, 3)}): name one."
    splits = {name for split in SPLITS for name in trees.all_names(split)}
    return f"no images in train/<class>/ in the folder {path}.{in_place_of_classes(FolderTree(path), splits)}"


def known_forms():
    """Return the list of the forms that are known, for messages."""
    return "\n".join(["prepare_data.py knows these forms of a data set:", *(f"  {form.lies_there}" for form in FORMS)])


# Trees ---------------------------------------------------------------------------------------------------------------


def _open_folder(path, options):
    return _of_tree(trees.open_tree(FolderTree(path), str(path), None), f"folder {text_of(path.name)}")


def _is_folder_of_images(path):
    return path.is_dir() and trees.has_tree(FolderTree(path), str(path))


def _has_both_splits(path):
    tree, where = FolderTree(path), str(path)
    root = trees.root_of_split(tree, where, "train")
    return root is not None and bool(trees.split_folders(tree, root, "val"))


def _archive_at(path):
    """Return the archive that `path` is, or the only one in the folder `path`, or None."""
    inside = [path]
    if path.is_dir():
        inside = [entry for entry in sorted(path.iterdir()) if entry.name.endswith(ARCHIVES) and not is_junk(entry.name)]
    if len(inside) != 1 or not inside[0].is_file():
        return None
    path = inside[0]
    if path.name in (TRAIN_TAR, VAL_TAR, DEVKIT):
        raise DataError(f"{path} is one of three files that belong together: name the folder that holds them")
    known = zipfile.is_zipfile(path) or opener_of_compressed(path) is not None or tarfile.is_tarfile(path)
    return path if known or path.name.endswith(ARCHIVES) else None


def _open_archive(path, options):
    path = _archive_at(path)
    delete_uncompressed(options.scratch, but=[path])
    if zipfile.is_zipfile(path):
        try:
            listing, kind = zip_listing(path), "zip file"
        except NotImplementedError as error:
            raise DataError(f"{path} cannot be read here ({error}): unpack it, and name the folder") from error
        except (zipfile.BadZipFile, ValueError) as error:
            raise DataError(f"{path} is damaged: {error}") from error
    elif path.name.endswith(".zip"):
        raise DataError(f"{path} is damaged or cut off: the list of its files, at its end, is missing; download it again")
    elif opener_of_compressed(path) is not None:
        listing, kind = tar_listing(uncompressed(path, options.scratch, options.log), what=str(path)), "tar file"
    else:
        listing, kind = tar_listing(path), "tar file"
    found = trees.open_tree(ArchiveTree(listing), str(path), path.parent)
    left_out = LeftOut()
    if found is None:
        left_out.add_refused(listing)
        why = [*left_out.lines("the archive"), "Unpack it, and name the folder."] if left_out.counts else []
        raise DataError("\n".join([f"no images in train/<class>/ in the {kind} {path}.", *why, known_forms()]))
    source = _of_tree(found, f"{kind} {text_of(path.name)}")
    left_out.add_refused(listing._replace(refused=[]))  # those that are inside of it belong to a split
    source.remarks += left_out.lines("the archive")
    return source


def _of_tree(found, kind):
    """Return the Source of an ImageTree."""
    splits = {}
    for split, labelled in found.found.items():
        splits[split] = []
        for path, label in zip(labelled.paths, labelled.labels, strict=True):
            text = text_of(path)
            entry = Entry(text.removeprefix(f"{labelled.classes[label]}/"), label, found.place(split, path))
            splits[split].append(entry)
    return Source(kind, found.found["train"].classes, splits, found.class_names, trees.remarks_of(found))


# The official tars ---------------------------------------------------------------------------------------------------


def _is_official(path):
    there = [(path / name).is_file() for name in (TRAIN_TAR, VAL_TAR, DEVKIT)] if path.is_dir() else []
    return any(there[:2]) and (all(there) or not _has_both_splits(path))  # else it is a tree with a tar left over


def _open_official(folder, options):
    missing = [name for name in (TRAIN_TAR, VAL_TAR, DEVKIT) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} holds a part of the official ImageNet; missing: {', '.join(missing)}")
    kit = trees.read_devkit(FileSlice(str(folder / DEVKIT), 0, (folder / DEVKIT).stat().st_size))
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
        wnid = kit.wnids_of_val.get(trees.stem(name))
        if wnid is None or not is_image_name(name):
            left_out["val"].add(NO_LABEL, name)
        else:
            val.append((wnid, name, place))
    trees.require_all(kit.wnids_of_val, [name for _, name, _ in val], f"{folder / VAL_TAR}: validation images", DEVKIT)
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


def _old_hub_folder(path):
    folders = (path, path / "data")
    return next((folder for folder in folders if any((folder / name).exists() for name in OLD_TRAIN)), None)


def _open_old_hub(path, options):
    folder = _old_hub_folder(path)
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
                wnid = trees.stem(name).rpartition("_")[2]  # n01440764_10026_n01440764.JPEG
                if is_image_name(name) and WNID.fullmatch(wnid):
                    images[split].append((wnid, name, place))
                else:
                    left_out[split].add(NO_LABEL, name)
    return _of_classes("archives of the Hugging Face Hub", images, {}, [], left_out)


# Rows ----------------------------------------------------------------------------------------------------------------


def _open_parquet(path, options):
    rows = tables.read_parquet(tables.parquet_files(path), options.image_column, options.label_column)
    return _of_rows("parquet files of Hugging Face", rows, keep_order=True)


def _open_arrow(path, options):
    return _of_rows("Arrow files of the datasets library", tables.read_arrow(tables.arrow_files(path)), keep_order=False)


def _open_shards(path, options):
    return _of_rows("WebDataset shards", tables.read_shards(tables.shard_files(path)), keep_order=False)


def _of_rows(kind, found, keep_order):
    """Return the Source of Rows; the classes become sorted wnids where those are known.

    Hugging Face's imagenet-1k calls its classes by English words; the wnids are in the names of the training images.
    """
    names, class_names, rows = found.names, found.class_names, found.rows
    if names is None:
        rows = _with_labels_alike(rows)
        seen = {label for _, label, _ in rows["train"] if label is not None}
        if all(isinstance(label, int) for label in seen):
            if max(seen, default=0) >= MOST_CLASSES:
                raise DataError(f"the labels go up to {max(seen)}: they number something else; classes are numbered from 0")
            names = [str(number) for number in range(max(seen, default=-1) + 1)]
        else:
            names = class_order(seen)
    label_of = {label: label for label in range(len(names))} | {name: label for label, name in enumerate(names)}
    wnids = {}
    for name, label, _ in rows["train"]:
        if label in label_of and (found_wnid := WNID.match(PurePosixPath(name).name)):
            wnids.setdefault(label_of[label], set()).add(found_wnid[0])
    classes = names
    if len(wnids) == len(names) and all(len(each) == 1 for each in wnids.values()) and not all(map(WNID.fullmatch, names)):
        wnid_of = {label: each.pop() for label, each in wnids.items()}
        classes = sorted(set(wnid_of.values()))
        if len(classes) == len(names):
            if not all(name.isdigit() for name in names):
                class_names = {wnid: names[label] for label, wnid in wnid_of.items()}
            label_of = {each: classes.index(wnid_of[label]) for each, label in label_of.items()}
        else:
            classes = names
    splits, left_out = {}, {split: LeftOut() for split in SPLITS}
    for split, of_split in rows.items():
        splits[split] = []
        for name, label, place in of_split:
            if label in label_of:
                splits[split].append(Entry(text_of(PurePosixPath(name).name), label_of[label], place))
            else:
                left_out[split].add(NO_LABEL, name)
        if not keep_order:
            splits[split].sort(key=lambda entry: (entry.label, entry.name))
    remarks = found.remarks + [line for split in SPLITS for line in left_out[split].lines(split)]
    return Source(kind, list(classes), splits, dict(class_names), remarks)


def _with_labels_alike(rows):
    """Return the rows of all splits with labels that are all int, or all text: a number is no index where others are names."""
    labels = {label for of_split in rows.values() for _, label, _ in of_split}
    if all(isinstance(label, (int, type(None))) for label in labels):
        return rows
    return {
        split: [(name, label if label is None else str(label), place) for name, label, place in of_split]
        for split, of_split in rows.items()
    }


# What is known -------------------------------------------------------------------------------------------------------

FORMS = (
    Form(
        "the official tar files",
        f"a folder with {TRAIN_TAR}, {VAL_TAR} and {DEVKIT}",
        "the names of the inner tars; the kit's ground truth",
        False,
        _is_official,
        _open_official,
    ),
    Form(
        "archives of the Hugging Face Hub",
        "a folder with the Hub's old train_images_0.tar.gz, ... and val_images.tar.gz",
        "the wnid at the end of each name",
        False,
        lambda path: _old_hub_folder(path) is not None,
        _open_old_hub,
    ),
    Form(
        "parquet files of Hugging Face",
        "a folder with train-*.parquet or train/*.parquet, and the same for validation, valid, val or test",
        "the column of class labels; --image-column and --label-column name others",
        False,
        lambda path: path.is_dir() and tables.parquet_files(path) is not None,
        _open_parquet,
    ),
    Form(
        "Arrow files",
        "a folder saved by the datasets library, or train.arrow and val.arrow as prepare_data.py writes them",
        "the column of class labels",
        False,
        lambda path: path.is_dir() and tables.arrow_files(path) is not None,
        _open_arrow,
    ),
    Form(
        "WebDataset shards",
        "a folder with WebDataset's shards: train-*.tar and val-*.tar, or imagenet1k-train-*.tar and so on",
        "KEY.cls, or 'label' in KEY.json; wnids where the images' names begin with them",
        False,
        lambda path: path.is_dir() and tables.shard_files(path) is not None,
        _open_shards,
    ),
    Form(
        "a tree of folders",
        "a folder with train/<class>/<image> and val/<class>/<image>; validation/, valid/ or test/<class>/ do for val/, and "
        "links may lead anywhere: ImageNet sorted into folders, ImageNet-100, Imagenette, Imagewoof, tiny-imagenet-200, "
        f"Kaggle's ILSVRC/Data/CLS-LOC with its flat val and LOC_val_solution.csv or {DEVKIT}",
        "the folders' names; val_annotations.txt, LOC_val_solution.csv or the kit where val is flat",
        True,
        _is_folder_of_images,
        _open_folder,
    ),
    Form(
        "an archive of such a tree",
        "an archive of such a tree, .zip, .tar or .tar.gz (.tgz, .tar.bz2, .tar.xz): Kaggle's "
        "imagenet-object-localization-challenge.zip and imagenet_object_localization_patched2019.tar.gz, imagenette2.tgz, "
        "tiny-imagenet-200.zip",
        "as in the tree",
        False,
        lambda path: _archive_at(path) is not None,
        _open_archive,
    ),
)

# Not read: pattern of a file's name, what it is, and how to get images out of it
FOREIGN = (
    (
        r".*\.tfrecords?|.*tfrecord.*-of-\d+|(train|validation)-\d{5}-of-\d{5}",
        "TFRecord files",
        "Write the images out with tensorflow_datasets: for example in ds.as_numpy_iterator(): save example['image'] to "
        "train/<label>/<number>.png",
    ),
    (
        r".*\.mds(\.zstd)?",
        "MosaicML's MDS shards",
        "Write the images out with streaming: for number, sample in enumerate(streaming.StreamingDataset(local=FOLDER)): "
        "sample['x'].save(f\"train/{sample['y']}/{number}.png\")",
    ),
    (
        r".*\.beton",
        "FFCV's .beton file",
        "Write the images out with ffcv: for images, labels in ffcv.loader.Loader(FILE, ...): save each to "
        "train/<label>/<number>.png; or prepare the images that it was made of",
    ),
    (
        r".*\.rec|.*\.idx",
        "MXNet's RecordIO file",
        "Write the images out with mxnet: header, image = mxnet.recordio.unpack(MXIndexedRecordIO(IDX, REC, 'r').read_idx(n)); "
        "write image to train/<int(header.label)>/<n>.jpg",
    ),
    (
        r"data\.mdb|lock\.mdb|.*\.lmdb",
        "an LMDB database",
        "Write the images out with lmdb: for key, value in lmdb.open(FOLDER).begin().cursor(): write the image in value to "
        "train/<class>/<key>.jpg",
    ),
    (
        r"(train|val)_data(_batch_\d+)?(\.pkl)?|.*_batch(_\d+)?\.(pkl|pickle)|data_batch_\d+",
        "pickled arrays, such as ImageNet of 64 x 64 px",
        "Write the images out: batch = pickle.load(open(FILE, 'rb')); PIL.Image.fromarray(batch['data'][n].reshape(3, 64, "
        "64).transpose(1, 2, 0)).save(f\"train/{batch['labels'][n]}/{n}.png\")",
    ),
    (
        r".*\.(h5|hdf5|npz|npy)",
        "arrays in HDF5 or NumPy files",
        "Write the images out: PIL.Image.fromarray(array[n]).save(f'train/{label[n]}/{n}.png')",
    ),
)
