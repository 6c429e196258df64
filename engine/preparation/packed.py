"""The packed split: one Arrow file of encoded images and labels, in the layout that Hugging Face `datasets` writes.

`datasets.Dataset.from_file("train.arrow")` opens what is written here, and PackedSplit opens what `datasets` wrote: an Arrow
IPC stream with the columns `image` (struct of `bytes` and `path`) and `label` (int64), the class names in its metadata.
"""

import hashlib
import itertools
import json
import mmap
import os
from pathlib import Path

import numpy as np

from engine.preparation.finding import relabelled
from engine.system.errors import DataError
from engine.system.files import replacing, sync, sync_folder
from engine.system.plain_json import json_object, parse_json

try:
    import pyarrow as pa
except ImportError:  # folders of images do without
    pa = None

DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OSError)  # what reading another program's file can end in
LARGEST_RECORD_BATCH = 2**30  # bytes of images; Arrow counts them in 32 bits
END_OF_STREAM = (
    b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow's mark: without it a file cut between two record batches looks whole
)


class PackedSplit:
    """One split in an Arrow file; where each image's bytes lie is kept in arrays, the bytes are read when asked for.

    Attributes:
        classes: list of str.
        class_names: {class: what people call it}, as far as known.
        labels: int64 [N].
    Raises:
        DataError: the file is damaged, cut off, or holds no images with labels.
    """

    def __init__(self, path):
        self.path = Path(path)
        if pa is None:
            raise DataError(f"{path} is an Arrow file, and pyarrow is not installed: pip install pyarrow")
        try:
            self._open()
        except DataError:
            raise
        except DAMAGED as error:
            raise DataError(f"{path} is damaged ({error}); copy it again, or prepare it again with prepare_data.py") from error

    def _open(self):
        self._file = open(self.path, "rb")  # noqa: SIM115 - open as long as the split: the file may be replaced meanwhile
        whole = self._content()
        if whole.size < len(END_OF_STREAM) or whole.slice(whole.size - len(END_OF_STREAM)).to_pybytes() != END_OF_STREAM:
            raise OSError("its end is missing")
        reader = pa.ipc.open_stream(whole)
        image_column, label_column, self.classes = _columns(reader.schema, self.path)
        names = (reader.schema.metadata or {}).get(b"class_names", b"{}")
        self.class_names = json_object(names)
        starts, lengths, labels = [], [], []
        for batch in reader:
            content = batch.column(image_column).field("bytes")
            if content.null_count or batch.column(label_column).null_count:
                raise DataError(
                    f"{self.path} holds rows without an image's bytes or without a label; only whole rows are usable"
                )
            _, offsets, values = content.buffers()
            kind = np.int64 if pa.types.is_large_binary(content.type) else np.int32
            bounds = np.frombuffer(offsets, kind)[content.offset : content.offset + len(content) + 1].astype(np.int64)
            starts.append(bounds[:-1] + (values.address - whole.address))
            lengths.append(np.diff(bounds).astype(np.int32))
            labels.append(batch.column(label_column).to_numpy())
        self._starts = np.concatenate(starts) if starts else np.empty(0, np.int64)
        self._lengths = np.concatenate(lengths) if lengths else np.empty(0, np.int32)
        self.labels = np.concatenate(labels).astype(np.int64) if labels else np.empty(0, np.int64)
        self._rows = None  # of the file, by index, where the images are in another order than there
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise DataError(f"{self.path} holds labels outside of its {len(self.classes)} classes")
        if len(self._starts) and (self._starts + self._lengths).max() > whole.size:
            raise DataError(f"{self.path} is compressed; write it without compression")

    def _content(self):
        """Return the file's bytes, in memory as far as they are looked at; also of one that has lost its name since."""
        return pa.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))

    def __reduce__(self):
        state = {name: value for name, value in vars(self).items() if name not in ("path", "_file")}
        return PackedSplit, (self.path,), state  # a process that is not forked opens it anew

    def relabel(self, classes):
        """Let the labels count in another list of classes, which has all of them; the images are grouped in its order."""
        self.labels, order = relabelled(self, classes)
        self.classes = classes
        if order is not None:
            self._starts, self._lengths, self._rows = self._starts[order], self._lengths[order], order

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        """Return the image's name as `class/file`; reads through the whole file's names, for messages."""
        row = index if self._rows is None else self._rows[index]
        try:
            name = next(itertools.islice(self.names(), int(row), None))
        except DAMAGED:  # since it was opened
            name = f"row {row}"
        return f"{self.classes[self.labels[index]]}/{name}"

    def names(self):
        """Yield every image's file name in the file's order, '' where none is known."""
        reader = pa.ipc.open_stream(self._content())
        image_column, _, _ = _columns(reader.schema, self.path)
        for batch in reader:
            for path in batch.column(image_column).field("path"):
                yield path.as_py() or ""

    def file_names(self):
        """Return every image's file name in the order of the images, '' where none is known."""
        names = list(self.names())
        return names if self._rows is None else [names[row] for row in self._rows]

    def position(self, index):
        """Return (start, length) of the image's bytes in the file."""
        return int(self._starts[index]), int(self._lengths[index])

    def location(self, index):
        """Return (path, start, length) of the image's bytes."""
        return self.path, *self.position(index)

    def read(self, index):
        """Return the bytes of the image."""
        start, length = self.position(index)
        content = os.pread(self._file.fileno(), length, start)
        if len(content) != length:
            raise OSError(f"{self.path} has become shorter")
        return content


