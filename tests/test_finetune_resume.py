"""A fine-tuning that is stopped in the middle of an epoch goes on as if nothing had happened."""

import shutil
import signal

import pytest
from conftest import assert_same_run, finish, run_here, run_program, start_driver, tiny_run

from engine.run import checkpoint_files


@pytest.mark.slow
def test_a_stopped_fine_tuning_ends_with_the_same_bits(image_tree, tmp_path):
    first = {"epochs": 1, "warmup_epochs": 0, "swa_start_epoch": 0, "blur_pool": True}
    assert run_here(tiny_run(image_tree, tmp_path / "first", **first)) == 0
    images = shutil.copytree(image_tree / "train", tmp_path / "my_images")
    shutil.rmtree(images / "dots_star")
    weights = shutil.copy(tmp_path / "first/last.pt", tmp_path / "w.pt")
    settings = {"device": "cpu", "precision": "fp32", "num_workers": 0, "log_every_steps": 2}
    settings |= {"initial_weights": weights, "epochs": 3, "batch_size": 8, "train_resolution": 32, "val_resolution": 32}
    settings |= {"freeze": "layer1", "backbone_rate_factor": 0.5, "class_weights": "balanced", "data_dir": images}

    def arguments(name):
        own = {"checkpoint_dir": tmp_path / name, "log_file": tmp_path / f"{name}.log"}
        return ["--recipe=finetune", *(f"--{key}={value}" for key, value in (settings | own).items())]

    assert run_program("train.py", arguments("whole"))[0] == 0
    process = start_driver(arguments("parts"), tmp_path / "steps", ("train", "train_step"), call=8, signals=[signal.SIGTERM])
    status, output = finish(process)
    assert status == 128 + signal.SIGTERM and "saved. Go on with" in output, output
    stopped = checkpoint_files.read(tmp_path / "parts/last.pt")
    assert (stopped["epoch"], stopped["batch"]) == (1, 3)  # 5 steps an epoch
    (tmp_path / "w.pt").unlink()
    status, output = run_program("train.py", [*arguments("parts"), "--resume=auto"])
    assert status == 0, output
    assert "initial weights:" not in output
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
