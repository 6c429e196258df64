"""Data sets whose images lie in rows or samples: parquet and Arrow files of Hugging Face, WebDataset shards.

Each function returns Rows: names, labels and places, with what the labels mean as far as the files say so.
"""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

from engine.preparation import finding
from engine.preparation.archives import FileSlice, ParquetRow, tar_listing
from engine.preparation.names import IMAGE_SUFFIXES, is_junk, some
from engine.preparation.packed import DAMAGED, PackedSplit
from engine.preparation.trees import SPLIT_NAMES, SPLITS
from engine.system.errors import DataError
from engine.system.plain_json import json_object

METADATA = "metadata.parquet"  # of a folder of images, as the datasets library reads it
LARGEST_ROW_GROUP = 2**30  # bytes of images; each worker holds one, and from 2 GiB on Arrow cannot read it
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")  # where no metadata say which


class Rows(NamedTuple):
    """The images of a data set in rows."""

    rows: dict  # {split: [(name, label, place)]}; labels are int where names are known, else int or str
    names: list | None  # the classes in the order of the labels, as far as the files say
    class_names: dict  # {class: what people call it}
    remarks: list


def files_of_splits(folders, patterns, is_meant=lambda path: True):
    """Return {split: [paths]} from the first of the folders in which there are files of every split, or None.

    Args:
        folders: Paths.
        patterns: of the files, with NAME in place of the split's name.
        is_meant: function of the first file of training images: whether it is of this kind.
    Raises:
        DataError: there are training images of this kind and none for validation, or two sets of files.
    """
    for folder in folders:
        found = {}
        for split in SPLITS:
            for group in SPLIT_NAMES[split]:
                sets = [_files(folder, name, patterns) for name in group]
                sets = [files for files in sets if files]
                if len(sets) > 1:
                    raise DataError(f"{folder} holds {sets[0][0].name} and {sets[1][0].name}: move the files of one set away")
                if sets:
                    found[split] = sets[0]
                    break
        if "train" in found and is_meant(found["train"][0]):
            if "val" not in found:
                raise DataError(f"{folder} holds files of training images ({found['train'][0].name}) and none for validation")
            return found
    return None


def _files(folder, name, patterns):
    for pattern in patterns:
        files = [path for path in sorted(folder.glob(pattern.replace("NAME", name))) if path.is_file()]
        if files := [path for path in files if not is_junk(path.name) and path.name != METADATA]:
            return files
    return []


def require_all_parts(paths):
    """Raise DataError where a file is missing among those that are numbered, as `-00001-of-00003` or simply from 0 on."""
    counted = [re.search(r"(\d+)-of-(\d+)", path.name) for path in paths]
    plain = [re.search(r"(\d+)\D*$", path.stem) for path in paths]
    if all(counted):
        first, expected, there = 0, int(counted[0][2]), {int(found[1]) for found in counted}
    elif all(plain):
        there = {int(found[1]) for found in plain}
        padded = len(plain[0][1]) > 1 and any(found[1].startswith("0") for found in plain)
        first = 0 if padded else min(there)  # plain numbers, such as years, begin anywhere
        expected = max(there) + 1 - first
    else:
        return
    if missing := sorted(set(range(first, first + expected)) - there):
        raise DataError(
            f"{paths[0].parent} holds {len(paths)} of the {expected} files like {paths[0].name}; number "
            f"{some([str(number) for number in missing])} is missing: download the rest"
        )


# Parquet -------------------------------------------------------------------------------------------------------------


def parquet_files(folder):
    """Return {'train': [paths], 'val': [paths]} of a folder with Hugging Face's parquet files, or None."""
    patterns = ("NAME-*.parquet", "NAME.parquet", "NAME/*.parquet", "NAME_*.parquet")
    return files_of_splits((folder, folder / "data", folder / "default"), patterns)


