"""The two-minute notice of an EC2 spot instance, from a real HTTP server that speaks IMDSv2."""

import time

import pytest
from conftest import NOTICE, figures, finish, run_here, start_driver, tiny_run, wait_for

from engine.system.interruption import Interrupted, StopRequest, watch_spot_notice

POLL_OFTEN = "from engine.system import interruption\ninterruption.watch_spot_notice.__defaults__ = (0.02,)\n"


def test_a_spot_notice_stops_the_run_as_sigterm_does(metadata_service, image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", spot_notice="true", epochs=6)
    arguments += [f"--spot-notice-url=http://127.0.0.1:{metadata_service.server_port}"]
    process = start_driver(arguments, tmp_path / "steps", first=POLL_OFTEN)
    wait_for(lambda: (tmp_path / "steps").exists() and (tmp_path / "steps").stat().st_size)
    metadata_service.notice = NOTICE
    status, output = finish(process)
    assert status == 143, output
    assert "spot termination notice" in output and "terminate" in output and "saved. Go on with" in output
    assert run_here([f"--resume={tmp_path}/run/last.pt", "--spot-notice=false"]) == 0
    assert run_here(tiny_run(image_tree, tmp_path / "undisturbed", epochs=6)) == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "undisturbed")


def test_without_a_notice_the_poll_asks_for_nothing(metadata_service):
    stop, said = StopRequest(), []
    ended = watch_spot_notice(stop, f"http://127.0.0.1:{metadata_service.server_port}", said.append, poll_seconds=0.01)
    time.sleep(0.3)
    stop.check()
    metadata_service.notice = NOTICE
    wait_for(lambda: stop.cause is not None, seconds=10)
    with pytest.raises(Interrupted):
        stop.check()
    assert stop.exit_code == 143
    assert said == []
    ended.set()


def test_a_metadata_service_that_does_not_answer_is_said_once(metadata_service):
    metadata_service.server_close()
    stop, said = StopRequest(), []
    ended = watch_spot_notice(stop, f"http://127.0.0.1:{metadata_service.server_port}", said.append, poll_seconds=0.01)
    wait_for(lambda: said, seconds=20)
    time.sleep(0.2)
    ended.set()
    assert len(said) == 1
    assert "does not answer" in said[0]
    stop.check()
