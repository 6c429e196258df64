"""Packed images from object storage to this machine's disk: in parallel, gone on with after a kill, verified by SHA256SUMS."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.system.errors import DataError
from engine.system.files import SCHEMES, replacing
from engine.system.lock import FolderLock
from engine.system.object_store import ObjectStore, StorageError

CHECKSUMS = "SHA256SUMS"
RANGE_BYTES, THREADS = 32 << 20, 8


def images_folder(config):
    """Return the folder on this machine where a configuration's images lie, or will lie once they are fetched."""
    return config["local_data_dir"] if config["data_dir"].startswith(SCHEMES) else config["data_dir"]


def fetch_images(config, log):
    """Copy the files that SHA256SUMS at data_dir names to local_data_dir, unless they are there; nothing where it is no URL.

    Raises:
        DataError: they are not there, cannot be read, or arrive damaged.
    """
    if not config["data_dir"].startswith(SCHEMES):
        return
    folder = Path(config["local_data_dir"])
    lock = FolderLock(folder.with_name(f".{folder.name}.lock"), "local_data_dir", "name another --local-data-dir")
    lock.acquire(log)
    try:
        _fetch(ObjectStore(config["data_dir"], "data_dir"), folder, log)
    except StorageError as error:
        raise DataError(f"data_dir = {config['data_dir']!r}: {error}; what has arrived stays, start again") from error
    finally:
        lock.release()


def _fetch(store, folder, log):
    listing, _ = store.read(CHECKSUMS)
    if listing is None:
        raise DataError(f"{store.url} holds no {CHECKSUMS}: copy the folder that prepare_data.py wrote there")
    names = {name.lstrip("*"): checksum for checksum, name in (line.split() for line in listing.decode().splitlines())}
    there = (folder / CHECKSUMS).read_bytes() if (folder / CHECKSUMS).is_file() else None
    if there == listing and all((folder / name).is_file() for name in names):
        return  # verified when they came
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (there == listing and (folder / name).is_file())]
    sizes = {}
    for name in missing:
        if (found := store.head(name)) is None:
            raise DataError(f"{store.url} holds no {name}, which its {CHECKSUMS} names")
        sizes[name] = found.bytes
    log(f"fetching {sum(sizes.values()) / 1e9:.2f} GB from {store.url} to {folder}")
    for name, size in sizes.items():
        _fetch_file(store, name, size, names[name], folder)
    with replacing(folder / CHECKSUMS) as file:
        file.write(listing)


def _fetch_file(store, name, size, checksum, folder):
    """Fetch one file by ranges; those that a killed process has brought are on the list beside it."""
    part, ranges = folder / f".{name}.part", folder / f".{name}.ranges"
    done = {int(line) for line in ranges.read_text().split("\n")[:-1]} if ranges.exists() and part.exists() else set()
    with open(part, "r+b" if done else "wb") as file, open(ranges, "a" if done else "w", buffering=1) as list_of_ranges:
        os.truncate(file.fileno(), size)

        def fetch(start):
            os.pwrite(file.fileno(), store.read_range(name, start, min(start + RANGE_BYTES, size)), start)
            os.fsync(file.fileno())  # before the list says so
            list_of_ranges.write(f"{start}\n")

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fetch, (start for start in range(0, size, RANGE_BYTES) if start not in done)))
    with open(part, "rb") as file:
        arrived = hashlib.file_digest(file, "sha256").hexdigest()
    ranges.unlink()
    if arrived != checksum:
        part.unlink()
        raise DataError(f"{name} from {store.url} is not what its {CHECKSUMS} says: it was damaged there or on its way")
    os.replace(part, folder / name)
