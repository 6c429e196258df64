"""Where a run's mirror is, who may write to it, and what a new machine takes from it."""

import contextlib
import itertools
import os
import time
from pathlib import Path

from config import CONFIG
from engine.run import checkpoint_files
from engine.run.checkpoint_files import BEST, LAST, PREVIOUS, RECORDS
from engine.run.events import EVENTS
from engine.run.generations import MirroredFile, position_in_words
from engine.run.ledger import HOURS, is_ledger
from engine.run.mirror import LOG, Mirror
from engine.system.errors import CheckpointError, UserError
from engine.system.files import ADDRESS, keep_as, replacing
from engine.system.object_store import ObjectStore, StorageError
from engine.system.plain_json import from_json
from engine.system.store_lock import lock_of_store

IS_THE_SAME = "is checkpoint_dir itself: name a place that outlives this machine"
START_TRIES_SECONDS = (2.0, 5.0, 15.0, 30.0)  # between tries to reach the mirror before a run begins


def open_mirror(opened, stack, command, source, folder, ledger):
    """Lock the mirror of the run that a command asks for, if it has one, and bring its folder up to date; return lines to log.

    Args:
        opened: list that the Mirror is added to.
        stack: ExitStack that releases the lock.
        source, folder: as source_of_run returns them.
    Raises:
        UserError: the mirror cannot be reached or used, or holds another run.
        InUse: another machine uses it.
    """
    url = _url_of(command, source, folder)
    if url == "none":
        return []
    if is_same_folder(url, folder):
        raise UserError(f"mirror = {url!r} {IS_THE_SAME}")
    store = ObjectStore(url, "mirror")
    mirror = _reach(store, ledger, stack)
    opened.append(mirror)
    remarks = [mirror.lock.note] if mirror.lock.note else []
    if source == "auto":
        remarks += _retried(store, lambda: fetch_newer(mirror, Path(folder), command))
    elif source is None:
        refuse_another_run(url, mirror.manifest, command)
    return remarks


def refuse_another_run(url, manifest, command):
    """Raise CheckpointError if a mirror's manifest, or None, is of a run that a new one would have to delete unasked."""
    if manifest and "overwrite" not in command.options:
        raise CheckpointError(
            f"mirror = {url!r} holds another run. Go on with it: --resume auto. Keep it and start another: --mirror OTHER. "
            "Delete it and start anew: --overwrite"
        )


def is_same_folder(url, folder):
    """Return whether a mirror's URL is the path of a run's folder."""
    return not ADDRESS.match(url) and Path(url).resolve() == Path(folder).resolve()


def _url_of(command, source, folder):
    """Return the mirror's URL: the command's, or else the one that the checkpoint to go on from was mirrored to."""
    if source is None or "mirror" in command.given:
        return command.config["mirror"]
    path = Path(folder) / LAST if source == "auto" else Path(source)
    return _config_of(path / LAST if path.is_dir() else path).get("mirror", command.config["mirror"])


def _config_of(path):
    """Return the configuration in a checkpoint at a glance, {} where it has none."""
    return checkpoint_files.at_a_glance(path, lambda checkpoint: checkpoint["config"]) or {}


def _reach(store, ledger, stack):
    its_lock = lock_of_store(store, "mirror", "use another --mirror")
    _retried(store, lambda: its_lock.acquire(print))
    stack.callback(its_lock.release)
    return _retried(store, lambda: Mirror(store, its_lock, ledger))


def _retried(store, ask):
    """Return ask(), tried again for a while where the storage does not answer: what lies there decides how the run begins."""
    for seconds in (*START_TRIES_SECONDS, None):
        try:
            return ask()
        except StorageError as error:
            if seconds is None:
                raise UserError(
                    f"mirror = {store.url!r} cannot be used: {error}. To go on without it: --mirror none"
                ) from error
            print(f"WARNING: mirror: {store.url}: {error}; tried again in {seconds:.0f} s", flush=True)
            time.sleep(seconds)
    return None


def clear_mirror(mirror):
    """Delete the run that a mirror holds, before a new one begins.

    Raises:
        UserError: it cannot be.
    """
    _retried(mirror.store, mirror.delete_run)


def ledgers_there(mirror):
    """Return the ledgers that a mirror knows: run.json's, and the one that is written every few seconds."""
    if mirror is None:
        return []
    found = [mirror.manifest["ledger"]] if mirror.manifest else []
    with contextlib.suppress(StorageError, ValueError):
        content, _ = mirror.store.read(HOURS)
        found += [from_json(content.decode())] if content else []
    return list(filter(is_ledger, found))


