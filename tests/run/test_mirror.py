"""A run that is found again on another machine: what is uploaded, and which of folder and mirror is gone on with."""

import builtins
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, finish, run_here, run_program, start_driver, start_program, start_python, tiny_run, wait_for
from google_storage import GoogleStorage
from object_storage import BUCKET, S3Server

import train
from config import CONFIG
from engine.cli.command_line import Command
from engine.run import checkpoint_files, mirror
from engine.run.ledger import Ledger, read_hours
from engine.run.mirror import MANIFEST, Mirror
from engine.system import lock, object_store
from engine.system.errors import CheckpointError, UserError
from engine.system.object_store import Conflict, ObjectStore, StorageError
from engine.system.store_lock import lock_of_store
from engine.training import mirroring
from engine.training.mirroring import fetch_newer

pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")
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


def test_a_machine_that_is_cut_off_while_it_takes_the_run_over_takes_all_of_it_the_next_time(writer, tmp_path):
    writer.saved(1, "best.pt")
    writer.saved(2)
    (tmp_path / "new/metrics.jsonl").mkdir(parents=True)  # where no file can be written
    with pytest.raises(CheckpointError, match="could not be written"):
        fetched(writer, tmp_path / "new")
    assert not (tmp_path / "new/last.pt").exists()  # which says that the folder is up to date
    (tmp_path / "new/metrics.jsonl").rmdir()
    assert fetched(writer, tmp_path / "new")[0] == 2
    assert checkpoint_files.read(tmp_path / "new/best.pt")["epoch"] == 1
    assert len((tmp_path / "new/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "{}", '{"format": 1}', '{"run": 1, "saves": 1, "budget": 1, "sessions": []}']
)
def test_what_is_no_run_or_no_ledger_in_the_mirror_is_told_in_words_or_passed_over(content, writer, tmp_path):
    writer.saved(1)
    (tmp_path / "mirror/hours.json").write_text(content)
    assert [known["run"] for known in mirroring.ledgers_there(writer.mirror)] == [writer.ledger.run]
    (tmp_path / "run/hours.json").write_text(content)
    assert read_hours(tmp_path / "run") is None
    (tmp_path / "mirror/run.json").write_text(content)
    with pytest.raises(StorageError, match="run.json cannot be read"):
        fetched(writer, tmp_path / "new")


def test_a_machine_that_wakes_up_names_nothing_in_a_folder_that_another_one_has_taken_over(writer, tmp_path):
    writer.mirror.lock.acquire(print)
    writer.saved(1)
    (tmp_path / "mirror/run.lock").write_text(json.dumps(lock.this_process()._asdict()))  # of the other's
    named = (tmp_path / "mirror/run.json").read_bytes()
    writer.save(2)
    wait_for(lambda: writer.said, 10)
    writer.mirror.lock.lost_to = lock.UNKNOWN  # as it finds out by itself within 15 s
    assert "is held by process" in writer.said[0] and (tmp_path / "mirror/run.json").read_bytes() == named


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


def test_a_delete_that_fails_is_complained_of_and_the_mirror_goes_on(writer, tmp_path):
    writer.saved(1)
    writer.saved(2)
    (old,) = (tmp_path / "mirror/checkpoints").glob("epoch_001*")
    old.unlink()
    (old / "in the way").mkdir(parents=True)  # a folder is no object that could be deleted
    writer.saved(3, "epoch_003.pt")
    wait_for(lambda: writer.said)
    assert "could not be deleted" in writer.said[0]
    writer.saved(4)
    assert set(writer.mirror.manifest["files"]) == {"last.pt", "epoch_003.pt"}
    shutil.rmtree(old)
    old.touch()
    writer.saved(5)
    wait_for(lambda: not old.exists())
    assert fetched(writer, tmp_path / "new")[0] == 5 and len(writer.said) == 1


def test_a_kept_checkpoint_that_is_damaged_on_the_disk_holds_up_no_later_one(writer):
    for epoch, damage in ((1, b"cut short"), (2, None)):
        path = writer.folder / f"epoch_{epoch:03d}.pt"
        checkpoint_files.write(path, {"epoch": epoch})
        whole = path.read_bytes()
        path.write_bytes(damage or whole[:100] + b"!" + whole[101:])
        writer.offer_too = [path.name]
        writer.saved(epoch)
        wait_for(lambda count=epoch: len(writer.said) == count)
        assert path.name in writer.said[-1] and "was not uploaded" in writer.said[-1]
    writer.offer_too = []
    writer.saved(3)
    assert set(writer.mirror.manifest["files"]) == {"last.pt"} and len(writer.said) == 2


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


def test_a_full_disk_that_the_mirrors_run_does_not_fit_on_is_said_in_a_line(writer, tmp_path):
    writer.saved(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written to .*/new: .*Make room there"):
            fetched(writer, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "new").iterdir())
    assert fetched(writer, tmp_path / "new")[0] == 1


def test_the_log_of_another_run_stays_and_that_of_this_run_is_continued(writer, tmp_path):
    log = tmp_path / "training.log"  # where every run logs by default
    writer.mirror.log_file = writer.folder / "log"
    writer.mirror.log_file.write_text("of this run, 1\n")
    writer.saved(1)
    log.write_text("of another\n")
    assert "stays as training.1.log" in fetched(writer, tmp_path / "new")[1]
    assert log.read_text() == "of this run, 1\n" and (tmp_path / "training.1.log").read_text() == "of another\n"
    writer.mirror.log_file.write_text("of this run, 1\nof this run, 2\n")
    writer.saved(2)
    fetched(writer, tmp_path / "new")
    assert log.read_text() == "of this run, 1\nof this run, 2\n"
    log.write_text("of this run, 1\nof this run, 2\nwritten after the last upload\n")
    writer.saved(3)
    fetched(writer, tmp_path / "new")
    assert len(log.read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.glob("training*")) == ["training.1.log", "training.log"]


def test_a_new_run_whose_mirror_cannot_be_emptied_is_refused_in_a_line_or_warned_of(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(mirroring, "START_TRIES_SECONDS", (0.0,))
    writer.saved(1)
    there = Mirror(writer.store, None, Ledger(time.perf_counter()))
    there.log = writer.said.append

    def put_in_the_way(path):  # a folder is no object that could be deleted
        path.unlink()
        (path / "in the way").mkdir(parents=True)

    put_in_the_way(tmp_path / "mirror/run.json")
    with pytest.raises(UserError, match="mirror = .* cannot be used: .*run.json"):
        mirroring.clear_mirror(there)
    shutil.rmtree(tmp_path / "mirror/run.json")
    (checkpoint,) = (tmp_path / "mirror/checkpoints").iterdir()
    put_in_the_way(checkpoint)
    mirroring.clear_mirror(there)
    assert len(writer.said) == 1 and "could not be deleted" in writer.said[0]
    assert not (tmp_path / "mirror/metrics.jsonl").exists() and there.manifest is None


def test_the_same_last_pt_offered_again_after_a_resumption_leaves_the_one_before_it_there(writer, tmp_path):
    writer.saved(1)
    writer.saved(2)
    resumed = Writer(tmp_path / "new", tmp_path / "mirror")
    fetch_newer(resumed.mirror, resumed.folder, COMMAND)
    resumed.ledger.saves = 2
    resumed.mirror.offer(["last.pt"], (2, 0), 2)
    resumed.mirror.close()
    there = sorted(path.name[:9] for path in (tmp_path / "mirror/checkpoints").iterdir())
    assert there == ["epoch_001", "epoch_002"]
    assert resumed.mirror.manifest["previous"]["object"].startswith("checkpoints/epoch_001")


def test_what_a_finished_run_cannot_leave_in_the_mirror_is_tried_again_and_said(writer, tmp_path, monkeypatch):
    in_the_way = tmp_path / "mirror/best.pt"
    (in_the_way / "a folder").mkdir(parents=True)
    writer.saved(1, "best.pt")
    writer.mirror.finished = True
    threading.Timer(0.5, shutil.rmtree, (in_the_way,)).start()
    writer.mirror.close()
    assert [line.split(":")[0] for line in writer.said] == ["WARNING", f"mirrored to {writer.store.url}"]
    assert checkpoint_files.read(in_the_way)["epoch"] == 1
    other = Writer(tmp_path / "other", tmp_path / "other_mirror")
    (tmp_path / "other_mirror/best.pt/a folder").mkdir(parents=True)
    other.saved(1, "best.pt")
    other.mirror.finished = True
    monkeypatch.setattr(mirror, "STOP_SECONDS", 0.01)
    other.mirror.close()
    assert re.fullmatch(r"WARNING: .* is in .*, after epoch 1, but NOT in time: best.pt under its own name", other.said[-1])


def test_what_a_kill_in_the_middle_of_an_upload_left_in_a_folder_is_deleted(writer, tmp_path):
    writer.saved(1)
    code = f"""
import os
from engine.system.object_store import ObjectStore

def parts():
    yield bytes(8 << 20)
    yield bytes(8 << 20)
    os.kill(os.getpid(), 9)

ObjectStore({str(tmp_path / "mirror")!r}, "mirror").put("checkpoints/epoch_009+00000-0.pt", parts())
"""
    assert finish(start_python(["-c", code], environment={"PYTHONPATH": str(REPOSITORY)}))[0] == -9
    assert list(tmp_path.glob("mirror/checkpoints/epoch_009*#1"))
    (tmp_path / "mirror/mine#1").touch()
    Writer(tmp_path / "next", tmp_path / "mirror").mirror.close()
    assert len(list((tmp_path / "mirror/checkpoints").iterdir())) == 1 and (tmp_path / "mirror/mine#1").exists()


def test_while_the_storage_is_down_no_pruned_checkpoint_is_held_open(writer, tmp_path):
    def held():
        links = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # closed in between
                links.append(os.readlink(path))
        return [link for link in links if f"{writer.folder}/epoch_" in link and link.endswith("(deleted)")]

    writer.mirror.keep = 2
    writer.saved(1)
    there = tmp_path / "mirror/checkpoints"
    there.rename(tmp_path / "away")
    there.touch()  # so that nothing can be written into it
    for epoch in (998, 999, 1000, 1001):
        writer.save(epoch, f"epoch_{epoch}.pt")
        wait_for(lambda: writer.said)
    for epoch in (998, 999):
        (writer.folder / f"epoch_{epoch}.pt").unlink()
    wait_for(lambda: not held(), 20)
    there.unlink()
    (tmp_path / "away").rename(there)
    wait_for(lambda: writer.mirror.manifest["epoch"] == 1001)
    assert set(writer.mirror.manifest["files"]) == {"last.pt", "epoch_1000.pt", "epoch_1001.pt"}


@pytest.fixture
def google(monkeypatch):
    server = GoogleStorage()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lock, "SIGN_OF_LIFE_SECONDS", 0.05)
    yield server
    server.close()


def test_google_storage_takes_each_generation_and_each_sign_of_life(google, tmp_path):
    writer = Writer(tmp_path / "run", "gs://bucket/run")
    writer.mirror.lock.acquire(print)
    generation = 0
    for epoch in (1, 2, 3):
        writer.saved(epoch)
        wait_for(lambda before=generation: google.objects["run/run.lock"][0] > before, 20)
        generation = google.objects["run/run.lock"][0]
    writer.mirror.close()
    writer.mirror.lock.release()
    assert writer.said == ["mirrored to gs://bucket/run: after epoch 3"]
    assert fetched(writer, tmp_path / "new")[0] == 3 and "run/run.lock" not in google.objects


def test_a_run_whose_objects_were_deleted_in_the_storage_is_uploaded_anew(google, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "RETRY_SECONDS", (0.05, 0.1))
    writer = Writer(tmp_path / "run", "gs://bucket/emptied")
    writer.mirror.lock.acquire(print)
    writer.saved(1, "best.pt")
    for name in writer.store.list():  # by hand, or by a rule of the bucket
        writer.store.delete(name)
    writer.saved(2)
    assert "could not be written to" in writer.said[0]
    assert fetched(writer, tmp_path / "new")[0] == 2
    assert checkpoint_files.read(tmp_path / "new/best.pt")["epoch"] == 1
    assert len((tmp_path / "new/metrics.jsonl").read_text().splitlines()) == 2
    writer.mirror.close()
    writer.mirror.lock.release()


@pytest.mark.slow
def test_a_lock_in_google_storage_is_taken_over_from_a_holder_that_is_silent(google, monkeypatch):
    store = ObjectStore("gs://bucket/run", "mirror")
    its_lock = lock_of_store(store, "mirror", "wait")
    its_lock.acquire(print)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 2.0)  # the server tells the time in whole seconds
    monkeypatch.setattr(lock, "_machine", lambda: "another")
    other = lock_of_store(store, "mirror", "wait")
    with pytest.raises(CheckpointError, match="gs://bucket/run is in use by"):
        other.acquire(print)
    its_lock._released.set()  # it falls silent
    other.acquire(print)
    assert "no sign of life" in other.note
    other.release()


