"""What the processes of one job claim among themselves: torchrun ... tests/ranks.py FOLDER [CLAIM]; see test_distributed.py.

Each function is a claim; a failing one leaves its traceback in FOLDER/<claim>.<rank>, a passing one an empty file there.
"""

import math
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WithoutBatchNorm, fresh_state, state_of

import train
from config import CONFIG
from engine.cli.command_line import parse_command_line
from engine.data.batches import Batch
from engine.data.loader import BatchLoader
from engine.system import distributed
from engine.system.errors import TrainingStopped, UserError
from engine.system.interruption import Interrupted, StopRequest
from engine.training import settling
from engine.training.metrics import MetricAccumulator
from engine.training.out_of_memory import take_step
from engine.training.sync_batch_norm import CpuSyncBatchNorm2d
from engine.training.trials import Trials

CPU = torch.device("cpu")
BATCH = 8  # over 3 processes: 3, 3, 2
QUICK = CONFIG | {"architecture": "resnet18", "batch_size": BATCH, "epochs": 3, "warmup_epochs": 1, "swa_start_epoch": 0}
QUICK |= {"device": "cpu", "optimizer": "sgd", "learning_rate": 0.05, "grad_clip_value": math.inf}
CLAIMS = []


def claim(function):
    CLAIMS.append(function)
    return function


def the_whole_batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=dtype), torch.arange(BATCH) % 5


def my_part(*tensors):
    places = distributed.shard(np.arange(BATCH))
    return [tensor[places] for tensor in tensors]


class Tight(WithoutBatchNorm):
    """Runs out of memory with more than `room` images, in the process of rank 1 alone."""

    room = 2

    def forward(self, images):
        if distributed.rank() == 1 and len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


# The claims ----------------------------------------------------------------------------------------------------------


@claim
def the_shares_are_disjoint_and_leave_nothing_out():
    for count in (1, 2, 3, 7, 8, 256):
        shares = distributed.all_gather_object(distributed.shard(np.arange(count)).tolist())
        assert [index for shard in shares for index in shard] == list(range(count))
        assert max(map(len, shares)) == distributed.largest_shard(count)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@claim
def gradients_are_those_of_the_whole_batch_in_one_process():
    for micro_batch_size in (BATCH, 1):
        network, alone = WithoutBatchNorm().double(), WithoutBatchNorm().double()
        state = state_of(network, QUICK)
        state.micro_batch_size = micro_batch_size
        images, labels = the_whole_batch(torch.float64)
        result = train.train_step(state, *my_part(images, labels), QUICK | {"grad_clip_value": math.inf})
        loss = F.cross_entropy(alone(images).float(), labels)
        loss.backward()
        for ours, theirs in zip(network.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(distributed.all_reduce_sum(result.loss), loss.detach(), rtol=1e-6, atol=1e-6)
        hits = (alone(images).argmax(1) == labels).sum()
        assert distributed.all_reduce_sum(result.correct) == hits


@claim
def sam_looks_uphill_along_the_gradient_of_the_whole_batch():
    for micro_batch_size in (BATCH, 1):
        network, alone = WithoutBatchNorm().double(), WithoutBatchNorm().double()
        config = QUICK | {"sam_rho": 0.5, "sam_every_steps": 1}
        state = state_of(network, config)
        state.micro_batch_size = micro_batch_size
        images, labels = the_whole_batch(torch.float64)
        train.train_step(state, *my_part(images, labels), config)
        weights = list(alone.parameters())
        gradients = torch.autograd.grad(F.cross_entropy(alone(images).float(), labels), weights)
        length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight += 0.5 * gradient / length
        uphill = torch.autograd.grad(F.cross_entropy(alone(images).float(), labels), weights)
        for ours, theirs in zip(network.parameters(), uphill, strict=True):
            torch.testing.assert_close(ours.grad, theirs, rtol=1e-5, atol=1e-7)


@claim
def muon_moves_the_filters_of_all_processes_alike():
    torch.manual_seed(4)
    convolutions = [torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 6, 3)]
    network = torch.nn.Sequential(*convolutions, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 5))
    config, before = QUICK | {"optimizer": "muon"}, convolutions[1].weight.detach().clone()
    state = state_of(network, config)
    for _ in range(2):
        train.train_step(state, *my_part(*the_whole_batch()), config)
    assert not torch.equal(convolutions[1].weight, before)
    for weight in network.parameters():
        assert all(torch.equal(weight, other) for other in distributed.all_gather_object(weight.detach()))


