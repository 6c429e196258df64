"""When the host waits in a whole epoch, with real workers, the ring of buffers, the side stream and its events."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import fresh_state, make_demo_data
from fake_cuda import CUDA, QUICK, Copies, fake_cuda

import train
from config import CONFIG
from engine.data.batches import training_requests
from engine.data.loader import BatchLoader
from engine.data.splits import open_splits
from engine.inference.scoring import topk_correct
from engine.system.interruption import StopRequest
from engine.training.metrics import MetricAccumulator, TrainingMetrics

BATCHES, LOG_EVERY = 15, 5
SMALL = CONFIG | QUICK | {"batch_size": 8, "train_resolution": 32, "val_resolution": 32, "num_workers": 2}
SMALL |= {"log_every_steps": LOG_EVERY}


EVERYTHING = {"ema_half_life_images": 80, "ema_every_images": 8, "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "colout": 0.1}
EVERYTHING |= {"sam_rho": 0.5, "sam_every_steps": 2, "loss": "bce"}


@pytest.fixture
def splits(tmp_path):
    make_demo_data(tmp_path / "images", 8 * BATCHES, 20)
    return open_splits(tmp_path / "images")


@contextlib.contextmanager
def loader(splits, config):
    said = []
    with contextlib.closing(BatchLoader(splits, config, CUDA, torch.float16, StopRequest(), said.append)) as batches:
        assert said == []
        yield batches


@pytest.fixture
def epoch(splits, tmp_path, monkeypatch):
    """Return the function that trains an epoch of 15 batches and returns the runtime's log of it, a list of words each."""
    log = tmp_path / "log"

    def note(text):
        with log.open("a") as file:
            file.write(f"{text}\n")

    def read(sums):
        note("reads the figures")
        return TrainingMetrics(1.0, 1.0, 1.0, 8, 0, 0, 0)

    real_step = train.train_step

    def step(*arguments):
        note("step begins")
        result = real_step(*arguments)
        note("step ends")
        return result

    monkeypatch.setattr(MetricAccumulator, "read", read)  # fake tensors have no values
    monkeypatch.setattr(train, "train_step", step)
    checkpoints = SimpleNamespace(save_if_due=lambda state: None)
    monitor = SimpleNamespace(log=print, advance=lambda figures, rate, speed: figures is not None and speed.recent())

    def trained(**changes):
        config = SMALL | changes
        with loader(splits, config) as server, fake_cuda():
            state = fresh_state(config, "fp16", 10, BATCHES, CUDA)
            monkeypatch.setenv("STANDIN_LOG", str(log))
            requests = training_requests(splits["train"], config, 0, 0)
            run = SimpleNamespace(
                num_classes=10, training_batches=lambda state: batches, monitor=monitor, checkpoints=checkpoints
            )
            batches = server.training(requests, set())
            with Copies(asynchronous=True) as copies:
                train.train_one_epoch(state, run, config)
            monkeypatch.delenv("STANDIN_LOG")
        assert state.batch == BATCHES and copies.found == []
        return [line.split() for line in log.read_text().splitlines()]

    return trained


def waits_within_steps(log):
    """Return the runtime's waits between the beginning of a step and its end."""
    inside, waits = False, []
    for words in log:
        if words[0] == "step":
            inside = words[1] == "begins"
        elif words[0] == "wait" and inside:
            waits.append(words)
    return waits


@pytest.mark.parametrize("changes", [{}, EVERYTHING])
def test_an_epoch_waits_for_copies_that_are_long_done_and_for_the_figures_and_nothing_else(epoch, changes):
    log = epoch(**changes)
    assert waits_within_steps(log) == []
    waits = Counter(words[1] for words in log if words[0] == "wait")
    assert waits == {
        "cudaStreamSynchronize": 2,  # mean and standard deviation of the normalisation, once
        "cudaDeviceSynchronize": 1,  # before the first batch: of an earlier pass
        "cudaEventSynchronize": BATCHES - 1 + BATCHES // LOG_EVERY,  # below
    }
    step, recorded_in, readings = 0, {}, 0
    for words in log:
        if words[:2] == ["step", "begins"]:
            step += 1
        elif words[0] == "record":
            recorded_in[words[1]] = step
        elif words[0] == "reads":
            readings += 1
        elif words[:2] == ["wait", "cudaEventSynchronize"]:
            of_a_reading = readings > 0
            readings = 0
            assert of_a_reading or step - recorded_in[words[2]] >= 2  # the copy of the batch before the last one
    on_stream = Counter(words[1] for words in log if words[0] == "streamwait")
    assert on_stream["0"] == BATCHES  # the main stream waits for each batch, on the device


def test_control_a_wait_in_the_step_is_noticed(epoch, monkeypatch):
    real = topk_correct
    monkeypatch.setattr("train.topk_correct", lambda *a: (real(*a), torch.cuda.synchronize())[0])
    assert waits_within_steps(epoch()) == [["wait", "cudaDeviceSynchronize", "0", "0"]] * BATCHES


def test_the_peak_of_memory_is_each_epochs_own(epoch):
    big = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del big
    assert torch.cuda.max_memory_allocated() >= 2**28
    epoch()
    assert torch.cuda.max_memory_allocated() < 2**28
