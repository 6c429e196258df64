"""A preparation that is killed, stopped or out of room loses nothing: the same command goes on to the same files."""

import errno
import os
import shutil
import signal
import subprocess
import time

import pyarrow
import pyarrow.parquet
import pytest
from conftest import encoded, finish, photo, run_program, start_program
from published_forms import ORIGINALS, image_folder, prepare, write_files

import prepare_data
from engine.data.images import packed_jpeg
from engine.data.splits import open_splits
from engine.preparation import packing
from engine.preparation.archives import FileSlice
from engine.preparation.forms import open_source
from engine.preparation.packed import PackedSplit, PackedWriter
from engine.preparation.packing import Packing, ReadFailed, job_id, pack
from engine.preparation.source import Entry
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


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
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


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS"])
def test_a_file_of_ones_own_under_a_name_of_the_preparations_is_not_replaced(name, tmp_path):
    image_folder(tmp_path / "images", ORIGINALS)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / name).write_text("mine\n")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(DataError, match=f"{name} is there, is none of prepare_data.py's, and would be replaced"):
            prepare(tmp_path / "images", tmp_path / "packed", *flags)
    assert [path.read_text() for path in (tmp_path / "packed").iterdir()] == ["mine\n"]


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


def cut_off(monkeypatch, at, cut):
    """Let prepare_data.py call `cut` once, just before the function of this name that it calls."""
    function = getattr(prepare_data, at)

    def and_then(*arguments, **named):
        monkeypatch.undo()
        cut()
        return function(*arguments, **named)

    monkeypatch.setattr(prepare_data, at, and_then)


def stop():
    raise KeyboardInterrupt


def test_a_source_that_goes_away_stops_the_preparation_which_goes_on_when_it_is_back(tmp_path, monkeypatch, capsys):
    tree, away, packed = small_tree(tmp_path / "tree"), tmp_path / "away", tmp_path / "packed"
    assert prepare(tree, tmp_path / "whole") == 0
    cut_off(monkeypatch, "StopRequest", lambda: tree.rename(away))
    assert prepare(tree, packed) == 1
    said = capsys.readouterr().err
    assert "train/cat/0.jpg cannot be read (No such file or directory)" in said
    assert "The same command goes on from here" in said
    away.rename(tree)
    cut_off(monkeypatch, "announce", lambda: tree.rename(away))  # already while a sample is read
    with pytest.raises(DataError, match=r"train/cat/0.jpg cannot be read \(No such file"):
        prepare(tree, packed)
    away.rename(tree)
    assert prepare(tree, packed) == 0
    assert (packed / "SHA256SUMS").read_text() == (tmp_path / "whole/SHA256SUMS").read_text()


def test_a_machine_that_cannot_read_or_has_no_memory_is_no_fault_of_the_image(tmp_path):
    def out_of_memory(*_):
        raise MemoryError

    image = SMALL
    (tmp_path / "good.jpg").write_bytes(image)
    (tmp_path / "memory.jpg").symlink_to("/proc/self/mem")  # which gives EIO, whoever reads it
    (tmp_path / "bad.jpg").write_bytes(image[:300])

    def packed(name, length, encode=packed_jpeg):
        return pack(Entry(name, 0, FileSlice(str(tmp_path / name), 0, length)), encode, 352, 90)

    assert packed("good.jpg", len(image)) == (image, None)
    assert packed("bad.jpg", 300)[0] is None
    assert "ends in the middle" in packed("bad.jpg", 301)[1]  # as a member of an archive that is damaged
    for name, encode, reason in (
        ("gone.jpg", packed_jpeg, "No such file"),
        ("memory.jpg", packed_jpeg, "Input/output error"),
        ("good.jpg", out_of_memory, "MemoryError"),
    ):
        with pytest.raises(ReadFailed, match=f"{name} cannot be read .{reason}"):
            packed(name, len(image), encode)


def test_a_split_without_a_single_good_image_is_no_success(tmp_path):
    tree = small_tree(tmp_path / "tree")
    for path in (tree / "val").rglob("*.jpg"):
        path.write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(DataError, match=r"none of the 8 val images is one that can be read \(cat/0.jpg: "):
            prepare(tree, tmp_path / "packed")
        assert not (tmp_path / "packed/manifest.json").exists()


