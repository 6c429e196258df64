"""Flags that have no effect are named when a run starts, and no others."""

import re

import pytest
from conftest import run_here, tiny_run

import lr_finder
from config import CONFIG, RECIPES
from engine.cli.command_line import parse_command_line
from engine.cli.unused_keys import ONLY_WITH, notes_on_unused

FLAGS = {  # key: its flag, with what it is in vain, and with what it counts
    "zero_init_residual": ("false", "--initial-weights w.pt", ""),
    "resolution_step": ("16", "", "--start-resolution 128"),
    "resolution_ramp_start": ("0.1", "", "--start-resolution 128"),
    "resolution_ramp_end": ("0.9", "", "--start-resolution 128"),
    "randaugment_ops": ("9", "--augmentation trivialaugment", "--augmentation randaugment"),
    "randaugment_magnitude": ("30", "", "--augmentation composer_randaugment"),
    "adamw_learning_rate": ("0.02", "--optimizer adamw", "--optimizer muon"),
    "backbone_rate_factor": ("0.1", "--freeze layer4", "--freeze layer3"),
    "momentum": ("0.5", "--optimizer adam", "--optimizer sgdw"),
    "decay_norms_and_biases": ("true", "--recipe finetune", "--recipe fast"),
    "sam_every_steps": ("2", "--recipe mild", "--recipe medium"),
    "step_epochs": ("2", "--schedule cosine", "--schedule step"),
    "step_factor": ("0.5", "", "--schedule step"),
    "onecycle_anneal": ("linear", "--recipe mild", "--recipe fast"),
    "onecycle_div_factor": ("10", "--schedule constant", ""),
    "onecycle_final_div_factor": ("10", "--schedule step", ""),
    "swa_learning_rate": ("0.1", "--recipe fast", "--recipe demo"),
    "swa_anneal_epochs": ("2", "--swa-learning-rate 0", ""),
    "swa_batch_norm_batches": ("2", "--swa-start-epoch 0", "--swa-learning-rate 0"),
    "ema_every_images": ("16", "", "--recipe mild"),
    "local_data_dir": ("here", "", "--data-dir s3://bucket/images"),
    "keep_checkpoints": ("2", "--checkpoint-every-epochs 0", ""),
    "spot_notice_url": ("http://127.0.0.1", "", "--spot-notice true"),
}


def notes_on(*words):
    command = parse_command_line(" ".join(words).split())
    return notes_on_unused(command.config, command.given)


@pytest.mark.parametrize("key", ONLY_WITH)
def test_a_flag_without_effect_is_noted_with_what_would_give_it_one(key):
    value, in_vain, counting = FLAGS[key]
    flag = f"--{key.replace('_', '-')} {value}"
    (note,) = notes_on(flag, in_vain)
    assert note.startswith(f"{key} is not used: it counts with {next(iter(ONLY_WITH[key]))} ")
    assert notes_on(flag, counting) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_sets_a_key_without_effect(recipe):
    assert notes_on_unused(CONFIG | RECIPES[recipe], RECIPES[recipe]) == []
    assert notes_on(f"--recipe {recipe}") == []  # nor is anything said of what was not given


IN_VAIN = """--adamw-learning-rate=0.02 --momentum=0.5 --randaugment-ops=9 --step-epochs=2 --resolution-ramp-start=0.1
--ema-every-images=16 --sam-every-steps=2"""
ITS_NOTE = "adamw_learning_rate is not used: it counts with optimizer muon"


@pytest.mark.slow
def test_a_run_a_check_and_a_range_test_begin_with_the_notes(image_tree, tmp_path, capfd, monkeypatch):
    arguments = [*tiny_run(image_tree, tmp_path / "run", epochs=1, warmup_epochs=0, swa_start_epoch=1), *IN_VAIN.split()]
    assert run_here([*arguments, "--check"]) == 0
    checked = capfd.readouterr().out
    assert checked.count(" is not used: ") == 7 and re.search(f"^note   flags +{ITS_NOTE}$", checked, re.M)
    assert run_here(arguments) == 0
    said = capfd.readouterr().out.split("epoch 1/1")[0]
    assert said.count(" is not used: ") == 7 and f"note: {ITS_NOTE}" in said
    assert run_here([f"--resume={tmp_path}/run", "--epochs=2", "--momentum=0.5"]) == 0
    assert "note: momentum is not used: it counts with optimizer sgd, sgdw or muon" in capfd.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert lr_finder.main(parse_command_line([*arguments, "--steps=20"], lr_finder.OWN_FLAGS)) == 0
    assert f"note: {ITS_NOTE}" in capfd.readouterr().out
