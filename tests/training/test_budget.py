"""A run's hours and budget: counted over all sessions, kept in the checkpoint, said when they will be missed."""

import functools
import json
import os
import re
import shutil
import signal
import time

import pytest
from conftest import finish, run_here, run_program, start_driver, tiny_run, wait_for

from config import CONFIG
from engine.cli.command_line import parse_command_line
from engine.cli.keys import ConfigError
from engine.run import checkpoint_files, ledger
from engine.run.ledger import HOURS, Ledger, read_hours
from engine.training import images, settling
from engine.training.budget import _settle_budget, open_ledger
from engine.training.forecast import Forecast
from engine.training.plan import PlanError, Rates
from engine.training.resuming import Beginning
from train import OWN_FLAGS

QUICK = CONFIG | {"batch_size": 8, "epochs": 4, "warmup_epochs": 1, "swa_start_epoch": 0, "train_resolution": 32}


def ledger_of(hours, price=None, sessions=1):
    """The ledger of a run whose earlier sessions took so many hours each."""
    made = Ledger(time.perf_counter(), price)
    made.run = "run"
    made.merge(
        {"run": "run", "saves": 3, "budget": None}
        | {"sessions": {f"session {n}": {"seconds": 3600 * hours, "price_per_hour": price} for n in range(sessions)}}
    )
    return made


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_two_ledgers_of_a_run_are_merged_by_the_longer_of_each_session():
    ours, theirs = ledger_of(1.0, price=2.0), ledger_of(1.5, price=2.0, sessions=3)
    ours.merge(theirs.state())
    assert ours.earlier_sessions == 4  # three, and the other process's own
    assert ours.hours() == pytest.approx(3 * 1.5, abs=0.01)
    assert ours.dollars() == pytest.approx(3 * 1.5 * 2, abs=0.01)
    before = ours.state()["sessions"].keys()
    stranger = Ledger(time.perf_counter())
    ours.merge(stranger.state())
    assert ours.state()["sessions"].keys() == before


def test_hours_json_tells_what_a_killed_session_did_after_its_last_save(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "WRITE_SECONDS", 0.05)
    killed = Ledger(time.perf_counter() - 3600)
    killed.keep(tmp_path)
    checkpoint = killed.state()
    time.sleep(0.3)
    killed._ended.set()  # as a kill does: nothing more is written
    later = Ledger(time.perf_counter())
    later.take_over(checkpoint)
    short = later.hours()
    later.merge(read_hours(tmp_path))
    assert later.hours() > short
    (tmp_path / HOURS).write_text("{")
    assert read_hours(tmp_path) is None


def forecast_for(hours, budget, price=None, config=QUICK, rates=None):
    """A Forecast after the first of 4 epochs, which took an hour, in a session that follows one of so many hours."""
    clock, book = Clock(), ledger_of(hours, price)
    book.budget, book.rates = budget, rates
    forecast = Forecast(config, (80, 0), book, clock)
    forecast.note(0, 0)
    clock.now = 3600.0
    return forecast


def test_the_end_and_the_dollars_follow_from_this_sessions_speed_and_all_sessions_hours():
    outlook = forecast_for(2.0, None, price=1.5).outlook(1, 0)
    assert outlook.hours_left == pytest.approx(3.0)
    assert outlook.hours == pytest.approx(2.0 + 3.0, abs=0.01)  # the hour of the clock here is none of the ledger's
    assert outlook.dollars_so_far == pytest.approx(2.0 * 1.5, abs=0.01)
    assert outlook.dollars == pytest.approx(5.0 * 1.5, abs=0.01)
    expected = time.time() + 3 * 3600
    assert abs(time.mktime(outlook.end) - expected) < 5
    assert re.fullmatch(r"; ends \d{4}-\d\d-\d\d \d\d:\d\d, 3.00 of 7.50 dollars", forecast_for(2.0, None, 1.5).in_words(1))