def require_same_run(mirror, ledger, source, path):
    """Let the mirror hold the ledger's run, and no later state of it than a last.pt that was asked for; count its saves on.

    Raises:
        CheckpointError: it does not.
    """
    if mirror is None or not mirror.manifest:
        return
    url, there = mirror.store.url, mirror.manifest
    if there["ledger"]["run"] != ledger.run:
        raise CheckpointError(f"mirror = {url!r} holds another run than this one: name another --mirror")
    if there["saves"] > ledger.saves and source != "auto" and Path(path).name == LAST:
        raise CheckpointError(
            f"the mirror {url} holds a later state of this run than {path}, {position_in_words(there)}. Go on with it: "
            "--resume auto. Do again what came after this one: --mirror OTHER, or --mirror none"
        )
    ledger.saves = max(ledger.saves, there["saves"])  # after going back to an epoch_005.pt, too, the next save is the newest


# From the mirror to the folder -----------------------------------------------------------------------------------------


def fetch_newer(mirror, folder, command):
    """Put the mirror's run into the folder where that has none, or an earlier state of it; return lines to log.

    Raises:
        StorageError: the storage cannot be reached.
        CheckpointError: they hold different runs, no checkpoint is whole, or there is no room for it here.
    """
    try:
        return _fetch_newer(mirror, folder, command)
    except OSError as error:
        raise CheckpointError(
            f"the run in {mirror.store.url} could not be written to {folder}: {error}. Make room there, or name another "
            "--checkpoint-dir"
        ) from error


def _fetch_newer(mirror, folder, command):
    manifest, remarks = mirror.manifest, []
    if manifest is None:
        return remarks
    newest = {LAST: MirroredFile(**manifest["files"][LAST])}
    here = None
    try:
        path, here, problems = checkpoint_files.newest_good(folder)
        remarks += [f"WARNING: {problem}" for problem in problems]
    except CheckpointError as error:
        remarks.append(f"WARNING: {error}")
    if here is not None:
        ledger = here.get("ledger") or {"run": manifest["ledger"]["run"], "saves": 0}
        if ledger["run"] != manifest["ledger"]["run"]:
            raise CheckpointError(
                f"{folder} and the mirror {mirror.store.url} hold different runs: name another --checkpoint-dir or --mirror"
            )
        same = path.name == LAST and _checksum_of(path) == newest[LAST].checksum
        if ledger["saves"] > manifest["saves"] or same:
            return remarks
    candidates = [newest[LAST]] + ([MirroredFile(**manifest["previous"])] if manifest["previous"] else [])

    def fetch_the_rest(last):
        best = manifest["files"].get(BEST)
        if best and _checksum_of(folder / BEST) != best["checksum"]:
            _fetched(mirror, MirroredFile(**best), folder / BEST, remarks)
        for name in (RECORDS, EVENTS):
            content, _ = mirror.store.read(name)
            if content is not None:
                _write(folder / name, content)
        log_file = command.given.get("log_file") or _config_of(last).get("log_file", CONFIG["log_file"])
        _fetch_log(mirror.store, Path(log_file), remarks)

    taken = next((entry for entry in candidates if _fetched(mirror, entry, folder / LAST, remarks, fetch_the_rest)), None)
    if taken is None:
        if here is None:
            raise CheckpointError(
                "\n".join([*remarks, f"no checkpoint in {mirror.store.url} is whole: start anew with --overwrite"])
            )
        return remarks
    remarks.append(f"note: {folder / LAST} was fetched from {mirror.store.url} ({taken.bytes / 1e6:,.0f} MB)")
    return remarks


def _fetch_log(store, path, remarks):
    """Put the mirror's log at a path; a log there that it does not continue stays under another name."""
    content, _ = store.read(LOG)
    if content is None or (path.exists() and not path.is_file()):  # /dev/null
        return
    here = path.read_bytes() if path.exists() else b""
    if here.startswith(content):
        return
    if not content.startswith(here):
        numbers = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        other = next(name for name in numbers if not os.path.lexists(name))
        keep_as(path, other)
        remarks.append(f"note: {path} held another log than this run's; it stays as {other}")
    _write(path, content)


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)


def _checksum_of(path):
    try:
        with open(path, "rb") as file:
            return checkpoint_files.checksum_at_end(file)
    except OSError:
        return None


def _fetched(mirror, entry, path, remarks, before=lambda arrived: None):
    """Put a checkpoint of the mirror at a path, the file that was there staying as previous.pt; return whether it is whole.

    Args:
        before: called with the path of the whole file that has arrived, before it takes its place; cut off in there, the folder
            is none that has it.
    Raises:
        StorageError: the storage cannot be reached.
    """
    if mirror.store.head(entry.object) is None:
        remarks.append(f"WARNING: {entry.object} is not in {mirror.store.url} any more")
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as file:
            for chunk in mirror.store.stream(entry.object):
                file.write(chunk)
            file.flush()
            checkpoint_files.verify(file.name)
            before(file.name)
            if path.name == LAST and path.is_file():
                keep_as(path, path.with_name(PREVIOUS))
    except CheckpointError as error:
        remarks.append(f"WARNING: of {mirror.store.url}: {error}")
        return False
    return True
