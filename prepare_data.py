"""Prepare ImageNet, or any set of labelled images, for training: one packed file per split.

python prepare_data.py SOURCE data/imagenet

SOURCE may be a folder with the official ILSVRC2012_*.tar files, Kaggle's archives or the tree unpacked from them, Hugging
Face's parquet files, a folder that the datasets library saved, WebDataset shards, or a folder or an archive of train/<class>/*
and val/<class>/*; docs/data_forms.md has the list. Training images are re-encoded to a shorter side of 352 px, which makes
them faster to read; validation images are kept byte for byte. Killed at any instant, the same command goes on where it was.
"""

import argparse
import collections
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time

import numpy as np
import torch
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

from engine.data.images import PACKED_SHORTER_SIDE, packed_jpeg
from engine.preparation.archives import ParquetRow, delete_uncompressed
from engine.preparation.finding import WNID
from engine.preparation.forms import Options, open_source
from engine.preparation.packed import PackedSplit, PackedWriter, packed_schema, unfinished_files
from engine.preparation.trees import IMAGENET_COUNTS
from engine.system.console import protect_output
from engine.system.errors import DataError, run_program
from engine.system.files import path_argument, replacing
from engine.system.interruption import Interrupted, StopRequest
from engine.system.lock import folder_lock
from engine.system.workers import WorkerDied, available_cores, worker_pool

IMAGENET_IMAGES = dict(zip(("train", "val"), IMAGENET_COUNTS, strict=True))
IMAGENET_CLASSES = 1000
MANIFEST, CHECKSUMS = "manifest.json", "SHA256SUMS"
PIECE = 512  # images between two entries of the journal: what a kill can cost
JOB = 32  # images that a worker process makes at a time
SAMPLE = 48  # images of a split from which the size of the whole is told beforehand
PLAIN_LINE_SECONDS = 30.0


def parse_arguments(arguments=None):
    """Return what the command line asks for; ends the program with status 2 where that is impossible."""
    parser = argparse.ArgumentParser(
        "prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SOURCE", type=path_argument, help="folder or archive that holds the images")
    parser.add_argument("destination", metavar="DESTINATION", type=path_argument, help="folder for train.arrow and val.arrow")
    parser.add_argument(
        "--shorter-side",
        type=int,
        default=PACKED_SHORTER_SIDE,
        metavar="PX",
        help=f"of larger training images; default {PACKED_SHORTER_SIDE}, 0 keeps all as they are",
    )
    parser.add_argument("--quality", type=int, default=90, help="of the re-encoded JPEGs, 1 to 100; default 90")
    parser.add_argument("--num-workers", type=int, default=available_cores(), help="processes; default one per CPU core")
    parser.add_argument("--image-column", metavar="NAME", help="of parquet files whose columns do not tell")
    parser.add_argument("--label-column", metavar="NAME", help="of parquet files whose columns do not tell")
    parser.add_argument("--overwrite", action="store_true", help="delete what was prepared in DESTINATION before")
    arguments = parser.parse_args(arguments)
    for name, lowest, highest in (("shorter_side", 0, 10_000), ("quality", 1, 100), ("num_workers", 1, 256)):
        if not lowest <= getattr(arguments, name) <= highest:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be from {lowest} to {highest}")
    return arguments


def main(arguments):
    with folder_lock(arguments.destination, "DESTINATION", print, "prepare into another folder") as lock:
        if lock.note:
            print(lock.note)
        return prepare(arguments)