def test_a_growing_resolution_makes_later_epochs_longer():
    growing = QUICK | {"start_resolution": 32, "train_resolution": 64, "resolution_ramp_start": 0.5, "resolution_ramp_end": 0.5}
    outlook = forecast_for(0.0, None, config=growing).outlook(1, 0)
    assert outlook.hours_left == pytest.approx(3 * 4)  # the first one is the only small one


def test_where_larger_images_are_not_slower_as_the_data_are_the_limit_no_budget_is_said_to_be_missed():
    growing = QUICK | {"start_resolution": 32, "train_resolution": 64, "resolution_ramp_start": 0.5, "resolution_ramp_end": 0.5}
    rates = Rates({32: 100.0, 64: 100.0}, {1: 100.0}, 0.0, "measured").as_plain()
    budget = {"hours": 4.1, "dollars": None}
    forecast = forecast_for(0.0, budget, config=growing, rates=json.loads(json.dumps(rates)))
    assert forecast.outlook(1, 0).hours_left == pytest.approx(3.0)
    assert forecast.warning(1, 0) is None
    assert "more than its budget" in forecast_for(0.0, budget, config=growing).warning(1, 0)  # nothing known of the machine


def test_averages_that_the_plan_did_not_know_are_counted_as_forward_passes():
    averaged = QUICK | {"swa_start_epoch": 2, "swa_batch_norm_batches": 10}
    rates = Rates({32: 100.0}, {1: 100.0}, 0.0, "measured without averages").as_plain()
    # Of 80 images 3 epochs are left, and in each the 80 images' forward pass, a third of a step's work.
    assert forecast_for(0.0, None, config=averaged, rates=rates).outlook(1, 0).hours_left == pytest.approx(3 * (1 + 1 / 3))


@pytest.mark.parametrize(
    ("budget", "price", "said"),
    [
        ({"hours": 5.1, "dollars": None}, None, None),
        ({"hours": 4.01, "dollars": None}, None, "(25%) more than its budget of 4.0 hours; 3 ep"),
        ({"hours": 2.5, "dollars": None}, None, "more than its budget of 2.5 hours; not even the epoch in progress fits"),
        (
            {"hours": 9.0, "dollars": 8.1},
            2.0,
            "takes 10.00 dollars in all, 1.90 (23%) more than its budget of 8.1; 3 ep",
        ),
    ],
)
def test_a_budget_that_will_be_missed_is_said_once_with_what_fits(budget, price, said):
    forecast = forecast_for(2.0, budget, price)
    first = forecast.warning(1, 0)
    assert first is None if said is None else said in first
    assert forecast.warning(1, 0) is None


@pytest.mark.parametrize(("swa_start_epoch", "said"), [(3, "; 3 epochs would fit: "), (4, "; 3 epochs would fit, but ")])
def test_epochs_that_the_configuration_refuses_are_not_advised(swa_start_epoch, said):
    config = QUICK | {"swa_start_epoch": swa_start_epoch, "swa_batch_norm_batches": 1, "swa_anneal_epochs": 1}
    warning = forecast_for(2.0, {"hours": 4.2, "dollars": None}, config=config).warning(1, 0)
    assert said in warning and ("swa_start_epoch = 4" in warning) == ("but" in said)


def test_a_speed_is_not_trusted_before_it_has_settled():
    forecast = forecast_for(2.0, {"hours": 0.1, "dollars": None})
    forecast._clock.now = 1.0
    assert forecast.warning(0, 1) is None


