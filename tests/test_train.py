"""The step, the loop, and what a run leaves behind; all in this process."""

import copy
import json
import math
import os
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import WithoutBatchNorm, fresh_state, run_here, run_program, state_of, tiny_run
from torch.optim.lr_scheduler import OneCycleLR

import report
import train
from config import CONFIG
from engine.cli.keys import ConfigError
from engine.data.loader import BatchLoader
from engine.data.splits import open_splits
from engine.inference.scoring import evaluate
from engine.run import checkpoint_files
from engine.run.throughput import Throughput
from engine.system.device import autocast, build_scaler, choose_precision, load_scaler, set_up_arithmetic
from engine.system.errors import CheckpointError, DataError, TrainingStopped, UserError
from engine.system.interruption import StopRequest
from engine.training import validation
from engine.training.optim import build_optimizer
from engine.training.out_of_memory import take_step
from model import build_model

CPU = torch.device("cpu")
QUICK = CONFIG | {"batch_size": 8, "epochs": 4, "warmup_epochs": 1, "swa_start_epoch": 0, "architecture": "resnet18"}


def state_for(config, precision="fp32"):
    return fresh_state(config, precision)


def some_batch(images=8, resolution=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, resolution, resolution, generator=generator), torch.arange(images) % 5


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_step_is_the_plain_one_of_a_textbook(name):
    config = QUICK | {"optimizer": name, "grad_clip_value": 0.5, "label_smoothing": 0.1}
    state = state_for(config)
    twin = copy.deepcopy(state.model)
    groups = build_optimizer(twin, config).param_groups
    kind = {"adamw": lambda: torch.optim.AdamW(groups, foreach=False, fused=False),
            "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, foreach=False, fused=False)}[name]  # fmt: skip
    plain = kind()
    schedule = OneCycleLR(plain, max_lr=0.0005, total_steps=40, pct_start=0.25, cycle_momentum=False)
    for number in range(5):
        images, labels = some_batch(seed=number)
        result = train.train_step(state, images, labels, config)
        plain.zero_grad()
        logits = twin(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        plain.step()
        schedule.step()
        assert result.loss.item() == pytest.approx(loss.item(), rel=1e-4)
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-3)
        assert result.correct.item() == (logits.argmax(1) == labels).sum().item()


GOLDEN_LOSSES = [1.62997, 1.66440, 1.60163, 1.63284, 1.52215]  # torch 2.14.1, fp32, an AVX-512 CPU


def test_five_golden_losses_do_not_move():
    state = state_for(QUICK | {"architecture": "resnet50"})
    state.model.train()
    losses = [train.train_step(state, *some_batch(seed=s), QUICK).loss.item() for s in range(5)]
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=2e-3)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 7, 8, 100])
def test_micro_batches_add_up_to_the_batchs_gradient(micro_batch_size):
    config = QUICK | {"grad_clip_value": math.inf}
    whole, parts = state_of(WithoutBatchNorm(), config), state_of(WithoutBatchNorm(), config)
    parts.micro_batch_size = micro_batch_size
    expected = train.train_step(whole, *some_batch(), config)
    result = train.train_step(parts, *some_batch(), config)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)
    assert result.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    assert result.correct.item() == expected.correct.item()


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_the_true_gradient_is_clipped_whatever_the_loss_scale(scale):
    config = QUICK | {"grad_clip_value": 0.01}
    state = state_of(WithoutBatchNorm(), config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    result = train.train_step(state, *some_batch(), config)
    assert result.grad_norm.item() == pytest.approx(0.3, rel=0.9)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters()]).item()
    assert clipped == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were(precision):
    state = state_for(QUICK, precision)
    images, labels = some_batch()
    train.train_step(state, images, labels, QUICK)
    before = [p.detach().clone() for p in state.model.parameters()]
    rate = state.schedule.get_last_lr()[0]
    result = train.train_step(state, images * math.nan, labels, QUICK)
    assert not torch.isfinite(result.loss)
    assert all(torch.equal(p, old) for p, old in zip(state.model.parameters(), before, strict=True))
    assert state.schedule.get_last_lr()[0] > rate  # the plan counts steps, not successes


SAM = {"sam_rho": 0.5, "sam_every_steps": 1}


