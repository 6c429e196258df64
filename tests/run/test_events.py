"""What happens to a run is told by events.jsonl, for programs to read."""

import os
import resource
import signal

import pytest
from conftest import run_here, tiny_run

from engine.run.events import EVENTS, EventLog, read_events
from engine.run.tensorboard import open_tensorboard


def events_of(folder, *kinds):
    return [event for event in read_events(folder / EVENTS) if event["event"] in kinds]


def stopped_after(function, calls, number):
    """The function, sending this process a signal once it has been called so often."""
    made = []

    def wrapped(*arguments, **options):
        made.append(1)
        if len(made) == calls:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return wrapped


def test_what_tensorboard_could_not_be_told_on_a_full_disk_it_is_told_with_the_next_epoch(tmp_path, capfd):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = open_tensorboard(tmp_path, 0)
    board.add({"epoch": 1, "val_loss": 3.0})
    (file,) = tmp_path.glob("tensorboard/*")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError):
            board.add({"epoch": 2, "val_loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    board.add({"epoch": 3, "val_loss": 1.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert "Traceback" not in capfd.readouterr().err


def test_a_runs_events_tell_its_start_stop_resumption_and_end(image_tree, tmp_path, monkeypatch):
    import train

    arguments = tiny_run(image_tree, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopped_after(train.train_step, 11, signal.SIGTERM))
        assert run_here(arguments) == 143
    (stopped,) = events_of(tmp_path / "run", "interruption")
    assert (stopped["reason"], stopped["epoch"], stopped["batch"], stopped["step"]) == ("SIGTERM", 1, 4, 11)
    assert stopped["saved"] is True
    assert run_here([*arguments, "--resume=auto"]) == 0
    kinds = [event["event"] for event in read_events(tmp_path / "run" / EVENTS)]
    assert kinds == ["start", "save", "epoch", "save", "interruption", "start", "resume", *["save", "epoch"] * 2, "end"]
    first, second = events_of(tmp_path / "run", "start")
    assert first["config"]["batch_size"] == second["config"]["batch_size"] == 8
    assert (first["images"], first["steps_per_epoch"], first["recipe"]) == (60, 7, "seed")
    (resumed,) = events_of(tmp_path / "run", "resume")
    assert (resumed["epoch"], resumed["batch"], resumed["step"]) == (1, 4, 11)
    assert resumed["checkpoint"] == str(tmp_path / "run/last.pt")
    assert events_of(tmp_path / "run", "end")[0]["step"] == 21
    times = [event["time"] for event in read_events(tmp_path / "run" / EVENTS)]
    assert times == sorted(times)


@pytest.mark.slow
def test_a_new_run_in_the_same_folder_has_events_of_its_own(tiny_arguments, tmp_path):
    assert run_here([*tiny_arguments, "--epochs=2"]) == 0
    assert run_here([*tiny_arguments, "--epochs=2", "--overwrite"]) == 0
    assert len(events_of(tmp_path / "run", "start")) == len(events_of(tmp_path / "run", "end")) == 1


def test_events_go_along_with_a_run_that_goes_on_elsewhere(tiny_arguments, tmp_path):
    assert run_here([*tiny_arguments, "--epochs=2"]) == 0
    assert run_here([f"--resume={tmp_path}/run/last.pt", f"--checkpoint-dir={tmp_path}/new", "--epochs=3"]) == 0
    assert len(events_of(tmp_path / "new", "start")) == 2


def test_a_warning_is_an_event(tiny_arguments, tmp_path):
    assert run_here([*tiny_arguments, "--epochs=2"]) == 0
    (tmp_path / "run/last.pt").write_bytes(b"damaged")
    assert run_here([*tiny_arguments, "--resume=auto", "--epochs=3"]) == 0
    assert any("last.pt is damaged" in event["text"] for event in events_of(tmp_path / "run", "warning"))


def test_an_error_that_ends_a_run_is_an_event_with_its_reason(tiny_arguments, tmp_path, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr("train.average_and_validate", broken)
    with pytest.raises(ZeroDivisionError):
        run_here(tiny_arguments)
    (stopped,) = events_of(tmp_path / "run", "interruption")
    assert stopped["reason"] == "ZeroDivisionError: of the test"


def test_a_line_that_a_kill_cut_short_costs_itself_alone(tmp_path):
    (tmp_path / EVENTS).write_text('{"event": "start", "time": 1.0}\n{"event": "save", "ti')
    log = EventLog()
    log.add("resume", epoch=1, batch=2)
    log.open(tmp_path)
    log.add("end")
    assert [event["event"] for event in read_events(tmp_path / EVENTS)] == ["start", "resume", "end"]


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path):
    log = EventLog()
    log.open(tmp_path)
    log.add("start", steps_per_epoch=7)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / EVENTS).stat().st_size + 10, limits[1]))
        log.add("save", epoch=1, batch=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [event["event"] for event in read_events(tmp_path / EVENTS)] == ["start"]
    log.add("end")
    events = read_events(tmp_path / EVENTS)
    assert [event["event"] for event in events] == ["start", "save", "end"]
    assert events[1]["step"] == 10
