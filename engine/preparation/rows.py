"""Data sets whose images lie in rows or samples, as sources: what their labels mean, and the classes in the order of wnids.

What lies in the files is read by engine/preparation/tables.py.
"""

from pathlib import PurePosixPath

from engine.preparation import tables
from engine.preparation.finding import NO_LABEL, LeftOut
from engine.preparation.names import WNID, class_order, text_of
from engine.preparation.source import Entry, Source
from engine.preparation.trees import SPLITS
from engine.system.errors import DataError

MOST_CLASSES = 1_000_000  # by numbers as labels


def open_parquet(path, options):
    """Return the Source of a folder of parquet files."""
    rows = tables.read_parquet(tables.parquet_files(path), options.image_column, options.label_column)
    return _of_rows("parquet files of Hugging Face", rows, keep_order=True)


def open_arrow(path, options):
    """Return the Source of a folder of Arrow files."""
    return _of_rows("Arrow files of the datasets library", tables.read_arrow(tables.arrow_files(path)), keep_order=False)


def open_shards(path, options):
    """Return the Source of a folder of WebDataset shards."""
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
