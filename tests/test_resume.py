"""Promises 1 and 2: interrupted at any instant, a run goes on as if nothing had happened.

Real processes, real signals. The runs compared are of the same command, one of them never interrupted.
"""

import lzma
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    REPOSITORY,
    assert_same,
    assert_same_run,
    children_of,
    figures,
    finish,
    run_here,
    run_program,
    start_driver,
    start_program,
    tiny_run,
    wait_for,
)

import model
from engine.cli.keys import ConfigError
from engine.data.loader import to_device
from engine.run import checkpoint_files
from engine.run.monitor import Monitor
from engine.run.records import read_records
from engine.system.errors import CheckpointError, DataError
from engine.training import validation


@pytest.fixture(scope="module")
def reference(image_tree, tmp_path_factory):
    """A run that nobody interrupts; the runs of this module are compared with it."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    status, output = run_program("train.py", tiny_run(image_tree, folder))
    assert status == 0, output
    return folder


# Signals -------------------------------------------------------------------------------------------------------------

MOMENTS = {  # function of a module, its n-th call, and where the run then says that it stopped
    "a training step": ("train", "train_step", 11, "in epoch 2 after 4 batches"),
    "the recomputation of batch norm": ("engine.training.validation", "recompute_bn_stats", 1, "in epoch 2 after 7 batches"),
    "validation": ("engine.training.validation", "evaluate", 3, "in epoch 3 after 7 batches"),
    "the writing of a checkpoint": ("engine.run.checkpoint_files", "write", 2, "in epoch 3 after 0 batches"),
    "the writing of the records": ("engine.run.epoch_records", "append_record", 2, "in epoch 3 after 0 batches"),
}


BLOCKS = {
    "of torchvision": {"cutmix_alpha": 1.0, "augmentation": "trivialaugment", "start_resolution": 32},
    "of MosaicML": {
        "colout": 0.2,
        "augmentation": "composer_randaugment",
        "randaugment_magnitude": 30,
        "start_resolution": 40,
        "resolution_step": 8,
        "optimizer": "sgdw",
        "initialization": "fan_in",
        "sam_rho": 0.5,
        "sam_every_steps": 3,
    },
    "with Muon": {"optimizer": "muon", "nesterov": False, "sam_rho": 0.05, "sam_every_steps": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_run_with_every_building_block_goes_on_as_if_nothing_had_happened(blocks, image_tree, tmp_path):
    changes = {"mixup_alpha": 0.2, "loss": "bce", "schedule": "cosine", "nesterov": True, "optimizer": "sgd"}
    changes |= {"swa_start_epoch": 0, "epochs": 2, "train_resolution": 64, "stochastic_depth": 0.2}
    changes |= {"ema_half_life_images": 32, "ema_every_images": 16} | BLOCKS[blocks]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_program("train.py", tiny_run(image_tree, whole, **changes))[0] == 0
    moment = ("train", "train_step")
    status, output = finish(start_driver(tiny_run(image_tree, parts, **changes), tmp_path / "steps", moment, call=10))
    assert status == 143, output
    assert run_program("train.py", ["--resume", parts / "last.pt", f"--log-file={tmp_path / 'log'}"])[0] == 0
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole, parts))
    for kind in ("model", "ema_model"):
        assert all(torch.equal(first[kind][key], second[kind][key]) for key in first[kind])
    assert figures(whole) == figures(parts)
    assert figures(whole)[-1]["ema_val_top1"] >= 0
    status, output = run_program("evaluate.py", [parts / "last.pt", "--flip"])
    assert status == 0, output
    assert output.count("running average: top-1") == 2  # plain, and with the mirror image


QUICK = ("a training step", "the writing of a checkpoint")


@pytest.mark.parametrize("moment", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS])
def test_sigterm_saves_everything_and_the_resumed_run_equals_the_uninterrupted_one(moment, image_tree, reference, tmp_path):
    module, function, call, where = MOMENTS[moment]
    arguments = tiny_run(image_tree, tmp_path / "run")
    status, output = finish(start_driver(arguments, tmp_path / "steps", (module, function), call))
    assert status == 143, output
    assert f"stopped by SIGTERM {where}; saved. Go on with: python train.py --resume {tmp_path}/run/last.pt" in output
    status, output = run_program("train.py", [*arguments, "--resume=auto", "--num-workers=2"])
    assert status == 0, output
    assert "resumed" in output
    assert_same_run(tmp_path / "run", reference)


def then_sigterm(batches, after):
    """Yield the batches; after so many of them this process gets SIGTERM."""
    for number, batch in enumerate(batches, 1):
        yield batch
        if number == after:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("engine.training.validation.recompute_bn_stats", marks=pytest.mark.slow),
        "engine.training.validation.evaluate",
    ],
)
def test_a_stop_between_an_epochs_last_step_and_its_record_is_resumed_bit_by_bit(where, image_tree, tmp_path, monkeypatch):
    changes = {"stochastic_depth": 0.5, "swa_start_epoch": 2, "epochs": 3}  # the recomputation draws random numbers
    assert run_here(tiny_run(image_tree, tmp_path / "whole", **changes)) == 0
    original, calls = getattr(validation, where.rpartition(".")[2]), []

    def interrupted(model, batches, *others, **options):
        calls.append(model)
        return original(model, then_sigterm(batches, after=2 if len(calls) == 2 else None), *others, **options)

    arguments = tiny_run(image_tree, tmp_path / "parts", **changes)
    monkeypatch.setattr(where, interrupted)
    assert run_here(arguments) == 143
    assert run_here([*arguments, "--resume=auto"]) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_the_speed_of_an_epoch_is_that_of_the_whole_epoch_however_often_it_was_resumed(image_tree, tmp_path, monkeypatch):
    arguments = [*tiny_run(image_tree, tmp_path / "run", swa_start_epoch=0, epochs=2), "--resume=auto"]
    original, last = to_device, tmp_path / "run/last.pt"
    with monkeypatch.context() as patch:
        patch.setattr(
            "engine.data.loader.to_device", lambda batches, *others: then_sigterm(original(batches, *others), after=3)
        )
        assert run_here(arguments) == 143
        first = checkpoint_files.read(last)
        assert run_here(arguments) == 143
    saved = checkpoint_files.read(last)
    assert (first["batch"], saved["batch"]) == (3, 6)
    before, after = first["speed"], saved["speed"]
    assert (before["images"], after["images"]) == (24, 48)
    assert 0 < before["seconds"] < after["seconds"]
    assert 0 < before["waited_seconds"] < after["waited_seconds"]
    assert run_here(arguments) == 0
    resumed, untouched = read_records(tmp_path / "run/metrics.jsonl")
    for record in (resumed, untouched):
        assert record["images_per_s"] * record["seconds"] == pytest.approx(56)
    assert resumed["seconds"] > saved["speed"]["seconds"]
    assert checkpoint_files.read(last)["speed"] == {"images": 0, "seconds": 0.0, "waited_seconds": 0.0}

    del saved["speed"]  # as in a checkpoint of old
    checkpoint_files.write(last, saved)
    assert run_here(arguments) == 0
    record = read_records(tmp_path / "run/metrics.jsonl")[0]
    assert record["images_per_s"] * record["seconds"] == pytest.approx(8)  # of what it can know


@pytest.mark.slow
def test_resnet50_killed_in_mid_epoch_and_resumed_ends_with_the_same_bits(image_tree, tmp_path):
    changes = {"architecture": "resnet50", "epochs": 2, "batch_size": 10, "swa_batch_norm_batches": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, output = run_program("train.py", tiny_run(image_tree, whole, **changes))
    assert status == 0, output
    arguments = tiny_run(image_tree, killed, **changes, checkpoint_minutes=1e-6)  # last.pt after every step
    status, output = finish(start_driver(arguments, tmp_path / "steps", ("train", "train_step"), 9, [signal.SIGKILL]))
    assert status == -signal.SIGKILL, output
    saved = checkpoint_files.read(killed / "last.pt")
    assert (saved["epoch"], saved["batch"]) == (1, 2)
    status, output = run_program("train.py", [f"--resume={killed}/last.pt"])
    assert status == 0, output
    assert_same_run(killed, whole)


def test_ctrl_c_reaches_the_whole_process_group_and_the_workers_outlive_it(image_tree, reference, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", num_workers=2)
    process = start_program("train.py", arguments, start_new_session=True)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and (tmp_path / "run/last.pt").exists())
    os.killpg(process.pid, signal.SIGINT)
    status, output = finish(process)
    assert status == 130, output
    assert "stopped by SIGINT" in output
    assert "Traceback" not in output
    assert processes_of_group(process.pid) == []
    assert run_program("train.py", [*arguments, "--resume=auto"])[0] == 0
    assert_same_run(tmp_path / "run", reference)


def test_a_second_ctrl_c_exits_at_once_and_leaves_the_old_last_pt_whole(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", num_workers=1)
    process = start_driver(arguments, tmp_path / "steps", ("torch", "save"), 2, [signal.SIGINT, signal.SIGINT])
    status, output = finish(process)
    assert status == 130, output
    assert "second Ctrl-C" in output
    assert checkpoint_files.read(tmp_path / "run/last.pt")["epoch"] == 1


def test_a_run_stopped_before_its_first_step_can_be_resumed(image_tree, reference, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run")
    status, output = finish(start_driver(arguments, tmp_path / "steps", ("train", "new_state"), 1))
    assert status == 143, output
    assert checkpoint_files.read(tmp_path / "run/last.pt")["batch"] == 0
    assert run_program("train.py", [*arguments, "--resume=auto"])[0] == 0
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_a_worker_killed_by_the_system_is_said_and_the_state_saved(image_tree, reference, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", num_workers=1)
    process = start_program("train.py", arguments)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and children_of(process.pid))
    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    status, output = finish(process)
    assert status == 1, output
    assert "a data worker died: process" in output
    assert "killed by SIGKILL" in output
    assert "Traceback" not in output
    assert run_program("train.py", [*arguments, "--resume=auto"])[0] == 0
    assert_same_run(tmp_path / "run", reference)


def test_the_range_test_can_be_stopped_and_leaves_no_trace(image_tree, tmp_path):
    arguments = [a for a in tiny_run(image_tree, tmp_path / "run") if "log_file" not in a]
    arguments += [f"--output={tmp_path}/found", "--steps=5000"]
    process = start_program("lr_finder.py", arguments, cwd=tmp_path)
    wait_for(lambda: "range test" in process.stdout.readline())
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 143, output
    assert list(tmp_path.iterdir()) == []


def processes_of_group(group):
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            alive.append(stat.parent.name)
    return alive


# A full disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_with_a_full_disk_and_says_that_its_result_is_not_saved(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", swa_start_epoch=0)
    assert run_here([*arguments, "--epochs=1"]) == 0
    before = (tmp_path / "run/last.pt").read_bytes()
    limit = 1_000_000  # the log fits, a checkpoint does not
    process = start_program("train.py", [*arguments, "--resume=auto"], file_size_limit=limit)
    status, output = finish(process)
    assert status == 1, output
    assert output.count("WARNING: the checkpoint could not be saved") == 3  # after epochs 2 and 3, and once more at the end
    assert "epoch 3/3: train loss" in output
    assert "could NOT be saved" in output
    assert "Traceback" not in output
    assert (tmp_path / "run/last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert run_here([*arguments, "--resume=auto"]) == 0
    assert [record["epoch"] for record in figures(tmp_path / "run")] == [1, 2, 3]


def test_a_full_disk_does_not_end_the_log(tmp_path):
    with Monitor("/dev/full", torch.device("cpu")) as monitor:
        monitor.log("said all the same")


# SIGKILL at random instants ------------------------------------------------------------------------------------------


def steps_in(file):
    """Return how many steps a driver has written down."""
    return len(file.read_text().split()) if file.exists() else 0


def kill_again_and_again(image_tree, folder, kills, seed):
    """Kill a run that often at random instants, each third time as it writes a checkpoint, let it end; return what happened.

    Returns:
        dict: `kills`; `ends`, how often the run was quicker; `in_writing`, kills that hit the writing of a checkpoint;
            `steps_lost`, of each kill.
    """
    rng = random.Random(seed)
    steps = folder.with_suffix(".steps")
    # last.pt after every step that ends more than 0.3 s after the save before
    arguments = [*tiny_run(image_tree, folder, checkpoint_minutes=0.005), "--resume=auto"]
    happened = {"kills": 0, "ends": 0, "in_writing": 0, "steps_lost": []}
    while happened["kills"] < kills:
        steps.unlink(missing_ok=True)
        process = start_driver(arguments, steps)
        last = rng.randrange(15)  # the step in which the kill comes, or soon after it
        wait_for(lambda process=process, last=last: process.poll() is not None or steps_in(steps) > last)
        while happened["kills"] % 3 == 2 and process.poll() is None and not list(folder.glob(".*.pt.tmp")):
            pass  # until a checkpoint is being written
        if process.poll() is not None:  # it came to its end first: begin anew, the kills are not done
            assert process.returncode == 0, process.communicate()[0]
            happened["ends"] += 1
            assert happened["ends"] <= 10 * kills, "the run is too short to be killed"
            shutil.rmtree(folder)
            continue
        process.kill()
        process.communicate()
        happened["kills"] += 1
        happened["in_writing"] += bool(list(folder.glob(".*.pt.tmp")))
        taken = [int(line) + 1 for line in steps.read_text().split()] if steps.exists() else []
        saved = checkpoint_files.read(folder / "last.pt") if (folder / "last.pt").exists() else {"epoch": 0, "batch": 0}
        happened["steps_lost"].append(max(0, (taken or [0])[-1] - saved["epoch"] * 7 - saved["batch"]))
    status, output = finish(start_driver(arguments, steps))
    assert status == 0, output
    return happened


def test_a_kill_between_two_names_of_a_checkpoint_loses_no_best(image_tree, reference, tmp_path):
    best_epoch = checkpoint_files.read(reference / "last.pt")["best"]["epoch"]
    arguments = tiny_run(image_tree, tmp_path / "run")
    # last.pt gets its new name once an epoch, best.pt before it
    driver = start_driver(
        arguments, tmp_path / "steps", ("os", "replace"), call=best_epoch, signals=[signal.SIGKILL], about="/last.pt"
    )
    status, output = finish(driver)
    assert status == -signal.SIGKILL, output
    assert checkpoint_files.read(tmp_path / "run/best.pt")["epoch"] == best_epoch
    assert run_program("train.py", [*arguments, "--resume=auto"])[0] == 0
    assert_same_run(tmp_path / "run", reference)


def test_a_run_killed_at_random_instants_ends_with_the_same_bits(image_tree, reference, tmp_path):
    happened = kill_again_and_again(image_tree, tmp_path / "run", kills=3, seed=1)
    print(happened)
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_a_run_killed_thirty_times_ends_with_the_same_bits(image_tree, reference, tmp_path):
    happened = kill_again_and_again(image_tree, tmp_path / "run", kills=30, seed=2)
    print(happened, "worst case in steps:", max(happened["steps_lost"]))
    assert happened["kills"] == 30
    assert happened["in_writing"] > 0
    assert_same_run(tmp_path / "run", reference)


# The resume rule -----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(reference, tmp_path):
    """A copy of the reference run's folder, whose epochs can be raised."""
    shutil.copytree(reference, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_says_so_when_it_is_resumed(finished, capfd):
    assert run_here([f"--resume={finished}/last.pt"]) == 0
    assert "finished 3 epochs" in capfd.readouterr().out


def test_epochs_may_be_raised_and_the_rate_plan_is_rebuilt(finished, image_tree, capfd):
    assert run_here([f"--resume={finished}/last.pt", "--epochs=4"]) == 0
    assert "changed on resume: epochs = 4, was 3 (the learning-rate schedule is rebuilt" in capfd.readouterr().out
    assert [record["epoch"] for record in figures(finished)] == [1, 2, 3, 4]
    assert checkpoint_files.read(finished / "last.pt")["schedule"]["step"] == 28


@pytest.mark.slow
def test_a_run_whose_averaging_is_moved_before_it_begins_equals_one_begun_so(image_tree, tmp_path):
    for start in (0, 2):
        run = tiny_run(image_tree, tmp_path / str(start), swa_start_epoch=start, epochs=2, checkpoint_every_epochs=1)
        assert run_here(run) == 0
    for before, after in ((0, 2), (2, 0)):
        moved = tmp_path / f"{before}_to_{after}"
        moved.mkdir()
        shutil.copy(tmp_path / f"{before}/epoch_001.pt", moved)
        assert run_here([f"--resume={moved}/epoch_001.pt", f"--swa-start-epoch={after}"]) == 0
        ours, theirs = (checkpoint_files.read(folder / "last.pt") for folder in (moved, tmp_path / str(after)))
        for name in ("model", "averaged_model", "optimizer", "schedule", "rng", "best"):
            assert_same(ours[name], theirs[name], name)


def test_a_flag_that_bends_the_run_is_refused_with_the_reason(finished):
    with pytest.raises(ConfigError, match=r"learning_rate = 0\.1: this run was started with 0\.0005"):
        run_here([f"--resume={finished}/last.pt", "--learning-rate=0.1"])
    with pytest.raises(ConfigError, match="a run of the recipe seed"):
        run_here([f"--resume={finished}/last.pt", "--recipe=demo"])


def test_other_images_are_refused(finished, tmp_path):
    from engine.data.demo import make_demo_data

    make_demo_data(tmp_path / "others", 50, 20)
    with pytest.raises(DataError, match="holds 50 training images"):
        run_here([f"--resume={finished}/last.pt", f"--data-dir={tmp_path}/others"])


def test_resuming_best_is_allowed_and_said_aloud(finished, capfd):
    assert run_here([f"--resume={finished}/best.pt"]) == 0
    assert "note: best.pt instead of last.pt" in capfd.readouterr().out
    assert [record["epoch"] for record in figures(finished)] == [1, 2, 3]


def test_a_resumed_run_goes_on_where_its_file_lies(finished, tmp_path):
    moved = tmp_path / "moved"
    finished.rename(moved)
    assert run_here([f"--resume={moved}/last.pt", "--epochs=4"]) == 0
    assert checkpoint_files.read(moved / "last.pt")["epoch"] == 4
    assert not finished.exists()


def test_resume_auto_without_a_checkpoint_starts_a_new_run(image_tree, reference, tmp_path, capfd):
    assert run_here([*tiny_run(image_tree, tmp_path / "run"), "--resume=auto"]) == 0
    assert "nothing to resume" in capfd.readouterr().out
    assert_same_run(tmp_path / "run", reference)


def test_a_damaged_last_pt_is_said_and_the_newest_good_one_used(image_tree, reference, tmp_path, capfd):
    arguments = tiny_run(image_tree, tmp_path / "run", checkpoint_every_epochs=1)
    assert run_here(arguments) == 0
    (tmp_path / "run/epoch_003.pt").unlink()
    (tmp_path / "run/best.pt").unlink()
    damaged = tmp_path / "run/last.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged.*--resume auto"):
        run_here([f"--resume={damaged}"])
    assert run_here([*arguments, "--resume=auto"]) == 0
    said = capfd.readouterr().out
    assert "WARNING" in said and "last.pt is damaged" in said and "resumed" in said and "epoch_002.pt" in said
    assert figures(tmp_path / "run") == figures(reference)


# Files of earlier versions -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_format_1_is_resumed_and_ends_as_it_did_then(image_tree, tmp_path, monkeypatch):
    """Commit f6ab1fd wrote it after epoch 2 of 3; its filters were set to a pattern that packs well. Its figures."""
    pytest.importorskip("simplejpeg", reason="Pillow decodes to slightly other pixels")
    monkeypatch.setattr("train.build_model", model.build_model)  # the whole network
    packed = (REPOSITORY / "tests/fixtures/checkpoint_format_1.pt.xz").read_bytes()
    (tmp_path / "last.pt").write_bytes(lzma.decompress(packed))
    assert run_here([f"--resume={tmp_path}/last.pt", f"--data-dir={image_tree}", f"--log-file={tmp_path}/log"]) == 0
    record = read_records(tmp_path / "metrics.jsonl")[-1]
    losses = [record[f"{kind}_loss"] for kind in ("train", "val", "averaged_val", "ema_val")]
    assert losses == pytest.approx([2.74790, 2.52719, 2.82639, 2.51326], rel=2e-3)  # torch 2.14.1, fp32, an AVX-512 CPU
    assert (record["epoch"], record["learning_rate"], record["best_top1"]) == (3, 0.00025, 20.0)