@claim
def synced_batch_norm_is_batch_norm_over_the_whole_batch():
    torch.manual_seed(3)
    whole = torch.randn(BATCH, 4, 5, 5, dtype=torch.float32) * 3 + 1
    for momentum in (0.1, None):
        ours, theirs = CpuSyncBatchNorm2d(4, momentum=momentum), torch.nn.BatchNorm2d(4, momentum=momentum)
        for norm in (ours, theirs):
            torch.nn.init.constant_(norm.weight, 1.5)
        weights = torch.linspace(-1, 1, whole.numel()).view_as(whole)
        for _ in range(2):
            part, batch = my_part(whole)[0].clone().requires_grad_(), whole.clone().requires_grad_()
            (mine, expected), (my_weights,) = (ours(part), theirs(batch)), my_part(weights)
            (mine * my_weights).sum().backward()
            (expected * weights).sum().backward()
            torch.testing.assert_close(mine, *my_part(expected), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(part.grad, *my_part(batch.grad), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(distributed.all_reduce_sum(ours.weight.grad), theirs.weight.grad, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        assert ours.num_batches_tracked == theirs.num_batches_tracked == 2


@claim
def a_step_that_overflows_in_one_process_leaves_the_statistics_of_all_as_they_were():
    for changes in ({}, {"sync_batch_norm": True}):
        config = QUICK | changes
        state = fresh_state(config)
        state.ddp_model.train()
        images, labels = my_part(*the_whole_batch())
        train.train_step(state, images, labels, config)
        before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        train.train_step(state, images * (math.inf if distributed.rank() == 1 else 1.0), labels, config)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())


@claim
def a_process_out_of_memory_makes_all_halve_their_micro_batches():
    said = []
    state, alone = state_of(Tight(), QUICK), WithoutBatchNorm()
    images, labels = the_whole_batch()
    take_step(train.train_step, state, *my_part(images, labels), QUICK, said.append)
    assert distributed.all_gather_object(state.micro_batch_size) == [2] * distributed.size()
    assert len(said) == (1 if distributed.rank() == 1 else 0)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05 / 25, momentum=0.9)
    F.cross_entropy(alone(images), labels).backward()
    optimizer.step()
    for ours, theirs in zip(state.model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@claim
def under_synced_norms_all_take_as_many_micro_batches_and_stay_in_step():
    network = torch.nn.Sequential(Tight())
    network[0].norm = CpuSyncBatchNorm2d(8)
    state = state_of(network, QUICK)
    take_step(train.train_step, state, *my_part(*the_whole_batch()), QUICK, lambda text: None)
    assert distributed.all_gather_object(state.micro_batch_size) == [2] * distributed.size()
    assert network[0].norm.num_batches_tracked == 2
    assert network[0].norm.training
    weights = distributed.all_gather_object(network[0].conv.weight.detach())
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    state.micro_batch_size = 1  # 3, 3 and 2 images: not in three parts, of which one would have none
    take_step(train.train_step, state, *my_part(*the_whole_batch()), QUICK, lambda text: None)
    assert network[0].norm.num_batches_tracked == 4


@claim
def out_of_memory_in_a_common_step_stops_and_names_the_micro_batch():
    state = state_of(Tight(), QUICK)
    state.probed_resolutions.add(32)
    if distributed.rank() == 1:
        with pytest.raises(TrainingStopped, match="--micro-batch-size 2 --resume auto"):
            take_step(train.train_step, state, *my_part(*the_whole_batch()), QUICK, print)


@claim
def a_rehearsal_leaves_no_trace():
    state = fresh_state(QUICK | {"stochastic_depth": 0.5})
    state.model.train()
    before = {key: tensor.clone() for key, tensor in state.model.state_dict().items()}
    rng, steps = torch.get_rng_state(), []

    def step(*arguments, probe=False):
        if probe:
            train.train_step(*arguments, probe=True)
        else:
            steps.append(arguments)

    for _ in range(2):
        take_step(step, state, *my_part(*the_whole_batch()), QUICK, print)
    assert len(steps) == 2
    assert state.probed_resolutions == {32}
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


@claim
def statistics_become_their_mean():
    state = fresh_state(QUICK)
    norm = state.model.layer1[0].bn1
    norm.running_mean.fill_(distributed.rank())
    norm.running_var.fill_(10 + distributed.rank())
    weights = state.model.conv1.weight.clone()
    distributed.average_bn_stats(state.model)
    assert norm.running_mean.tolist() == [1.0] * 64
    assert norm.running_var.tolist() == [11.0] * 64
    assert torch.equal(state.model.conv1.weight, weights)


@claim
def sums_of_an_epoch_are_of_all_processes_and_survive_another_number_of_them():
    sums, rank = MetricAccumulator(CPU), distributed.rank()
    sums.add(torch.tensor(0.5), torch.tensor(float(rank)), torch.tensor(3.0), 8)  # each has a loss of 0.5 of the mean
    sums.add(torch.tensor(math.nan), torch.tensor(8.0), torch.tensor(math.nan), 8)
    figures = sums.read()
    assert (figures.loss, figures.top1, figures.grad_norm) == (1.5, 100 * 3 / 8, 3.0)
    assert (figures.images, figures.skipped_steps) == (16, 1)
    again = MetricAccumulator(CPU)
    again.load(sums.state())
    assert again.read() == figures


@claim
def an_error_of_the_first_ends_all_and_only_the_first_says_why():
    def fail():
        assert distributed.rank() == 0
        error = UserError("the reason")
        error.exit_code = 2
        raise error

    with pytest.raises(UserError) as caught:
        distributed.run_on_rank0(fail)
    assert caught.value.exit_code == 2
    assert str(caught.value) == ("the reason" if distributed.rank() == 0 else "")
    assert distributed.run_on_rank0(lambda: [1, "two"]) == [1, "two"]


@claim
def an_error_of_any_ends_all_and_only_that_one_says_why():
    def fail_on_one():
        if distributed.rank() == 1:
            raise UserError("the reason")
        return distributed.rank()

    with pytest.raises(UserError) as caught:
        distributed.run_on_all_ranks(fail_on_one)
    assert str(caught.value) == ("the reason" if distributed.rank() == 1 else "")
    assert distributed.run_on_all_ranks(distributed.rank) == distributed.rank()


@claim
def all_train_the_epochs_that_the_first_has_planned():
    def plan(config, *others):
        return config | {"epochs": 50 + distributed.rank()}, []

    command = parse_command_line(["--hours=1", "--checkpoint-dir=nowhere", "--log-file=/dev/null", "--device=cpu"], ["hours H"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settling, "plan_new_run", plan)
        trials = Trials(None, None, 1, CPU, "fp32")
        config, *_ = settling.settle(command, command.config, None, {"train": range(256), "val": range(2)}, trials, None, 0.0)
    assert config["epochs"] == 50


@claim
def news_reaches_all_and_no_news_costs_no_gathering():
    assert distributed.gather_events(None) == {}
    assert distributed.gather_events("here" if distributed.rank() == 2 else None) == {2: "here"}


@claim
def each_process_draws_from_a_stream_of_its_own_and_keeps_it():
    state = fresh_state(QUICK)
    torch.manual_seed(QUICK["seed"] + distributed.rank())
    saved = state.state_dict() | {"config": QUICK}
    expected = distributed.all_gather_object(torch.rand(3).tolist())
    assert len({tuple(numbers) for numbers in expected}) == distributed.size()
    torch.manual_seed(99)
    state.load_state_dict(saved, QUICK, 10)
    assert distributed.all_gather_object(torch.rand(3).tolist()) == expected
    state.load_state_dict(saved | {"rng": saved["rng"][:1]}, QUICK, 10)  # of a run in one process
    drawn = distributed.all_gather_object(torch.rand(3).tolist())
    assert drawn[0] == expected[0]
    assert len({tuple(numbers) for numbers in drawn}) == distributed.size()


@claim
def a_request_to_one_stops_all_before_the_same_batch():
    server = BatchLoader.__new__(BatchLoader)  # the agreement alone, without its workers
    server.stop = StopRequest()
    seen = []

    def batches():
        for number in range(6):
            if number == 3 and distributed.rank() == 2:
                server.stop.request("SIGTERM", 143)
            yield Batch(number, None, [(number, "bad")] if distributed.rank() == number else [])

    with pytest.raises(Interrupted, match=r"SIGTERM \(process 2\)") as caught:
        for batch in server._in_step(batches()):
            seen.append((batch.images, batch.bad_images))
    assert caught.value.exit_code == 143
    assert seen == [(number, [(number, "bad")]) for number in range(3)]


# Claims that are made alone, each in a job of its own --------------------------------------------------------------------


def those_who_wait_do_not_lose_one_that_is_long_at_work():
    def work(rank=0):
        if distributed.rank() == rank:
            time.sleep(8)
        return distributed.rank()

    assert distributed.run_on_rank0(work) == 0
    assert distributed.run_on_all_ranks(work, 1) == distributed.rank()


def those_who_wait_hear_of_one_that_is_killed_at_its_work():
    def work():
        time.sleep(2.5)
        os.kill(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's
    with pytest.raises(distributed.ProcessLost), distributed.detect_lost_ranks():
        distributed.run_on_rank0(work)


PATIENCE = {  # seconds within which a process must answer in them
    those_who_wait_do_not_lose_one_that_is_long_at_work: 5,
    those_who_wait_hear_of_one_that_is_killed_at_its_work: 300,
}


if __name__ == "__main__":
    alone = [function for function in PATIENCE if function.__name__ in sys.argv]
    for function in alone:
        distributed.ANSWER_WITHIN = timedelta(seconds=PATIENCE[function])
    with distributed.process_group(CPU):
        for function in alone or CLAIMS:
            place = Path(sys.argv[1]) / f"{function.__name__}.{distributed.rank()}"
            try:
                function()
                place.write_text("")
            except BaseException:
                place.write_text(traceback.format_exc())
                raise
