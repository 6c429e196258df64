"""Packed images come from object storage to the local disk, whole or not at all."""

import hashlib
import os
import resource
import signal

import pytest
from conftest import NOTICE, finish, run_program, start_program, tiny_run
from object_storage import BUCKET, S3Server, SilentServer

from engine.data import fetching
from engine.system import object_store
from engine.system.errors import DataError
from engine.system.object_store import ObjectStore, StorageError

pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A place with two files of 10,000 and 3,000 bytes, fetched 1,000 bytes at a time."""
    monkeypatch.setattr(fetching, "RANGE_BYTES", 1000)
    monkeypatch.setattr(object_store, "RANGE_TRIES_SECONDS", (0.0,))
    contents = {"train.arrow": os.urandom(10_000), "val.arrow": os.urandom(3_000)}
    made = ObjectStore(str(tmp_path / "bucket"), "data_dir")
    for name, content in contents.items():
        made.put(name, content)
    lines = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
    made.put("SHA256SUMS", lines.encode())
    return made


def test_files_are_fetched_once_and_gone_on_with_where_a_kill_left_them(store, tmp_path, monkeypatch):
    local, asked, read = tmp_path / "local", [], store.read_range

    def failing(name, start, end):
        asked.append((name, start))
        if len(asked) > 5:
            raise StorageError("gone")
        return read(name, start, end)

    monkeypatch.setattr(store, "read_range", failing)
    with pytest.raises(StorageError):
        fetching._fetch(store, local, print)
    assert not list(local.glob("*.arrow"))
    before = set(asked[:5])
    asked.clear()
    monkeypatch.setattr(store, "read_range", lambda name, *rest: asked.append((name, rest[0])) or read(name, *rest))
    fetching._fetch(store, local, print)
    assert len(asked) == 13 - 5 and not before & set(asked)
    assert (local / "train.arrow").read_bytes() == store.read("train.arrow")[0]
    assert sorted(os.listdir(local)) == ["SHA256SUMS", "train.arrow", "val.arrow"]
    asked.clear()
    fetching._fetch(store, local, print)
    assert asked == []


SILENT = {"data_dir": "s3://bucket/images", "mirror": "s3://bucket/run"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("setting", SILENT)
def test_a_run_that_is_stopped_while_storage_does_not_answer_ends_at_once(setting, number, image_tree, tmp_path):
    server = SilentServer()
    arguments = tiny_run(image_tree, tmp_path / "run", **{setting: SILENT[setting]}, local_data_dir=tmp_path / "local")
    process = start_program("train.py", arguments, environment=server.environment)
    server.wait_for_client()
    process.send_signal(number)
    status, output = finish(process, timeout=30)  # the client gives up after a minute
    server.close()
    assert status == 128 + number, output
    assert "stopped" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("run.lock"))


def test_a_spot_notice_ends_a_run_whose_images_are_still_being_fetched(image_tree, tmp_path, metadata_service):
    server = SilentServer()
    arguments = tiny_run(image_tree, tmp_path / "run", data_dir=SILENT["data_dir"], local_data_dir=tmp_path / "local")
    arguments += ["--spot-notice=true", f"--spot-notice-url=http://127.0.0.1:{metadata_service.server_port}"]
    process = start_program("train.py", arguments, environment=server.environment)
    server.wait_for_client()
    metadata_service.notice = NOTICE
    status, output = finish(process, timeout=30)
    server.close()
    assert status == 143, output
    assert "stopped by spot termination notice" in output and ", before the training began" in output


def test_damaged_and_missing_files_are_refused(store, tmp_path):
    store.put("val.arrow", os.urandom(3_000))
    with pytest.raises(DataError, match="val.arrow from .* is not what its SHA256SUMS says"):
        fetching._fetch(store, tmp_path / "local", print)
    assert not (tmp_path / "local/val.arrow").exists() and not (tmp_path / "local/SHA256SUMS").exists()
    store.delete("val.arrow")
    with pytest.raises(DataError, match="holds no val.arrow, which its SHA256SUMS names"):
        fetching._fetch(store, tmp_path / "local", print)
    store.delete("SHA256SUMS")
    with pytest.raises(DataError, match="holds no SHA256SUMS"):
        fetching._fetch(store, tmp_path / "local", print)


def configuration(store, local, monkeypatch):
    """That of a run on the images of a store, which stands for one in a bucket."""
    monkeypatch.setattr(fetching, "ObjectStore", lambda url, setting: store)
    return {"data_dir": "s3://bucket/images", "local_data_dir": str(local)}


def add(store, name, content):
    store.put(name, content)
    store.put("SHA256SUMS", store.read("SHA256SUMS")[0] + f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())


def test_a_range_that_fails_is_asked_for_again(store, tmp_path, monkeypatch):
    read, asked = store.read_range, []

    def failing_first(name, start, end):
        asked.append((name, start))
        if asked.count((name, start)) == 1:
            raise StorageError("busy")
        return read(name, start, end)

    monkeypatch.setattr(store, "read_range", failing_first)
    fetching._fetch(store, tmp_path / "local", print)
    assert len(asked) == 26 and (tmp_path / "local/train.arrow").read_bytes() == store.read("train.arrow")[0]


def test_names_with_spaces_and_the_folder_that_a_program_runs_in_are_fetched_to(store, tmp_path, monkeypatch):
    add(store, "the second set.arrow", b"1234")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fetching.fetch_images(configuration(store, ".", monkeypatch), print)
    assert (tmp_path / "here/the second set.arrow").read_bytes() == b"1234" and len(list(tmp_path.glob("here/*.arrow"))) == 3
    store.put("SHA256SUMS", b"train.arrow is fine\n")
    with pytest.raises(DataError, match="is not what sha256sum writes of the files beside it: 'train.arrow is fine'"):
        fetching.fetch_images(configuration(store, "elsewhere", monkeypatch), print)


def test_a_file_here_that_has_been_cut_short_is_fetched_again(store, tmp_path):
    fetching._fetch(store, tmp_path / "local", print)
    os.truncate(tmp_path / "local/train.arrow", 5_000)
    said = []
    fetching._fetch(store, tmp_path / "local", said.append)
    assert len(said) == 1 and (tmp_path / "local/train.arrow").read_bytes() == store.read("train.arrow")[0]


def test_a_resumed_run_goes_on_with_the_images_that_are_here_while_their_storage_does_not_answer(store, tmp_path, monkeypatch):
    local, said, read, asked = tmp_path / "local", [], store.read, []
    fetching._fetch(store, local, print)

    def silent(name):
        asked.append(name)
        if len(asked) < 7:
            raise StorageError("no answer")
        return read(name)

    monkeypatch.setattr(store, "read", silent)
    fetching._fetch(store, local, said.append, resumed=True)
    assert [line.rpartition("no answer; ")[2][:11] for line in said] == ["tried again", "the run goe"]
    with pytest.raises(StorageError):  # of a new run nobody knows that they are the same ones
        fetching._fetch(store, local, said.append)
    (local / "val.arrow").unlink()
    with pytest.raises(StorageError):
        fetching._fetch(store, local, said.append, resumed=True)
    fetching._fetch(store, local, said.append, resumed=True)
    assert (local / "val.arrow").read_bytes() == read("val.arrow")[0]


def test_a_disk_without_room_for_the_images_is_said_in_a_line(store, tmp_path, monkeypatch):
    config = configuration(store, tmp_path / "local", monkeypatch)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))  # a full disk
    try:
        with pytest.raises(DataError, match="local_data_dir = .* cannot be written to: .*make room"):
            fetching.fetch_images(config, print)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(fetching, "free_bytes", lambda folder: 12_345)  # of the 13,000 that are needed
    with pytest.raises(DataError, match="0.00 GB are still to be fetched, and 0.00 GB are free: make room"):
        fetching.fetch_images(config, print)
    assert "train.arrow" not in os.listdir(tmp_path / "local")


@pytest.mark.slow
def test_a_run_trains_on_images_in_a_bucket(image_tree, tmp_path, monkeypatch):
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    assert run_program("prepare_data.py", [image_tree, tmp_path / "packed"])[0] == 0
    server = S3Server()
    try:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = ObjectStore(f"s3://{BUCKET}/images", "data_dir")
        for path in (tmp_path / "packed").iterdir():
            store.put(path.name, path.read_bytes())
        arguments = tiny_run(store.url, tmp_path / "run", local_data_dir=tmp_path / "local", epochs=2)
        status, output = run_program("train.py", arguments)
        assert status == 0 and "fetching" in output, output
        status, output = run_program("train.py", [*arguments, "--resume=auto", "--epochs=3"])
        assert status == 0 and "fetching" not in output, output
        elsewhere = tiny_run("s3://no-such-bucket/images", tmp_path / "other", local_data_dir=tmp_path / "nothing")
        status, output = run_program("train.py", elsewhere)
        assert status == 1 and "there may be no such bucket" in output and "Traceback" not in output, output
        status, output = run_program("evaluate.py", [tmp_path / "run/best.pt"])
        assert status == 0, output
    finally:
        server.close()