def _columns(schema, path):
    """Return (name of the image column, name of the label column, classes) by the metadata that `datasets` writes."""
    description = (schema.metadata or {}).get(b"huggingface")
    features = json_object(description)["info"]["features"] if description else {}
    kinds = {feature.get("_type"): name for name, feature in reversed(features.items()) if isinstance(feature, dict)}
    if "Image" not in kinds or "ClassLabel" not in kinds:
        raise DataError(
            f"{path} has no column of images and of class labels (columns: {', '.join(schema.names)}); "
            "prepare_data.py writes such files, and so does the datasets library with the features Image and ClassLabel"
        )
    return kinds["Image"], kinds["ClassLabel"], features[kinds["ClassLabel"]]["names"]


def packed_schema(classes, class_names):
    """Return the Arrow schema of a packed split.

    Args:
        classes: the classes in the order of their labels.
        class_names: {class: what people call it}.
    """
    if pa is None:
        raise DataError("packed images are an Arrow file, and pyarrow is not installed: pip install pyarrow")
    features = {"image": {"_type": "Image"}, "label": {"names": list(classes), "_type": "ClassLabel"}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), "class_names": json.dumps(class_names)}
    return pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)


def packed_rows(schema, rows):
    """Return the bytes of a record batch, to be appended to a file that begins with `schema.serialize()`.

    Args:
        rows: list of (image file's bytes, file name, label), together below 2 GiB.
    """
    contents, names, labels = zip(*rows, strict=True)
    image = pa.StructArray.from_arrays(
        [pa.array(contents, pa.binary()), pa.array(names, pa.string())], fields=list(schema.field("image").type)
    )
    return pa.record_batch([image, pa.array(labels, pa.int64())], schema=schema).serialize()


def write_split(path, rows, classes, rows_in_batch=256):
    """Write a small packed split at once.

    Args:
        rows: list of (image file's bytes, file name, label).
        classes: the classes in the order of their labels.
        rows_in_batch: rows of a record batch, together below 2 GiB.
    """
    schema = packed_schema(classes, {})
    with replacing(path) as file:
        file.write(schema.serialize())
        for start in range(0, len(rows), rows_in_batch):
            file.write(packed_rows(schema, rows[start : start + rows_in_batch]))
        file.write(END_OF_STREAM)


