"""ImageNet in each of its published forms, seen as one: a list of named, labelled images per split, read where they lie.

Nothing is unpacked to disk. A name inside an archive becomes a file name in the packed split and never a path.
"""

import csv
import io
import json
import os
import re
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from engine.data import IMAGE_SUFFIXES
from engine.errors import DataError
from engine.packed import PackedSplit
from engine.places import ParquetRow, Stored, Zipped, folder_listing, tar_listing, zip_listing

TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
VAL_LABELS, SYNSETS = "LOC_val_solution.csv", "LOC_synset_mapping.txt"  # Kaggle's
WNID = re.compile(r"n\d{8}")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation")}
KNOWN_FORMS = f"""prepare_data.py knows these forms of a data set:
  a folder with {TRAIN_TAR}, {VAL_TAR} and {DEVKIT}
  Kaggle's imagenet-object-localization-challenge.zip, or its tree unpacked, ILSVRC/Data/CLS-LOC with LOC_*
  a folder with Hugging Face's train-*.parquet and validation-*.parquet
  a folder saved by the datasets library, or train.arrow and val.arrow as prepare_data.py writes them
  a folder with train/<class>/<image> and val/<class>/<image>"""


class Entry(NamedTuple):
    """One image of a split."""

    name: str  # a file name, no path
    label: int  # index into the source's classes
    place: Stored | Zipped | ParquetRow


@dataclass
class Source:
    """A data set as it was found."""

    kind: str  # in words
    classes: list  # sorted wnids, for ImageNet
    splits: dict  # {'train': [Entry], 'val': [Entry]}, sorted by label and name, parquet as it lies
    class_names: dict = field(default_factory=dict)  # {class: what people call it}, as far as known
    refused: list = field(default_factory=list)  # what was passed over, with the reason


def open_source(path):
    """Return the Source at `path`, a folder or an archive, whatever its form.

    Raises:
        DataError: nothing there, no known form, or a form that is not complete; says what is missing.
    """
    path = Path(path).resolve()
    if not path.exists():
        raise DataError(f"no data set at {path}: there is no such file or folder")
    if path.is_file():
        return _open_archive(path)
    if any((path / name).exists() for name in (TRAIN_TAR, VAL_TAR)):
        return _official(path)
    for folder in (path, path / "data"):
        if any(folder.glob("train-*.parquet")):
            return _parquet(folder)
    if files := _arrow_files(path):
        return _arrow(files)
    zips = sorted(path.glob("*.zip"))
    if len(zips) == 1 and not any((path / name).is_dir() for name in ("train", "ILSVRC")):
        return _open_archive(zips[0])
    return _tree(folder_listing(path), f"folder {path.name}")


def _open_archive(path):
    try:
        if zipfile.is_zipfile(path):
            return _tree(zip_listing(path), f"zip file {path.name}")
        if path.name in (TRAIN_TAR, VAL_TAR, DEVKIT):
            raise DataError(f"{path} is one of three files that belong together: name the folder that holds them")
        if tarfile.is_tarfile(path):
            return _tree(tar_listing(path), f"tar file {path.name}")
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    raise DataError(f"{path} is no archive of a known form.\n{KNOWN_FORMS}")


# Forms ---------------------------------------------------------------------------------------------------------------


def _official(folder):
    missing = [name for name in (TRAIN_TAR, VAL_TAR, DEVKIT) if not (folder / name).exists()]
    if missing:
        raise DataError(f"{folder} holds a part of the official ImageNet; missing: {', '.join(missing)}")
    class_names, wnids_of_val = _devkit(Stored(str(folder / DEVKIT), 0, (folder / DEVKIT).stat().st_size))
    outer, refused = tar_listing(folder / TRAIN_TAR)
    train = []
    for name, place in outer.items():
        wnid = PurePosixPath(name).stem
        if not WNID.fullmatch(wnid) or not name.endswith(".tar"):
            refused.append(f"{name}: not the tar of a class")
            continue
        inner = tar_listing(folder / TRAIN_TAR, place.start, place.length)
        refused += [f"{name}: {problem}" for problem in inner.refused]
        train += [(wnid, member, at) for member, at in inner.files.items()]
    val_files, val_refused = tar_listing(folder / VAL_TAR)
    val = [(wnids_of_val.get(_stem(name)), name, place) for name, place in val_files.items()]
    return _source("official tar files", train, val, class_names, refused + val_refused)


