"""What a mirror holds of a run: the checkpoints of one save, and run.json, which names them."""

import contextlib
from typing import NamedTuple

from engine.system.errors import first_line
from engine.system.object_store import StorageError
from engine.system.plain_json import from_json

MANIFEST = "run.json"


class MirroredFile(NamedTuple):
    """A checkpoint in the mirror."""

    object: str
    checksum: str  # SHA-256 that the file ends with, of all that comes before
    bytes: int


class Generation:
    """Checkpoints of one save, held open: whatever takes their names later, these are the bytes that are read.

    Args:
        paths: {name: path}.
        place: (whole epochs, batches of the next one) of last.pt.
        saves: number of the save.
    """

    def __init__(self, paths, place, saves):
        self.place, self.saves = place, saves
        self.files = {name: open(path, "rb", buffering=0) for name, path in paths.items()}  # noqa: SIM115 - closed by close()

    def take_over_from(self, older):
        """Take the files of an older generation that has not been uploaded, as far as there are no newer ones here."""
        for name, file in older.files.items():
            if name in self.files:
                file.close()
            else:
                self.files[name] = file

    def add(self, path):
        """Take one file more, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.files[path.name] = open(path, "rb", buffering=0)  # noqa: SIM115

    def drop(self, name):
        """Close a file that is not to be uploaded."""
        self.files.pop(name).close()

    def close(self):
        for file in self.files.values():
            file.close()


def read_manifest(store):
    """Return (contents, Version) of the store's run.json; (None, None) if no run is there.

    Raises:
        StorageError: the storage cannot be reached, or what lies there is none.
    """
    content, found = store.read(MANIFEST)
    if content is None:
        return None, None
    try:
        manifest = from_json(content.decode())
        if manifest["format"] > 1:
            raise StorageError(f"{store.url}/{MANIFEST} was written by a newer version of this program: update the program")
        if missing := {"saves", "epoch", "batch", "files", "previous", "ledger"} - manifest.keys():
            raise ValueError(f"it lacks {min(missing)}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{store.url}/{MANIFEST} cannot be read ({first_line(error)})") from error
    return manifest, found.version


def files_in(manifest):
    """Return {name: MirroredFile} of a manifest, or of nothing."""
    return {name: MirroredFile(**facts) for name, facts in manifest["files"].items()} if manifest else {}


def position_in_words(manifest):
    """Return how far the state that a manifest names has come."""
    position = f"epoch {manifest['epoch']}" + (f" and {manifest['batch']} batches" if manifest["batch"] else "")
    return f"after {position}"
