"""One run to a folder: a lock that says who holds it and since when, and that is taken over once its holder is gone.

The lock is a small file, made by an exclusive create, which network file systems know, too; flock is not relied on. Its holder
touches it every SIGN_OF_LIFE_SECONDS. A holder on this machine is gone when its process is; one elsewhere, or of a folder that
this one is a copy of, when the file has not been touched for SILENCE_SECONDS by the clock of the file system.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from engine.system.distributed import run_on_rank0
from engine.system.errors import CheckpointError, InUse, TrainingStopped
from engine.system.files import make_folder
from engine.system.plain_json import json_object

LOCK = "run.lock"
SIGN_OF_LIFE_SECONDS = 15.0
SILENCE_SECONDS = 120.0


class Holder(NamedTuple):
    """Who holds a lock."""

    host: str
    machine: str  # boot and process namespace: where `pid` means something
    pid: int
    process_started: str  # in clock ticks after the boot; "" where it cannot be known
    since: str  # date and time
    token: str  # of this one time
    inode: int = 0  # of the lock file, which a copy of the folder has not; 0 where it is not known

    def __str__(self):
        return f"process {self.pid} on {self.host}, since {self.since}"


UNKNOWN = Holder("an unknown host", "", 0, "", "an unknown time", "")  # of a lock file that cannot be read


def this_process():
    """Return this process as a Holder."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Holder(socket.gethostname(), _machine(), os.getpid(), _state_and_start(os.getpid())[1], since, uuid.uuid4().hex)


def _machine():
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _state_and_start(pid):
    """Return (state letter, start in clock ticks after the boot) of a process; ('', '') where /proc does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def process_lives(pid, started):
    """Return whether a process of this machine lives that started at that tick, as _state_and_start tells it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    state, began = _state_and_start(pid)
    return state != "Z" and began in ("", started)  # a zombie has ended, its parent has not asked yet


@contextlib.contextmanager
def folder_lock(folder, name, log, cure):
    """Hold the folder's lock, one for all processes of a job; give its FolderLock. A folder that is missing is made.

    Args:
        name: of the setting that the folder is.
        log: called with a text when it takes a while to know whether another holder is gone.
        cure: what somebody can do who is refused, besides waiting.
    Raises:
        InUse: somebody else holds it.
        CheckpointError: the folder cannot be written to.
    """
    folder = Path(folder)
    lock = FolderLock(folder / LOCK, name, cure)
    run_on_rank0(lock.acquire, log)
    try:
        yield lock
    finally:
        lock.release()


