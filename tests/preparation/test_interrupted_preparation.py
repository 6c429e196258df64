"""A preparation that is killed, stopped or out of room loses nothing: the same command goes on to the same files."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import encoded, finish, photo, run_program, start_program
from published_forms import ORIGINALS, image_folder, prepare, write_files

from engine.data.splits import open_splits
from engine.preparation.packed import PackedSplit
from engine.system.errors import DataError


@pytest.fixture(scope="module")
def long_work(tmp_path_factory):
    """An ImageFolder of 2,600 training images, that is 6 pieces; (folder, checksums of its preparation, its destination)."""
    folder = tmp_path_factory.mktemp("long")
    images = [encoded(photo(130, 150, seed), quality=85) for seed in range(20)]
    for split, count in (("train", 1300), ("val", 20)):
        for name in ("cat", "dog"):
            write_files(folder / "source", {f"{split}/{name}/{n:05d}.JPEG": images[n % 20] for n in range(count)})
    assert prepare(folder / "source", folder / "whole", "--shorter-side=96") == 0
    return folder / "source", folder / "whole"


def arguments_for(long_work, destination):
    return [long_work[0], destination, "--shorter-side=96", "--num-workers=2"]


def wait_for_a_piece(process, destination):
    """Wait until the journal of the training images has grown."""
    journal = destination / ".train.arrow.journal"
    size = journal.stat().st_size if journal.exists() else 100
    while not journal.exists() or journal.stat().st_size <= size:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def assert_same_files(destination, long_work):
    for name in ("train.arrow", "val.arrow", "SHA256SUMS"):
        assert (destination / name).read_bytes() == (long_work[1] / name).read_bytes(), name


def test_killed_again_and_again_it_ends_with_the_same_files(long_work, tmp_path):
    destination = tmp_path / "packed"
    for _ in range(3):
        process = start_program("prepare_data.py", arguments_for(long_work, destination), start_new_session=True)
        wait_for_a_piece(process, destination)
        os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        assert not (destination / "train.arrow").exists()
    status, output = run_program("prepare_data.py", arguments_for(long_work, destination))
    assert status == 0, output
    assert "train: going on after " in output
    assert_same_files(destination, long_work)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_with_a_word_and_the_same_command_goes_on(number, long_work, tmp_path):
    destination = tmp_path / "packed"
    process = start_program("prepare_data.py", arguments_for(long_work, destination), start_new_session=True)
    wait_for_a_piece(process, destination)
    os.killpg(process.pid, number)
    status, output = finish(process)
    assert status == 128 + number, output
    assert "The same command goes on from here" in output
    assert "Traceback" not in output
    assert run_program("prepare_data.py", arguments_for(long_work, destination))[0] == 0
    assert_same_files(destination, long_work)


def test_a_killed_worker_ends_it_with_a_word(long_work, tmp_path):
    destination = tmp_path / "packed"
    process = start_program("prepare_data.py", arguments_for(long_work, destination))
    wait_for_a_piece(process, destination)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    status, output = finish(process)
    assert status == 1, output
    assert "a worker process was killed" in output
    assert "Traceback" not in output


def test_a_full_disk_ends_it_with_a_word_and_the_same_command_goes_on(long_work, tmp_path):
    destination, limit = tmp_path / "packed", (long_work[1] / "train.arrow").stat().st_size // 2
    process = start_program(
        "prepare_data.py",
        arguments_for(long_work, destination),
        file_size_limit=limit,
    )
    status, output = finish(process)
    assert status == 1, output
    assert "File too large" in output
    assert "Traceback" not in output
    assert run_program("prepare_data.py", arguments_for(long_work, destination))[0] == 0
    assert_same_files(destination, long_work)


def test_what_was_prepared_before_is_kept_unless_told_otherwise(long_work, tmp_path, capsys):
    destination = tmp_path / "packed"
    shutil.copytree(long_work[1], destination)
    assert prepare(long_work[0], destination, "--shorter-side=96") == 0
    assert "prepared already" in capsys.readouterr().out
    with pytest.raises(DataError, match="--overwrite"):
        prepare(long_work[0], destination, "--shorter-side=80")
    image_folder(tmp_path / "other", ORIGINALS)
    with pytest.raises(DataError, match="--overwrite"):
        prepare(tmp_path / "other", destination)
    assert_same_files(destination, long_work)
    assert prepare(tmp_path / "other", destination, "--overwrite") == 0
    assert len(PackedSplit(destination / "train.arrow")) == 15


def test_an_unfinished_preparation_of_other_images_is_not_mixed_with_this_one(long_work, tmp_path):
    destination = tmp_path / "packed"
    process = start_program("prepare_data.py", arguments_for(long_work, destination), start_new_session=True)
    wait_for_a_piece(process, destination)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    with pytest.raises(DataError, match="is being prepared"):
        open_splits(destination)
    image_folder(tmp_path / "other", ORIGINALS)
    with pytest.raises(DataError, match="another preparation"):
        prepare(tmp_path / "other", destination)


# What is there is kept, and gone on with ------------------------------------------------------------------------------

SMALL = encoded(photo(40, 48), quality=85)


def small_tree(folder, images=4, classes=("cat", "dog")):
    """Write a tree of small images, each with its number behind its end, and so with bytes of its own."""
    files = {
        f"{split}/{name}/{n}.jpg": SMALL + b"%03d" % n for split in ("train", "val") for name in classes for n in range(images)
    }
    return write_files(folder, files)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_source_is_never_replaced_by_its_own_preparation(tmp_path):
    tree = small_tree(tmp_path / "tree")
    assert prepare(tree, tmp_path / "packed") == 0
    assert prepare(tree, tree) == 0  # beside train/ and val/
    (tmp_path / "link").symlink_to(tmp_path / "packed")
    for source, destination in (("packed", "packed"), ("packed", "link"), ("link", "packed"), ("tree", "tree")):
        before = files_in(tmp_path / "packed")
        for flags in ([], ["--shorter-side=32"], ["--shorter-side=32", "--overwrite"]):
            with pytest.raises(DataError, match="is a part of SOURCE and would be replaced: name another") as refused:
                prepare(tmp_path / source, tmp_path / destination, *flags)
            assert "--overwrite" not in str(refused.value)
        assert files_in(tmp_path / "packed") == before
    assert prepare(tmp_path / "packed", tmp_path / "smaller", "--shorter-side=32") == 0


def test_nothing_is_deleted_before_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    tree = small_tree(tmp_path / "tree")
    prepare(tree, tmp_path / "packed")
    before = files_in(tmp_path / "packed")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=-(10**6)))
    with pytest.raises(DataError, match="free, and about"):
        prepare(tree, tmp_path / "packed", "--shorter-side=32", "--overwrite")
    assert files_in(tmp_path / "packed") == before
