"""The folder of a run: which checkpoints are written and kept in it, what a damaged one costs, and its best."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from config import CONFIG
from engine.run import checkpoint_files
from engine.run.checkpoint_folder import CheckpointFolder, all_finite
from engine.system.errors import CheckpointError, TrainingStopped
from engine.system.interruption import StopRequest
from engine.system.lock import LOCK, FolderLock


class State:
    """What CheckpointFolder asks of a TrainState."""

    def __init__(self, epoch=1, batch=0, value=1.0, best=0):
        self.best = {"top1": 50.0 + best if best else 0.0, "epoch": best, "weights": "raw"}
        self.contents = {"epoch": epoch, "batch": batch, "best": self.best, "model": {"weight": torch.full((50,), value)}}

    def state_dict(self):
        return self.contents


def folder_for(path, said=None, **changes):
    config, log = CONFIG | {"checkpoint_dir": str(path)} | changes, (said if said is not None else []).append
    return CheckpointFolder(config, {"recipe": "seed"}, FolderLock(Path(path) / LOCK, "", ""), StopRequest(), log)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_last_every_time_epoch_every_fifth_and_best_when_it_is(tmp_path):
    folder = folder_for(tmp_path)
    for epoch in range(1, 11):
        assert folder.save(State(epoch, best=7 if epoch >= 7 else 0))
    folder.save(State(10, batch=3, best=7))
    assert names(tmp_path) == ["best.pt", "epoch_005.pt", "epoch_010.pt", "last.pt", "previous.pt"]
    assert checkpoint_files.position(tmp_path / "previous.pt") == (10, 0)
    assert checkpoint_files.read(tmp_path / "best.pt")["epoch"] == 7
    assert checkpoint_files.read(tmp_path / "epoch_005.pt")["epoch"] == 5
    assert checkpoint_files.read(tmp_path / "last.pt")["batch"] == 3
    assert checkpoint_files.read(tmp_path / "last.pt")["recipe"] == "seed"


def test_no_epoch_file_is_written_in_the_middle_of_an_epoch(tmp_path):
    folder_for(tmp_path).save(State(5, batch=2))
    assert names(tmp_path) == ["last.pt"]


def test_a_checkpoint_in_a_folder_whose_name_is_no_utf_8_tells_its_position(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    folder_for(folder).save(State(2))
    assert checkpoint_files.position(folder / "last.pt") == (2, 0)


def test_keep_checkpoints_keeps_the_newest(tmp_path):
    folder = folder_for(tmp_path, keep_checkpoints=2, checkpoint_every_epochs=1)
    for epoch in range(1, 6):
        folder.save(State(epoch, best=1))
    assert names(tmp_path) == ["best.pt", "epoch_004.pt", "epoch_005.pt", "last.pt", "previous.pt"]


def test_keep_checkpoints_keeps_the_newest_beyond_999_epochs(tmp_path):
    folder = folder_for(tmp_path, keep_checkpoints=2, checkpoint_every_epochs=1)
    for epoch in (998, 999, 1000, 1001):
        folder.save(State(epoch))
    assert names(tmp_path) == ["epoch_1000.pt", "epoch_1001.pt", "last.pt", "previous.pt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_that_is_not_finite_is_saved_over_a_good_checkpoint(tmp_path, value):
    folder = folder_for(tmp_path)
    with pytest.raises(TrainingStopped, match=r"not saved. No checkpoint has been saved yet: start anew, with --overwrite"):
        folder.save(State(1, value=value))
    folder.save(State(1))
    with pytest.raises(TrainingStopped, match=r"no longer finite: not saved.*last\.pt"):
        folder.save(State(2, value=value))
    assert checkpoint_files.read(tmp_path / "last.pt")["epoch"] == 1


def test_saves_inside_an_epoch_come_after_checkpoint_minutes(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    folder = folder_for(tmp_path, checkpoint_minutes=2.0)
    for seconds, saved in ((119, False), (2, True), (119, False), (2, True)):
        now[0] += seconds
        (tmp_path / "last.pt").unlink(missing_ok=True)
        folder.save_if_due(State(0, batch=1))
        assert (tmp_path / "last.pt").exists() == saved


def test_a_folder_that_holds_another_run_is_refused_and_its_other_files_are_never_deleted(tmp_path):
    checkpoint_files.refuse_to_overwrite(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "mine.pt").write_text("mine")
    checkpoint_files.refuse_to_overwrite(tmp_path)
    folder_for(tmp_path).save(State(5, best=5))
    with pytest.raises(CheckpointError, match=r"holds another run.*--resume auto.*--checkpoint-dir.*--overwrite"):
        checkpoint_files.refuse_to_overwrite(tmp_path)
    checkpoint_files.delete_run(tmp_path)
    assert names(tmp_path) == ["mine.pt", "notes.txt"]


def test_the_remains_of_a_kill_in_the_middle_of_a_save_are_cleared_away(tmp_path):
    for name in (".last.pt.tmp", *(f".4321-{name}.tmp" for name in ("best.pt", "metrics.jsonl", "curves.png", "report.html"))):
        (tmp_path / name).write_bytes(b"half of it")
    (tmp_path / ".4321-mine.tmp").write_text("mine")
    folder_for(tmp_path)
    assert names(tmp_path) == [".4321-mine.tmp"]


FULL_DISK = """
import resource, sys
sys.path[:0] = {paths!r}
from test_checkpoint_folder import State, folder_for
said = []
folder = folder_for({folder!r}, said)
assert folder.save(State(1))
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
assert not folder.save(State(2, best=2))
assert "could not be saved" in said[0] and "the next save is tried again" in said[0], said
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert folder.save(State(3))
"""


@pytest.mark.parametrize("limit", [0, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (100, 1000))])
def test_a_full_disk_leaves_the_old_checkpoint_and_the_next_save_is_tried_again(tmp_path, limit):
    here = os.path.dirname(__file__)
    paths = [here, os.path.dirname(here)]
    script = FULL_DISK.format(paths=paths, folder=str(tmp_path), limit=limit)
    before = script.index("resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM")
    check = "from engine.run import checkpoint_files\nassert checkpoint_files.read({!r})['epoch'] == 1\n".format(
        str(tmp_path / "last.pt")
    )
    check += f"import os\nassert os.listdir({str(tmp_path)!r}) == ['last.pt'], os.listdir({str(tmp_path)!r})\n"
    done = subprocess.run([sys.executable, "-c", script[:before] + check + script[before:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert checkpoint_files.read(tmp_path / "last.pt")["epoch"] == 3


def test_rlimit_is_the_real_thing():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY


def test_all_finite_looks_into_nested_state():
    good = {"a": [torch.ones(2), {"b": torch.zeros(0)}], "n": 3, "i": torch.tensor([1]), "none": None}
    assert all_finite(good)
    assert not all_finite(good | {"c": ({"d": torch.tensor([1.0, float("nan")])},)})
    assert all_finite({})


# Damage: whatever single file it hits, an earlier whole one is there ---------------------------------------------------


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with open(path, "r+b") as file:  # in place: every name of the file sees it
        file.write(content)


@pytest.mark.parametrize("damaged", ["last.pt", "previous.pt", "best.pt", "epoch_005.pt"])
def test_whatever_single_file_is_damaged_in_place_another_one_of_the_same_epoch_is_whole(damaged, tmp_path):
    folder = folder_for(tmp_path)
    for epoch in (3, 4, 5):
        folder.save(State(epoch, best=epoch))
    flip_a_bit(tmp_path / damaged)
    path, contents, problems = checkpoint_files.newest_good(tmp_path)
    assert contents["epoch"] == 5
    assert (damaged == "last.pt") == bool(problems)


def test_where_no_epochs_are_kept_a_damaged_last_pt_costs_one_save(tmp_path):
    folder = folder_for(tmp_path, checkpoint_every_epochs=0)
    for batch in (1, 2, 3):
        folder.save(State(0, batch=batch))
    flip_a_bit(tmp_path / "last.pt")
    path, contents, problems = checkpoint_files.newest_good(tmp_path)
    assert (path.name, contents["batch"], len(problems)) == ("previous.pt", 2, 1)


def test_the_farthest_checkpoint_is_taken_whatever_the_clock_says(tmp_path):
    folder = folder_for(tmp_path, checkpoint_every_epochs=1)
    for epoch in (1, 2, 999, 1000):
        folder.save(State(epoch, best=1))
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).unlink()
    for seconds, name in enumerate(("epoch_1000.pt", "epoch_999.pt", "epoch_002.pt", "epoch_001.pt", "best.pt")):
        os.utime(tmp_path / name, (seconds, seconds))  # as a careless copy leaves them
    assert checkpoint_files.newest_good(tmp_path)[0].name == "epoch_1000.pt"
    (tmp_path / "epoch_1000.pt").unlink()
    (tmp_path / "epoch_999.pt").unlink()
    assert checkpoint_files.newest_good(tmp_path)[0].name == "epoch_002.pt"
    (tmp_path / "epoch_002.pt").rename(tmp_path / "epoch_007.pt")  # a name proves nothing
    (tmp_path / "epoch_001.pt").rename(tmp_path / "epoch_009.pt")
    assert checkpoint_files.newest_good(tmp_path)[1]["epoch"] == 2


def test_what_is_no_checkpoint_among_the_checkpoints_is_named_and_passed_over(tmp_path):
    folder_for(tmp_path).save(State(3))
    (tmp_path / "last.pt").rename(tmp_path / "epoch_003.pt")
    (tmp_path / "last.pt").symlink_to(tmp_path / "nowhere.pt")
    (tmp_path / "best.pt").mkdir()
    os.mkfifo(tmp_path / "previous.pt")
    path, contents, problems = checkpoint_files.newest_good(tmp_path)
    assert contents["epoch"] == 3
    assert [problem.partition(" is ")[2] for problem in problems] == [
        "a link that leads nowhere",
        "no regular file",
        "no regular file",
    ]


# The best --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 1 MB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def fill(disk, leave):
    """Fill a disk but for so many bytes; return the file that does it."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filling").write_bytes(bytes(max(0, free - leave)))
    return disk / "filling"


