"""One run to a place in object storage: the folder's lock and its take-over rule (engine/system/lock.py), by conditional put.

The holder writes the lock anew every SIGN_OF_LIFE_SECONDS, on the condition that it is still its own. Whoever finds a holder
gone puts itself in its place on the condition that the object is the one it has seen, so that one of several does it.
"""

import contextlib
import json
import threading
import time
import uuid

from engine.system import lock
from engine.system.errors import InUse, TrainingStopped
from engine.system.interruption import in_a_thread
from engine.system.lock import LOCK, UNKNOWN, FolderLock, Holder, process_lives, this_process
from engine.system.object_store import Conflict, StorageError
from engine.system.plain_json import json_object

RELEASE_SECONDS = 10.0  # to give a lock back in, or else it falls silent
ASKING_SECONDS = 1.0  # between two looks at a lock that may be given up


def lock_of_store(store, setting, cure):
    """Return the lock of an ObjectStore, not yet acquired: a FolderLock where the storage is a folder.

    Args:
        setting: what the store's URL is the value of.
        cure: what somebody can do who is refused, besides waiting.
    """
    if store.is_folder:
        return FolderLock(store.path / LOCK, setting, cure)
    return StoreLock(store, setting, cure)


class StoreLock:
    """A lock object that this process holds from acquire() to release()."""

    def __init__(self, store, setting, cure):
        self.store, self.setting, self.cure = store, setting, cure
        self.me = this_process()
        self.note = None  # how it was taken over, if it was
        self.lost_to = None
        self._version = None
        self._released = threading.Event()

    def acquire(self, log):
        """Take the lock; take it over from a holder that is gone.

        Args:
            log: called with a text when it takes a while to know whether another holder is gone.
        Raises:
            InUse: somebody else holds it.
            StorageError: the storage cannot be reached.
        """
        while not self._try(create=True):
            content, found = self.store.read(LOCK)
            if content is None:  # released in between
                continue
            holder = _holder_in(content)
            why_gone = self._why_gone(holder, found, log)
            if why_gone is None:
                raise InUse(
                    f"{self.store.url} is in use by {holder} ({LOCK}): wait until it has ended, stop it, or {self.cure}"
                )
            if self._try(version=found.version):
                self.note = f"note: {self.store.url}/{LOCK} was taken over from {holder}: {why_gone}"
                break
        threading.Thread(target=self._show_life, name="store-lock", daemon=True).start()

    def _try(self, **condition):
        try:
            sign = {"sign_of_life": uuid.uuid4().hex}  # S3's e_tag of the same bytes is the same
            self._version = self.store.put(LOCK, json.dumps(self.me._asdict() | sign).encode(), **condition)
        except Conflict:
            return self.is_mine()  # a put may have been done although its answer was lost
        return True

    def is_mine(self):
        """Return whether the storage says that this process holds the lock."""
        content, found = self.store.read(LOCK)
        if content is None or _holder_in(content) != self.me:
            return False
        self._version = found.version
        return True

    def _why_gone(self, holder, found, log):
        """Return why the holder is known to be gone, or None if it lives; may wait for a sign of life."""
        if holder.machine == self.me.machine:
            return None if process_lives(holder.pid, holder.process_started) else "that process is gone"
        silence = lock.SILENCE_SECONDS
        remaining = min(silence, silence - (self._now_there() - found.modified).total_seconds())
        if remaining > 0:
            log(f"{self.store.url}/{LOCK} is held by {holder}: waiting up to {remaining:.0f} s for a sign of life")
        deadline = time.monotonic() + remaining
        while time.monotonic() < deadline:
            time.sleep(min(ASKING_SECONDS, lock.SIGN_OF_LIFE_SECONDS / 5))
            now = self.store.head(LOCK)
            if now is None or now.version != found.version:
                return None if now else "it was released"
        return f"no sign of life for {silence:.0f} s"

    def _now_there(self):
        """Return the time by the clock of the storage."""
        probe = f"{LOCK}.{uuid.uuid4().hex}"
        self.store.put(probe, b"")
        try:
            return self.store.head(probe).modified
        finally:
            self.store.delete(probe)

    def require(self):
        """Raise TrainingStopped if somebody else has taken the lock over: this process was silent for too long."""
        if self.lost_to is not None:
            raise TrainingStopped(
                f"{self.store.url} was taken over by {self.lost_to}, since this process had given no sign of life for "
                f"{lock.SILENCE_SECONDS:.0f} s; nothing more is written there"
            )

    def release(self):
        """Give the lock back, unless somebody else has taken it over."""
        self._released.set()
        if self._version is not None and self.lost_to is None:
            with contextlib.suppress(StorageError, TimeoutError):
                in_a_thread(self._give_back, seconds=RELEASE_SECONDS)

    def _give_back(self):
        if self.is_mine():
            self.store.delete(LOCK)

    def _show_life(self):
        while not self._released.wait(lock.SIGN_OF_LIFE_SECONDS):
            with contextlib.suppress(StorageError):  # silence is what others are to notice
                if self._try(version=self._version) or self._released.is_set():
                    continue
                content, _ = self.store.read(LOCK)
                if content is None:
                    self._try(create=True)  # deleted by hand
                elif (holder := _holder_in(content)) != UNKNOWN:
                    self.lost_to = holder


def _holder_in(content):
    try:
        facts = json_object(content)
        return Holder(**{name: facts[name] for name in Holder._fields if name in facts})
    except (ValueError, TypeError):
        return UNKNOWN