class FolderLock:
    """A lock file that this process holds from acquire() to release()."""

    def __init__(self, path, name, cure):
        self.path, self.name, self.cure = path, name, cure
        self.me = this_process()
        self.note = None  # how it was taken over, if it was
        self.lost_to = None
        self._made_folder = False
        self._folder = None  # what tells the folder from another one under its name, once the lock is held
        self._is_replaced, self._looking = False, threading.Lock()
        self._released = threading.Event()

    def acquire(self, log):
        """Take the lock; take it over from a holder that is gone."""
        try:
            self._made_folder = not self.path.parent.exists()
            make_folder(self.path.parent)
            self._acquire(log)
            self._folder = _identity(self.path.parent)
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{self.name} = {str(self.path.parent)!r} cannot be written to: {reason}") from error
        threading.Thread(target=self._show_life, name="folder-lock", daemon=True).start()

    def _acquire(self, log):
        while not self._create():
            holder = self._holder()
            if holder is None:  # released in between
                if self.path.is_symlink():
                    raise CheckpointError(f"{self.path} is a link that leads nowhere: delete it")
                continue
            why_gone = self._why_gone(holder, log)
            if why_gone is None:
                raise InUse(
                    f"{self.path.parent} is in use by {holder} ({self.path.name}): wait until it has ended, stop it, or "
                    f"{self.cure}"
                )
            if self._take_over(holder):
                self.note = f"note: {self.path} was taken over from {holder}: {why_gone}"
                return

    def release(self):
        """Give the lock back, unless somebody else has taken it over."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self._holder() == self.me:
                self.path.unlink()
                if self._made_folder:
                    self.path.parent.rmdir()  # fails where it holds a run by now

    def other_holder(self):
        """Return the Holder that the file names now, if it is another one than this process; else None."""
        holder = self._holder()
        return None if holder == self.me else holder

    def require(self):
        """Return a line to log where the folder was gone, and is made anew; None where it is there.

        Raises:
            TrainingStopped: somebody else has taken the lock over, this process having been silent for too long; or the folder
                was moved away or deleted, and another one with files in it is in its place.
            OSError: the folder cannot be made anew.
        """
        note = None
        if self._folder is not None and not self.path.parent.exists():
            self.path.parent.mkdir(parents=True)
            self._folder = _identity(self.path.parent)
            note = f"WARNING: {self.path.parent} was gone, moved away or deleted, and is made anew; what lay there is not in it"
        self._look()
        if self._is_replaced:
            raise TrainingStopped(
                f"{self.path.parent} is not this run's folder any more, which was moved away or deleted: another one with "
                "files in it is there, and nothing is written to it. Go on with the run where its folder is now: --resume PATH"
            )
        if self.lost_to is not None:
            raise TrainingStopped(
                f"{self.path.parent} was taken over by {self.lost_to}, since this process had given no sign of life for "
                f"{SILENCE_SECONDS:.0f} s, or since the folder was moved away; nothing more is written here"
            )
        return note

    def _create(self, path=None):
        """Create the lock file, or another one, with this process in it; return whether it was not there before."""
        try:
            descriptor = os.open(path or self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        if path is None:
            self.me = self.me._replace(inode=os.fstat(descriptor).st_ino)
        try:
            os.write(descriptor, json.dumps(self.me._asdict()).encode() + b"\n")
        except OSError:
            os.unlink(path or self.path)
            raise
        finally:
            os.close(descriptor)
        return True

    def _holder(self):
        """Return the Holder that the file names, None if there is no file."""
        for _ in range(20):
            try:
                return Holder(**json_object(self.path.read_text(encoding="utf-8")))
            except FileNotFoundError:
                return None
            except (ValueError, TypeError):
                time.sleep(0.1)  # it may be in the writing
        return UNKNOWN

    def _touched(self):
        """Return when the holder last gave a sign of life, in seconds by the file system's clock; None without a file."""
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _why_gone(self, holder, log):
        """Return why the holder is known to be gone, or None if it lives; may wait for a sign of life."""
        if holder.machine == self.me.machine:
            if not process_lives(holder.pid, holder.process_started):
                return "that process is gone"
            if not self._is_copy(holder):
                return None
        touched = self._touched()
        if touched is None:
            return "it was released"
        remaining = min(SILENCE_SECONDS, SILENCE_SECONDS - (self._now_there() - touched))
        if remaining > 0:
            log(f"{self.path} is held by {holder}: waiting up to {remaining:.0f} s for a sign of life")
        deadline = time.monotonic() + remaining
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SIGN_OF_LIFE_SECONDS / 5))
            if self._touched() not in (touched, None):
                return None
            if self._touched() is None:
                return "it was released"
        return f"no sign of life for {SILENCE_SECONDS:.0f} s"

    def _is_copy(self, holder):
        """Return whether this may be the lock file of a copied folder; where inodes do not stay, only silence tells."""
        with contextlib.suppress(FileNotFoundError):
            return holder.inode not in (0, self.path.stat().st_ino)
        return False

    def _now_there(self):
        """Return the time by the clock of the file system, which may be another machine's."""
        probe = self.path.with_name(f".{self.path.name}.{self.me.token}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _take_over(self, holder):
        """Replace the holder's file by this process's; return whether that was done.

        Of several that find the same holder gone, the one that can create the claim on it does it. A claim itself is held for
        an instant; one that is left by a kill is passed over after SILENCE_SECONDS.
        """
        claim = self.path.with_name(f".{self.path.name}.claim-{holder.token or 'unknown'}")
        if not self._create(claim):
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                if self._now_there() - claim.stat().st_mtime > SILENCE_SECONDS:
                    claim.unlink()
            return False
        try:
            if self._holder() != holder:
                return False  # another one was quicker, and has given its claim back
            self.path.unlink(missing_ok=True)
            return self._create()
        finally:
            claim.unlink(missing_ok=True)

    def _show_life(self):
        while not self._released.wait(SIGN_OF_LIFE_SECONDS):
            self._look()

    def _look(self):
        """See who holds the lock, and give a sign of life if it is this process; make the file again where it was deleted."""
        with self._looking, contextlib.suppress(OSError):  # an unreachable folder: silence is what others are to notice
            holder = self._holder() if self._folder is not None else None
            if holder == self.me:
                os.utime(self.path)
            elif holder is not None and holder != UNKNOWN:
                self.lost_to = holder
            elif holder is None and self._folder is not None and not self._released.is_set():
                # of a folder in the place of the run's own, an empty one will do
                self._is_replaced = _identity(self.path.parent) != self._folder and any(os.scandir(self.path.parent))
                if not self._is_replaced:
                    self._create()


def _identity(folder):
    about = os.stat(folder)
    return about.st_dev, about.st_ino