def test_the_last_word_about_the_best_is_true_where_the_disk_was_full_when_it_was_due(small_disk):
    said = []
    folder = folder_for(small_disk, said)
    folder.save(State(1, best=1))
    assert folder.best_in_words(State(1, best=1).best, "8 px") == (
        f"best validation top-1 51.00 % in epoch 1 (raw weights, 8 px), in {small_disk}/best.pt"
    )
    filling = fill(small_disk, leave=0)
    assert not folder.save(State(2, best=2))
    assert "could not be saved" in said[-1]
    filling.unlink()
    assert folder.save(State(2, batch=1, best=2))  # the weights have moved on
    assert folder.best_in_words(State(2, best=2).best, "8 px") == (
        f"best validation top-1 51.00 % in epoch 1 (raw weights, 8 px), in {small_disk}/best.pt; "
        "52.00 % in epoch 2 (raw weights, 8 px) is not on disk"
    )


def test_a_disk_that_takes_the_checkpoint_but_no_copy_of_it_keeps_the_checkpoint(small_disk):
    said = []
    folder = folder_for(small_disk, said)
    folder.save(State(1))
    assert (small_disk / "last.pt").stat().st_size < 4096
    fill(small_disk, leave=4096)  # a page: one file
    assert not folder.save(State(2, best=2))
    assert said[-1].startswith("WARNING: best.pt, the best so far, could not be written") and "last.pt is saved" in said[-1]
    assert checkpoint_files.read(small_disk / "last.pt")["epoch"] == 2
    assert folder.best_in_words(State(2, best=2).best, "8 px").startswith("there is no")
    (small_disk / "filling").unlink()
    assert folder.save(State(2, best=2))  # tried once more, as at the end of a run
    assert checkpoint_files.read(small_disk / "best.pt")["epoch"] == 2


