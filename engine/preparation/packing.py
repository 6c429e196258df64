"""The packing job: the images of a source into one packed file per split, with a manifest and checksums.

Killed at any instant, the same job goes on where it was.
"""

import collections
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

from engine.preparation.archives import ParquetRow
from engine.preparation.names import WNID, is_image_name, text_of
from engine.preparation.packed import PackedSplit, PackedWriter, files_of_job, packed_schema, unfinished_files
from engine.preparation.trees import IMAGENET_COUNTS
from engine.system.errors import DataError
from engine.system.files import replacing
from engine.system.plain_json import json_object
from engine.system.workers import worker_pool

IMAGENET_IMAGES = dict(zip(("train", "val"), IMAGENET_COUNTS, strict=True))
IMAGENET_CLASSES = 1000
MANIFEST, CHECKSUMS = "manifest.json", "SHA256SUMS"
PIECE = 512  # images between two entries of the journal: what a kill can cost
CHUNK = 32  # images that a worker process makes at a time
SAMPLE = 48  # images of a split from which the size of the whole is estimated beforehand
PLAIN_LINE_SECONDS = 30.0


class ReadFailed(DataError):
    """The machine could not read an image: its disk is gone, a right is missing, too many files are open, no memory is left."""


class Packing(NamedTuple):
    """How images are packed, and where."""

    destination: Path
    encode: Callable  # function (bytes of an image file, shorter side in px, quality) -> bytes; sent to the workers
    shorter_side: int  # px, of larger training images; 0 keeps all as they are
    quality: int  # of the re-encoded JPEGs, 1 to 100
    num_workers: int

    def shorter_sides(self):
        """Return {split: px}; validation images are kept byte for byte."""
        return {"train": self.shorter_side or math.inf, "val": math.inf}


# Before it starts ----------------------------------------------------------------------------------------------------


def add_known_class_names(source):
    """Add the English names of ImageNet's classes where the source has none."""
    names = ResNet50_Weights.DEFAULT.meta["categories"]  # in the order of the sorted wnids
    if is_imagenet(source) and not source.class_names:
        source.class_names = dict(zip(source.classes, names, strict=True))


def is_imagenet(source):
    """Return whether the classes are ImageNet-1K's, by their number, the first and the last."""
    ends = (source.classes[0], source.classes[-1])
    return len(source.classes) == IMAGENET_CLASSES and ends == ("n01440764", "n15075141")


def is_meant_as_imagenet(source):
    """Return whether the counts should be ImageNet-1K's: most of its subsets have 10 or 100 classes."""
    return len(source.classes) > IMAGENET_CLASSES / 2 and all(map(WNID.fullmatch, source.classes))


def job_id(source, packing):
    """Return a text that is the same for images of the same names, labels and sizes prepared in the same way, and no others."""
    digest = hashlib.sha256(repr((source.classes, packing.shorter_sides(), packing.quality)).encode())
    sizes = parquet_sizes(source)
    for entries in source.splits.values():
        lengths = [sizes[each.place.file] if isinstance(each.place, ParquetRow) else each.place.length for each in entries]
        lines = [f"{entry.name} {entry.label} {length}" for entry, length in zip(entries, lengths, strict=True)]
        digest.update("\n".join(lines).encode())
    return digest.hexdigest()


def job_of_split(job, split):
    """Return the text that tells a split's part of a job from all others."""
    return f"{job} {split}"


def packed_files(destination):
    """Return {split: path of its packed file}."""
    return {split: destination / f"{split}.arrow" for split in IMAGENET_IMAGES}


def refuse_to_replace_source(source, destination):
    """Raise DataError where a packed file that would be replaced is one that the source's images are read from."""
    files = {entry.place.file for entries in source.splits.values() for entry in entries}
    packed = [path for path in packed_files(destination).values() if path.exists()]
    for file in files if packed else ():
        if not is_image_name(os.fsdecode(file)) and (own := next((p for p in packed if os.path.samefile(p, file)), None)):
            raise DataError(
                f"{own} is a part of SOURCE and would be replaced: name another DESTINATION, or, where other images in "
                "SOURCE are meant, move it away"
            )