@pytest.mark.parametrize(
    ("precision", "changes"),
    [("fp32", {}), ("bf16", {"micro_batch_size": 3}), ("fp32", {"memory": "lowest", "freeze": "layer1"} | SAM)],
)
def test_a_skipped_step_leaves_batch_norm_statistics_and_running_averages_as_they_were(precision, changes):
    config = QUICK | {"ema_half_life_images": 80, "ema_every_images": 8} | changes
    state = state_for(config, precision)
    state.model.train()

    def step(images):
        result = take_step(train.train_step, state, images, some_batch()[1], config, print)
        state.count_step(result, config)
        return result

    images, _ = some_batch()
    step(images)
    before, average = (copy.deepcopy(model.state_dict()) for model in (state.model, state.ema_model))
    overflowing = images.clone()
    overflowing[-1, 0, 0, 0] = math.inf  # in the last of the micro-batches
    assert not torch.isfinite(step(overflowing).grad_norm)
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in state.ema_model.state_dict().items():  # has taken the same weights a second time
        assert name == "n_averaged" or torch.allclose(tensor, average[name]), name
    assert torch.isfinite(step(images).grad_norm)
    assert not torch.equal(state.model.layer4[1].bn1.running_var, before["layer4.1.bn1.running_var"])
    assert int(state.model.layer4[1].bn1.num_batches_tracked) == 2 * int(before["layer4.1.bn1.num_batches_tracked"])


def test_the_loss_scale_is_sought_in_fp16_only():
    assert build_scaler(CPU, "fp16").get_scale() == 2.0**16
    assert build_scaler(CPU, "bf16").get_scale() == build_scaler(CPU, "fp32").get_scale() == 1.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_fp16_the_loss_scale_stays_1_after_steps_that_are_not_finite(precision):
    state = state_for(QUICK, precision)
    images, labels = some_batch()
    for factor in (1, math.nan, math.nan, 1):
        train.train_step(state, images * factor, labels, QUICK)
    assert state.scaler.get_scale() == 1.0


def scaler_state(scale, **changes):
    """What a checkpoint of fp16 holds of the loss scale."""
    usual = {"scale": scale, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7}
    return usual | changes


OF_FP32_BEFORE = scaler_state(2.0**-20, growth_interval=2**31 - 1)  # halved at each bad step, as checkpoints from then have it


@pytest.mark.parametrize(
    ("precision", "saved", "scale", "interval"),
    [
        ("fp16", scaler_state(512.0), 512.0, 2000),
        ("fp16", OF_FP32_BEFORE, 2.0**16, 2000),
        ("fp32", OF_FP32_BEFORE, 1.0, 2**31 - 1),
        ("bf16", scaler_state(512.0), 1.0, 2**31 - 1),
    ],
)
def test_a_resumed_run_takes_over_the_loss_scale_of_fp16_and_no_others(precision, saved, scale, interval):
    scaler = build_scaler(CPU, precision)
    load_scaler(scaler, saved, precision)
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (scale, interval)
    assert scaler.get_backoff_factor() == (0.5 if precision == "fp16" else 1.0)
    of_one_kind = (precision == "fp16") == (saved["growth_interval"] == 2000)
    assert scaler.state_dict()["_growth_tracker"] == (7 if of_one_kind else 0)


