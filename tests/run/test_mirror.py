"""A run that is found again on another machine: what is uploaded, and which of folder and mirror is gone on with."""

import builtins
import os
import re
import shutil
import signal
import time

import pytest
from conftest import finish, run_here, run_program, start_driver, start_program, tiny_run, wait_for
from object_storage import BUCKET, S3Server

import train
from config import CONFIG
from engine.cli.command_line import Command
from engine.run import checkpoint_files, mirror
from engine.run.ledger import Ledger
from engine.run.mirror import MANIFEST, Mirror
from engine.system.errors import CheckpointError, UserError
from engine.system.object_store import Conflict, ObjectStore
from engine.system.store_lock import lock_of_store
from engine.training.mirroring import fetch_newer

pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")
COMMAND = Command(CONFIG, {}, None, {})


class Writer:
    """A run that saves small checkpoints in a folder and mirrors them in another one."""

    def __init__(self, folder, place):
        self.folder, self.said = folder, []
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
        self.mirror.offer(["last.pt", *names], (epoch, 0), self.ledger.saves)

    def saved(self, epoch, *names):
        """The same, and wait until it is there."""
        self.save(epoch, *names)
        wait_for(lambda: self.mirror.manifest and self.mirror.manifest["saves"] == self.ledger.saves)


def fetched(writer, folder):
    """Let a new machine take the run from the writer's mirror; return (epoch of its last.pt, lines)."""
    of_new_machine = Mirror(writer.store, None, Ledger(time.perf_counter()))
    lines = fetch_newer(of_new_machine, folder, COMMAND)
    return checkpoint_files.newest_good(folder)[1]["epoch"], "\n".join(lines)


@pytest.fixture
def writer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a log would lie there
    monkeypatch.setattr(mirror, "RETRY_SECONDS", (0.05, 0.1))
    made = Writer(tmp_path / "run", tmp_path / "mirror")
    yield made
    made.mirror.close()


def test_the_mirror_names_the_newest_whole_checkpoints_and_keeps_the_one_before(writer, tmp_path):
    writer.saved(1, "best.pt")
    writer.saved(2, "epoch_002.pt")
    writer.saved(3)
    files = writer.mirror.manifest["files"]
    assert {name: entry["object"][12:21] for name, entry in files.items()} == {
        "last.pt": "epoch_003",
        "best.pt": "epoch_001",
        "epoch_002.pt": "epoch_002",
    }
    writer.saved(4)
    there = sorted(path.name[:9] for path in (tmp_path / "mirror/checkpoints").iterdir())
    assert there == ["epoch_001", "epoch_002", "epoch_003", "epoch_004"]  # best, kept, the one before, last
    writer.saved(5)
    assert not list((tmp_path / "mirror/checkpoints").glob("epoch_003*"))
    assert len(list((tmp_path / "mirror/checkpoints").glob("epoch_001*"))) == 1  # last.pt and best.pt were the same bytes
    epoch, lines = fetched(writer, tmp_path / "new")
    assert epoch == 5 and "was fetched from" in lines
    assert checkpoint_files.read(tmp_path / "new/best.pt")["epoch"] == 1
    assert len((tmp_path / "new/metrics.jsonl").read_text().splitlines()) == 5


def test_damage_in_the_mirror_is_found_and_the_generation_before_is_taken(writer, tmp_path):
    writer.saved(1)
    writer.saved(2)
    (newest,) = (tmp_path / "mirror/checkpoints").glob("epoch_002*")
    newest.write_bytes(newest.read_bytes()[:100] + b"!" + newest.read_bytes()[101:])
    epoch, lines = fetched(writer, tmp_path / "new")
    assert epoch == 1 and "WARNING" in lines and "damaged" in lines
    shutil.rmtree(tmp_path / "mirror/checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole"):
        fetched(writer, tmp_path / "newer")


def test_a_checkpoint_that_is_damaged_on_the_disk_is_not_uploaded(writer, tmp_path):
    writer.saved(1)
    path = writer.folder / "last.pt"
    checkpoint_files.write(path, {"epoch": 2, "batch": 0})
    path.write_bytes(path.read_bytes()[:100] + b"!" + path.read_bytes()[101:])
    writer.mirror.offer(["last.pt"], (2, 0), 2)
    wait_for(lambda: writer.said)
    assert "last.pt is damaged on this disk and was not uploaded" in writer.said[0]
    assert writer.mirror.manifest["saves"] == 1
    writer.saved(3)
    assert fetched(writer, tmp_path / "new")[0] == 3


def test_the_newer_one_of_folder_and_mirror_is_gone_on_with(writer, tmp_path):
    writer.saved(1)
    elsewhere = tmp_path / "elsewhere"
    assert fetched(writer, elsewhere)[0] == 1
    writer.saved(2)
    assert fetched(writer, elsewhere)[0] == 2  # the folder's is older
    assert checkpoint_files.read(elsewhere / "previous.pt")["epoch"] == 1
    writer.mirror.offer = lambda *_: None
    writer.save(3)
    epoch, lines = fetched(writer, writer.folder)  # the mirror's is older
    assert epoch == 3 and lines == ""
    (writer.folder / "last.pt").write_bytes(b"cut short")
    epoch, lines = fetched(writer, writer.folder)
    assert epoch == 2 and "damaged or cut short" in lines
    other = Writer(tmp_path / "other", tmp_path / "other_mirror")
    other.saved(9)
    with pytest.raises(CheckpointError, match="hold different runs"):
        fetched(other, elsewhere)
    other.mirror.close()


