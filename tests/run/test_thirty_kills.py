"""A run that loses its machine again and again, inside of uploads too, ends with the bits of the run that nobody disturbed."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from conftest import assert_same, finish, run_program, start_driver, tiny_run, wait_for
from object_storage import BUCKET, S3Server
from test_mirror import as_machine

from engine.run import checkpoint_files
from engine.run.generations import MANIFEST, read_manifest
from engine.run.ledger import HOURS
from engine.system.object_store import ObjectStore

KILLS, STEPS = int(os.environ.get("MIRROR_KILLS", 30)), 7  # the latter of an epoch
KINDS = ("plain", "plain", "inside an upload", "inside an upload", "refusing", "slow")
QUICK = "from engine.run import ledger\nledger.WRITE_SECONDS = 0.1\n"


class Machines:
    """Two machines that take turns on one run; whoever comes has an empty disk or what it had."""

    def __init__(self, server, image_tree, folder, rng):
        self.server, self.tree, self.folder, self.rng = server, image_tree, folder, rng
        self.store = ObjectStore(f"s3://{BUCKET}/run", "mirror")
        self.killed, self.twice, self.seconds, self.taken = {}, [], 0.0, 0
        self.heard = {}  # {session: its seconds} as the server had heard of it when it was killed
        self.mirrored = 0  # steps behind the checkpoint that the mirror named then
        self.starts = 0

    def start(self):
        name = self.rng.choice("AB")
        if self.rng.random() < 0.6:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / f"{name}.log").unlink(missing_ok=True)
        self.starts += 1
        self.must_begin_at = 0 if (self.folder / name).exists() else self.mirrored
        steps = self.folder / f"steps{self.starts}"
        flags = {"epochs": 60, "mirror": self.store.url, "checkpoint_minutes": 0.005, "swa_start_epoch": 50}
        arguments = [*tiny_run(self.tree, self.folder / name, **flags), "--resume=auto"]
        begun = self.folder / "begun"
        first = f"import time\nopen({str(begun)!r}, 'w').write(repr(time.perf_counter()))\n"
        return start_driver(arguments, steps, first=first + QUICK + as_machine(name, 0.3, 1.5)), steps

    def kill(self, kind):
        process, steps = self.start()
        wait_for(lambda: steps.exists() or process.poll() is not None)
        time.sleep(self.rng.uniform(0, 2.0))
        if kind in ("refusing", "slow"):
            self.server.mode = kind
            time.sleep(self.rng.uniform(0, 2.0))
        elif kind == "inside an upload":
            before = self.server.bytes_in
            wait_for(lambda: self.server.bytes_in > before + 2_000_000 or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
        finish(process)
        self.count_seconds()
        self.server.mode = "open"
        self.listen()
        self.killed[kind] = self.killed.get(kind, 0) + 1
        self.count(steps)
        print(len(self.twice), kind, "steps so far:", self.taken, flush=True)

    def listen(self):
        """Note what the server has heard of the session that was killed, and how far its checkpoint has come."""
        content, _ = self.store.read(HOURS)
        if content is not None:
            ledger = json.loads(content)
            self.heard[ledger["session"]] = ledger["sessions"][ledger["session"]]["seconds"]
        manifest, _ = read_manifest(self.store)
        self.mirrored = manifest["epoch"] * STEPS + manifest["batch"] if manifest else 0

    def count_seconds(self):
        """Count the seconds from the program's first line to its end."""
        self.seconds += time.perf_counter() - float((self.folder / "begun").read_text())

    def count(self, steps):
        """Count the steps that a session did again."""
        done = [int(line) for line in steps.read_text().split()] if steps.exists() else []
        if done:
            assert done[0] >= self.must_begin_at, "begun before what the mirror had"
            self.twice.append(max(0, self.taken - done[0]))
            self.taken = done[-1] + 1

    def finish(self):
        process, steps = self.start()
        status, output = finish(process, 1200)
        self.count_seconds()
        assert status == 0, output
        self.count(steps)
        return next(path for path in (self.folder / "A", self.folder / "B") if str(path) in output)


@pytest.mark.slow
def test_a_run_killed_thirty_times_on_two_machines_ends_with_the_same_bits(image_tree, tmp_path, monkeypatch):
    pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    server = S3Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    try:
        reference = tmp_path / "reference"
        flags = {"epochs": 60, "swa_start_epoch": 50}
        assert run_program("train.py", tiny_run(image_tree, reference, **flags))[0] == 0
        machines = Machines(server, image_tree, tmp_path, random.Random(21))
        for number in range(KILLS):
            if machines.taken >= 59 * STEPS:
                break
            machines.kill(KINDS[number % len(KINDS)])
        folder = machines.finish()
        for name in ("last.pt", "best.pt"):
            ours, theirs = checkpoint_files.read(folder / name), checkpoint_files.read(reference / name)
            for contents in (ours, theirs):
                del contents["ledger"], contents["config"]
            assert_same(ours, theirs, name)
        manifest = json.loads(machines.store.read(MANIFEST)[0])
        sessions = manifest["ledger"]["sessions"]
        counted = sum(session["seconds"] for session in sessions.values())
        print("kills:", machines.killed, "sessions:", len(sessions), "of", machines.starts)
        print("steps done twice at most:", max(machines.twice), "in all:", sum(machines.twice), "of", 60 * STEPS)
        print(f"seconds in the ledger: {counted:.1f}, of the sessions: {machines.seconds:.1f}")
        assert sum(machines.killed.values()) == KILLS
        assert counted <= machines.seconds
        known = {token: session["seconds"] for token, session in sessions.items()}
        assert [token for token, seconds in machines.heard.items() if known.get(token, 0.0) < seconds] == []
        assert len(machines.heard) > KILLS / 2
        assert counted > 0.6 * machines.seconds  # a kill hides what came after the last sign of life; 0.84 was measured
        assert max(machines.twice) < 30 * STEPS  # of 60; 56 steps were measured
    finally:
        server.close()
