"""The mirror of a run: what is uploaded and when, to a folder, to Google's storage and to S3, and of two machines only one."""

import builtins
import contextlib
import json
import os
import re
import shutil
import signal
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, finish, run_here, run_program, start_driver, start_program, start_python, tiny_run, wait_for
from google_storage import GoogleStorage
from mirrored_run import COMMAND, Writer, fetched
from object_storage import BUCKET, S3Server

import train
from engine.run import checkpoint_files, mirror
from engine.run.generations import MANIFEST
from engine.system import lock, object_store
from engine.system.errors import CheckpointError, UserError
from engine.system.object_store import Conflict, ObjectStore
from engine.system.store_lock import lock_of_store
from engine.training.mirroring import fetch_newer

pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")


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
