"""Files where they lie: in zip and tar archives, in tars inside of tars, in parquet; read without unpacking.

A name inside an archive is never used as a path. Members that point out of their archive, and links, are refused and listed.
A tar must be whole: Python's tarfile takes a bad header, or none, for the end. A compressed tar cannot be read from the
middle: it is uncompressed to a file beside the destination first; its checksum proves it to be whole.
"""

import bz2
import errno
import functools
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import NamedTuple

from engine.system.errors import DataError
from engine.system.files import replacing

OF_WINDOWS = 0  # the system that made a member of a zip: no name there has a backslash in it, and some libraries separate by it
BLOCK = 512  # bytes; a tar consists of these
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # how such a file begins: what reads it


class FileSlice(NamedTuple):
    """Bytes that lie in a file as they are: a file of its own, a member of a tar, a row of an Arrow file."""

    file: str | bytes
    start: int
    length: int

    def read(self):
        with open(self.file, "rb") as file:
            file.seek(self.start)
            content = file.read(self.length)
        if len(content) != self.length:
            raise OSError(f"{os.fsdecode(self.file)} ends in the middle of it")
        return content


class Zipped(NamedTuple):
    """A member of a zip file."""

    file: str
    start: int  # of the member's local header
    length: int  # compressed
    checksum: int  # CRC-32 of the content

    def read(self):
        with open(self.file, "rb") as file:
            file.seek(self.start)
            header = file.read(30)
            if len(header) != 30 or header[:4] != b"PK\x03\x04":
                raise OSError(f"{self.file} is damaged at byte {self.start}")
            method, name_length, extra_length = struct.unpack_from("<H16xHH", header, 8)
            file.seek(name_length + extra_length, os.SEEK_CUR)
            content = file.read(self.length)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompress(content, wbits=-15)
        if zlib.crc32(content) != self.checksum:
            raise OSError(f"{self.file} is damaged: a member's checksum does not match")
        return content


class ParquetRow(NamedTuple):
    """A row of a parquet file with a column of images, structs with `bytes` or the bytes themselves."""

    file: str
    row_group: int
    row: int
    column: str  # 'image.bytes', or 'image'

    def read(self):
        value = _row_group(self.file, self.row_group, self.column)[self.row].as_py()
        content = (value or {}).get("bytes") if self.column.endswith(".bytes") else value
        if content is None:
            raise OSError(f"{self.file} holds no bytes in row {self.row} of row group {self.row_group}")
        return content


@functools.lru_cache(maxsize=1)  # the rows are read in order
def _row_group(file, row_group, column):
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file).read_row_group(row_group, columns=[column]).column(0)


# Listings: every regular file in an archive ---------------------------------------------------------------------------


class Listing(NamedTuple):
    files: dict  # {path with slashes, relative: FileSlice or Zipped}
    folders: set  # paths, as far as the archive names them by themselves
    refused: list  # (path, reason)
    hostile: list  # names that lead out of the archive


