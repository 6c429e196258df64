"""The two-minute notice of an EC2 spot instance, from a real HTTP server that speaks IMDSv2."""

import time

import pytest
from conftest import NOTICE, figures, run_here, run_program, tiny_run, wait_for

from engine.system.interruption import Interrupted, StopRequest, watch_spot_notice


def test_a_spot_notice_stops_the_run_as_sigterm_does(metadata_service, image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", spot_notice="true")
    arguments += [f"--spot-notice-url=http://127.0.0.1:{metadata_service.server_port}"]
    metadata_service.notice = NOTICE
    status, output = run_program("train.py", arguments)
    assert status == 143, output
    assert "spot termination notice" in output and "terminate" in output and "saved. Go on with" in output
    assert run_here([f"--resume={tmp_path}/run/last.pt", "--spot-notice=false"]) == 0
    assert run_here(tiny_run(image_tree, tmp_path / "undisturbed")) == 0
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
