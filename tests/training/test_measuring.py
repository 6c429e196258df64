"""What a machine does in an hour is measured as a run would have it."""

import itertools
import time

import pytest
import torch
from conftest import run_here, tiny_run
from torch.nn.modules.module import register_module_forward_hook
from torchvision.models import ResNet

import train
from engine.cli.command_line import parse_command_line
from engine.data.splits import open_splits
from engine.preparation.finding import ImageFolder
from engine.run import checkpoint_files, epoch_records
from engine.run.monitor import Monitor
from engine.training import measuring
from engine.training.images import open_images
from engine.training.measuring import measure_machine, steady_pace
from engine.training.out_of_memory import take_step
from engine.training.plan import plan_run
from engine.training.trials import Trials
from model import build_model


class Simulation:
    """A clock, workers that make a batch of 10 images in turn, each in `making` seconds, and a device that takes `working`.

    As a DataLoader hands them out: in order, each worker having been asked for two beforehand.
    """

    def __init__(self, workers, making, working, first_step):
        self.now, self.workers, self.making, self.working, self.first_step = 0.0, workers, making, working, first_step

    def clock(self):
        return self.now

    def batches(self):
        free, asked = [0.0] * max(self.workers, 1), []  # when each worker is done; when each batch was asked for
        ahead = 2 * self.workers
        asked = [0.0] * ahead
        number = 0
        while True:
            if not self.workers:
                self.now += self.making
            else:
                worker = number % self.workers
                free[worker] = max(free[worker], asked[number]) + self.making
                self.now = max(self.now, free[worker])
                asked.append(self.now)
            number += 1
            yield None, range(10)

    def work(self, images, labels):
        self.now += self.first_step or self.working
        self.first_step = 0.0
        return torch.zeros(())


@pytest.mark.parametrize("workers", [0, 1, 2, 8, 32])
@pytest.mark.parametrize("working", [0.02, 0.05, 0.09, 0.11, 0.4])
@pytest.mark.parametrize("first_step", [0.4, 60.0])
def test_a_machine_is_measured_at_the_speed_that_it_keeps_up(workers, working, first_step):
    """However full the queue was: batches can be made at 10 a second, or one after the other without workers."""
    machine = Simulation(workers, making=0.1 * max(workers, 1), working=working, first_step=first_step)
    pace = steady_pace(machine.batches(), machine.work, workers, 2 * workers, 1.1, machine.clock)
    kept_up = 10 / (0.1 + working) if not workers else 10 / max(0.1, working)
    assert pace.images_per_s == pytest.approx(kept_up, rel=0.02)
    assert pace.first_work == pytest.approx(max(first_step - working, 0), abs=0.01)

    a_pass, count = Simulation(workers, machine.making, working, 0.0), 4 * max(workers, 1)
    for batch in itertools.islice(a_pass.batches(), count):
        a_pass.work(*batch)
    assert a_pass.now == pytest.approx(10 * count / pace.images_per_s + pace.first_batch, rel=0.03)


@pytest.mark.parametrize("workers", [0, 1, 3, 8])
@pytest.mark.parametrize("every", [1, 5, 10, 7])
def test_a_machine_is_measured_over_whole_periods_of_steps_that_take_longer(workers, every):
    machine = Simulation(workers, making=0.001, working=0.05, first_step=0.0)
    steps = itertools.count()

    def work(images, labels):
        if next(steps) % every == 0:  # as a step with SAM, of twice the work
            machine.now += machine.working
        return machine.work(images, labels)

    pace = steady_pace(machine.batches(), work, workers, 2 * workers, 1.1, machine.clock, repeats=every)
    step = 0.05 * (1 + 1 / every) + (0.001 if not workers else 0.0)
    assert pace.images_per_s == pytest.approx(10 / step, rel=1e-6)