def _path_inside(name):
    """Return an archive member's name as a path, or None if it could lead out of a folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", name) is not None or "\0" in name:
        return None
    inside = str(PurePosixPath(name))
    return "" if inside == "." else inside


def zip_listing(path):
    """Return the Listing of a zip file; only what is stored or deflated, unencrypted, and no link is taken."""
    listing = Listing({}, set(), [], [])
    with zipfile.ZipFile(path) as archive:
        has_slashes = any("/" in member.orig_filename for member in archive.infolist())
        for member in archive.infolist():
            name = member.orig_filename
            if not member.flag_bits & 0x800:  # not said to be UTF-8: the bytes as they are on disk
                name = name.encode("cp437").decode("utf-8", "surrogateescape")
            if "/" not in name and (member.create_system == OF_WINDOWS or not has_slashes):
                name = name.replace("\\", "/")
            inside = _path_inside(name)
            if inside is None:
                listing.hostile.append(name)
            elif name.endswith("/"):
                listing.folders.add(inside)
            elif member.external_attr >> 28 == 0o12:
                listing.refused.append((inside, "a symbolic link in an archive"))
            elif member.flag_bits & 1:
                listing.refused.append((inside, "encrypted"))
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                listing.refused.append((inside, "compressed in an unusual way"))
            else:
                _add(listing, inside, Zipped(str(path), member.header_offset, member.compress_size, member.CRC))
    return listing


def tar_listing(path, start=0, length=None, what=None):
    """Return the Listing of an uncompressed tar file, or of one of `length` bytes inside of it at `start`.

    Args:
        what: the archive in words, for messages; default: its path.
    Raises:
        DataError: it is damaged, cut off, or no tar; says at which byte.
    """
    listing = Listing({}, set(), [], [])
    length = os.path.getsize(path) - start if length is None else length
    what = what or str(path)
    with _Window(path, start, length) as window:
        archive = None
        try:
            archive = tarfile.open(fileobj=window, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
            for member in archive:
                inside = _path_inside(member.name)
                if inside is None:
                    listing.hostile.append(member.name)
                elif member.isdir():
                    listing.folders.add(inside)
                elif not member.isreg() or member.issparse():
                    listing.refused.append((inside, "a link or a special file in an archive"))
                elif member.offset_data + member.size > length:
                    raise DataError(f"{what} is cut off: {member.name} ends behind its end; download it again")
                else:
                    _add(listing, inside, FileSlice(str(path), start + member.offset_data, member.size))
        except DataError:
            raise
        except Exception as error:  # a damaged header can say anything, and tarfile fails in many ways
            if getattr(error, "errno", None) not in (None, errno.EINVAL):  # which a seek to a damaged place is
                raise  # it is the disk
            at = f" at byte {start + archive.offset:,}" if archive is not None else ""
            raise DataError(f"{what} is no tar, or a damaged one{at} ({error}); download it again") from error
        _require_the_end(window, archive.offset, start, what)
    return listing


def _require_the_end(window, position, start, what):
    """Raise DataError unless the tar ends at `position` in the window: two blocks of zeros, and nothing but zeros behind."""
    window.seek(position)
    zeros = 0
    while content := window.read(2**20):
        stripped = content.lstrip(b"\0")
        if stripped:
            at = position + zeros + len(content) - len(stripped)
            what_lies_there = "no whole header of a file" if zeros + len(content) - len(stripped) < 2 * BLOCK else "something"
            raise DataError(
                f"{what} is damaged: {what_lies_there} at byte {start + at:,}, where it should have ended or gone on; "
                "download it again"
            )
        zeros += len(content)
    if zeros < 2 * BLOCK:
        raise DataError(f"{what} is cut off: it has no end at byte {start + position:,}; download it again")


def _add(listing, path, place):
    if path in listing.files:
        listing.refused.append((path, "a second file of the same name; the last one counts"))
    listing.files[path] = place


# Compressed tars -----------------------------------------------------------------------------------------------------


def opener_of_compressed(path):
    """Return the function that opens a compressed file for reading, or None if it is not compressed."""
    with open(path, "rb") as file:
        beginning = file.read(8)
    return next((opener for magic, opener in COMPRESSED.items() if beginning.startswith(magic)), None)


def uncompressed(path, scratch, log):
    """Return the path of the tar in a compressed file, uncompressed in the folder `scratch` unless it lies there already.

    Raises:
        DataError: the file is damaged or cut off, the disk is too small, or `scratch` is None.
    """
    if scratch is None:
        raise DataError(f"{path} is compressed and can only be read from its beginning")
    target = _copy_of(path, scratch)
    if target.exists():
        return target
    scratch.mkdir(parents=True, exist_ok=True)
    size = os.path.getsize(path)
    if shutil.disk_usage(scratch).free < size:
        raise DataError(
            f"{path} is compressed; uncompressed it takes more than its {size / 1e9:,.1f} GB, which are not free in "
            f"{scratch}: name a folder on another disk"
        )
    log(f"{path.name} is compressed: it is uncompressed to {scratch} first, and that file is deleted at the end")
    try:
        with opener_of_compressed(path)(path) as file, replacing(target) as whole:
            shutil.copyfileobj(file, whole, 2**24)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, ValueError) as error:
        raise DataError(f"{path} is damaged or cut off ({error}); download it again") from error
    except OSError as error:
        if error.errno is None:  # bz2 has no error of its own
            raise DataError(f"{path} is damaged or cut off ({error}); download it again") from error
        raise DataError(f"{path} could not be uncompressed to {scratch}: {error}") from error
    return target


def _copy_of(path, scratch):
    """Return the path of the tar that `uncompressed` makes of a file."""
    status = os.stat(path)
    same = hashlib.sha256(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return scratch / f".uncompressed-{same.hexdigest()[:16]}.tar"


def delete_uncompressed(scratch, but=()):
    """Delete what `uncompressed` has written in the folder `scratch`, or begun to, except from the files `but`."""
    if scratch is None:
        return
    kept = {_copy_of(path, scratch) for path in but}
    for path in scratch.glob(".*uncompressed-*.tar*"):
        if path not in kept:
            path.unlink()


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, path, start, length):
        super().__init__()
        self._file, self._start, self._length, self._position = open(path, "rb"), start, length, 0  # noqa: SIM115

    def seekable(self):
        return True

    def readable(self):
        return True

    def tell(self):
        return self._position

    def seek(self, offset, whence=os.SEEK_SET):
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def readinto(self, buffer):
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[: max(0, min(len(buffer), self._length - self._position))])
        self._position += count
        return count

    def close(self):
        self._file.close()
        super().close()