def refuse_to_replace_others(destination):
    """Raise DataError where a manifest or checksums lie that no packing job has written."""
    for name, sign in ((MANIFEST, '"splits": {'), (CHECKSUMS, "train.arrow")):
        path = destination / name
        if path.exists() and path.stat().st_size and sign not in path.read_text(errors="replace"):
            raise DataError(
                f"{path} is there, is none of prepare_data.py's, and would be replaced: move it away, or name another folder"
            )


def files_to_overwrite(destination, job):
    """Return the paths of what packing jobs have written, finished or not, but the beginning that is this very job's."""
    finished = _lost_files(destination, job) == []
    paths = [path for path in (destination / MANIFEST, destination / CHECKSUMS) if path.exists()]
    for split, path in packed_files(destination).items():
        kept = set() if finished else files_of_job(path, job_of_split(job, split))
        paths += [file for file in (path, *unfinished_files(path)) if file.exists() and file not in kept]
    return paths


def is_prepared(destination, job):
    """Return whether this very job is done, and tidy up after it; raise DataError if another one's files are in its place."""
    lost = _lost_files(destination, job)
    if lost is not None:
        if lost:
            print(f"WARNING: {', '.join(map(str, lost))}: moved away or cut off since; it is all packed anew")
        for path in () if lost else packed_files(destination).values():
            for file in unfinished_files(path):  # of a job that was killed at its end, or packed a lost file anew
                file.unlink(missing_ok=True)
        return not lost
    for path in packed_files(destination).values():
        if path.exists() and ((destination / MANIFEST).exists() or not unfinished_files(path)[1].exists()):
            raise DataError(
                f"{path} is there already, from images of other names or sizes, or in another way; name another folder, "
                "or have it replaced: --overwrite"
            )
    return False