def prepare(arguments):
    """Pack the source, or go on with it; return the exit status."""
    torch.set_num_threads(1)  # here and, inherited, in the workers
    destination = arguments.destination
    shorter_sides = {"train": arguments.shorter_side or math.inf, "val": math.inf}
    print(f"looking at {arguments.source} ...", flush=True)
    try:
        source = open_source(arguments.source, Options(destination, arguments.image_column, arguments.label_column))
    except DataError:
        delete_uncompressed(destination)
        raise
    add_known_class_names(source)
    job = job_of(source, shorter_sides, arguments.quality)
    if arguments.overwrite:
        delete_prepared(destination)
    if is_prepared(destination, job):
        print(f"{destination} is prepared already, from the same images in the same way")
        delete_uncompressed(destination)
        return 0
    announce(source, destination, shorter_sides, arguments.quality)
    splits = {}
    with StopRequest() as stop:
        try:
            for split in source.splits:
                splits[split] = pack_split(source, split, destination, job, shorter_sides[split], arguments, stop)
        except (Interrupted, WorkerDied, OSError) as cause:
            stop_asked = stop.cause is not None  # then a worker that got the signal as well is no cause of its own
            what = f"stopped by {stop.cause}" if stop_asked else f"stopped: {cause}"
            print(f"{what}. The same command goes on from here", file=sys.stdout if stop_asked else sys.stderr)
            return stop.exit_code or 1
    write_manifest(source, splits, destination, job, arguments)
    delete_uncompressed(destination)
    return 0


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


def job_of(source, shorter_sides, quality):
    """Return a text that is the same for the same images prepared in the same way, and for no others."""
    digest = hashlib.sha256(repr((source.classes, shorter_sides, quality)).encode())
    for entries in source.splits.values():
        digest.update("\n".join(f"{entry.name} {entry.label}" for entry in entries).encode())
    return digest.hexdigest()


def prepared_files(destination):
    """Return {split: path of its packed file}."""
    return {split: destination / f"{split}.arrow" for split in IMAGENET_IMAGES}


def delete_prepared(destination):
    """Delete everything that a preparation writes, finished or not."""
    for path in prepared_files(destination).values():
        for file in (path, *unfinished_files(path)):
            file.unlink(missing_ok=True)
    for name in (MANIFEST, CHECKSUMS):
        (destination / name).unlink(missing_ok=True)


def is_prepared(destination, job):
    """Return whether this very job is done; raise DataError if another one's files are in its place."""
    manifest = destination / MANIFEST
    if manifest.exists():
        try:
            same = json.loads(manifest.read_text())["job"] == job
        except (ValueError, KeyError, TypeError):
            same = False
        if same and all(path.exists() for path in prepared_files(destination).values()):
            return True
    for path in prepared_files(destination).values():
        if path.exists() and (manifest.exists() or not unfinished_files(path)[1].exists()):
            raise DataError(
                f"{path} is there already, prepared from other images or in another way; name another folder, "
                "or have it replaced: --overwrite"
            )
    return False


