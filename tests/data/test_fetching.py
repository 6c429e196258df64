"""Packed images come from object storage to the local disk, whole or not at all."""

import hashlib
import os

import pytest
from conftest import run_program, tiny_run
from object_storage import BUCKET, S3Server

from engine.data import fetching
from engine.system.errors import DataError
from engine.system.object_store import ObjectStore, StorageError

pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A place with two files of 10,000 and 3,000 bytes, fetched 1,000 bytes at a time."""
    monkeypatch.setattr(fetching, "RANGE_BYTES", 1000)
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
        status, output = run_program("evaluate.py", [tmp_path / "run/best.pt"])
        assert status == 0, output
    finally:
        server.close()