def test_the_same_images_are_those_of_the_same_names_and_sizes_wherever_they_lie(tmp_path, monkeypatch, capsys):
    tree, moved, packed = small_tree(tmp_path / "tree"), tmp_path / "moved", tmp_path / "packed"
    cut_off(monkeypatch, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tree, packed)
    tree.rename(moved)
    small_tree(tree)
    (tree / "train/dog/2.jpg").write_bytes(SMALL)  # under the same name
    with pytest.raises(DataError, match="another preparation"):
        prepare(tree, packed)
    assert prepare(moved, packed) == 0
    assert prepare(moved, packed) == 0
    assert "prepared already, from images of the same names and sizes in the same way" in capsys.readouterr().out
    with pytest.raises(DataError, match="from images of other names or sizes, or in another way"):
        prepare(tree, packed)
    rows = [{"image": {"bytes": SMALL}, "label": n} for n in range(2)]
    jobs = set()
    for size in (0, 0, 1):
        rows[0]["image"]["bytes"] = SMALL + bytes(size)
        for split in ("train", "val"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet", compression="none")
        jobs.add(job_id(open_source(tmp_path), Packing(packed, packed_jpeg, 352, 90, 1)))
    assert len(jobs) == 2


@pytest.fixture
def half_done(tmp_path, monkeypatch):
    """(source, finished preparation, another one in which 4 of the 6 training images are packed, two in a piece)."""
    tree, whole, packed = small_tree(tmp_path / "tree", images=3), tmp_path / "whole", tmp_path / "packed"
    append = PackedWriter.append

    def fail_after_four(writer, *arguments):
        append(writer, *arguments)
        if writer.entries_done == 4:
            monkeypatch.undo()
            raise OSError("no more")

    with pytest.MonkeyPatch.context() as pieces:
        pieces.setattr(packing, "PIECE", 2)
        assert prepare(tree, whole) == 0
        monkeypatch.setattr(PackedWriter, "append", fail_after_four)
        assert prepare(tree, packed) == 1
        yield tree, whole, packed


def test_a_beginning_that_is_shorter_than_its_journal_is_gone_back_in_never_filled_up(half_done, capsys):
    tree, whole, packed = half_done
    part = packed / ".train.arrow.part"
    os.truncate(part, part.stat().st_size - 100)
    assert prepare(tree, packed) == 0
    said = capsys.readouterr().out
    assert f"WARNING: {part} is shorter than it was: going back" in said
    assert "train: going on after 2 images" in said
    assert_same_files(packed, (tree, whole))


def test_a_beginning_or_a_finished_split_that_is_gone_is_begun_anew(half_done, monkeypatch, capsys):
    tree, whole, packed = half_done
    (packed / ".train.arrow.part").unlink()
    cut_off(monkeypatch, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tree, packed)
    assert f"WARNING: {packed / '.train.arrow.part'} is not there any more: going back" in capsys.readouterr().out
    (packed / "train.arrow").unlink()
    os.truncate(packed / "val.arrow", 500)
    assert prepare(tree, packed) == 0
    said = capsys.readouterr().out
    assert f"WARNING: {packed / 'train.arrow'} is not there any more" in said
    assert f"WARNING: {packed / 'val.arrow'} is shorter than it was" in said
    assert_same_files(packed, (tree, whole))


def test_a_file_that_a_finished_preparation_has_lost_is_packed_anew(tmp_path, capsys):
    tree, packed = small_tree(tmp_path / "tree"), tmp_path / "packed"
    prepare(tree, packed)
    before = (packed / "SHA256SUMS").read_text()
    (packed / "train.arrow").unlink()
    os.truncate(packed / "val.arrow", 5)
    assert prepare(tree, packed) == 0
    assert "moved away or cut off since" in capsys.readouterr().out
    assert (packed / "SHA256SUMS").read_text() == before
    (packed / ".val.arrow.journal").write_text("killed before the last of it was deleted")
    assert prepare(tree, packed) == 0
    assert sorted(path.name for path in packed.iterdir()) == ["SHA256SUMS", "manifest.json", "train.arrow", "val.arrow"]
    assert len(open_splits(packed)["train"]) == 8


def test_overwrite_keeps_what_this_very_job_has_begun_and_no_other(half_done, capsys):
    tree, whole, packed = half_done
    (packed / "val.arrow").write_bytes(b"of another job")
    (packed / "manifest.json").write_text('{"job": "another", "splits": {}}')
    assert prepare(tree, packed, "--overwrite") == 0
    assert "train: going on after 4 images" in capsys.readouterr().out
    assert_same_files(packed, (tree, whole))
    assert prepare(tree, packed, "--overwrite") == 0  # a finished one is made anew
    said = capsys.readouterr().out
    assert "going on" not in said and "prepared already" not in said
    assert_same_files(packed, (tree, whole))


def test_a_file_system_without_fsync_will_do(tmp_path, monkeypatch):
    def cannot(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", cannot)
    assert prepare(small_tree(tmp_path / "tree"), tmp_path / "packed") == 0
