"""Several processes under torchrun train the network of one, and lose no more than one.

Real processes and signals; gloo between CPUs. Sums over processes are added in another order than those of one, so figures
are compared up to rounding: fp32 keeps 7 digits, and the runs are short.
"""

import contextlib
import os
import random
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    NOTICE,
    children_of,
    figures,
    finish,
    run_program,
    run_torchrun,
    start_program,
    start_torchrun,
    tiny_run,
    wait_for,
)
from object_storage import S3Server
from ranks import CLAIMS, PATIENCE

from engine.data.demo import make_demo_data
from engine.run import checkpoint_files
from engine.run.records import read_records
from engine.system import distributed

ROUNDING = 5e-6  # of losses and norms after 3 epochs, relative: sums in another order in fp32; seen on a CPU: 2.6e-6
# 9 images over 4 processes are 3, 2, 2 and 2; of the last validation batch, 2 images, two processes get none
SETTINGS = {"sync_batch_norm": "true", "batch_size": 9}
STEPS = 6  # of an epoch


def ranks_of(process):
    """Return {rank: process id} of the processes that torchrun has started and that are still there."""
    ranks = {}
    for pid in children_of(process.pid):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks |= {int(entry[5:]): pid for entry in environment if entry.startswith(b"RANK=")}
    return ranks


def steps_in(path):
    """Return the steps that a checkpoint has behind it."""
    contents = checkpoint_files.read(path)
    return contents["epoch"] * STEPS + contents["batch"]


def assert_same_figures(folder, reference):
    """Compare all epochs of two runs: counts and accuracies exactly, losses and norms up to rounding."""
    ours, theirs = figures(folder), figures(reference)
    assert [record["epoch"] for record in ours] == [record["epoch"] for record in theirs]
    for record, expected in zip(ours, theirs, strict=True):
        record.pop("processes", None)
        assert record == {
            name: pytest.approx(value, rel=ROUNDING) if "loss" in name or name == "grad_norm" else value
            for name, value in expected.items()
        }