def found_best(folder, said, best, resumed="last.pt"):
    there = folder_for(folder, said)
    there.find_best(State(best=best).best, folder / resumed)
    return there.best["epoch"]


def test_a_resumed_run_sees_to_it_that_best_pt_is_the_best(tmp_path):
    folder = folder_for(tmp_path, checkpoint_every_epochs=1)
    for epoch in (1, 2, 3):
        folder.save(State(epoch, best=min(epoch, 2)))
    said = []
    assert found_best(tmp_path, said, best=2) == 2 and said == []
    flip_a_bit(tmp_path / "best.pt")
    assert found_best(tmp_path, said, best=2) == 2
    assert "is made from" in said[0] and "is damaged" in said[0]
    assert checkpoint_files.read(tmp_path / "best.pt")["epoch"] == 2
    for name in ("best.pt", "epoch_002.pt", "previous.pt"):
        (tmp_path / name).unlink()
    assert found_best(tmp_path, said, best=2) == 0
    assert "WARNING: the best weights so far (52.00 % in epoch 2) are not in" in said[-1]
    again = folder_for(tmp_path)
    again.save(State(4, best=4))
    assert checkpoint_files.read(tmp_path / "best.pt")["epoch"] == 4


def test_a_run_that_goes_on_in_another_folder_takes_its_best_along(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    folder = folder_for(tmp_path / "old")
    for epoch in (1, 2):
        folder.save(State(epoch, best=1))
    new = folder_for(tmp_path / "new")
    new.find_best(State(best=1).best, tmp_path / "old/last.pt")
    assert checkpoint_files.read(tmp_path / "new/best.pt")["epoch"] == 1
    assert f"in {tmp_path}/new/best.pt" in new.best_in_words(State(best=1).best, "8 px")


def test_a_run_that_was_taken_back_goes_on_from_its_last_pt_and_not_from_its_former_future(tmp_path):
    folder = folder_for(tmp_path, checkpoint_every_epochs=1)
    for epoch in (1, 2, 3):
        folder.save(State(epoch))
    folder.save(State(1, batch=4))  # resumed from epoch_001.pt
    assert checkpoint_files.newest_good(tmp_path)[1]["batch"] == 4


def test_a_run_resumed_from_another_file_than_last_pt_writes_one_at_its_end(tmp_path):
    folder = folder_for(tmp_path)
    folder.save(State(5, best=5))
    folder.find_best(State(best=5).best, tmp_path / "last.pt")
    assert folder.is_saved
    folder.find_best(State(best=5).best, tmp_path / "best.pt")
    assert not folder.is_saved
