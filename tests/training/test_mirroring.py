"""A run that is found again on another machine: which of folder and mirror is gone on with, and what is fetched."""

import os
import re
import resource
import shutil
import signal
import time

import pytest
from conftest import run_here, tiny_run
from mirrored_run import Writer, fetched

import train
from engine.run import checkpoint_files
from engine.run.ledger import Ledger, read_hours
from engine.run.mirror import Mirror
from engine.system.errors import CheckpointError, UserError
from engine.system.object_store import StorageError
from engine.training import mirroring

pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")


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


def test_a_runs_own_folder_is_no_mirror_of_it(image_tree, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    arguments = tiny_run(image_tree, tmp_path / "run", mirror=tmp_path / "link")
    with pytest.raises(UserError, match="is checkpoint_dir itself"):
        run_here(arguments)
    assert run_here([*arguments, "--check"]) == 1
    assert "is checkpoint_dir itself" in capsys.readouterr().out