def read_parquet(files, image_column=None, label_column=None):
    """Return the Rows of parquet files.

    Args:
        files: of parquet_files.
        image_column, label_column: names; default: those that the metadata or their types tell.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError("parquet files need pyarrow, which is not installed: pip install pyarrow") from None
    rows, names = {}, []
    for split, paths in files.items():
        require_all_parts(paths)
        rows[split] = []
        for path in paths:
            try:
                file = pyarrow.parquet.ParquetFile(path)
                image, label, classes = _columns(file.schema_arrow, path, image_column, label_column)
                names.append(classes)
                before = len(rows[split])
                for group in range(file.num_row_groups):
                    rows[split] += _rows_of_group(file, path, group, image, label)
            except (pyarrow.ArrowException, *DAMAGED) as error:
                if isinstance(error, DataError) or getattr(error, "errno", None) is not None:
                    raise
                raise DataError(f"{path} is damaged, or no parquet file of images with labels: {error}") from error
            if len(rows[split]) - before != file.metadata.num_rows:
                raise DataError(
                    f"{path} holds {len(rows[split]) - before:,} of the {file.metadata.num_rows:,} rows that its metadata "
                    "promise; download it again"
                )
        _require_promised_rows(paths, split, len(rows[split]))
    return Rows(rows, _same(names), {}, [])


def _rows_of_group(file, path, group, image, label):
    """Return [(name, label, place)] of a row group."""
    import pyarrow as pa

    kind = file.schema_arrow.field(image).type
    in_struct = pa.types.is_struct(kind)
    has_path = in_struct and kind.get_field_index("path") >= 0
    column = f"{image}.bytes" if in_struct else image
    parts = file.metadata.row_group(group)
    chunks = [parts.column(number) for number in range(parts.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    if size > LARGEST_ROW_GROUP:
        raise DataError(
            f"{path} holds a row group of {size / 1e6:,.0f} MB of images, more than the {LARGEST_ROW_GROUP / 1e6:,.0f} MB that "
            "a worker can take at once: write it anew in smaller ones, as pandas' and pyarrow's row_group_size=1000 does"
        )
    table = file.read_row_group(group, columns=[label] + ([f"{image}.path"] if has_path else []))
    labels = table[label].to_pylist()
    paths = table[image].combine_chunks().field(0).to_pylist() if has_path else [None] * len(labels)
    return [
        (name or f"{path.stem}-{group:05d}-{row:05d}.JPEG", label, ParquetRow(str(path), group, row, column))
        for row, (label, name) in enumerate(zip(labels, paths, strict=True))
    ]


def _columns(schema, path, image_column, label_column):
    """Return (name of the image column, name of the label column, class names or None) of a parquet file."""
    import pyarrow as pa

    description = (schema.metadata or {}).get(b"huggingface")
    features = json_object(description)["info"]["features"] if description else {}
    typed = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}

    def holds_bytes(kind):
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def holds_images(field):
        if pa.types.is_struct(field.type):
            return field.type.get_field_index("bytes") >= 0
        return holds_bytes(field.type)

    def holds_labels(field):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type  # pandas' categories
        return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def chosen(asked, kind, usual, fits, flag, words):
        candidates = [name for name in schema.names if typed.get(name) == kind]
        candidates = candidates or [name for name in usual if name in schema.names and fits(schema.field(name))]
        candidates = candidates or [name for name in schema.names if kind == "Image" and fits(schema.field(name))]
        if asked is not None:
            if asked not in schema.names or not fits(schema.field(asked)):
                raise DataError(f"{flag} {asked}: {path} has no such column that would do (columns: {', '.join(schema.names)})")
            return asked
        if len(candidates) != 1:
            which = f"several could be it: {', '.join(candidates)}" if candidates else f"columns: {', '.join(schema.names)}"
            raise DataError(f"{path} does not say which column holds the {words} ({which}): name it with {flag}")
        return candidates[0]

    image = chosen(image_column, "Image", IMAGE_COLUMNS, holds_images, "--image-column", "images")
    label = chosen(label_column, "ClassLabel", LABEL_COLUMNS, holds_labels, "--label-column", "labels")
    return image, label, features.get(label, {}).get("names")


def _require_promised_rows(paths, split, count):
    """Raise DataError where the data set's card beside the files promises another number of rows."""
    for folder in {paths[0].parent: 0, paths[0].parent.parent: 0}:
        card = folder / "README.md"
        if not card.is_file():
            continue
        text = card.read_text("utf-8", "replace")
        stated = re.findall(r"- name: (\w+)\n(?:\s+num_bytes: \d+\n)?\s+num_examples: (\d+)", text)
        promised = {int(number) for name, number in stated if any(name in group for group in SPLIT_NAMES[split])}
        if promised and count not in promised:
            raise DataError(f"{paths[0].parent} holds {count:,} rows of {split}, {card} promises {max(promised):,}")
        return


def _same(names):
    if any(other != names[0] for other in names):
        raise DataError("the files name different classes: they belong to different data sets")
    return names[0]


# Arrow ---------------------------------------------------------------------------------------------------------------


def arrow_files(folder):
    """Return {'train': [paths], 'val': [paths]} of a folder with Arrow files, or None."""
    found = {}
    for split in SPLITS:
        for name in (name for group in SPLIT_NAMES[split] for name in group):
            state = folder / name / "state.json"
            if split in found:
                break
            if state.exists():  # saved by datasets.DatasetDict.save_to_disk
                found[split] = _listed_files(state)
            elif (folder / f"{name}.arrow").is_file():
                found[split] = [folder / f"{name}.arrow"]
            elif files := _files(folder, name, ("*-NAME-*-of-*.arrow",)) + _files(folder, name, ("*-NAME.arrow",)):
                found[split] = files  # the cache of datasets.load_dataset
    return found if set(found) == set(SPLITS) else None