def test_deterministic_changes_nothing_on_a_cpu(monkeypatch):
    """Where all bits repeat as it is; what it changes on a GPU is in cuda_without_gpu/proof_card.py."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_up_arithmetic(CONFIG | {"deterministic": True}, CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="fp32 or bf16"):
        choose_precision({"precision": "fp16"}, CPU)


# Memory --------------------------------------------------------------------------------------------------------------


class NeedsMemory(WithoutBatchNorm):
    """Runs out of memory with more than `room` images at once, in the forward pass or in the backward pass."""

    room = 3
    fails_in_backward = False

    def forward(self, images):
        logits = super().forward(images)
        if len(images) > self.room:
            if not self.fails_in_backward:
                raise torch.OutOfMemoryError("CUDA out of memory")
            logits.register_hook(self._fail)
        return logits

    @staticmethod
    def _fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("fails_in_backward", [False, True])
def test_out_of_memory_halves_the_micro_batch_and_the_step_is_the_same(fails_in_backward):
    config = QUICK
    whole, tight = state_of(WithoutBatchNorm(), config), state_of(WithoutBatchNorm(), config)
    tight.model.__class__ = NeedsMemory
    tight.model.fails_in_backward = fails_in_backward
    said = []
    train.train_step(whole, *some_batch(), config)
    take_step(train.train_step, tight, *some_batch(), config, said.append)
    assert tight.micro_batch_size == 2
    assert [text[-16:] for text in said] == ["micro-batches of 4"[-16:], "micro-batches of 2"[-16:]]
    for ours, theirs in zip(tight.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert tight.schedule.last_epoch == whole.schedule.last_epoch == 1


def test_out_of_memory_with_a_single_image_stops_the_run():
    state = state_of(WithoutBatchNorm(), QUICK)
    state.model.__class__ = NeedsMemory
    state.model.room = 0
    with pytest.raises(TrainingStopped, match="lower --train-resolution"):
        take_step(train.train_step, state, *some_batch(), QUICK, lambda text: None)


def test_the_micro_batch_is_remembered_in_the_checkpoint(tiny_arguments, tmp_path):
    assert run_here([*tiny_arguments, "--epochs=2", "--micro-batch-size=3"]) == 0
    assert checkpoint_files.read(tmp_path / "run/last.pt")["micro_batch_size"] == 3


@pytest.mark.slow
def test_a_resumed_run_keeps_the_micro_batch_that_fitted_unless_a_flag_changes_it(tiny_arguments, tmp_path):
    assert run_here([*tiny_arguments, "--epochs=2"]) == 0
    last = tmp_path / "run/last.pt"
    checkpoint_files.write(last, checkpoint_files.read(last) | {"micro_batch_size": 4})  # as if memory had run out once
    for epochs, flags, expected in ((3, [], 4), (4, ["--micro-batch-size=2"], 2), (5, [], 2), (6, ["--micro-batch-size=0"], 8)):
        assert run_here([f"--resume={last}", f"--epochs={epochs}", *flags]) == 0
        assert checkpoint_files.read(last)["micro_batch_size"] == expected


@pytest.mark.parametrize("seen", [{"train_resolution": 32}, {"train_resolution": 64, "colout": 0.5}])
def test_a_micro_batch_that_fitted_at_64_px_is_not_taken_to_32_px_if_it_is_a_single_image(seen, image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", swa_start_epoch=0, **seen)
    assert run_here([*arguments, "--epochs=1"]) == 0
    last = tmp_path / "run/last.pt"
    checkpoint_files.write(last, checkpoint_files.read(last) | {"micro_batch_size": 1})
    assert run_here([f"--resume={last}", "--epochs=2"]) == 0
    assert checkpoint_files.read(last)["micro_batch_size"] == 8


# A whole run ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_checkpoints_records_log_and_curves(tiny_arguments, tmp_path, capfd):
    assert run_here([*tiny_arguments, "--checkpoint-every-epochs=2", "--report=true"]) == 0
    folder = tmp_path / "run"
    names = ["best.pt", "curves.png", "epoch_002.pt", "events.jsonl", "hours.json", "last.pt", "metrics.jsonl", "previous.pt"]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "report.html", "report.md"]
    assert "Finished after 3 epochs." in (folder / "report.md").read_text()
    assert (folder / "report.html").read_text().count("<svg") > 3
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert all(record["val_images"] == 20 and record["train_images"] == 56 for record in records)
    assert all(0 <= record[key] <= 100 for record in records for key in ("train_top1", "val_top1", "val_top5"))
    assert ["averaged_val_top1" in record for record in records] == [False, True, True]
    best = max(max(r["val_top1"], r.get("averaged_val_top1", 0)) for r in records)
    assert records[-1]["best_top1"] == checkpoint_files.read(folder / "best.pt")["best"]["top1"] == best

    log = (tmp_path / "run.log").read_text().splitlines()
    assert all(line[:4].isdigit() and line[10] == "T" for line in log)
    text = "\n".join(log)
    for said in ('configuration: {"batch_size": 8', "recipe seed: resnet18", "epoch 1/3:", "epoch 3/3:", "finished 3 epochs"):
        assert said in text
    printed = capfd.readouterr()
    assert "epoch 3/3:" in printed.out
    assert "\r" not in printed.out + printed.err  # no bar debris where the output is no terminal


def test_the_recorded_speed_is_that_of_training_without_validation(tiny_arguments, tmp_path, monkeypatch):
    clock = []
    original = validation.evaluate

    def noted(*arguments, **options):
        clock.append("validation begins")
        return original(*arguments, **options)

    monkeypatch.setattr(validation, "evaluate", noted)
    monkeypatch.setattr(Throughput, "stop", lambda speed, stop=Throughput.stop: clock.append("stopped") or stop(speed))
    assert run_here([*tiny_arguments, "--epochs=2"]) == 0
    assert clock == ["stopped", "validation begins"] * 2


def test_the_last_state_is_complete(tiny_arguments, tmp_path):
    assert run_here(tiny_arguments) == 0
    last = checkpoint_files.read(tmp_path / "run/last.pt")
    assert (last["epoch"], last["batch"], last["schedule"]["step"]) == (3, 0, 21)
    assert last["averaged_model"]["n_averaged"] == 2
    assert last["config"]["batch_size"] == 8
    assert last["classes"] == sorted(last["classes"])
    assert set(last) >= {"model", "optimizer", "scaler", "rng", "best", "recipe"}


def test_the_averaged_weights_are_the_mean_of_the_epochs_final_weights(tiny_arguments, tmp_path):
    assert run_here([*tiny_arguments, "--checkpoint-every-epochs=1"]) == 0
    second, third = (checkpoint_files.read(tmp_path / f"run/epoch_00{n}.pt")["model"] for n in (2, 3))
    averaged = checkpoint_files.read(tmp_path / "run/last.pt")["averaged_model"]
    for name in ("conv1.weight", "fc.bias", "layer4.1.bn2.weight"):
        torch.testing.assert_close(averaged[f"module.{name}"], (second[name] + third[name]) / 2, rtol=1e-5, atol=1e-7)
    assert not torch.equal(averaged["module.bn1.running_mean"], third["bn1.running_mean"])


@pytest.mark.slow
def test_the_weights_do_not_depend_on_how_often_they_are_validated(image_tree, tmp_path, capfd):
    every, seldom = tmp_path / "every", tmp_path / "seldom"
    assert run_here(tiny_run(image_tree, every)) == 0
    assert run_here(tiny_run(image_tree, seldom, validate_every_epochs=2)) == 0
    first, second = (checkpoint_files.read(folder / "last.pt") for folder in (every, seldom))
    for kind in ("model", "averaged_model"):
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in first[kind])
    records = [json.loads(line) for line in (seldom / "metrics.jsonl").read_text().splitlines()]
    assert ["val_top1" in record for record in records] == [False, True, True]  # the last one always
    assert second["best"]["epoch"] in (2, 3)
    assert re.search(r"epoch 1/3: train loss \S+, top-1 \S+ %; not validated; lr", capfd.readouterr().out)
    assert report.main(report.parse_arguments([str(seldom)])) == 0


def test_a_new_run_never_overwrites_an_earlier_one_unless_told_to(tiny_arguments, tmp_path):
    assert run_here([*tiny_arguments, "--epochs=2"]) == 0
    before = (tmp_path / "run/last.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"holds another run.*--resume auto.*--overwrite"):
        run_here([*tiny_arguments, "--epochs=2"])
    assert (tmp_path / "run/last.pt").read_bytes() == before
    assert run_here([*tiny_arguments, "--epochs=2", "--overwrite", "--seed=1"]) == 0
    assert checkpoint_files.read(tmp_path / "run/last.pt")["config"]["seed"] == 1
    with pytest.raises(ConfigError, match="--resume and --overwrite"):
        run_here([*tiny_arguments, "--resume=auto", "--overwrite"])


@pytest.mark.parametrize("key", ["checkpoint_dir", "log_file"])
def test_a_place_that_cannot_be_written_to_is_said(tiny_arguments, tmp_path, key):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=f"{key} = .* cannot be written to"):
        run_here([*tiny_arguments, f"--{key}={tmp_path}/file/below"])


def test_evaluate_scores_a_checkpoint_as_its_run_did(tiny_arguments, tmp_path):
    assert run_here(tiny_arguments) == 0
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    status, output = run_program("evaluate.py", [tmp_path / "run/last.pt", "--device=cpu"])
    assert status == 0, output
    raw, averaged = output.splitlines()
    assert f"raw weights: top-1 {record['val_top1']:.2f} %, top-5 {record['val_top5']:.2f} %" in raw
    assert f"averaged weights: top-1 {record['averaged_val_top1']:.2f} %" in averaged
    assert "on 20 images of 10 classes, 32 px centre crop (ratio 0.875), no test-time augmentation" in raw
    status, output = run_program("evaluate.py", [tmp_path / "run/none.pt"])
    assert status == 1
    assert "Traceback" not in output
    assert "found last.pt" in output


def test_evaluation_counts_every_image_exactly_once_whatever_the_batch_size(image_tree):
    splits = open_splits(image_tree)
    model = build_model(QUICK, 10)
    results = []
    for batch_size in (1, 7, 64):
        config = QUICK | {"batch_size": batch_size, "val_resolution": 32, "num_workers": 0}
        batches = BatchLoader(splits, config, CPU, torch.float32, StopRequest(), print)
        results.append(evaluate({"raw": model}, batches.validation(), 20, autocast(CPU, "fp32"))["raw"])
    assert all(result["images"] == 20 for result in results)
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[0] == pytest.approx(results[2], rel=1e-4)
    with pytest.raises(DataError, match="20 images evaluated, 21 expected"):
        evaluate({"raw": model}, batches.validation(), 21, autocast(CPU, "fp32"))


def test_too_few_images_for_a_batch_are_said(tiny_arguments):
    with pytest.raises(DataError, match=r"60 training images make no batch of batch_size = 64"):
        run_here([*tiny_arguments, "--batch-size=64"])


def test_an_exploding_run_stops_with_step_rate_and_last_good_checkpoint(image_tree, tmp_path):
    arguments = tiny_run(
        image_tree, tmp_path / "run", optimizer="sgd", max_bad_steps=3, grad_clip_value="inf", swa_start_epoch=0
    )
    assert run_here([*arguments, "--epochs=1"]) == 0
    good = (tmp_path / "run/last.pt").read_bytes()
    arguments = [*arguments, "--epochs=3", "--resume=auto"]
    saved = checkpoint_files.read(tmp_path / "run/last.pt")
    saved["model"]["fc.weight"] *= 1e36  # finite, and the next gradient is not
    checkpoint_files.write(tmp_path / "run/last.pt", saved)
    exploding = (tmp_path / "run/last.pt").read_bytes()
    assert exploding != good
    with pytest.raises(TrainingStopped, match=r"steps in a row without a finite loss.*in epoch 2.*at rate.*last\.pt"):
        run_here(arguments)
    assert (tmp_path / "run/last.pt").read_bytes() == exploding
    assert "without a finite loss" in (tmp_path / "run.log").read_text()


def test_weights_that_are_not_finite_are_never_averaged(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", optimizer="sgd")
    assert run_here([*arguments, "--epochs=2"]) == 0
    saved = checkpoint_files.read(tmp_path / "run/last.pt")
    saved["model"]["layer1.0.conv1.weight"] *= 1e30  # finite; the batch-norm statistics of the next pass are not
    checkpoint_files.write(tmp_path / "run/last.pt", saved)
    with pytest.raises(TrainingStopped, match="no longer finite"):
        run_here([*arguments, "--epochs=3", "--resume=auto"])
    assert checkpoint_files.read(tmp_path / "run/last.pt")["averaged_model"]["n_averaged"] == 1


def test_learning_rate_auto_finds_a_rate_and_keeps_it(image_tree, tmp_path, capfd):
    arguments = tiny_run(image_tree, tmp_path / "run", learning_rate="auto", epochs=2, grad_clip_value="inf")
    assert run_here(arguments) == 0
    config = checkpoint_files.read(tmp_path / "run/last.pt")["config"]
    rate = config["learning_rate"]
    assert isinstance(rate, float) and config["swa_learning_rate"] == rate / 2
    said = capfd.readouterr().out
    assert f"suggested learning_rate: {rate:g}" in said and f"swa_learning_rate = {rate / 2:g} (was 0.00025) follows" in said
    configurations = re.findall(r"configuration: (.*)", (tmp_path / "run.log").read_text())
    first, final = (json.loads(text, parse_constant=pytest.fail) for text in configurations)
    assert (first["learning_rate"], final["learning_rate"]) == ("auto", rate)
    assert final["grad_clip_value"] == "inf"
    assert report.main(report.parse_arguments([str(tmp_path / "run"), "--log", str(tmp_path / "run.log")])) == 0
    text = (tmp_path / "run/report.md").read_text()
    assert re.search(rf"\| learning_rate +\| {rate} +\| 0.0005 +\| range test, asked for by auto", text), text
    assert "grad_clip_value" in text
    assert run_here([*arguments, "--resume=auto"]) == 0


def test_bf16_runs_on_a_cpu(image_tree, tmp_path):
    assert run_here(tiny_run(image_tree, tmp_path / "run", precision="bf16", epochs=2)) == 0