def test_without_obstore_the_user_is_told_what_to_install(monkeypatch, tmp_path):
    original = builtins.__import__

    def without(name, *others, **options):
        if name.startswith("obstore"):
            raise ImportError(name)
        return original(name, *others, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"mirror = 's3://bucket/run': obstore is not installed: pip install obstore"):
        ObjectStore("s3://bucket/run", "mirror")


@pytest.mark.parametrize("name", ["run#2", "run?2"])
def test_an_address_of_which_the_storage_would_drop_a_part_is_refused(name):
    with pytest.raises(UserError, match="mirror = 's3://bucket/run.2': what follows . would not count"):
        ObjectStore(f"s3://bucket/{name}", "mirror")


def test_a_run_is_found_again_in_an_empty_folder_to_the_bit(image_tree, tmp_path, monkeypatch, capfd):
    mirrored = {"mirror": tmp_path / "mirror", "swa_start_epoch": 0, "epochs": 2, "report": "true"}
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
    for name in ("report.html", "report.md"):
        assert (tmp_path / "mirror" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert "finished 2 epochs" in (tmp_path / "mirror/training.log").read_text()


@pytest.mark.slow
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
def test_a_run_that_went_back_to_an_earlier_epoch_is_newer_than_a_folder_of_before(image_tree, tmp_path):
    first, second, place = tmp_path / "first", tmp_path / "second", tmp_path / "mirror"
    settings = {"mirror": place, "swa_start_epoch": 0, "checkpoint_every_epochs": 1}
    assert run_here(tiny_run(image_tree, first, epochs=4, **settings)) == 0
    shutil.copytree(first, second)  # a disk that stayed when its machine went away
    assert run_here([f"--resume={first}/epoch_001.pt", "--epochs=2"]) == 0
    assert run_here([*tiny_run(image_tree, second, epochs=2, **settings), "--resume=auto"]) == 0
    assert checkpoint_files.read(second / "last.pt")["epoch"] == 2


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
    second = store.put("lock", b"b", version=first)
    with pytest.raises(Conflict):
        store.put("lock", b"c", version=first)
    assert store.read("lock")[0] == b"b" and store.head("lock").version == second

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
    assert [len(part) for part in store.stream("large")] == 4 * [8 << 20]
    store.delete("large")
    store.delete("large")
    assert store.head("large") is None and store.read("large") == (None, None)


@pytest.mark.slow
def test_a_large_object_arrives_over_a_slow_line_and_across_a_break(server, url, monkeypatch):
    ObjectStore(url, "mirror").put("large", iter([b"1" * (8 << 20), b"2" * (8 << 20)]))
    sixtieth = {name: "2s" if value == "120s" else value for name, value in object_store.TIMEOUTS.items()}
    monkeypatch.setattr(object_store, "TIMEOUTS", sixtieth)
    monkeypatch.setattr(object_store, "RETRIES", object_store.RETRIES | {"retry_timeout": timedelta(seconds=0.5)})
    store, server.mode = ObjectStore(url, "mirror"), "slow"
    parts = store.stream("large")
    first = next(parts)  # 4 s at 2 MB/s
    server.mode = "refusing"
    threading.Timer(3.0, setattr, (server, "mode", "open")).start()
    assert first + b"".join(parts) == b"1" * (8 << 20) + b"2" * (8 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("newer", [False, True])
def test_a_run_that_is_stopped_with_a_backlog_has_its_last_save_named_first(newer, server, url, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "STOP_SECONDS", 10.0)
    writer = Writer(tmp_path / "run", url)
    writer.saved(1)
    server.mode, before = "slow", server.bytes_in
    checkpoint_files.write(writer.folder / "epoch_002.pt", {"weights": torch.zeros(40 << 20)})  # 20 s on four connections
    writer.offer_too = ["epoch_002.pt"]
    writer.save(2)
    wait_for(lambda: server.bytes_in > before + 2_000_000)
    writer.offer_too = []
    if newer:
        writer.save(3)
    writer.mirror.close()
    server.mode = "open"
    assert re.search(rf"the last save is in .*, after epoch {2 + newer}, but NOT in time: epoch_002.pt", writer.said[-1])
    assert fetched(writer, tmp_path / "new")[0] == 2 + newer


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
        second = start("second")
        wait_for(lambda: (tmp_path / "second.steps").read_text())
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