def test_without_obstore_the_user_is_told_what_to_install(monkeypatch, tmp_path):
    original = builtins.__import__

    def without(name, *others, **options):
        if name.startswith("obstore"):
            raise ImportError(name)
        return original(name, *others, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"mirror = 's3://bucket/run': obstore is not installed: pip install obstore"):
        ObjectStore("s3://bucket/run", "mirror")


def test_a_run_is_found_again_in_an_empty_folder_to_the_bit(image_tree, tmp_path, monkeypatch, capfd):
    mirrored = {"mirror": tmp_path / "mirror", "swa_start_epoch": 0, "epochs": 2}
    whole, step, taken = tmp_path / "whole", train.train_step, []
    assert run_here(tiny_run(image_tree, whole, swa_start_epoch=0, epochs=2)) == 0

    def stopped(*arguments, **options):
        taken.append(1)
        if len(taken) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopped)
        assert run_here([*tiny_run(image_tree, tmp_path / "first", **mirrored), "--resume=auto"]) == 143
    output = capfd.readouterr().out
    assert re.search(r"stopped by SIGTERM .*; saved.*\nmirrored to .*: after epoch 1 and 3 batches", output)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(CheckpointError, match="holds another run. Go on with it: --resume auto"):
        run_here(tiny_run(image_tree, tmp_path / "second", **mirrored))
    assert run_here([*tiny_run(image_tree, tmp_path / "second", **mirrored), "--resume=auto"]) == 0
    ours, theirs = (checkpoint_files.read(folder / "last.pt") for folder in (tmp_path / "second", whole))
    ours["config"]["mirror"] = theirs["config"]["mirror"]
    assert len(ours["ledger"]["sessions"]) == 2
    for contents in (ours, theirs):  # as assert_same_run, but for the mirror
        del contents["ledger"], contents["config"]
    assert str(ours) == str(theirs)
    assert (tmp_path / "mirror/best.pt").is_file() and not (tmp_path / "mirror/run.lock").exists()


def test_an_older_last_pt_does_not_take_the_place_of_a_newer_one_in_the_mirror(image_tree, tmp_path, capsys):
    first, second, place = tmp_path / "first", tmp_path / "second", tmp_path / "mirror"
    arguments = tiny_run(image_tree, first, mirror=place, epochs=1, swa_start_epoch=0)
    assert run_here(arguments) == 0
    shutil.copytree(first, second)  # a disk that stayed when its machine went away
    assert run_here([f"--resume={first}/last.pt", "--epochs=2"]) == 0
    for flags in ([f"--resume={second}/last.pt", "--epochs=3"], [f"--resume={second}", "--epochs=3"]):
        with pytest.raises(CheckpointError, match="after epoch 2.*--resume auto"):
            run_here(flags)
    assert run_here([f"--resume={second}/last.pt", "--mirror=none"]) == 0
    assert run_here([*tiny_run(image_tree, second, mirror=place, epochs=2, swa_start_epoch=0), "--resume=auto"]) == 0
    assert checkpoint_files.read(second / "last.pt")["epoch"] == 2
    assert not list(place.glob("*#*"))  # of files that were put in the place of themselves