def _devkit(place):
    """Return ({wnid: name}, {stem of a validation image: wnid}) from the official development kit."""
    try:
        import scipy.io
    except ImportError:
        raise DataError(
            f"the class numbers of {DEVKIT} are a MATLAB file, and scipy is not installed: pip install scipy"
        ) from None
    try:
        with tarfile.open(fileobj=io.BytesIO(place.read())) as kit:
            members = {PurePosixPath(member.name).name: member for member in kit if member.isreg()}
            synsets = scipy.io.loadmat(io.BytesIO(kit.extractfile(members["meta.mat"]).read()), squeeze_me=True)["synsets"]
            numbers = kit.extractfile(members["ILSVRC2012_validation_ground_truth.txt"]).read().split()
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        class_names = {str(synset["WNID"]): str(synset["words"]) for synset in synsets}
        val = {f"ILSVRC2012_val_{row:08d}": wnids[int(number)] for row, number in enumerate(numbers, start=1)}
    except (tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise DataError(f"{place.file} is damaged or another kit ({type(error).__name__}: {error})") from error
    return class_names, val


def _tree(listing, kind):
    """Return the Source of a tree of files: an ImageFolder, or Kaggle's ILSVRC/Data/CLS-LOC with its flat val."""
    files, refused = listing.files, list(listing.refused)
    images = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
    prefixes = {path[: match.start(1)] for path in images if (match := re.search(r"(?:^|/)(train/)[^/]+/", path))}
    if not prefixes:
        hint = f"\nPassed over: {'; '.join(refused[:5])}" if refused else ""
        raise DataError(f"no images in train/<class>/ in the {kind}.{hint}\n{KNOWN_FORMS}")
    prefix = min(prefixes, key=len)
    by_name = {PurePosixPath(path).name: path for path in files}

    def inside(split):
        for name in SPLIT_NAMES[split]:
            found = [(path, path[len(prefix + name) + 1 :]) for path in images if path.startswith(f"{prefix}{name}/")]
            if found:
                return found
        raise DataError(f"no images in {prefix}val/ in the {kind}: validation images are needed as well")

    train = []
    for path, below in inside("train"):
        if "/" in below:
            train.append((below.split("/")[0], path, files[path]))
        else:
            refused.append(f"{path}: not in a class folder")
    found, labels, class_names = inside("val"), {}, {}
    if SYNSETS in by_name:
        lines = files[by_name[SYNSETS]].read().decode().splitlines()
        class_names = dict(line.split(maxsplit=1) for line in lines if " " in line)
    if any("/" not in below for _, below in found):
        if VAL_LABELS in by_name:
            rows = csv.DictReader(io.StringIO(files[by_name[VAL_LABELS]].read().decode()))
            labels = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        elif DEVKIT in by_name:
            class_names, labels = _devkit(files[by_name[DEVKIT]])
        else:
            raise DataError(
                f"{prefix}val/ in the {kind} is flat: its labels are in {VAL_LABELS} (Kaggle) or {DEVKIT} (official); "
                "put either beside it"
            )
    val = [(below.split("/")[0] if "/" in below else labels.get(_stem(path)), path, files[path]) for path, below in found]
    return _source(kind, train, val, class_names, refused)


def _stem(path):
    return PurePosixPath(path).name.split(".")[0]


def _source(kind, train, val, class_names, refused):
    """Return the Source of lists of (class or None, path, place)."""
    classes = sorted({wnid for wnid, _, _ in train})
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    splits = {}
    for split, images in (("train", train), ("val", val)):
        refused += [f"{path}: no label for it" for wnid, path, _ in images if wnid not in label_of]
        entries = [Entry(PurePosixPath(path).name, label_of[wnid], place) for wnid, path, place in images if wnid in label_of]
        splits[split] = sorted(entries, key=lambda entry: (entry.label, entry.name))
    return _checked(Source(kind, classes, splits, class_names, refused))


def _arrow_files(folder):
    """Return {'train': [paths], 'val': [paths]} of a folder with Arrow files, or None."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            state = folder / name / "state.json"
            if state.exists():  # saved by datasets.DatasetDict.save_to_disk
                listed = json.loads(state.read_text())["_data_files"]
                found[split] = [folder / name / PurePosixPath(entry["filename"]).name for entry in listed]
            elif f"{name}.arrow" in os.listdir(folder):
                found[split] = [folder / f"{name}.arrow"]
            elif files := sorted(folder.glob(f"*-{name}-*-of-*.arrow")) + sorted(folder.glob(f"*-{name}.arrow")):
                found[split] = files  # the cache of datasets.load_dataset
    return found if set(found) == set(SPLIT_NAMES) else None


def _arrow(files):
    rows, names = {}, []
    for split, paths in files.items():
        parts = [PackedSplit(path) for path in paths]
        names.append(parts[0].classes)
        rows[split] = [
            (
                name or f"{part.path.stem}-{index:07d}.JPEG",
                int(part.labels[index]),
                Stored(str(part.path), *part.position(index)),
            )
            for part in parts
            for index, name in enumerate(part.names())
        ]
    return _labelled("Arrow files of the datasets library", rows, names, parts[0].class_names, keep_order=False)


def _parquet(folder):
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError("parquet files need pyarrow, which is not installed: pip install pyarrow") from None
    rows, names = {}, []
    for split, split_names in SPLIT_NAMES.items():
        paths = sorted(path for name in split_names for path in folder.glob(f"{name}-*.parquet"))
        if not paths:
            raise DataError(f"{folder} holds no {split_names[-1]}-*.parquet")
        expected = re.search(r"-of-0*(\d+)", paths[0].name)
        if expected and len(paths) != int(expected[1]):
            raise DataError(f"{folder} holds {len(paths)} of the {expected[1]} files of {split_names[-1]}; download the rest")
        rows[split] = []
        for path in paths:
            try:
                file = pyarrow.parquet.ParquetFile(path)
                features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
                names.append(features["label"]["names"])
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=["label", "image.path"])
                    paths_in_group = table["image"].combine_chunks().field(0).to_pylist()
                    for row, (label, name) in enumerate(zip(table["label"].to_pylist(), paths_in_group, strict=True)):
                        name = name or f"{path.stem}-{group:05d}-{row:05d}.JPEG"
                        rows[split].append((name, label, ParquetRow(str(path), group, row)))
            except (pyarrow.ArrowInvalid, KeyError, OSError) as error:
                raise DataError(f"{path} is damaged, or not of the form of Hugging Face's imagenet-1k: {error}") from error
    return _labelled("parquet files of Hugging Face", rows, names, {}, keep_order=True)


def _labelled(kind, rows, names, class_names, keep_order):
    """Return the Source of rows (name, label, place), labels counting in `names`; the classes become sorted wnids where known.

    Hugging Face's imagenet-1k calls its classes by English words; the wnids are in the names of the training images.
    """
    if any(other != names[0] for other in names):
        raise DataError("the files name different classes: they belong to different data sets")
    names = names[0]
    wnids = {}
    for name, label, _ in rows["train"]:
        if found := WNID.match(PurePosixPath(name).name):
            wnids.setdefault(label, set()).add(found[0])
    classes, label_of = names, dict(enumerate(range(len(names))))
    if len(wnids) == len(names) and all(len(found) == 1 for found in wnids.values()) and not all(map(WNID.fullmatch, names)):
        wnids = {label: found.pop() for label, found in wnids.items()}
        classes = sorted(set(wnids.values()))
        label_of = {label: classes.index(wnid) for label, wnid in wnids.items()}
        class_names = {wnid: names[label] for label, wnid in wnids.items()}
    splits, refused = {}, []
    for split, found in rows.items():
        refused += [f"{name}: no label for it" for name, label, _ in found if label not in label_of]
        entries = [Entry(PurePosixPath(name).name, label_of[label], place) for name, label, place in found if label in label_of]
        splits[split] = entries if keep_order else sorted(entries, key=lambda entry: (entry.label, entry.name))
    return _checked(Source(kind, list(classes), splits, dict(class_names), refused))


def _checked(source):
    for split in SPLIT_NAMES:
        if not source.splits[split]:
            hint = f" Passed over: {'; '.join(source.refused[:5])}" if source.refused else ""
            raise DataError(f"the {source.kind} holds no {split} images with a label.{hint}")
    source.class_names = {wnid: source.class_names[wnid] for wnid in source.classes if wnid in source.class_names}
    return source
