"""A run's files in object storage, so that it can be found again on another machine: uploaded behind the training's back.

Under the mirror's URL lie the checkpoints as `checkpoints/epoch_003+00120-<checksum>.pt`, and run.json, which says which of
them is last.pt, best.pt and so on. A generation is what one run.json names. Checkpoints are uploaded first and verified, and
run.json is written last: whenever a machine goes away, the generation that run.json names is whole, and so is the last.pt of
the one before it, which stays until the next. Records, log and report lie there under their own names.
"""

import contextlib
import hashlib
import os
import threading
import time
from pathlib import Path

from engine.run.checkpoint_files import BEST, CHECKSUM_BYTES, CURVES, EPOCH_PATTERN, LAST, RECORDS, REPORTS, checksum_at_end
from engine.run.events import EVENTS
from engine.run.generations import MANIFEST, Generation, MirroredFile, files_in, position_in_words, read_manifest
from engine.run.ledger import HOURS
from engine.system.errors import first_line
from engine.system.object_store import CHUNK_BYTES, Conflict, StorageError
from engine.system.plain_json import to_json

OBJECTS, LOG = "checkpoints/", "training.log"
BESIDES = (HOURS, RECORDS, EVENTS, CURVES, *REPORTS, LOG, LAST, BEST)  # objects of these names
STOP_SECONDS = 90.0  # for the last upload of a run that is asked to stop: a spot instance has two minutes
RETRY_SECONDS = (5.0, 60.0)  # after an upload that failed: at first, and at most
COMPLAIN_SECONDS = 600.0  # between warnings while the storage does not answer


class Overtaken(Exception):
    """An upload is given up for a newer one."""


class DamagedFile(Exception):
    """A checkpoint on this machine cannot be read as it was written."""


