"""Promise 4: two runs never share a folder. Real processes, real lock files."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import threading
import time

import pytest
import torch
from conftest import figures, finish, run_program, start_driver, start_program, tiny_run, wait_for

from config import CONFIG
from engine.run import checkpoint_files
from engine.run.checkpoint_folder import CheckpointFolder
from engine.system import lock
from engine.system.errors import CheckpointError, TrainingStopped
from engine.system.interruption import StopRequest


def hold(folder, said=None):
    return lock.folder_lock(folder, "checkpoint_dir", (said if said is not None else []).append, "train elsewhere")


def write_lock(folder, **changes):
    """A lock file of somebody else; return what it says."""
    holder = lock.this_process()._replace(token="other", **changes)
    folder.mkdir(exist_ok=True)
    (folder / lock.LOCK).write_text(json.dumps(holder._asdict()))
    return holder


def in_children(work, count):
    """Run work() in so many forked processes at once; return what they return, numbers from 0 to 255."""
    begin, children = time.time() + 0.2, []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            status = 255
            with contextlib.suppress(BaseException):
                time.sleep(max(0.0, begin - time.time()))
                status = work()
            os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_the_second_start_in_a_folder_is_refused_in_one_line_and_the_first_goes_on(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=200, checkpoint_minutes=0.0001)
    first = start_program("train.py", [*arguments, "--resume=auto"])
    wait_for(lambda: (tmp_path / "run/last.pt").exists() or first.poll() is not None)
    status, output = run_program("train.py", [*arguments, "--resume=auto"])
    assert status == 75, output
    assert re.fullmatch(
        rf"train\.py: {tmp_path}/run is in use by process {first.pid} on {socket.gethostname()}, since .*\n", output
    )
    first.send_signal(signal.SIGTERM)
    status, output = finish(first)
    assert status == 143 and "; saved. Go on with" in output, output
    assert not (tmp_path / "run" / lock.LOCK).exists()
    assert checkpoint_files.newest_good(tmp_path / "run")[2] == []
    records = [record["epoch"] for record in figures(tmp_path / "run")]
    assert records == list(range(1, len(records) + 1))


def test_the_lock_of_a_killed_run_is_taken_over_and_that_is_said(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=1, swa_start_epoch=0)
    killed = start_driver(arguments, tmp_path / "steps", ("train", "train_step"), 2, [signal.SIGKILL])
    assert finish(killed)[0] == -signal.SIGKILL
    assert (tmp_path / "run" / lock.LOCK).exists()
    status, output = run_program("train.py", [*arguments, "--resume=auto"])
    assert status == 0, output
    assert f"was taken over from process {killed.pid} on" in output
    assert "that process is gone" in output


def test_a_new_run_is_refused_in_a_folder_whose_run_has_not_saved_yet(image_tree, tmp_path):
    from conftest import run_here

    with hold(tmp_path / "run"), pytest.raises(CheckpointError, match="is in use by process"):
        run_here(tiny_run(image_tree, tmp_path / "run"))
    with hold(tmp_path / "run"), pytest.raises(CheckpointError, match="is in use by process"):
        run_here([*tiny_run(image_tree, tmp_path / "run"), "--overwrite"])


@pytest.mark.slow
@pytest.mark.parametrize("left_by", ["nobody", "a process that is gone"])
def test_of_many_that_want_the_folder_at_once_one_gets_it(left_by, tmp_path):
    for number in range(5):
        folder = tmp_path / str(number)
        if left_by != "nobody":
            write_lock(folder, pid=2**22 + 1, process_started="1")

        def take(folder=folder, refused=tmp_path / f"refused-{number}"):
            try:
                with hold(folder):
                    wait_for(lambda: len(list(refused.glob("*"))) == 7)  # all the others have asked by then
                return 0
            except CheckpointError:
                (refused / str(os.getpid())).touch()
                return 1

        (tmp_path / f"refused-{number}").mkdir()

        assert sorted(in_children(take, 8)) == [0] + 7 * [1]
        assert list(tmp_path.glob(f"{number}/*")) == []


def test_a_process_that_got_the_number_of_one_that_is_gone_does_not_hold_its_lock(tmp_path):
    write_lock(tmp_path / "run", pid=os.getpid(), process_started="1")
    with hold(tmp_path / "run") as taken:
        assert "that process is gone" in taken.note


def test_a_process_that_has_ended_and_was_not_asked_for_its_status_is_gone(tmp_path):
    child = os.fork()
    if child == 0:
        os._exit(0)
    wait_for(lambda: lock._state_and_start(child)[0] == "Z")
    write_lock(tmp_path / "run", pid=child, process_started=lock._state_and_start(child)[1])
    with hold(tmp_path / "run") as taken:
        assert "that process is gone" in taken.note
    os.waitpid(child, 0)


def test_a_holder_elsewhere_is_gone_once_it_has_been_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 1.5)
    monkeypatch.setattr(lock, "SIGN_OF_LIFE_SECONDS", 0.1)
    holder, said = write_lock(tmp_path / "run", machine="another", host="node7"), []
    with hold(tmp_path / "run", said) as taken:
        assert "node7" in taken.note and "no sign of life for 2 s" in taken.note
    assert "waiting up to" in said[0]
    old = time.time() - 3600
    write_lock(tmp_path / "run", machine="another", host="node7")
    os.utime(tmp_path / "run" / lock.LOCK, (old, old))
    said.clear()
    with hold(tmp_path / "run", said):
        assert said == []  # nothing to wait for
    write_lock(tmp_path / "run", machine="another", host="node7")
    ended = threading.Event()

    def live():
        while not ended.wait(0.2):
            os.utime(tmp_path / "run" / lock.LOCK)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match=rf"in use by process {holder.pid} on node7"), hold(tmp_path / "run"):
            pass
    finally:
        ended.set()
        thread.join()
    assert json.loads((tmp_path / "run" / lock.LOCK).read_text())["token"] == "other"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "number", "status", "cause"),
    [
        ("--stop-after-hours=1", signal.SIGTERM, 143, "SIGTERM"),
        ("--stop-after-hours=1", signal.SIGHUP, 129, "SIGHUP"),
        ("--stop-after-hours=0.003", None, 0, "--stop-after-hours 0.003"),
    ],
)
def test_a_run_that_is_stopped_before_its_training_ends_at_once_and_gives_its_lock_back(
    flag, number, status, cause, image_tree, tmp_path
):
    pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")
    write_lock(tmp_path / "mirror", host="node7", machine="another")  # which it waits for, up to 120 s
    arguments = [*tiny_run(image_tree, tmp_path / "run", mirror=tmp_path / "mirror"), "--resume=auto", flag]
    process = start_program("train.py", arguments)
    wait_for((tmp_path / "run" / lock.LOCK).exists)
    if number is not None:
        process.send_signal(number)
    code, output = finish(process, timeout=60)
    assert code == status and f"stopped by {cause}, before the training began" in output, output
    assert not (tmp_path / "run").exists() and (tmp_path / "mirror" / lock.LOCK).exists()


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SIGN_OF_LIFE_SECONDS", 0.1)
    with hold(tmp_path / "run"):
        os.utime(tmp_path / "run" / lock.LOCK, (0, 0))
        wait_for(lambda: (tmp_path / "run" / lock.LOCK).stat().st_mtime > 0)
        (tmp_path / "run" / lock.LOCK).unlink()  # by hand
        wait_for((tmp_path / "run" / lock.LOCK).exists)


def test_a_run_whose_folder_was_taken_over_writes_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SIGN_OF_LIFE_SECONDS", 0.1)
    with hold(tmp_path / "run") as ours:
        ours.require()
        write_lock(tmp_path / "run", host="node7")
        wait_for(lambda: ours.lost_to is not None)
        with pytest.raises(TrainingStopped, match="was taken over by process .* on node7"):
            ours.require()
    assert json.loads((tmp_path / "run" / lock.LOCK).read_text())["host"] == "node7"  # not ours to delete


def folder_of(lock_of_run, said):
    config = CONFIG | {"checkpoint_dir": str(lock_of_run.path.parent)}
    return CheckpointFolder(config, {"recipe": "seed"}, lock_of_run, StopRequest(), said.append)


class State:
    """What CheckpointFolder asks of a TrainState."""

    def state_dict(self):
        return {"epoch": 1, "batch": 2, "best": {"top1": 0.0, "epoch": 0, "weights": "raw"}, "model": {"w": torch.ones(3)}}


@pytest.mark.parametrize("is_made_by_hand", [False, True])
def test_a_run_whose_folder_was_moved_away_goes_on_saving_under_its_name(is_made_by_hand, tmp_path):
    said = []
    with hold(tmp_path / "run") as ours:
        checkpoints = folder_of(ours, said)
        assert checkpoints.save(State())
        (tmp_path / "run").rename(tmp_path / "moved")
        if is_made_by_hand:
            (tmp_path / "run").mkdir()
        assert checkpoints.save(State())
        assert checkpoint_files.read(tmp_path / "run/last.pt")["batch"] == 2
        assert (tmp_path / "run" / lock.LOCK).exists()
        assert ["made anew" in line for line in said] == [True] * (not is_made_by_hand)


def test_a_run_whose_folder_was_moved_away_leaves_another_runs_files_there_alone(tmp_path):
    with hold(tmp_path / "run") as ours:
        checkpoints = folder_of(ours, [])
        checkpoints.save(State())
        (tmp_path / "run").rename(tmp_path / "moved")
        with hold(tmp_path / "run"):  # another run, which comes and goes between two looks of the first
            (tmp_path / "run/last.pt").write_bytes(b"another run's")
        with pytest.raises(TrainingStopped, match="is not this run's folder any more"):
            checkpoints.save(State())
    assert (tmp_path / "run/last.pt").read_bytes() == b"another run's"
    assert checkpoint_files.read(tmp_path / "moved/last.pt")["batch"] == 2


@pytest.mark.slow
def test_a_lock_file_without_sense_is_taken_over_once_it_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.5)
    (tmp_path / lock.LOCK).write_bytes(b"\xff\x00")
    with hold(tmp_path) as taken:
        assert "no sign of life" in taken.note


def test_a_folder_that_cannot_be_written_to_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "astray").symlink_to(tmp_path / "nowhere")
    for place, reason in (
        (tmp_path / "file", "file is no folder"),
        (tmp_path / "file/run", "file is no folder"),
        (tmp_path / "astray", "astray is a link that leads nowhere"),
        (tmp_path / "astray/run", "astray is a link that leads nowhere"),
        ("/proc/run", "No such file"),
    ):
        with pytest.raises(CheckpointError, match=f"cannot be written to: .*{reason}"), hold(place):
            pass
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / lock.LOCK).symlink_to(tmp_path / "nowhere/at/all")
    with pytest.raises(CheckpointError, match="leads nowhere"), hold(tmp_path / "linked"):
        pass


def test_a_copy_of_the_folder_of_a_run_that_goes_on_is_a_folder_of_its_own_once_it_is_seen_that_nobody_is_there(
    tmp_path, monkeypatch
):
    with hold(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.3)
        with hold(tmp_path / "copy") as copy:
            assert f"taken over from process {os.getpid()} on " in copy.note and "no sign of life" in copy.note
            with pytest.raises(CheckpointError, match="run is in use by"), hold(tmp_path / "run"):
                pass


def test_a_folder_made_for_a_run_that_is_refused_does_not_stay(tmp_path):
    with hold(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