@pytest.mark.slow
def test_a_finished_run_whose_end_did_not_get_to_the_mirror_says_so_by_its_status(image_tree, tmp_path, monkeypatch, capfd):
    place, step, taken = tmp_path / "mirror", train.train_step, []
    arguments = [*tiny_run(image_tree, tmp_path / "run", mirror=place, swa_start_epoch=0, epochs=2), "--resume=auto"]
    monkeypatch.setattr(mirror, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(mirror, "RETRY_SECONDS", (0.05, 0.1))

    def broken(*arguments, **options):
        taken.append(1)
        if len(taken) == 10:
            wait_for((place / MANIFEST).exists)
            shutil.rmtree(place / "checkpoints")
            (place / "checkpoints").touch()  # a file, where nothing can lie
        return step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", broken)
        assert run_here(arguments) == 75
    assert "finished 2 epochs" in capfd.readouterr().out
    (place / "checkpoints").unlink()
    assert run_here(arguments) == 0
    assert checkpoint_files.read(place / "last.pt")["epoch"] == 2


# A real S3 server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    made = S3Server()
    before = {name: os.environ.get(name) for name in made.environment}
    os.environ.update(made.environment)
    yield made
    made.close()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def url(server, request):
    server.mode = "open"
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.mark.slow
def test_conditional_puts_multipart_uploads_and_what_is_given_up(url):
    store = ObjectStore(url, "mirror")
    first = store.put("lock", b"a", create=True)
    with pytest.raises(Conflict):
        store.put("lock", b"b", create=True)
    second = store.put("lock", b"b", e_tag=first)
    with pytest.raises(Conflict):
        store.put("lock", b"c", e_tag=first)
    assert store.read("lock")[0] == b"b" and store.head("lock").e_tag == second

    def parts(fail):
        for number in range(4):
            if number == fail:
                raise RuntimeError("given up")
            yield bytes([number]) * (8 << 20)

    store.put("large", parts(None))
    with pytest.raises(RuntimeError, match="given up"):
        store.put("other", parts(3))
    assert store.list() == {"large": 32 << 20, "lock": 1}
    assert store.read_range("large", 8 << 20, (8 << 20) + 2) == b"\1\1"
    assert sum(map(len, store.stream("large", 8 << 20))) == 24 << 20
    store.delete("large")
    store.delete("large")
    assert store.head("large") is None and store.read("large") == (None, None)


@pytest.mark.slow
def test_storage_that_does_not_answer_is_warned_of_and_tried_again_and_the_run_goes_on(server, url, image_tree, tmp_path):
    arguments = [*tiny_run(image_tree, tmp_path / "run", mirror=url, epochs=3000, checkpoint_minutes=0.01), "--resume=auto"]
    process = start_program("train.py", arguments)
    store = ObjectStore(url, "mirror")
    wait_for(lambda: store.head(MANIFEST) is not None)
    server.mode = "refusing"
    log = tmp_path / "run.log"
    wait_for(lambda: "could not be written to" in log.read_text())
    epoch = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    wait_for(lambda: len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) > epoch + 2)
    server.mode = "open"
    wait_for(lambda: "answers again" in log.read_text())
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 143 and "mirrored to" in output.splitlines()[-1], output
    server.mode = "refusing"
    status, output = run_program("train.py", [*arguments, f"--checkpoint-dir={tmp_path / 'new'}"])
    assert status == 1 and "cannot be used" in output and "--mirror none" in output, output


@pytest.mark.slow
def test_what_did_not_get_to_the_mirror_before_the_machine_goes_away_is_said(server, url, image_tree, tmp_path):
    source = "from engine.run import mirror\nmirror.STOP_SECONDS = 3.0\n"
    arguments = [*tiny_run(image_tree, tmp_path / "run", mirror=url, epochs=3000), "--resume=auto"]
    process = start_driver(arguments, tmp_path / "steps", first=source)
    store = ObjectStore(url, "mirror")
    wait_for(lambda: store.head(MANIFEST) is not None)
    server.mode = "refusing"
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 143, output
    assert re.search(r"WARNING: mirror: the last save did NOT get to .* in time; what is there is of after epoch \d+", output)


# Two machines --------------------------------------------------------------------------------------------------------


def as_machine(name, sign_of_life=0.5, silence=4.0):
    """What a driver begins with, so that it is a process of a machine of its own."""
    lines = ["from engine.system import lock", f"lock._machine = lambda: {name!r}"]
    return "\n".join([*lines, f"lock.SIGN_OF_LIFE_SECONDS, lock.SILENCE_SECONDS = {sign_of_life}, {silence}\n"])


def test_a_runs_own_folder_is_no_mirror_of_it(image_tree, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    arguments = tiny_run(image_tree, tmp_path / "run", mirror=tmp_path / "link")
    with pytest.raises(UserError, match="is checkpoint_dir itself"):
        run_here(arguments)
    assert run_here([*arguments, "--check"]) == 1
    assert "is checkpoint_dir itself" in capsys.readouterr().out


@pytest.mark.slow
def test_of_two_machines_one_is_refused_and_the_lock_of_a_dead_one_is_taken_over(server, url, image_tree, tmp_path):
    store, started = ObjectStore(url, "mirror"), []

    def start(name):
        arguments = tiny_run(image_tree, tmp_path / name, mirror=url, epochs=3000, checkpoint_minutes=0.01)
        started.append(start_driver([*arguments, "--resume=auto"], tmp_path / f"{name}.steps", first=as_machine(name)))
        return started[-1]

    try:
        first = start("first")
        wait_for(lambda: store.head(MANIFEST) is not None)
        status, output = finish(start("second"))
        assert status == 75 and f"{url} is in use by process {first.pid}" in output, output
        first.send_signal(signal.SIGSTOP)  # a machine that hangs, and comes back
        began, second = time.monotonic(), start("second")
        wait_for(lambda: (tmp_path / "second.steps").read_text())
        assert time.monotonic() - began > 3.0
        first.send_signal(signal.SIGCONT)
        wait_for(lambda: first.poll() is not None)
        assert first.poll() == 75 and f"stopped: {url} was taken over by" in (tmp_path / "first.log").read_text()
        second.kill()
        finish(second)
        third = start("second")  # on the same machine it is known at once that the process is gone
        wait_for(lambda: "that process is gone" in (tmp_path / "second.log").read_text())
        third.send_signal(signal.SIGTERM)
        assert finish(third)[0] == 143
        assert "no sign of life for 4 s" in (tmp_path / "second.log").read_text()
        assert store.head("run.lock") is None
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                finish(process)
