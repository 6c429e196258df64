"""report.py --serve: the report of a run that goes on, in a browser, and nothing else."""

import http.client
import json
import re
import shutil
import socket
import struct

import pytest
from browser import CHROMIUM, browser
from conftest import HOSTILE, finish, run_with_a_hostile_class, start_program, wait_for

from engine.report import serving


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of an epoch, one of its classes with a hostile name."""
    folder = run_with_a_hostile_class(tmp_path_factory.mktemp("serving"), train_images=60, val_images=20)
    (folder / "secret.txt").write_text("not for others")
    return folder


@pytest.fixture
def served(run, tmp_path):
    """(address, copy of the run's folder) of a server in a process of its own."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    gallery = {"title": HOSTILE, "training": False, "calibration_error": 0.1, "reliability": [], "classes": [[HOSTILE, 1, 0.0]]}
    shot = {
        "name": HOSTILE,
        "label": HOSTILE,
        "right": False,
        "best": [[HOSTILE, 0.5]],
        "jpeg": "'\"><script>alert(1)</script>",
    }
    gallery |= {"sections": [{"title": HOSTILE, "text": HOSTILE, "shots": [shot]}]}
    (folder / "val_gallery.json").write_text(json.dumps(gallery))
    process = start_program("report.py", [folder, "--serve", "0"])
    address = re.match(r"http://127\.0\.0\.1:(\d+)/ shows", process.stdout.readline())
    yield int(address[1]), folder
    process.terminate()
    finish(process)


def asked(port, path, method="GET", **headers):
    """Return (status, headers, text) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Host": f"localhost:{port}"} | headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


@pytest.mark.slow
def test_the_page_is_served_read_only_and_no_path_leads_elsewhere(served):
    port, folder = served
    status, headers, page = asked(port, "/")
    assert status == 200 and "Training report" in page and page.count("<script") == 1
    assert "<img src=x" not in page and "<script>alert" not in page
    nonce = re.search(r'<script nonce="([\w-]+)">', page)[1]
    assert f"script-src 'nonce-{nonce}'" in headers["Content-Security-Policy"]
    assert nonce not in asked(port, "/")[2]  # each answer has its own
    paths = [
        "/secret.txt",
        "/last.pt",
        "/../run/secret.txt",
        "/%2e%2e/run.log",
        "//etc/passwd",
        f"/{folder}/secret.txt",
        "/report",
    ]
    for path in paths:
        status, _, text = asked(port, path)
        assert status == 404 and text == "there is only /\n", path
    for method in ("POST", "PUT", "DELETE"):
        assert asked(port, "/", method)[0] == 501
    assert asked(port, "/", Host="evil.example")[0] == 403
    before = asked(port, "/state")[2]
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"event": "progress", "time": 1, "epoch": 1, "batch": 5}\n')
    assert asked(port, "/state")[2] == before  # no news that needs a page
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() * 2)
    assert asked(port, "/state")[2] != before


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_each_epoch_as_it_ends_and_runs_no_name_as_a_script(served, tmp_path):
    port, folder = served
    with browser(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{port}/", width=400)
        assert "Finished after 1 epoch." in page.value("document.body.innerText")
        assert page.value("document.title").startswith("Training report")
        page.click(".shots summary")
        assert HOSTILE in page.value("document.querySelector('.shots details[open]').innerText")
        record = json.loads((folder / "metrics.jsonl").read_text()) | {"epoch": 2, "val_top1": 87.65}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        wait_for(lambda: "87.65 %" in page.value("document.body ? document.body.innerText : ''"), seconds=30)
        assert page.value("document.title").startswith("Training report")


@pytest.mark.slow
def test_a_folder_without_a_run_is_waited_for_and_a_taken_port_is_said(served, tmp_path):
    port, _ = served
    (tmp_path / "empty").mkdir()
    status, output = finish(start_program("report.py", [tmp_path / "empty", f"--serve={port}"]))
    assert status == 1 and "name another port" in output
    process = start_program("report.py", [tmp_path / "empty", "--serve=0"])
    other = int(re.match(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
    assert "Nothing to report yet" in asked(other, "/")[2]
    process.terminate()
    finish(process)


def test_a_browser_that_goes_away_before_its_answer_costs_no_traceback(run, capfd):
    with serving._Server(("127.0.0.1", 0), serving._Handler) as server:
        server.daemon_threads = False  # so that they are waited for
        server.page = serving.Page([run], lambda: ("a report", []))
        for _ in range(3):
            with socket.create_connection(server.server_address) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            server.handle_request()
    assert capfd.readouterr().err == ""