def _lost_files(destination, job):
    """Return the packed files that are not as this very job's manifest says; None where there is no manifest of it."""
    try:
        manifest = json_object((destination / MANIFEST).read_text())
        if manifest["job"] != job:
            return None
        sizes = {path: manifest["splits"][split]["bytes"] for split, path in packed_files(destination).items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return [path for path, size in sizes.items() if not path.exists() or path.stat().st_size != size]


def announce(source, packing, overwritten=()):
    """Print what was found and what will be written; raise DataError if the disk cannot hold it.

    Args:
        overwritten: of files_to_overwrite, the files that will be deleted first.
    """
    destination = packing.destination
    counts = " and ".join(
        f"{len(source.splits[split]):,} {word} images" for split, word in (("train", "training"), ("val", "validation"))
    )
    print(f"{source.kind}: {counts} of {len(source.classes):,} classes, {gigabytes(source_size(source))}")
    for remark in source.remarks:
        print(remark)
    sizes = {split: estimated_size(source, split, packing) for split in source.splits}
    done = 0
    for path in packed_files(destination).values():
        begun = [file for file in (path, unfinished_files(path)[0]) if file.exists() and file not in overwritten]
        done += sum(file.stat().st_size for file in begun)
    freed = sum(path.stat().st_size for path in overwritten)
    free = shutil.disk_usage(destination).free + freed
    if freed:
        print(f"--overwrite: {gigabytes(freed)} of an earlier preparation in {destination} are deleted first")
    needed = sum(sizes.values()) - done
    print(
        f"will write about {gigabytes(sum(sizes.values()))} to {destination} (train {gigabytes(sizes['train'])}, val "
        f"{gigabytes(sizes['val'])}, estimated from a sample), {gigabytes(done)} of it done; {gigabytes(free)} are free there",
        flush=True,
    )
    if needed > free:
        raise DataError(
            f"{destination} has {gigabytes(free)} free, and about {gigabytes(needed)} are needed: free some, name a folder on "
            "another disk, or lower --shorter-side"
        )


def gigabytes(size):
    """Return bytes as text in GB, or in MB where that is less than 0.1 GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def source_size(source):
    """Return the bytes of the source's images."""
    slices = [entry.place for entries in source.splits.values() for entry in entries]
    return sum(parquet_sizes(source).values()) + sum(each.length for each in slices if not isinstance(each, ParquetRow))


def parquet_sizes(source):
    """Return {file: bytes} of the source's parquet files."""
    places = (entry.place for entries in source.splits.values() for entry in entries)
    return {file: os.path.getsize(file) for file in {each.file for each in places if isinstance(each, ParquetRow)}}


def estimated_size(source, split, packing):
    """Return the bytes that a packed split will take, estimated from some of its images."""
    entries, sizes = source.splits[split], []
    for number in np.linspace(0, len(entries) - 1, min(SAMPLE, len(entries))).astype(int):
        content, _ = pack(entries[number], packing.encode, packing.shorter_sides()[split], packing.quality)
        sizes += [len(content)] if content is not None else []
    return int(np.mean(sizes) * len(entries)) if sizes else 0


# The work ------------------------------------------------------------------------------------------------------------


def pack(entry, encode, shorter_side, quality):
    """Return (bytes to keep, None), or (None, what is wrong with the image).

    Raises:
        ReadFailed: what is wrong is the machine, and the image may be good.
    """
    try:
        return encode(entry.place.read(), shorter_side, quality), None
    except Exception as error:  # decoders fail in their own ways; whatever it is, the image is named and left out
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:  # a damaged archive has no errno
            reason = getattr(error, "strerror", None) or type(error).__name__
            file = text_of(os.fsdecode(entry.place.file))
            raise ReadFailed(f"{file} cannot be read ({reason}); where {entry.name} is lost for good, move it away") from error
        return None, f"{type(error).__name__}: {error}"


def pack_some(entries, encode, shorter_side, quality):
    """Return [(bytes or None, problem or None)] of the entries; runs in a worker process."""
    return [pack(entry, encode, shorter_side, quality) for entry in entries]


def pack_split(source, split, packing, job, stop):
    """Write the packed file of a split, or what is missing of it; return its finished PackedWriter.

    Args:
        job: of job_id.
        stop: StopRequest, heeded between two images.
    """
    entries, schema = source.splits[split], packed_schema(source.classes, source.class_names)
    writer = PackedWriter(packed_files(packing.destination)[split], schema, job_of_split(job, split))
    if writer.remark:
        print(writer.remark, flush=True)
    if writer.sha256 is not None:
        return writer
    if writer.entries_done:
        print(f"{split}: going on after {writer.entries_done:,} images", flush=True)
    with worker_pool(packing.num_workers) as pool:
        packed = packed_in_order(pool, entries[writer.entries_done :], split, packing)
        packed = stop.between(with_progress(packed, split, len(entries), writer.entries_done))
        while piece := list(itertools.islice(packed, PIECE)):
            rows = [(content, entry.name, entry.label) for entry, (content, problem) in piece if problem is None]
            bad = [
                [f"{source.classes[entry.label]}/{entry.name}", problem] for entry, (_, problem) in piece if problem is not None
            ]
            writer.append(rows, len(piece), bad)
    writer.finish()
    return writer


def packed_in_order(pool, entries, split, packing):
    """Yield (entry, pack's result) of each entry in order, made by the pool's processes a few chunks ahead."""
    ahead, how = collections.deque(), (packing.encode, packing.shorter_sides()[split], packing.quality)
    for start in range(0, len(entries), CHUNK):
        some = entries[start : start + CHUNK]
        ahead.append((some, pool.submit(pack_some, some, *how)))
        if len(ahead) > 4 * packing.num_workers:
            some, result = ahead.popleft()
            yield from zip(some, result.result(), strict=True)
    for some, result in ahead:
        yield from zip(some, result.result(), strict=True)


def with_progress(items, split, total, done):
    """Yield the items, and show how far they are: a bar on a terminal, a line every half a minute elsewhere."""
    on_terminal = sys.stderr.isatty()
    started = printed_at = time.monotonic()
    bar = tqdm(
        total=total, initial=done, desc=split, unit="image", unit_scale=True, disable=not on_terminal, dynamic_ncols=True
    )
    with bar:
        for count, item in enumerate(items, start=1):
            yield item
            bar.update()
            now = time.monotonic()
            if not on_terminal and now - printed_at >= PLAIN_LINE_SECONDS:
                printed_at, rate = now, count / (now - started)
                left = (total - done - count) / rate / 60
                print(f"{split}: {done + count:,} of {total:,} images, {rate:,.0f} images/s, {left:.0f} min left", flush=True)


# Afterwards ----------------------------------------------------------------------------------------------------------


def write_manifest(source, writers, packing, job):
    """Write the manifest and the checksums; print what there is and what is missing.

    Raises:
        DataError: a split has come out empty.
    """
    destination = packing.destination
    manifest = {
        "job": job,
        "source": source.kind,
        "shorter_side": packing.shorter_side,
        "quality": packing.quality,
        "prepared": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "is_imagenet_1k": is_meant_as_imagenet(source),
        "classes": len(source.classes),
        "splits": {},
        "remarks": source.remarks,
    }
    for split, writer in writers.items():
        packed = PackedSplit(writer.path)  # as train.py will open it
        per_class = np.bincount(packed.labels, minlength=len(packed.classes)).tolist()
        manifest["splits"][split] = {
            "file": writer.path.name,
            "bytes": writer.size,
            "sha256": writer.sha256,
            "images": len(packed),
            "images_of_imagenet_1k": IMAGENET_IMAGES[split],
            "bad_images": writer.bad,
            "images_per_class": dict(zip(packed.classes, per_class, strict=True)),
        }
        if not len(packed):
            named = f" ({': '.join(writer.bad[0])})" if writer.bad else ""
            raise DataError(f"none of the {writer.entries_done:,} {split} images is one that can be read{named}")
    with replacing(destination / CHECKSUMS, "w") as file:
        file.writelines(f"{writer.sha256}  {writer.path.name}\n" for writer in writers.values())
    with replacing(destination / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
    for writer in writers.values():
        unfinished_files(writer.path)[1].unlink()
    for line in summary(manifest, destination):
        print(line)


def summary(manifest, destination):
    """Return the lines that a preparation ends with."""
    lines = []
    for split, facts in manifest["splits"].items():
        of = f" of ImageNet-1K's {facts['images_of_imagenet_1k']:,}" if manifest["is_imagenet_1k"] else ""
        lines.append(f"{split}: {facts['images']:,}{of} images in {destination / facts['file']}, {gigabytes(facts['bytes'])}")
        lines += [f"WARNING: left out of {split}: {name} ({problem})" for name, problem in facts["bad_images"][:20]]
        if len(facts["bad_images"]) > 20:
            lines.append(f"WARNING: and {len(facts['bad_images']) - 20} more, named in {destination / MANIFEST}")
        empty = [name for name, count in facts["images_per_class"].items() if count == 0]
        if empty:
            lines.append(f"WARNING: {split} has no image of {len(empty)} classes: {', '.join(empty[:5])}")
    lines += [remark for remark in manifest["remarks"] if remark.startswith("WARNING")]
    if not manifest["is_imagenet_1k"]:
        lines.append("this is another data set than ImageNet-1K")
    lines.append(f"check a copy with: sha256sum -c {CHECKSUMS}; train with: python train.py --data-dir {destination}")
    missed = [
        f"{facts['images']:,} of {facts['images_of_imagenet_1k']:,} {split} images"
        for split, facts in manifest["splits"].items()
        if facts["images"] != facts["images_of_imagenet_1k"]
    ]
    if manifest["classes"] != IMAGENET_CLASSES:
        missed.append(f"{manifest['classes']:,} of {IMAGENET_CLASSES:,} classes")
    if manifest["is_imagenet_1k"] and missed:
        lines.append(f"WARNING: this is NOT the whole ImageNet-1K: {' and '.join(missed)}")
    return lines