class WorkClock:
    """Shows how much this process has worked: splits opened, images read, pixels through a network, files kept."""

    def __init__(self, monkeypatch):
        self.now, self.monkeypatch = 0.0, monkeypatch
        self.charge(ImageFolder, "__init__", 0.8)
        self.charge(ImageFolder, "read", 0.002)
        self.charge(checkpoint_files, "write", 0.3)
        for room in (epoch_records, measuring):
            self.charge(room, "draw_curves", 0.2)

    def __call__(self):
        return self.now

    def charge(self, owner, name, seconds):
        work = getattr(owner, name)

        def charged_work(*arguments, **options):
            self.now += seconds
            return work(*arguments, **options)

        self.monkeypatch.setattr(owner, name, charged_work)

    def charge_pixels(self, module, inputs, outputs):
        """Count a microsecond for each pixel that a network is given, and two more where it has to go back."""
        if isinstance(module, ResNet):
            images, _, height, width = inputs[0].shape
            self.now += images * height * width * (3e-6 if torch.is_grad_enabled() else 1e-6)


@pytest.mark.slow
def test_a_machines_rates_are_measured_at_the_smallest_and_largest_size_and_in_validation(image_tree, tmp_path, monkeypatch):
    arguments = tiny_run(image_tree, tmp_path / "run", start_resolution=32, train_resolution=96, epochs=8)
    config = parse_command_line(arguments).config
    splits = open_splits(image_tree)
    state = Trials(train.train_step, build_model, 10, torch.device("cpu"), "fp32").scratch_state(config)

    def step(state, images, labels):
        return train.train_step(state, images, labels, config)

    clock = WorkClock(monkeypatch)
    with register_module_forward_hook(clock.charge_pixels), Monitor(None, torch.device("cpu")) as monitor:
        rates = measure_machine(config, splits, state, step, monitor, -5.0, 0.5, clock)
    assert list(rates.training) == [32, 96]
    assert rates.training[32] > rates.training[96] > 0
    assert list(rates.validation) == [1, 2]  # raw weights, and averaged ones beside them
    assert rates.validation[1] > rates.training[96]
    assert rates.statistics > rates.training[96]
    kept = rates.start_seconds, rates.save_seconds, rates.drawing_seconds
    assert kept == pytest.approx((5.0, 0.3, 0.2))
    assert list(tmp_path.iterdir()) == []


def test_rates_are_kept_without_sam_and_by_the_size_that_the_network_sees(image_tree, tmp_path, monkeypatch):
    """So that they hold for recipes that have other such keys."""
    changes = {"start_resolution": 64, "train_resolution": 96, "sam_rho": 0.5, "sam_every_steps": 4, "colout": 0.25}
    config = parse_command_line(tiny_run(image_tree, tmp_path / "run", **changes)).config
    asked = []

    def pace(batches, work, workers, queued, seconds, clock, repeats):
        asked.append(repeats)
        return measuring.Pace(100.0, 0.0, 0.0)

    monkeypatch.setattr(measuring, "steady_pace", pace)
    state = Trials(train.train_step, build_model, 10, torch.device("cpu"), "fp32").scratch_state(config)
    with Monitor(None, torch.device("cpu")) as monitor:
        rates = measure_machine(config, open_splits(image_tree), state, None, monitor, time.perf_counter())
    assert rates.training == {48: 125.0, 72: 125.0}
    assert asked[:2] == [4, 4] and set(asked[2:]) == {1}
    assert {phase.images_per_s for phase in plan_run(config, rates, 60, 20).phases} == {100.0}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"sam_rho": 0.05, "sam_every_steps": 2, "colout": 0.1}])
def test_a_plan_is_right_when_held_against_the_run_that_follows(changes, image_tree, tmp_path, monkeypatch):
    growing = {"start_resolution": 48, "train_resolution": 64, "resolution_step": 16, "val_flip": "true"}
    averaged = {"epochs": 5, "swa_start_epoch": 3, "swa_batch_norm_batches": 4}
    arguments = tiny_run(image_tree, tmp_path / "run", **growing | averaged | changes)
    config, cpu, clock = parse_command_line(arguments).config, torch.device("cpu"), WorkClock(monkeypatch)

    def step(state, *batch):
        return take_step(train.train_step, state, *batch, config, print)

    with register_module_forward_hook(clock.charge_pixels), Monitor(None, cpu) as monitor:
        splits = open_images(config, None, print)
        state = Trials(train.train_step, train.build_model, 10, cpu, "fp32").scratch_state(config)
        rates = measure_machine(config, splits, state, step, monitor, 0.0, 0.5, clock)
        planned, begun = 3600 * plan_run(config, rates, len(splits["train"]), len(splits["val"])).hours, clock()
        assert run_here(arguments) == 0
    assert planned == pytest.approx(clock() - begun, rel=0.01)