@pytest.mark.slow
def test_what_was_measured_for_the_plan_is_kept_for_the_forecast(tiny_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(settling, "measure_machine", functools.partial(settling.measure_machine, seconds=0.1))
    arguments = [word for word in tiny_arguments if "--epochs" not in word]
    flags = ["--swa-start-epoch=0", "--recipe=seed", "--warmup-epochs=0", "--hours=0.01"]
    assert run_here([*arguments, *flags, "--start-resolution=32", "--train-resolution=64", "--batch-size=4"]) == 0
    rates = Rates.from_plain(checkpoint_files.read(tmp_path / "run/last.pt")["ledger"]["rates"])
    assert set(rates.training) == {32, 64} and min(rates.training.values()) > 0
    assert rates.save_seconds > 0 and rates == Rates.from_plain(read_hours(tmp_path / "run")["rates"])


@pytest.mark.slow
def test_a_budget_survives_in_the_checkpoint_and_a_run_without_one_gets_none(tiny_arguments, tmp_path, capfd):
    arguments = [*(word for word in tiny_arguments if "--epochs" not in word), "--swa-start-epoch=0", "--recipe=seed"]
    budget = ["--hours=0.0001", "--images-per-s=25", "--price-per-hour=3600"]
    assert run_here([*arguments, *budget]) == 0
    saved = checkpoint_files.read(tmp_path / "run/last.pt")
    assert saved["ledger"]["budget"] == {"hours": 0.0001, "dollars": None}
    assert saved["ledger"]["rates"] is None  # nothing was measured
    assert saved["ledger"]["saves"] == saved["epoch"] == saved["config"]["epochs"]
    assert re.search(r"epoch 1/\d+: .*; ends \S+ \S+, \d+\.\d\d of \d+\.\d\d dollars", capfd.readouterr().out)
    assert run_here([*arguments, "--resume=auto", "--hours=2"]) == 0  # the plan stays, the budget is the new one
    output = capfd.readouterr().out
    assert "the budget was 0 seconds, now it is 2.0 hours; the epochs stay as planned" in output
    assert re.search(r"budget: 2.0 hours; .* dollars used so far, with 1 earlier session", output)
    epochs = saved["epoch"]
    assert run_here([*arguments, "--resume=auto", "--hours=2", "--epochs=5000"]) == 0  # as at the first start
    assert "note: --epochs 5000 is not used: --hours chooses the epochs; without it" in capfd.readouterr().out
    assert checkpoint_files.read(tmp_path / "run/last.pt")["config"]["epochs"] == epochs
    assert run_here([*arguments, "--resume=auto", f"--epochs={epochs + 1}"]) == 0
    assert checkpoint_files.read(tmp_path / "run/last.pt")["epoch"] == epochs + 1
    (tmp_path / "other").mkdir()
    assert run_here([*arguments, "--epochs=1", f"--checkpoint-dir={tmp_path / 'other'}"]) == 0
    with pytest.raises(ConfigError, match="was begun without a budget"):
        run_here(["--hours=2", f"--resume={tmp_path / 'other'}"])


def test_a_budget_in_dollars_says_the_hours_that_another_price_makes_of_it():
    ours = ledger_of(2.0, price=0.75)
    ours.budget = {"hours": 12.0, "dollars": 9.0}
    lines = _settle_budget({"dollars": "9", "price_per_hour": "0.9"}, ours, {"path": "last.pt"})
    assert lines[0] == "the budget was 9 dollars (12.0 hours), now it is 9 dollars (10.0 hours); the epochs stay as planned"


def test_a_run_killed_before_its_first_save_is_planned_for_what_is_left_of_the_budget(tiny_arguments, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    killed = Ledger(time.perf_counter() - 3600)
    killed.keep(tmp_path / "run")
    killed._ended.set()  # nothing more is written
    arguments = [*(word for word in tiny_arguments if "--epochs" not in word), "--swa-start-epoch=0", "--recipe=seed"]
    arguments += ["--resume=auto", "--images-per-s=25", "--stop-after-hours=0.01"]
    with pytest.raises(PlanError, match="--hours 0.5: 1.00 hours are used by 1 earlier session, killed before the first save"):
        run_here([*arguments, "--hours=0.5"])
    assert run_here([*arguments, "--hours=1.0001"]) == 0
    assert "1.0 hours used so far, with 1 earlier session" in capfd.readouterr().out
    saved = checkpoint_files.read(tmp_path / "run/last.pt")
    assert saved["epoch"] == saved["config"]["epochs"]  # which are thousands for the whole budget
    assert saved["ledger"]["budget"]["hours"] == 1.0001 and len(saved["ledger"]["sessions"]) == 2


def test_hours_before_the_first_save_count_where_torchrun_starts_the_run_again(tmp_path):
    killed = Ledger(time.perf_counter() - 3600)
    killed.keep(tmp_path)
    killed.close()
    again = Ledger(time.perf_counter())  # with the command line of a new run
    open_ledger(
        again, parse_command_line(["--hours=2"], OWN_FLAGS), "auto", Beginning(CONFIG, "seed", None, []), tmp_path, None
    )
    assert again.run == killed.run and again.used_before()[0] == pytest.approx(1.0, abs=0.01)


def test_stop_after_hours_saves_and_ends_with_status_0_and_the_run_goes_on(image_tree, tmp_path, capfd):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=400, swa_start_epoch=0)
    assert run_here([*arguments, "--resume=auto", "--stop-after-hours=0.0006"]) == 0  # 2 s, most of them training
    output = capfd.readouterr().out
    position = r"stopped by --stop-after-hours 0.0006 in epoch (\d+) after (\d+) batches; saved. Go on with"
    epoch, batch = map(int, re.search(position, output).groups())
    saved = checkpoint_files.read(tmp_path / "run/last.pt")
    assert (saved["epoch"], saved["batch"]) == (epoch - 1, batch)
    assert run_here([*arguments, "--resume=auto", f"--epochs={epoch}"]) == 0


@pytest.mark.slow
def test_the_hours_of_killed_sessions_are_counted(image_tree, tmp_path):
    arguments = [*tiny_run(image_tree, tmp_path / "run", epochs=400, swa_start_epoch=0), "--resume=auto"]
    heard = {}  # {session: the seconds of it that hours.json had when it was killed}

    def listen():
        saved = read_hours(tmp_path / "run")
        if saved is not None:
            heard[saved["session"]] = saved["sessions"][saved["session"]]["seconds"]
        return len(heard)

    for number in range(1, 4):
        process = start_driver(arguments, tmp_path / f"steps{number}")
        wait_for(lambda number=number: listen() == number and min(heard.values()) > ledger.WRITE_SECONDS)
        process.send_signal(signal.SIGKILL)
        finish(process)
    status, output = run_program("train.py", [*arguments, "--stop-after-hours=0.001"])
    assert status == 0, output
    sessions = read_hours(tmp_path / "run")["sessions"]
    assert len(sessions) == 4
    assert [token for token, seconds in heard.items() if sessions[token]["seconds"] < seconds] == []


def test_hours_of_a_session_that_ends_while_images_are_fetched_are_counted_here_and_in_the_mirror(
    image_tree, tmp_path, monkeypatch
):
    pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")
    place, fetch = tmp_path / "mirror", images.fetch_images

    def stopped(*arguments):
        wait_for((place / HOURS).exists, 10)
        os.kill(os.getpid(), signal.SIGTERM)
        return fetch(*arguments)

    arguments = [*tiny_run(image_tree, tmp_path / "run", mirror=place), "--resume=auto"]
    with monkeypatch.context() as patch:
        patch.setattr(images, "fetch_images", stopped)
        assert run_here(arguments) == 143
    here, there = read_hours(tmp_path / "run"), read_hours(place)
    assert here["sessions"].keys() == there["sessions"].keys() and len(here["sessions"]) == 1
    shutil.rmtree(tmp_path / "run")
    assert run_here([*arguments, "--epochs=1", "--swa-start-epoch=0"]) == 0
    ledger = checkpoint_files.read(tmp_path / "run/last.pt")["ledger"]
    assert ledger["run"] == here["run"] and len(ledger["sessions"]) == 2
