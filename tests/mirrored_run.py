"""A run that saves small checkpoints and mirrors them, and a new machine that takes it over."""

import time

from conftest import wait_for

from config import CONFIG
from engine.cli.command_line import Command
from engine.run import checkpoint_files
from engine.run.ledger import Ledger
from engine.run.mirror import Mirror
from engine.system.object_store import ObjectStore
from engine.system.store_lock import lock_of_store
from engine.training.mirroring import fetch_newer

COMMAND = Command(CONFIG, {}, None, {})


class Writer:
    """A run that saves small checkpoints in a folder and mirrors them in another one."""

    def __init__(self, folder, place):
        self.folder, self.said, self.offer_too = folder, [], []
        folder.mkdir(exist_ok=True)
        self.store = ObjectStore(str(place), "mirror")
        self.ledger = Ledger(time.perf_counter())
        self.mirror = Mirror(self.store, lock_of_store(self.store, "mirror", "wait"), self.ledger)
        self.mirror.start(folder, None, 0, self.said.append)

    def save(self, epoch, *names):
        """Write last.pt after so many epochs, under other names, too, and offer them."""
        self.ledger.saves += 1
        contents = {"format": checkpoint_files.FORMAT, "epoch": epoch, "batch": 0, "ledger": self.ledger.state()}
        for name in ("last.pt", *names):
            checkpoint_files.write(self.folder / name, contents | {"config": {}})
        (self.folder / "metrics.jsonl").write_text("".join(f'{{"epoch": {n + 1}}}\n' for n in range(epoch)))
        self.mirror.offer(["last.pt", *names, *self.offer_too], (epoch, 0), self.ledger.saves)

    def saved(self, epoch, *names):
        """The same, and wait until it is there."""
        self.save(epoch, *names)
        wait_for(lambda: self.mirror.manifest and self.mirror.manifest["saves"] == self.ledger.saves)


def fetched(writer, folder):
    """Let a new machine take the run from the writer's mirror; return (epoch of its last.pt, lines)."""
    of_new_machine = Mirror(writer.store, None, Ledger(time.perf_counter()))
    lines = fetch_newer(of_new_machine, folder, COMMAND)
    return checkpoint_files.newest_good(folder)[1]["epoch"], "\n".join(lines)