def announce(source, destination, shorter_sides, quality):
    """Say what was found and what will be written, and refuse to begin what the disk cannot hold."""
    counts = " and ".join(
        f"{len(source.splits[split]):,} {word} images" for split, word in (("train", "training"), ("val", "validation"))
    )
    print(f"{source.kind}: {counts} of {len(source.classes):,} classes, {gigabytes(source_size(source))}")
    for remark in source.remarks:
        print(remark)
    sizes = {split: estimated_size(entries, shorter_sides[split], quality) for split, entries in source.splits.items()}
    done = 0
    for path in prepared_files(destination).values():
        done += sum(file.stat().st_size for file in (path, unfinished_files(path)[0]) if file.exists())
    free = shutil.disk_usage(destination).free
    needed = sum(sizes.values()) - done
    print(
        f"will write about {gigabytes(sum(sizes.values()))} to {destination} (train {gigabytes(sizes['train'])}, val "
        f"{gigabytes(sizes['val'])}, told from a sample), {gigabytes(done)} of it done; {gigabytes(free)} are free there",
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
    places = [entry.place for entries in source.splits.values() for entry in entries]
    whole_files = {place.file for place in places if isinstance(place, ParquetRow)}
    return sum(os.path.getsize(file) for file in whole_files) + sum(
        place.length for place in places if not isinstance(place, ParquetRow)
    )


def estimated_size(entries, shorter_side, quality):
    """Return the bytes that a packed split will take, told from some of its images."""
    sizes = []
    for number in np.linspace(0, len(entries) - 1, min(SAMPLE, len(entries))).astype(int):
        content, _ = pack(entries[number], shorter_side, quality)
        sizes += [len(content)] if content is not None else []
    return int(np.mean(sizes) * len(entries)) if sizes else 0


# The work ------------------------------------------------------------------------------------------------------------


def pack(entry, shorter_side, quality):
    """Return (bytes to keep, None), or (None, what is wrong with the image)."""
    try:
        return packed_jpeg(entry.place.read(), shorter_side, quality), None
    except Exception as error:  # decoders fail in their own ways; whatever it is, the image is named and left out
        return None, f"{type(error).__name__}: {error}"


def pack_some(entries, shorter_side, quality):
    """Return [(bytes or None, problem or None)] of the entries; runs in a worker process."""
    return [pack(entry, shorter_side, quality) for entry in entries]


def pack_split(source, split, destination, job, shorter_side, arguments, stop):
    """Write the packed file of a split, or what is missing of it; return its finished PackedWriter."""
    entries = source.splits[split]
    schema = packed_schema(source.classes, source.class_names)
    writer = PackedWriter(prepared_files(destination)[split], schema, f"{job} {split}")
    if writer.sha256 is not None:
        return writer
    if writer.entries_done:
        print(f"{split}: going on after {writer.entries_done:,} images", flush=True)
    with worker_pool(arguments.num_workers) as pool:
        packed = packed_in_order(pool, entries[writer.entries_done :], shorter_side, arguments)
        packed = stop.between(with_progress(packed, split, len(entries), writer.entries_done))
        while piece := list(itertools.islice(packed, PIECE)):
            rows = [(content, entry.name, entry.label) for entry, (content, problem) in piece if problem is None]
            bad = [
                [f"{source.classes[entry.label]}/{entry.name}", problem] for entry, (_, problem) in piece if problem is not None
            ]
            writer.append(rows, len(piece), bad)
    writer.finish()
    return writer


def packed_in_order(pool, entries, shorter_side, arguments):
    """Yield (entry, pack's result) of each entry in order, made by the pool's processes a few jobs ahead."""
    ahead = collections.deque()
    for start in range(0, len(entries), JOB):
        some = entries[start : start + JOB]
        ahead.append((some, pool.submit(pack_some, some, shorter_side, arguments.quality)))
        if len(ahead) > 4 * arguments.num_workers:
            some, result = ahead.popleft()
            yield from zip(some, result.result(), strict=True)
    for some, result in ahead:
        yield from zip(some, result.result(), strict=True)


def with_progress(items, split, total, done):
    """Yield the items, and show how far they are: a bar on a terminal, a line every half a minute elsewhere."""
    on_terminal = sys.stderr.isatty()
    started = said = time.monotonic()
    bar = tqdm(
        total=total, initial=done, desc=split, unit="image", unit_scale=True, disable=not on_terminal, dynamic_ncols=True
    )
    with bar:
        for count, item in enumerate(items, start=1):
            yield item
            bar.update()
            now = time.monotonic()
            if not on_terminal and now - said >= PLAIN_LINE_SECONDS:
                said, rate = now, count / (now - started)
                left = (total - done - count) / rate / 60
                print(f"{split}: {done + count:,} of {total:,} images, {rate:,.0f} images/s, {left:.0f} min left", flush=True)


# Afterwards ----------------------------------------------------------------------------------------------------------


def write_manifest(source, writers, destination, job, arguments):
    """Write the manifest and the checksums, and say what there is and what is missing."""
    manifest = {
        "job": job,
        "source": source.kind,
        "shorter_side": arguments.shorter_side,
        "quality": arguments.quality,
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


if __name__ == "__main__":
    protect_output()
    sys.exit(run_program("prepare_data.py", main, parse_arguments()))