class Mirror:
    """Uploads what a run saves, in a thread of its own; the training only hands over open files.

    Args:
        store: ObjectStore.
        its_lock: of the store, held by this process.
        ledger: the run's Ledger, which goes along.
    """

    def __init__(self, store, its_lock, ledger):
        self.store, self.lock, self.ledger = store, its_lock, ledger
        self.folder, self.log_file, self.keep, self.log = None, None, 0, print
        self.finished = False  # the run has come to its end: close() takes its time
        self._manifest, self._version = read_manifest(store)
        self._there = set(store.list(OBJECTS))
        self._small = {}  # {name: (size, time of change)} of the small files as they were uploaded
        self._pending, self._closing, self._given_up = None, False, False
        self._gave_up_last = False
        self._offered, self._named = None, None  # number of the newest save, and of the one that run.json names
        self._left = ""  # in words: what is not there yet
        self._complete = False
        self._next_complaint = {}  # {what is complained of: when it may be again}
        self._changed = threading.Condition()
        self._thread = None

    @property
    def manifest(self):
        """What run.json holds, or None where no run is there."""
        return self._manifest

    def start(self, folder, log_file, keep, log):
        """Begin to upload.

        Args:
            folder: the run's checkpoint_dir.
            log_file: the run's log, or None.
            keep: newest epoch_NNN.pt to keep; 0 keeps all.
            log: called with each message for the user.
        """
        self.folder, self.log_file, self.keep, self.log = Path(folder), log_file, keep, log
        self.store.delete_unfinished([f"{OBJECTS}epoch_*.pt", MANIFEST, *BESIDES])  # before there is anything of its own
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def write_hours(self):
        """Let hours.json there be the ledger as it is now, unless the storage does not answer."""
        with contextlib.suppress(StorageError):
            if self.lock.lost_to is None:
                self.store.put(HOURS, (to_json(self.ledger.state()) + "\n").encode())

    def offer(self, names, place, saves):
        """Have these checkpoints of the folder uploaded; returns at once. An upload that waits is overtaken by this one."""
        try:
            generation = Generation({name: self.folder / name for name in names}, place, saves)
        except OSError as error:
            self.log(f"WARNING: mirror: {error}")
            return
        with self._changed:
            if self._pending is not None:
                self._merge(generation, self._pending)
            self._pending = generation
            self._offered = saves
            self._changed.notify_all()

    def close(self, seconds=None):
        """Wait until what was saved last is uploaded, as long as there is time; say what did not get there.

        Args:
            seconds: how long to wait at most where the run has not come to its end; None: STOP_SECONDS.
        Returns:
            False where something did not get there.
        """
        if self._thread is None:
            return True
        started = time.monotonic()
        deadline = started + (seconds or STOP_SECONDS)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._thread.is_alive() and self.lock.lost_to is None:
                if not self.finished and time.monotonic() >= deadline:
                    break
                self._changed.wait(0.2)
                if self.finished and "uploading" in self._next_complaint and time.monotonic() - started > 10 * STOP_SECONDS:
                    break  # the storage does not answer
        self._given_up = True
        if self.lock.lost_to is not None:  # the run has said so
            return True
        self._thread.join(0.1)
        there = position_in_words(self._manifest) if self._manifest else None
        if self._complete:
            self.log(f"mirrored to {self.store.url}: {there}")
        elif there and self._named == self._offered:
            self.log(f"WARNING: mirror: the last save is in {self.store.url}, {there}, but NOT in time: {self._left}")
        else:
            there = f"what is there is of {there}" if there else "nothing is there"
            self.log(f"WARNING: mirror: the last save did NOT get to {self.store.url} in time; {there}")
        return self._complete

    def delete_run(self):
        """Delete the run that is there, and nothing else; what cannot be deleted besides run.json costs a warning.

        Raises:
            StorageError: run.json is still there.
        """
        if self._manifest:
            self.store.delete(MANIFEST)
        if self._manifest or self._there:
            self._delete(BESIDES)
        self._manifest, self._version = None, None
        self._there -= self._delete(self._there)

    # In the thread ---------------------------------------------------------------------------------------------------

    def _work(self):
        wait = RETRY_SECONDS[0]
        while (generation := self._next()) is not None:
            try:
                if self._given_up or self.lock.lost_to is not None:
                    break  # the next save says it
                self._upload(generation)
                wait = RETRY_SECONDS[0]
                if self._next_complaint.pop("uploading", None):
                    self.log(f"mirror: {self.store.url} answers again")
            except Overtaken:
                self._put_back(generation)
            except Exception as error:  # the run is worth more
                self._put_back(generation)
                reason = f"{self.store.url} could not be written to: {first_line(error)}"
                self._complain("uploading", f"{reason}. The run goes on, and the upload is tried again")
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, wait)
                if self._closing:
                    time.sleep(1.0)
                wait = min(2 * wait, RETRY_SECONDS[1])
        self._finish_retried()
        with self._changed:
            self._changed.notify_all()

    def _complain(self, about, text):
        """Log a warning, one about a thing in COMPLAIN_SECONDS."""
        if time.monotonic() >= self._next_complaint.get(about, 0.0):
            self._next_complaint[about] = time.monotonic() + COMPLAIN_SECONDS
            self.log(f"WARNING: mirror: {text}")

    def _next(self):
        """Wait for a generation and return it; None: the run has ended and everything is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending is not None or self._closing)
            generation, self._pending = self._pending, None
            return generation

    def _put_back(self, generation):
        """Let what was not uploaded be part of the next upload."""
        with self._changed:
            if self._pending is None:
                self._pending = generation
            else:
                self._merge(self._pending, generation)

    def _merge(self, newer, older):
        """Take into a generation what an older one has besides, but for epochs that the folder keeps no more."""
        newer.take_over_from(older)
        for name in newer.files.keys() - self._without_old_epochs(newer.files).keys():
            newer.drop(name)  # held open, it would take its room on the disk

    def _upload(self, generation):
        """Upload a generation, and let run.json name it."""
        if self._manifest is None and BEST not in generation.files:  # of a run that is not there any more
            generation.add(self.folder / BEST)
        entries, names = {}, sorted(generation.files, key=lambda name: name != LAST)
        for number, name in enumerate(names):
            self._left = ", ".join(names[number:])
            try:
                entries[name] = self._upload_checkpoint(name, generation)
            except DamagedFile as error:
                if name == LAST:  # it is complained of until the next save brings another
                    raise
                self.log(f"WARNING: mirror: {error}")
                generation.drop(name)
            if self._closing and name == LAST and len(names) > 1:
                self._name(generation, entries)  # the others may not get there in time
        self._upload_small_files()
        self._name(generation, entries)
        self._delete_unnamed()
        generation.close()

    def _name(self, generation, entries):
        """Let run.json name what has been uploaded of a generation, {name: MirroredFile}."""
        before = files_in(self._manifest)
        files = self._without_old_epochs(before | entries)
        epochs, batches = generation.place
        manifest = {"format": 1, "saves": generation.saves, "epoch": epochs, "batch": batches, "time": time.time()}
        manifest["files"] = {name: file._asdict() for name, file in files.items()}
        manifest["previous"] = self._previous(before, files)
        self._write_manifest(manifest)
        self._named = generation.saves

    def _previous(self, before, files):
        """Return what run.json is to call the last.pt before this one: after a resumption the same one is offered again."""
        if self._manifest and before.get(LAST) == files.get(LAST):
            return self._manifest["previous"]
        return before[LAST]._asdict() if LAST in before else None

    def _upload_checkpoint(self, name, generation):
        """Return the MirroredFile of a generation's checkpoint, uploaded unless the very bytes are there."""
        file = generation.files[name]
        try:
            size, checksum = os.fstat(file.fileno()).st_size, checksum_at_end(file)
        except OSError as error:
            raise DamagedFile(f"{error}; it was not uploaded") from error
        for known in files_in(self._manifest).values():
            if (known.bytes, known.checksum) == (size, checksum) and known.object in self._there:
                return known
        epochs, batches = generation.place
        target = f"{OBJECTS}epoch_{epochs:03d}+{batches:05d}-{checksum[:12]}.pt"
        entry = MirroredFile(target, checksum, size)
        if target in self._there and self._is_whole(entry, file):
            return entry
        self.store.put(target, self._chunks(name, generation, size, checksum))
        self._there.add(target)
        if not self._is_whole(entry, file):
            raise StorageError(f"{target} is not what was sent")
        self._gave_up_last = False
        return entry

    def _chunks(self, name, generation, size, checksum):
        """Yield the file's bytes; raise Overtaken where they are no longer worth sending, DamagedFile where damaged."""
        file, digest = generation.files[name], hashlib.sha256()
        covered, position = size - CHECKSUM_BYTES, 0
        while position < size:
            with self._changed:
                if self._is_overtaken(name, generation, position / size):
                    self._gave_up_last = self._gave_up_last or name == LAST
                    raise Overtaken
            try:
                chunk = os.pread(file.fileno(), CHUNK_BYTES, position)
            except OSError as error:
                raise DamagedFile(f"{name} cannot be read and was not uploaded: {error}") from error
            if not chunk:
                raise DamagedFile(f"{name} is cut short and was not uploaded")
            digest.update(chunk[: max(covered - position, 0)])
            position += len(chunk)
            if position == size and digest.hexdigest() != checksum:
                raise DamagedFile(f"{name} is damaged on this disk and was not uploaded")
            yield chunk

    def _is_overtaken(self, name, generation, sent):
        """Return whether an upload, of which a share has been sent, is to be given up for a newer last.pt.

        No run is overtaken again and again; when it ends, last.pt comes before everything else.
        """
        newer = self._pending is not None and LAST in self._pending.files
        if self._given_up:
            return True
        if name != LAST:
            return self._closing and (newer or self._named != generation.saves)
        return newer and sent < 0.5 and (self._closing or not self._gave_up_last)

    def _is_whole(self, entry, file):
        """Return whether the object has the file's length and its last bytes, which are the checksum of all the others."""
        found = self.store.head(entry.object)
        if found is None or found.bytes != entry.bytes:
            return False
        start = entry.bytes - CHECKSUM_BYTES
        return self.store.read_range(entry.object, start, entry.bytes) == os.pread(file.fileno(), CHECKSUM_BYTES, start)

    def _upload_small_files(self):
        paths = {name: self.folder / name for name in (RECORDS, EVENTS, CURVES, *REPORTS)}
        paths |= {LOG: Path(self.log_file)} if self.log_file and os.path.isfile(self.log_file) else {}  # no terminal, no pipe
        for name, path in paths.items():
            try:
                found = path.stat()
                if self._small.get(name) == (found.st_size, found.st_mtime_ns):
                    continue
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                self._complain(name, f"{name} could not be read: {error}")
                continue
            whole_lines = name in (RECORDS, EVENTS, LOG)
            self.store.put(name, content[: content.rfind(b"\n") + 1] if whole_lines else content)
            self._small[name] = found.st_size, found.st_mtime_ns

    def _write_manifest(self, manifest):
        """Replace run.json, on the condition that nobody else has; a folder has no such condition, and its lock is asked."""
        manifest |= {"ledger": self.ledger.state()}
        if self.store.is_folder and (other := self.lock.other_holder()) is not None:
            raise Conflict(f"it is held by {other}")
        condition = {} if self.store.is_folder else {"version": self._version} if self._version else {"create": True}
        content = (to_json(manifest, indent=1) + "\n").encode()
        try:
            self._version = self.store.put(MANIFEST, content, **condition)
        except Conflict:  # an answer was lost, or the former holder of the lock, woken up, was quicker: it has no lock now
            _, found = self.store.read(MANIFEST)
            if not self.lock.is_mine():
                raise
            if found is None:  # deleted by hand, or by a rule of the bucket: the next try uploads all anew
                self._manifest, self._version, self._there = None, None, set(self.store.list(OBJECTS))
                self._small.clear()
                raise
            self._version = self.store.put(MANIFEST, content, version=found.version)
        self._manifest = manifest

    def _without_old_epochs(self, files):
        kept = sorted(filter(EPOCH_PATTERN.fullmatch, files), key=lambda name: int(EPOCH_PATTERN.fullmatch(name)[1]))
        gone = kept[: -self.keep] if self.keep else []
        return {name: file for name, file in files.items() if name not in gone}

    def _delete_unnamed(self):
        """Delete the checkpoints that neither this generation names nor the one before it."""
        named = {file.object for file in files_in(self._manifest).values()}
        if self._manifest["previous"]:
            named.add(self._manifest["previous"]["object"])
        self._there -= self._delete(self._there - named)  # what could not be is tried again with the next save

    def _delete(self, names):
        """Delete objects, and return the set of those that are gone."""
        gone, failed = set(), None
        for name in names:
            try:
                self.store.delete(name)
                gone.add(name)
            except StorageError as error:
                failed = error
        if failed is not None:
            text = f"what is no longer needed could not be deleted from {self.store.url}: {first_line(failed)}"
            self._complain("deleting", text)
        return gone

    def _finish_retried(self):
        """Do what comes after the last save, tried again while there is time."""
        while self._manifest is not None and self._pending is None and not self._given_up and self.lock.lost_to is None:
            try:
                self._finish()
                self._complete = True
                return
            except StorageError as error:
                self._complain("uploading", f"{self.store.url} could not be written to: {first_line(error)}")
                time.sleep(1.0)

    def _finish(self):
        """Bring the small files up to date, and let a finished run's weights lie under their own names."""
        self._left = "records, log and report as they are now"
        self._upload_small_files()
        self._write_manifest(self._manifest)
        for name in (LAST, BEST) if self.finished else ():
            if name in self._manifest["files"]:
                self._left = f"{name} under its own name"
                self.store.copy(self._manifest["files"][name]["object"], name)
