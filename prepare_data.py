"""Prepare ImageNet, or any set of labelled images, for training: one packed file per split.

python prepare_data.py SOURCE data/imagenet

SOURCE may be a folder with the official ILSVRC2012_*.tar files, Kaggle's archives or the tree unpacked from them, Hugging
Face's parquet files, a folder that the datasets library saved, WebDataset shards, or a folder or an archive of train/<class>/*
and val/<class>/*; docs/data_forms.md has the list. Training images are re-encoded to a shorter side of 352 px, which makes
them faster to read; validation images are kept byte for byte. Killed at any instant, the same command goes on where it was.
"""

import sys

import torch

from engine.cli.command_line import FlagsParser
from engine.data.images import PACKED_SHORTER_SIDE, packed_jpeg
from engine.preparation.archives import delete_uncompressed
from engine.preparation.forms import open_source
from engine.preparation.packing import (
    Packing,
    ReadFailed,
    add_known_class_names,
    announce,
    files_to_overwrite,
    is_prepared,
    job_id,
    pack_split,
    refuse_to_replace_others,
    refuse_to_replace_source,
    write_manifest,
)
from engine.preparation.source import Options
from engine.system.console import protect_output
from engine.system.errors import DataError, run_program
from engine.system.files import path_argument
from engine.system.interruption import Interrupted, StopRequest
from engine.system.lock import folder_lock
from engine.system.workers import WorkerDied, available_cores


def main(arguments):
    torch.set_num_threads(1)  # here and, inherited, in the workers
    with folder_lock(arguments.destination, "DESTINATION", print, "prepare into another folder") as lock:
        if lock.note:
            print(lock.note)
        try:
            return prepare(arguments)
        except DataError:  # after any other end the same command goes on, and needs them
            delete_uncompressed(arguments.destination)
            raise


def prepare(arguments):
    """Pack the source, or go on with it; return the exit status."""
    destination = arguments.destination
    packing = Packing(destination, packed_jpeg, arguments.shorter_side, arguments.quality, arguments.num_workers)
    source = find_source(arguments)
    job = job_id(source, packing)
    refuse_to_replace_source(source, destination)
    refuse_to_replace_others(destination)
    if not arguments.overwrite and is_prepared(destination, job):
        print(f"{destination} is prepared already, from images of the same names and sizes in the same way")
        delete_uncompressed(destination)
        return 0
    overwritten = files_to_overwrite(destination, job) if arguments.overwrite else []
    announce(source, packing, overwritten)
    for path in overwritten:
        path.unlink()
    with StopRequest() as stop:
        try:
            writers = {split: pack_split(source, split, packing, job, stop) for split in source.splits}
        except (Interrupted, ReadFailed, WorkerDied, OSError) as cause:
            stop_asked = stop.cause is not None  # then a worker that got the signal as well is no cause of its own
            what = f"stopped by {stop.cause}" if stop_asked else f"stopped: {cause}"
            print(f"{what}. The same command goes on from here", file=sys.stdout if stop_asked else sys.stderr)
            return stop.exit_code or 1
    write_manifest(source, writers, packing, job)
    delete_uncompressed(destination)
    return 0


def find_source(arguments):
    """Return the Source that is to be packed; raise DataError if there is none that is whole."""
    print(f"looking at {arguments.source} ...", flush=True)
    options = Options(arguments.destination, arguments.image_column, arguments.label_column)
    source = open_source(arguments.source, options)
    add_known_class_names(source)
    return source


def parse_arguments(arguments=None):
    """Return what the command line asks for; ends the program with status 2 where that is impossible."""
    parser = FlagsParser("prepare_data.py", description=__doc__)
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


if __name__ == "__main__":
    protect_output()
    sys.exit(run_program("prepare_data.py", main, parse_arguments()))