class PackedWriter:
    """Writes a packed split piece by piece; killed at any instant, another one with the same job goes on after the last piece.

    The pieces are appended to a file beside `path`, which takes its place at the end. A journal says how far the file is
    whole: what lies behind that was being written when the end came, and is cut off.

    Args:
        path: the split, e.g. data/imagenet/train.arrow.
        schema: of packed_schema.
        job: str that tells this preparation from any other.
    Attributes:
        entries_done: how many of the source's images are behind it, bad ones included.
        bad: list of [name, reason] of the images left out.
        size: bytes written.
        sha256: of the file, in hexadecimal, once it is finished; until then None.
        remark: a line for the user where less is there than the journal says, and the work goes back; else None.
    Raises:
        DataError: the remains of another job lie there.
    """

    def __init__(self, path, schema, job):
        self.path = Path(path)
        self._part, self._journal_path = unfinished_files(path)
        self._schema = schema
        self.entries_done, self.bad, self.size, self.sha256 = 0, [], 0, None
        self.remark = None
        lines = _whole_lines(self._journal_path)
        if lines and lines[0] != {"job": job}:
            raise DataError(
                f"{self._part} is the beginning of another preparation; go on with that one, or start anew: --overwrite"
            )
        lines = self._backed_lines(lines or [{"job": job}])
        self._journal = open(self._journal_path, "ab")  # noqa: SIM115
        for line in lines[1:]:
            self.entries_done, self.size, self.sha256 = line["entries"], line["size"], line["sha256"]
            self.bad += line["bad"]
        if self.sha256 is None:
            self._go_on()
        elif self._part.exists():
            os.replace(self._part, self.path)  # the kill came just before it

    def _backed_lines(self, lines):
        """Return the journal's lines up to the last one that what is there bears out; the journal is cut to them."""
        is_finished = lines[-1].get("sha256") is not None and not self._part.exists()
        file = self.path if is_finished else self._part
        there = file.stat().st_size if file.exists() else 0
        backed = lines[:1] + [line for line in lines[1:] if line["size"] <= there]
        if is_finished and backed != lines:
            backed = lines[:1]  # its beginning has its name already, and is left for other programs to read
        if backed != lines:
            what = "is shorter than it was" if file.exists() else "is not there any more"
            self.remark = f"WARNING: {file} {what}: going back from {lines[-1]['entries']:,} images"
        if backed != lines or not self._journal_path.exists():
            with replacing(self._journal_path) as journal:
                journal.writelines(map(_journal_line, backed))
        return backed

    def _go_on(self):
        self._hash = hashlib.sha256()
        self._file = open(self._part, "r+b" if self.size else "wb")  # noqa: SIM115
        if not self.size:
            self._write(self._schema.serialize())
            return
        self._file.truncate(self.size)
        while content := self._file.read(2**24):
            self._hash.update(content)

    def append(self, rows, entries, bad):
        """Write the next rows, and remember that they came of `entries` of the source's images, of which some were bad.

        Args:
            rows: list of (bytes, name, label).
            bad: list of [name, reason].
        """
        group, size = [], 0
        for row in [*rows, None]:
            if group and (row is None or size + len(row[0]) > LARGEST_RECORD_BATCH):
                self._write(packed_rows(self._schema, group))
                group, size = [], 0
            if row is not None:
                group.append(row)
                size += len(row[0])
        sync(self._file)  # the rows first: the journal never promises more than there is
        self.entries_done += entries
        self.bad += bad
        self._note(entries=self.entries_done, size=self.size, bad=bad, sha256=None)

    def finish(self):
        """Give the file its name."""
        self._write(END_OF_STREAM)
        sync(self._file)
        self._file.close()
        self.sha256 = self._hash.hexdigest()
        self._note(entries=self.entries_done, size=self.size, bad=[], sha256=self.sha256)
        self._journal.close()
        os.replace(self._part, self.path)
        sync_folder(self.path.parent)

    def _write(self, content):
        self._file.write(content)
        self._hash.update(content)
        self.size += len(content)

    def _note(self, **line):
        self._journal.write(_journal_line(line))
        sync(self._journal)


def _journal_line(line):
    return json.dumps(line).encode() + b"\n"


def files_of_job(path, job):
    """Return the set of paths that this job has written so far of the split at `path`, its journal included."""
    part, journal = unfinished_files(path)
    lines = _whole_lines(journal)
    if not lines or lines[0] != {"job": job}:
        return set()
    return {part, journal, path} if lines[-1].get("sha256") is not None else {part, journal}


def unfinished_files(path):
    """Return the paths of the unfinished split beside `path` and of its journal."""
    return path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.journal")


def _whole_lines(path):
    """Return the objects of a file of JSON lines up to the first damaged line; that one and what follows it is cut off."""
    if not path.exists():
        return []
    lines, good = [], 0
    content = path.read_bytes()
    for line in content.splitlines(keepends=True):
        try:
            lines.append(parse_json(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            lines.pop()
            break
        good += len(line)
    if good < len(content):
        os.truncate(path, good)
    return lines
