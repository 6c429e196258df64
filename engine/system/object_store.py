"""Object storage as the programs see it: S3, Google Cloud Storage, Azure, or a folder, through obstore, which is optional."""

import contextlib
import re
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from engine.system.errors import UserError, first_line
from engine.system.files import ADDRESS, make_folder
from engine.system.interruption import in_a_thread

CHUNK_BYTES = 8 << 20
# The longest silence of the other side: while an answer arrives, and until the answer to a part that was sent, of which four at
# once make 0.28 MB/s the slowest line. An answer that goes on arriving may take a day.
TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "120s", "timeout": "24h", "allow_http": True}  # http: only if asked for
RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}  # of one request; callers try again on their own
RANGE_TRIES_SECONDS = (1.0, 5.0, 15.0, 30.0)  # between tries to read a part of a large object


class StorageError(Exception):
    """The storage cannot be reached, or does not do what is asked."""


class Conflict(StorageError):
    """The object is there already, or is not any more what the caller knew."""


class Version(NamedTuple):
    """Which contents of an object: S3 and Azure go by the e_tag, Google by the version, so both are kept."""

    e_tag: str | None
    version: str | None

    def conditions(self):
        """Return what is known of it, as obstore takes it."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class StoredObject(NamedTuple):
    """What is known of an object."""

    bytes: int
    version: Version
    modified: datetime  # by the clock of the storage


class ObjectStore:
    """The objects under a URL, by names with slashes.

    Args:
        url: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix; or the path of a folder, which is made.
        setting: what the URL is the value of, for messages.
    Raises:
        UserError: obstore is not installed, or knows no such storage.
    """

    def __init__(self, url, setting):
        self.url = url.rstrip("/")
        self.is_folder = not ADDRESS.match(url)
        self.path = Path(url).absolute() if self.is_folder else None
        if not self.is_folder and (cut := re.search("[?#]", url)):  # two runs would share a place
            raise UserError(f"{setting} = {url!r}: what follows {cut[0]} would not count: name it without ? and #")
        try:
            import obstore
            from obstore.store import LocalStore, from_url
        except ImportError as error:
            raise UserError(f"{setting} = {url!r}: obstore is not installed: pip install obstore") from error
        self._obstore = obstore
        try:
            if self.is_folder:
                make_folder(self.path)
                self._store = LocalStore(self.path)
            else:
                self._store = from_url(url, client_options=TIMEOUTS, retry_config=RETRIES)
        except Exception as error:  # of many kinds: unknown scheme, missing bucket, broken credentials
            raise UserError(f"{setting} = {url!r} cannot be used: {first_line(error)}") from error

    @contextlib.contextmanager
    def _translated(self):
        from obstore import exceptions

        try:
            yield
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            raise Conflict(first_line(error)) from error
        except (exceptions.BaseError, OSError) as error:
            raise StorageError(first_line(error)) from error

    def put(self, name, content, create=False, version=None):
        """Write an object, whole or not at all; return its new Version.

        Args:
            content: bytes, or an iterator of bytes; an exception from it leaves nothing there.
            create: the object must not be there yet.
            version: Version that the object must have.
        Raises:
            Conflict: it is there already, or another one.
            StorageError: it could not be written.
        """
        mode = "create" if create else "overwrite" if version is None else version.conditions()
        upload = {"chunk_size": CHUNK_BYTES, "max_concurrency": 4}
        with self._translated():
            return _version_in(in_a_thread(self._obstore.put, self._store, name, content, mode=mode, **upload))

    def head(self, name):
        """Return the StoredObject of a name, or None if there is none."""
        with self._translated():
            try:
                found = in_a_thread(self._obstore.head, self._store, name)
            except FileNotFoundError:
                return None
        return StoredObject(found["size"], _version_in(found), found["last_modified"])

    def read(self, name):
        """Return (contents, StoredObject) of a small object, or (None, None) if there is none."""
        with self._translated():
            try:
                found = in_a_thread(self._obstore.get, self._store, name)
                content, meta = bytes(in_a_thread(found.bytes)), found.meta
            except FileNotFoundError:
                return None, None
        return content, StoredObject(meta["size"], _version_in(meta), meta["last_modified"])

    def read_range(self, name, start, end):
        """Return the bytes from `start` to before `end` of an object."""
        with self._translated():
            return bytes(in_a_thread(self._obstore.get_range, self._store, name, start=start, end=end))

    def read_range_retried(self, name, start, end):
        """Return what read_range does, asked for again for a while where the storage does not answer."""
        for seconds in RANGE_TRIES_SECONDS:
            try:
                return self.read_range(name, start, end)
            except StorageError:
                time.sleep(seconds)
        return self.read_range(name, start, end)

    def stream(self, name):
        """Yield the bytes of an object, by parts: on a bad line only a part is asked for again.

        Raises:
            StorageError: there is no such object, or it cannot be read.
        """
        found = self.head(name)
        if found is None:
            raise StorageError(f"{self.url} holds no {name}")
        for start in range(0, found.bytes, CHUNK_BYTES):
            yield self.read_range_retried(name, start, min(start + CHUNK_BYTES, found.bytes))

    def list(self, prefix=""):
        """Return {name: bytes} of the objects under a folder."""
        with self._translated():
            parts = in_a_thread(list, self._obstore.list(self._store, prefix or None))
        return {found["path"]: found["size"] for part in parts for found in part}

    def some_names(self):
        """Return the names of the first objects, as many as the storage tells at a time."""
        with self._translated():
            return [found["path"] for found in in_a_thread(next, iter(self._obstore.list(self._store)), [])]

    def delete_unfinished(self, names):
        """Delete what kills in the middle of a put have left of files in a folder, which list() passes over.

        obstore writes NAME beside itself as NAME#1, NAME#2. What S3 keeps of them is a lifecycle rule's to delete.

        Args:
            names: patterns of names, as for Path.glob.
        """
        for path in (path for name in names for path in self.path.glob(f"{name}#*")) if self.is_folder else ():
            if path.name.rpartition("#")[2].isdecimal():
                with contextlib.suppress(OSError):
                    path.unlink()

    def copy(self, name, other):
        """Let `other` hold what `name` holds; the storage does it by itself."""
        with self._translated():
            if self.is_folder and (self.path / other).exists() and (self.path / other).samefile(self.path / name):
                return  # it is: to rename one name of a file to another of its names would leave both
            in_a_thread(self._obstore.copy, self._store, name, other)

    def delete(self, name):
        """Delete an object; one that is not there stays so."""
        with self._translated(), contextlib.suppress(FileNotFoundError):
            in_a_thread(self._obstore.delete, self._store, name)


def _version_in(facts):
    return Version(facts["e_tag"], facts["version"])
