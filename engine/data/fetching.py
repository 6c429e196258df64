"""Packed images from object storage to this machine's disk: in parallel, gone on with after a kill, verified by SHA256SUMS."""

import errno
import hashlib
import os
import re
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

from engine.system import object_store
from engine.system.disks import free_bytes
from engine.system.errors import DataError
from engine.system.files import SCHEMES, make_folder, replacing
from engine.system.lock import FolderLock
from engine.system.object_store import ObjectStore, StorageError

CHECKSUMS = "SHA256SUMS"
RANGE_BYTES, THREADS = 8 << 20, 8


def images_folder(config):
    """Return the folder on this machine where a configuration's images lie, or will lie once they are fetched."""
    return config["local_data_dir"] if config["data_dir"].startswith(SCHEMES) else config["data_dir"]


def fetch_images(config, log, resumed=False):
    """Copy the files that SHA256SUMS at data_dir names to local_data_dir, unless they are there; nothing where it is no URL.

    Args:
        resumed: the run knows its images by their labels, and goes on with whole ones here while the storage does not answer.
    Raises:
        DataError: they are not there, cannot be read, have no room here, or arrive damaged.
    """
    if not config["data_dir"].startswith(SCHEMES):
        return
    folder = Path(os.path.abspath(config["local_data_dir"]))
    lock = FolderLock(folder.parent / f".{folder.name}.lock", "local_data_dir", "name another --local-data-dir")
    lock.acquire(log)
    try:
        _fetch(ObjectStore(config["data_dir"], "data_dir"), folder, log, resumed)
    except StorageError as error:
        raise DataError(f"data_dir = {config['data_dir']!r}: {error}; what has arrived stays, start again") from error
    except OSError as error:
        raise DataError(
            f"local_data_dir = {config['local_data_dir']!r} cannot be written to: {error}. What has arrived stays; make room, "
            "or name another --local-data-dir"
        ) from error
    finally:
        lock.release()


def _fetch(store, folder, log, resumed=False):
    try:
        listing = _listing(store, log)
    except StorageError as error:
        if not (resumed and _is_complete(folder)):
            raise
        log(f"WARNING: data_dir: {store.url}: {error}; the run goes on with the images in {folder}, verified when they came")
        return
    if listing is None:
        there = _what_is_there(store)
        raise DataError(f"{store.url} holds no {CHECKSUMS}, {there}: copy the folder that prepare_data.py wrote there")
    checksums, sizes = _checksums_in(listing, store.url), {}
    for name in checksums:
        if (found := store.head(name)) is None:
            raise DataError(f"{store.url} holds no {name}, which its {CHECKSUMS} names")
        sizes[name] = found.bytes
    known = folder / CHECKSUMS
    if is_same := known.is_file() and known.read_bytes() == listing:  # verified when they came
        sizes = {name: size for name, size in sizes.items() if _bytes_of(folder / name) != size}
        if not sizes:
            return
    _require_room(folder, sizes)
    make_folder(folder)
    if not is_same:
        known.unlink(missing_ok=True)  # of other files than those that come now
    log(f"fetching {sum(sizes.values()) / 1e9:.2f} GB from {store.url} to {folder}")
    for name, size in sizes.items():
        _fetch_file(store, name, size, checksums[name], folder)
    with replacing(known) as file:
        file.write(listing)


def _listing(store, log):
    """Return the SHA256SUMS of a store, or None if it has none; storage that does not answer is asked again for a while."""
    for seconds in object_store.RANGE_TRIES_SECONDS:
        try:
            return store.read(CHECKSUMS)[0]
        except StorageError as error:
            log(f"WARNING: data_dir: {store.url}: {error}; tried again in {seconds:.0f} s")
            time.sleep(seconds)
    return store.read(CHECKSUMS)[0]


def _is_complete(folder):
    """Return whether a folder has all files that its SHA256SUMS names; that is written once they are verified."""
    listing = folder / CHECKSUMS
    return listing.is_file() and all((folder / name).is_file() for name in _checksums_in(listing.read_bytes(), folder))


def _what_is_there(store):
    try:
        found = store.some_names()
    except StorageError as error:
        return f"and there may be no such bucket ({error})"
    return f"but {', '.join(found[:3])}" if found else "nor anything else"


def _checksums_in(listing, place):
    """Return {name: SHA-256} of what sha256sum wrote."""
    lines = listing.decode("utf-8", "replace").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?([^/\\]+)", line) for line in lines]
    if not found or not all(found):
        line = lines[found.index(None)] if lines else ""
        raise DataError(f"{place}/{CHECKSUMS} is not what sha256sum writes of the files beside it: {line!r}")
    return {line[2]: line[1] for line in found}


def _bytes_of(path):
    return path.stat().st_size if path.is_file() else None


def _arrived(folder, name):
    """Return the starts of the ranges of a file that a killed process has brought."""
    try:
        starts = _ranges(folder, name).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return set()
    return {int(start) for start in starts} if _part(folder, name).exists() else set()


def _part(folder, name):
    return folder / f".{name}.part"


def _ranges(folder, name):
    return folder / f".{name}.ranges"


def _require_room(folder, sizes):
    """Raise DataError if files of these sizes, in part there already, have no room in the folder."""
    needed = sum(sizes.values()) - sum(RANGE_BYTES * len(_arrived(folder, name)) for name in sizes)
    free = free_bytes(folder)
    if needed > free:
        raise DataError(
            f"local_data_dir = {str(folder)!r}: {needed / 1e9:.2f} GB are still to be fetched, and {free / 1e9:.2f} GB are "
            "free: make room there, or name another --local-data-dir"
        )


def _fetch_file(store, name, size, checksum, folder):
    """Fetch one file by ranges; those that a killed process has brought are on the list beside it."""
    part, ranges, done = _part(folder, name), _ranges(folder, name), _arrived(folder, name)
    with open(part, "r+b" if done else "wb") as file, open(ranges, "a" if done else "w", buffering=1) as list_of_ranges:
        os.truncate(file.fileno(), size)

        def fetch(start):
            content = store.read_range_retried(name, start, min(start + RANGE_BYTES, size))
            if os.pwrite(file.fileno(), content, start) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))
            os.fsync(file.fileno())  # before the list says so
            list_of_ranges.write(f"{start}\n")

        with ThreadPool(THREADS) as pool:  # a ThreadPoolExecutor would wait for its threads where the run is asked to stop
            for _ in pool.imap(fetch, (start for start in range(0, size, RANGE_BYTES) if start not in done)):
                pass
    with open(part, "rb") as file:
        arrived = hashlib.file_digest(file, "sha256").hexdigest()
    ranges.unlink()
    if arrived != checksum:
        part.unlink()
        raise DataError(f"{name} from {store.url} is not what its {CHECKSUMS} says: it was damaged there or on its way")
    os.replace(part, folder / name)
