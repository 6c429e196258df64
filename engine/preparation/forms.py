"""The published forms of ImageNet and of other sets of labelled images: which are known, each opened as one Source.

Nothing is unpacked to disk, but a compressed tar. A name inside an archive becomes a name in the packed split and never a path.
"""

import contextlib
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from engine.preparation import tables, trees
from engine.preparation.archives import delete_uncompressed, opener_of_compressed, tar_listing, uncompressed, zip_listing
from engine.preparation.finding import ArchiveTree, FolderTree, LeftOut, in_place_of_classes
from engine.preparation.imagenet_tars import TRAIN_TAR, VAL_TAR, is_official, old_hub_folder, open_official, open_old_hub
from engine.preparation.label_files import DEVKIT
from engine.preparation.names import is_junk, some, text_of
from engine.preparation.rows import open_arrow, open_parquet, open_shards
from engine.preparation.source import Entry, Options, Source
from engine.preparation.trees import SPLITS
from engine.system.errors import DataError

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")


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
        if getattr(options, flag) is not None and form.open is not open_parquet:
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


# What is known -------------------------------------------------------------------------------------------------------

FORMS = (
    Form(
        "the official tar files",
        f"a folder with {TRAIN_TAR}, {VAL_TAR} and {DEVKIT}",
        "the names of the inner tars; the kit's ground truth",
        False,
        is_official,
        open_official,
    ),
    Form(
        "archives of the Hugging Face Hub",
        "a folder with the Hub's old train_images_0.tar.gz, ... and val_images.tar.gz",
        "the wnid at the end of each name",
        False,
        lambda path: old_hub_folder(path) is not None,
        open_old_hub,
    ),
    Form(
        "parquet files of Hugging Face",
        "a folder with train-*.parquet or train/*.parquet, and the same for validation, valid, val or test",
        "the column of class labels; --image-column and --label-column name others",
        False,
        lambda path: path.is_dir() and tables.parquet_files(path) is not None,
        open_parquet,
    ),
    Form(
        "Arrow files",
        "a folder saved by the datasets library, or train.arrow and val.arrow as prepare_data.py writes them",
        "the column of class labels",
        False,
        lambda path: path.is_dir() and tables.arrow_files(path) is not None,
        open_arrow,
    ),
    Form(
        "WebDataset shards",
        "a folder with WebDataset's shards: train-*.tar and val-*.tar, or imagenet1k-train-*.tar and so on",
        "KEY.cls, or 'label' in KEY.json; wnids where the images' names begin with them",
        False,
        lambda path: path.is_dir() and tables.shard_files(path) is not None,
        open_shards,
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
