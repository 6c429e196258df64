"""Files where they lie: in folders, in zip and tar archives, in tars inside of tars, in parquet; read without unpacking.

A name inside an archive is never used as a path. Members and links that point out of their archive or folder are refused and
listed.
"""

import functools
import io
import os
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from engine.errors import DataError


class Stored(NamedTuple):
    """Bytes that lie in a file as they are: a file of its own, a member of a tar, a row of an Arrow file."""

    file: str
    start: int
    length: int

    def read(self):
        with open(self.file, "rb") as file:
            file.seek(self.start)
            content = file.read(self.length)
        if len(content) != self.length:
            raise OSError(f"{self.file} ends in the middle of it")
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
    """A row of a parquet file with the column `image`, a struct with `bytes`."""

    file: str
    row_group: int
    row: int

    def read(self):
        content = _row_group(self.file, self.row_group)[self.row].as_py()
        if content is None:
            raise OSError(f"{self.file} holds no bytes in row {self.row} of row group {self.row_group}")
        return content


@functools.lru_cache(maxsize=1)  # the rows are read in order
def _row_group(file, row_group):
    import pyarrow.parquet

    return (
        pyarrow.parquet.ParquetFile(file).read_row_group(row_group, columns=["image.bytes"])["image"].combine_chunks().field(0)
    )


# Listings: every regular file below a folder or in an archive ---------------------------------------------------------


class Listing(NamedTuple):
    files: dict  # {path with slashes, relative: Stored or Zipped}
    refused: list


def folder_listing(root):
    """Return the Listing of a folder; links that lead out of it, or round in it, are refused."""
    files, refused = {}, []

    def visit(folder, prefix):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_symlink():
                target = Path(entry.path).resolve()
                if not target.is_relative_to(root):
                    refused.append(f"{prefix}{entry.name}: a symbolic link out of the folder")
                    continue
                if target.is_dir() and Path(entry.path).is_relative_to(target):
                    refused.append(f"{prefix}{entry.name}: a symbolic link to a folder around it")
                    continue
            if entry.is_dir():
                visit(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                files[f"{prefix}{entry.name}"] = Stored(entry.path, 0, entry.stat().st_size)

    visit(root, "")
    return Listing(files, refused)


def _is_hostile(name):
    """Return whether an archive member's name could lead out of a folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", name) is not None or "\0" in name


def zip_listing(path):
    """Return the Listing of a zip file; only what is stored or deflated, unencrypted, and no link is taken."""
    files, refused = {}, []
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if _is_hostile(member.filename):
                refused.append(f"{member.filename}: a path out of the archive")
            elif member.external_attr >> 28 == 0o12:
                refused.append(f"{member.filename}: a symbolic link")
            elif member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                refused.append(f"{member.filename}: encrypted, or compressed in an unusual way")
            else:
                files[member.filename] = Zipped(str(path), member.header_offset, member.compress_size, member.CRC)
    return Listing(files, refused)


def tar_listing(path, start=0, length=None):
    """Return the Listing of an uncompressed tar file, or of one of `length` bytes inside of it at `start`."""
    files, refused = {}, []
    length = path.stat().st_size - start if length is None else length
    try:
        with tarfile.open(fileobj=_Window(path, start, length), mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                if _is_hostile(member.name):
                    refused.append(f"{member.name}: a path out of the archive")
                elif not member.isreg() or member.issparse():
                    refused.append(f"{member.name}: a link or a special file")
                elif member.offset_data + member.size > length:
                    raise DataError(f"{path} is cut off: {member.name} ends behind its end; download it again")
                else:
                    files[member.name] = Stored(str(path), start + member.offset_data, member.size)
    except tarfile.ReadError as error:
        raise DataError(f"{path} is not a plain tar ({error}); unpack a compressed one first") from error
    return Listing(files, refused)


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
