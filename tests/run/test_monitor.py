import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import REPOSITORY, narrow, tiny_run, within_seconds

from config import CONFIG
from engine.run.ledger import Ledger
from engine.run.monitor import Monitor
from engine.run.telemetry import GpuFigures
from engine.run.throughput import Throughput
from engine.system.errors import UserError
from engine.training.forecast import Forecast
from engine.training.metrics import TrainingMetrics

CPU = torch.device("cpu")


def run_on_a_terminal(arguments):
    """Run train.py with a pseudo-terminal for output; return what it wrote there."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # 40 lines of 160 characters
    environment = os.environ | {"TERM": "xterm", "TQDM_MININTERVAL": "0"}  # however short the epochs
    command = [sys.executable, *narrow("train.py"), *arguments]
    process = subprocess.Popen(command, stdout=its, stderr=its, cwd=REPOSITORY, env=environment)
    os.close(its)
    written = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not block:
            break
        written += block
    os.close(ours)
    assert process.wait(timeout=60) == 0, written.decode()
    return written.decode()


@pytest.mark.slow
def test_a_terminal_gets_a_bar_with_loss_top1_rate_and_speed(image_tree, tmp_path):
    written = run_on_a_terminal([*tiny_run(image_tree, tmp_path / "run", epochs=2), "--price-per-hour=3600"])
    bar = next(line for line in reversed(written.split("\r")) if line.startswith("epoch 2/2") and "loss=" in line)
    for shown in ("loss=", "top1=", "lr=", "img/s=", "/7"):
        assert shown in bar
    assert re.search(r"ends=\d{4}-\d\d-\d\d \d\d:\d\d, dollars=\d+\.\d\d of \d+\.\d\d", bar)
    assert "epoch 2: validation" in written
    assert "epoch 2/2: train loss" in written.replace("\r", "\n")


def test_figures_appear_in_plain_lines_now_and_then_where_there_is_no_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("engine.run.monitor.PLAIN_LINE_SECONDS", 0.0)
    figures = TrainingMetrics(1.5, 25.0, 0.3, 64, 0, 0, 0)
    with Monitor(str(tmp_path / "log"), torch.device("cpu")) as monitor:
        monitor.start("epoch 1/2", 10)
        monitor.advance(figures, 0.001, Throughput(CPU, 10))
        monitor.advance()
    assert capfd.readouterr().out == "epoch 1/2: batch 1/10, loss 1.500, top1 25.0%, lr 1.00e-03, img/s 0\n"


def test_a_machine_without_gpu_simply_has_no_gpu_figures():
    figures = GpuFigures(torch.device("cpu"))
    assert figures.read() == {}
    assert figures.text() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_memory_and_utilisation_are_shown():
    assert "MiB" in GpuFigures(torch.device("cuda")).text()["GPU"]


def test_every_line_of_the_log_has_its_time(tmp_path):
    with Monitor(str(tmp_path / "deep/log"), torch.device("cpu")) as monitor:
        monitor.log("one\ntwo")
        monitor.log_to_file("three")
    lines = (tmp_path / "deep/log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["one", "two", "three"]
    assert all(len(line.split(" ")[0]) == len("2026-01-31T12:34:56+0000") for line in lines)


def test_throughput_counts_images_per_second():
    speed = Throughput(CPU, 10)
    assert len(list(speed.watch([(None, range(10))] * 3))) == 3
    assert speed.images == 30
    assert speed.recent() > speed.overall() * 0.5 > 0
    assert speed.recent() == 0


def test_the_throughput_of_training_does_not_count_what_comes_after(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("engine.run.throughput.time.perf_counter", lambda: now[0])
    speed = Throughput(CPU, 10)
    assert len(list(speed.watch([(None, range(10))] * 3))) == 3
    now[0] += 10
    speed.stop()
    now[0] += 50  # validation
    assert (speed.seconds(), speed.overall()) == (10, 3)


def test_the_time_between_asking_for_a_batch_and_getting_it_is_the_waiting(monkeypatch):
    clock = iter([0, 1, 4, 10, 12, 20])  # made; of each of two batches asked for and got; asked for in vain
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    speed = Throughput(CPU, 10)
    for _ in speed.watch([(None, range(5)), (None, range(5))]):
        pass
    assert speed.waited() == (4 - 1) + (12 - 10)
    assert speed.waited() == 5


def test_epochs_shorter_than_the_steps_between_figures_show_the_forecast_and_warn_of_the_budget(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")
    monkeypatch.setattr("engine.run.epoch_records.draw_curves", lambda records, path: True)  # a second of drawing
    figures = {"train_loss": None, "val_loss": 1.0, "val_top1": 1.0, "val_top5": 1.0, "learning_rate": 1.0}
    figures |= {"images_per_s": 1.0, "seconds": 1.0, "skipped_steps": 0}
    config = CONFIG | {"batch_size": 8, "epochs": 4, "warmup_epochs": 1, "swa_start_epoch": 0}
    ledger, now = Ledger(time.perf_counter(), price_per_hour=1.5), [0.0]
    ledger.budget = {"hours": 2.0, "dollars": None}
    with Monitor(str(tmp_path / "log"), CPU) as monitor:
        monitor.forecast = Forecast(config, (80, 0), ledger, lambda: now[0])
        monitor.open_records(config, tmp_path, 0)
        for epoch in range(4):
            monitor.start(f"epoch {epoch + 1}/4", 10, epoch=epoch)
            for _ in range(10):
                now[0] += 360.0  # an hour an epoch
                monitor.advance()
            monitor.show_epoch(monitor.write_record({"epoch": epoch + 1} | figures))
    output = capfd.readouterr()
    assert re.search(r"\repoch 2/4: .*ends=\S+ \S+, dollars=0\.00 of \d\.\d\d", output.err)
    warnings = [line for line in output.out.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1 and "more than its budget of 2.0 hours; 2 epochs would fit" in warnings[0]


def test_curves_are_drawn_at_first_at_last_and_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run.epoch_records.DRAWING_SECONDS", 1000.0)
    drawn = []
    monkeypatch.setattr("engine.run.epoch_records.draw_curves", lambda records, path: drawn.append(len(records)) or True)
    figures = {"train_loss": None, "val_loss": 1.0, "val_top1": 1.0, "val_top5": 1.0, "learning_rate": 1.0}
    figures |= {"images_per_s": 1.0, "seconds": 1.0, "skipped_steps": 0}
    with Monitor(str(tmp_path / "log"), CPU) as monitor:
        monitor.open_records(CONFIG | {"epochs": 6}, tmp_path, 0)
        for epoch in range(1, 7):
            if epoch == 4:
                monkeypatch.setattr("engine.run.epoch_records.time.monotonic", lambda: 1e9)  # much later
            monitor.show_epoch(monitor.write_record({"epoch": epoch} | figures))
    assert drawn == [1, 4, 6]


def test_a_log_in_a_pipe_waits_for_no_reader(tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="log_file = .*pipe' cannot be written to: nobody reads it"), within_seconds(20):
        Monitor(str(tmp_path / "pipe"), CPU)
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with within_seconds(20), Monitor(str(tmp_path / "pipe"), CPU) as monitor:
        monitor.log_to_file("heard")
        assert os.read(reader, 100).endswith(b" heard\n")
        for _ in range(100):
            monitor.log_to_file("nobody reads on" * 100)
    os.close(reader)
    assert "WARNING: not logged" in capfd.readouterr().err


def test_a_log_is_never_written_behind_a_file_that_is_no_text(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"PK\x03\x04\x00\x00")
    with pytest.raises(UserError, match=r"best\.pt' is there and is no text: name another file with --log-file"):
        Monitor(str(tmp_path / "best.pt"), CPU)
    assert (tmp_path / "best.pt").read_bytes() == b"PK\x03\x04\x00\x00"


@pytest.mark.parametrize("left", [b"2026-11-27T00:15:39+0000 resumed\n" + bytes(4096), bytes(4096)], ids=["its end", "all"])
def test_a_log_whose_blocks_a_power_cut_left_as_zeros_is_continued(left, tmp_path):
    (tmp_path / "run.log").write_bytes(left)
    with Monitor(str(tmp_path / "run.log"), CPU) as monitor:
        monitor.log("gone on")
    content = (tmp_path / "run.log").read_bytes()
    assert content.startswith(left) and content.endswith(b" gone on\n")