def _listed_files(state):
    """Return the paths of the Arrow files that `datasets` lists in the state.json beside them."""
    try:
        listed = json_object(state.read_text("utf-8"))["_data_files"]
        return [state.parent / PurePosixPath(entry["filename"]).name for entry in listed]
    except DAMAGED as error:
        raise DataError(f"{state} is damaged, it names no Arrow files ({error!r}); copy it again") from error


def _require_rows_of_info(folder, count):
    """Raise DataError where a split's dataset_info.json promises another number of rows, or is damaged."""
    info = folder / "dataset_info.json"
    try:
        splits = json_object(info.read_text("utf-8")).get("splits") if info.is_file() else None
        promised = ((splits or {}).get(folder.name) or {}).get("num_examples")
    except DAMAGED as error:
        raise DataError(f"{info} is damaged ({error!r}); copy it again") from error
    if promised is not None and promised != count:
        raise DataError(f"{folder} holds {count:,} rows; {info.name} promises {promised}")


def read_arrow(files):
    """Return the Rows of Arrow files of the datasets library, or of prepare_data.py."""
    rows, names, class_names = {}, [], {}
    for split, paths in files.items():
        require_all_parts(paths)
        parts = [PackedSplit(path) for path in paths]
        names.append(parts[0].classes)
        class_names = parts[0].class_names
        rows[split] = [
            (
                name or f"{part.path.stem}-{index:07d}.JPEG",
                int(part.labels[index]),
                FileSlice(str(part.path), *part.position(index)),
            )
            for part in parts
            for index, name in enumerate(part.names())
        ]
        _require_rows_of_info(paths[0].parent, len(rows[split]))
    return Rows(rows, _same(names), class_names, [])


# WebDataset ----------------------------------------------------------------------------------------------------------


def shard_files(folder):
    """Return {'train': [paths], 'val': [paths]} of a folder with WebDataset's shards, or None."""
    patterns = ("NAME-*.tar", "*-NAME-*.tar", "NAME/*.tar", "NAME_*.tar", "*_NAME_*.tar")
    return files_of_splits((folder,), patterns, _is_shard)


def _is_shard(path):
    return any(member.endswith((".cls", ".json")) for member in tar_listing(path).files)


def read_shards(files):
    """Return the Rows of WebDataset's shards: of each sample the image and its label, KEY.cls or KEY.json with 'label'."""
    rows, remarks = {}, []
    for split, paths in files.items():
        require_all_parts(paths)
        rows[split], left_out = [], finding.LeftOut()
        for path in paths:
            listing, samples = tar_listing(path), {}
            left_out.add_refused(listing, f"{path.name}: ")
            for member, place in listing.files.items():
                folder, _, file = member.rpartition("/")
                key, _, extension = file.partition(".")
                samples.setdefault(f"{folder}/{key}", {})[f".{extension.lower()}"] = member, place
            for parts in samples.values():
                images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
                label = _label_of_sample(parts, path)
                if len(images) != 1 or label is None:
                    reason = finding.NO_LABEL if len(images) == 1 else "not one image in the sample"
                    left_out.add(reason, f"{path.name}: {next(iter(parts.values()))[0]}")
                    continue
                member, place = parts[images[0]]
                rows[split].append((PurePosixPath(member).name, label, place))
        remarks += left_out.lines(split)
    return Rows(_as_numbers(rows), None, {}, remarks)


def _label_of_sample(parts, path):
    """Return the label of a sample, int or str, or None."""
    try:
        if ".cls" in parts:
            label = parts[".cls"][1].read().decode().strip()
        elif ".json" in parts:
            facts = json_object(parts[".json"][1].read())
            label = next((facts[key] for key in ("label", "cls") if key in facts), None)
            if not isinstance(label, (int, str, type(None))) or isinstance(label, bool):
                raise ValueError(f"a number or a name is expected, not {type(label).__name__}")
        else:
            return None
    except ValueError as error:
        raise DataError(f"{path} holds a label that cannot be read ({error})") from error
    return None if str(label).startswith("-") and _is_number(str(label)[1:]) else label  # -1 is what unlabelled images have


def _is_number(text):
    return text.isascii() and text.isdigit() and len(text) < 19


def _as_numbers(rows):
    """Return the rows of all splits with labels that are int, where all are numbers; else as they are."""
    labels = {label for of_split in rows.values() for _, label, _ in of_split}
    if not all(isinstance(label, int) or _is_number(label) for label in labels):
        return rows
    return {split: [(name, int(label), place) for name, label, place in of_split] for split, of_split in rows.items()}