@pytest.fixture(scope="module")
def reference(image_tree, tmp_path_factory):
    """The run in one process, without torchrun, that the others are compared with."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    status, output = run_program("train.py", tiny_run(image_tree, folder, **SETTINGS))
    assert status == 0, output
    return folder


def test_a_restarted_process_does_not_meet_one_that_is_gone():
    store = dist.HashStore()  # of torchrun, which outlives the processes

    def meet():
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(distributed._generation, store, rank, 3) for rank in (1, 2)]
            time.sleep(0.2)  # the first one is the last to come
            names = {distributed._generation(store, 0, 3)} | {other.result(timeout=60) for other in others}
        assert len(names) == 1
        return names

    assert len(meet() | meet() | meet()) == 3


# The same run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def claims(tmp_path_factory):
    """What three processes found out about each claim: {(claim, rank): traceback or ''}."""
    folder = tmp_path_factory.mktemp("claims")
    status, output = run_torchrun(3, [folder], program="tests/ranks.py")
    found = {tuple(path.name.split(".")): path.read_text() for path in folder.iterdir()}
    assert status == 0 or any(found.values()), output
    return found


@pytest.mark.parametrize("claim", [function.__name__ for function in CLAIMS])
def test_among_three_processes(claim, claims):
    assert [claims.get((claim, str(rank)), "never came to it") for rank in range(3)] == ["", "", ""]


@pytest.mark.slow
@pytest.mark.parametrize("claim", [function.__name__ for function in PATIENCE])
def test_among_two_processes_of_which_one_is_long_at_work(claim, tmp_path):
    status, output = run_torchrun(2, [tmp_path, claim], program="tests/ranks.py")
    assert (tmp_path / f"{claim}.1").read_text() == "", output
    assert (status == 0) == (not claim.endswith("killed_at_its_work")), output


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_what_one_does(processes, image_tree, reference, tmp_path):
    status, output = run_torchrun(processes, tiny_run(image_tree, tmp_path / "run", **SETTINGS))
    assert status == 0, output
    assert_same_figures(tmp_path / "run", reference)
    assert [record["processes"] for record in figures(tmp_path / "run")] == [processes] * 3
    for record in read_records(tmp_path / "run/metrics.jsonl"):
        assert record["images_per_s"] * record["seconds"] == pytest.approx(9 * STEPS)  # those of all processes
    assert output.count("epoch 1/3: ") == 1  # one speaks for all
    assert (tmp_path / "run.log").read_text().count("epoch 1/3: ") == 1
    ours, theirs = (checkpoint_files.read(folder / "last.pt")["model"] for folder in (tmp_path / "run", reference))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_one_process_under_torchrun_trains_what_one_without_does_to_the_last_bit(image_tree, tmp_path):
    settings = {"epochs": 2, "mixup_alpha": 0.2, "ema_half_life_images": 32, "ema_every_images": 16, "micro_batch_size": 3}
    assert run_torchrun(1, tiny_run(image_tree, tmp_path / "with", **settings))[0] == 0
    assert run_program("train.py", tiny_run(image_tree, tmp_path / "without", **settings))[0] == 0
    assert figures(tmp_path / "with") == figures(tmp_path / "without")
    ours, theirs = (checkpoint_files.read(tmp_path / name / "last.pt")["model"] for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_wherever_any_of_them_is_asked_to_stop(image_tree, reference, tmp_path):
    arguments = [*tiny_run(image_tree, tmp_path / "run", checkpoint_minutes=0.001, **SETTINGS), "--resume=auto"]
    last = tmp_path / "run/last.pt"
    process = start_torchrun(2, arguments)
    wait_for(last.exists)  # after the first step
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    status, output = finish(process)
    assert status != 0
    assert re.search(r"stopped by SIGTERM \(process 1\) in epoch \d after \d batches; saved. Go on with: torchrun", output)
    assert "[rank" not in output  # as PyTorch marks the tracebacks of such processes
    position = steps_in(last)
    assert 0 < position < 3 * STEPS

    process = start_program("train.py", arguments)
    wait_for(lambda: steps_in(last) > position)
    process.terminate()
    status, output = finish(process)
    assert (status, "saved. Go on with: python" in output) == (143, True), output

    status, output = run_torchrun(4, [*arguments, "--checkpoint-minutes=10"])
    assert status == 0, output
    assert_same_figures(tmp_path / "run", reference)


# Interruptions -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_itself_asked_to_stop_leaves_one_good_checkpoint(number, image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=50, **SETTINGS)
    process = start_torchrun(2, arguments, restarts=3)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and figures(tmp_path / "run"))
    process.send_signal(number)
    status, output = finish(process)
    assert status != 0
    assert "SIGKILL" not in output  # by which torchrun ends what has not ended within 30 s
    assert f"stopped by {number.name}" in output
    assert checkpoint_files.read(tmp_path / "run/last.pt")["epoch"] >= 1
    assert output.count("recipe seed: ") == 1  # it was not started again


def kill_again_and_again(arguments, processes, kills, longest_wait, seed):
    """Kill one process of a job at a random instant, so many times, torchrun starting them again; return (kills, output)."""
    rng = random.Random(seed)
    process = start_torchrun(processes, arguments, restarts=kills)  # without --resume auto: a restart knows
    killed, generation = 0, set()
    while killed < kills and process.poll() is None:
        ranks = ranks_of(process)
        if len(ranks) < processes or generation & set(ranks.values()):
            time.sleep(0.05)
            continue
        time.sleep(rng.uniform(0, longest_wait))  # between its first breath and its last step
        assert not ranks_of(process) or ranks_of(process) == ranks, "they ended by themselves"
        generation = set(ranks.values())
        with contextlib.suppress(ProcessLookupError):  # the run has come to its end
            os.kill(rng.choice(list(ranks.values())), signal.SIGKILL)
            killed += 1
    status, output = finish(process)
    assert status == 0, output
    return killed, output


@pytest.mark.slow
def test_torchrun_restarts_a_job_of_which_a_process_was_killed_and_nothing_is_lost(image_tree, reference, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", checkpoint_minutes=0.001, **SETTINGS)
    killed, output = kill_again_and_again(arguments, processes=2, kills=1, longest_wait=8, seed=1)
    assert killed == 1
    assert "SIGKILL" in output or "exitcode: -9" in output
    assert_same_figures(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.usefixtures("whole_network")  # the narrow one has ended before the tenth
def test_ten_kills_of_a_random_process_lose_nothing(image_tree, tmp_path):
    settings = SETTINGS | {"epochs": 12, "checkpoint_minutes": 0.001}
    assert run_program("train.py", tiny_run(image_tree, tmp_path / "reference", **settings))[0] == 0
    killed, output = kill_again_and_again(tiny_run(image_tree, tmp_path / "run", **settings), 2, 10, 12, seed=2)
    assert killed == 10
    assert output.count("resumed ") > 3  # the others were killed before they came to it
    for record, expected in zip(figures(tmp_path / "run"), figures(tmp_path / "reference"), strict=True):
        assert record["epoch"] == expected["epoch"]
        assert record["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-3)  # rounding grows from step to step


@pytest.mark.slow
def test_a_spot_notice_ends_the_machines_torchrun_instead_of_using_up_its_restarts(metadata_service, image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=1000, spot_notice="true", **SETTINGS)
    arguments += [f"--spot-notice-url=http://127.0.0.1:{metadata_service.server_port}"]
    process = start_torchrun(2, arguments, restarts=3)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists())
    metadata_service.notice = NOTICE
    status, output = finish(process)
    assert status != 0
    assert re.search(
        r"stopped by spot termination notice .*terminate.* \(process 0\) in epoch \d+ after \d batches; saved", output
    )
    assert output.count("recipe seed: ") == 1
    checkpoint_files.read(tmp_path / "run/last.pt")


@pytest.mark.slow
def test_a_spot_notice_before_the_training_ends_the_machines_torchrun_too(metadata_service, image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=1000, spot_notice="true", **SETTINGS)
    arguments += [f"--spot-notice-url=http://127.0.0.1:{metadata_service.server_port}"]
    metadata_service.notice = NOTICE
    status, output = run_torchrun(2, arguments, restarts=3)
    assert status != 0 and output.count("stopped by spot termination notice") == 1, output


@pytest.mark.slow
def test_no_process_of_a_job_leaves_before_its_last_save_is_in_the_mirror(metadata_service, image_tree, tmp_path):
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=1000, spot_notice="true", mirror="s3://bucket/run", **SETTINGS)
    arguments += [f"--spot-notice-url=http://127.0.0.1:{metadata_service.server_port}"]
    server = S3Server()
    try:
        server.mode = "slow"
        process = start_torchrun(2, arguments, environment=server.environment)
        wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists())
        metadata_service.notice = NOTICE
        status, output = finish(process)
    finally:
        server.close()
    assert status != 0
    uploaded, asked = output.index("\nmirrored to s3://bucket/run"), re.search(r"closing signal|death signal", output)
    assert asked is None or asked.start() > uploaded, output  # what torchrun says when it ends its processes


@pytest.mark.slow
def test_overwriting_is_refused_under_torchrun_which_may_start_the_program_again(image_tree, tmp_path):
    status, output = run_torchrun(1, [*tiny_run(image_tree, tmp_path / "run"), "--overwrite"])
    assert status != 0
    assert "--overwrite: torchrun may start this program again" in output


@pytest.mark.slow
def test_machines_come_and_go_and_nothing_is_lost(image_tree, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-id=a", f"--rdzv-endpoint=localhost:{port}"]
    folder = tmp_path / "run"
    arguments = [*tiny_run(image_tree, folder, checkpoint_minutes=0.001, epochs=1000, **SETTINGS), "--resume=auto"]

    def records():
        return read_records(folder / "metrics.jsonl")

    def wait_for_epochs(processes):
        wait_for(lambda: records() and records()[-1].get("processes", 1) == processes)
        reached = records()[-1]["epoch"]
        wait_for(lambda: records()[-1]["epoch"] > reached)

    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the README says
    first = start_torchrun(1, arguments, restarts=5, meeting=meeting, environment=environment)
    wait_for_epochs(1)
    second = start_torchrun(1, arguments, restarts=5, meeting=meeting, environment=environment)
    wait_for_epochs(2)
    ranks = ranks_of(second).values()
    second.kill()
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    second.communicate()
    wait_for_epochs(1)
    first.send_signal(signal.SIGTERM)
    status, output = finish(first)
    assert "stopped by SIGTERM" in output, output
    assert [record["epoch"] for record in records()] == list(range(1, len(records()) + 1))
    assert records()[-1]["epoch"] == checkpoint_files.read(folder / "last.pt")["epoch"]


@pytest.mark.slow
def test_a_killed_process_takes_the_job_down_with_a_clear_message(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=50, checkpoint_minutes=0.001, **SETTINGS)
    process = start_torchrun(2, arguments)
    wait_for((tmp_path / "run/last.pt").exists)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    status, output = finish(process)
    assert status != 0
    assert re.search(r"train.py: another process of the job has ended .*go on with --resume auto", output), output
    assert "stopped: another process of the job has ended" in (tmp_path / "run.log").read_text()
    assert "[rank0]" not in output
    checkpoint_files.read(tmp_path / "run/last.pt")


@pytest.mark.slow
def test_a_killed_data_worker_of_one_process_stops_all_and_the_state_is_saved(image_tree, tmp_path):
    process = start_torchrun(2, tiny_run(image_tree, tmp_path / "run", epochs=50, num_workers=1, **SETTINGS))
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and figures(tmp_path / "run"))
    (worker,) = children_of(ranks_of(process)[1])
    os.kill(worker, signal.SIGKILL)
    status, output = finish(process)
    assert status != 0
    assert re.search(r"stopped by a data worker died.*\(process 1\) in epoch \d+ after \d batches; saved", output), output
    assert checkpoint_files.read(tmp_path / "run/last.pt")["epoch"] >= 1


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bad_image_is_named_and_counted_once_whoever_finds_it(tmp_path):
    make_demo_data(tmp_path / "tree", train_images=60, val_images=20)
    pictures = sorted((tmp_path / "tree/train").glob("*/*.jpg"))
    broken = [pictures[number] for number in (3, 20, 41)]
    for path in broken:
        path.write_bytes(b"no picture")
    settings = {"batch_size": 10, "epochs": 2, "swa_start_epoch": 0}
    status, output = run_torchrun(2, tiny_run(tmp_path / "tree", tmp_path / "run", **settings))
    assert status == 0, output
    for path in broken:
        assert output.count(f"bad image {path.parent.name}/{path.name}") == 1
    assert [record["bad_images"] for record in figures(tmp_path / "run")] == [3, 3]
    assert len(checkpoint_files.read(tmp_path / "run/last.pt")["bad_images"]) == 3


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tmp_path):
    status, output = run_torchrun(2, [f"--data-dir={tmp_path}/nowhere", f"--log-file={tmp_path}/log", "--device=cpu"])
    assert status != 0
    assert output.count("does not exist") == 1
    assert "train.py: data_dir = " in output
    assert "[rank" not in output


@pytest.mark.slow
def test_the_command_line_is_complained_of_once(tmp_path):
    status, output = run_torchrun(2, ["--epocs=3"])
    assert status != 0
    assert output.count("did you mean --epochs?") == 1


@pytest.mark.parametrize("program", ["lr_finder.py", "evaluate.py"])
def test_programs_for_one_process_refuse_several(program, image_tree):
    environment = {"RANK": "1", "WORLD_SIZE": "2"}
    status, output = run_program(program, [], environment=environment)
    assert status == 1
    assert "start it with python instead of torchrun" in output
