"""What only a GPU can show: python -m pytest -m gpu"""

import time

import pytest
import torch
from conftest import figures, fresh_state, run_program, run_torchrun, tiny_run

from config import CONFIG, RECIPES
from engine.data.batches import Batch, training_requests
from engine.data.demo import make_demo_data
from engine.data.loader import IMAGENET_MEAN, IMAGENET_STD, BatchLoader, to_device
from engine.data.splits import open_splits
from engine.run import checkpoint_files
from engine.run.throughput import Throughput
from engine.system.device import AUTOCAST_DTYPES, build_scaler
from engine.system.interruption import StopRequest
from engine.training.metrics import MetricAccumulator
from engine.training.mixing import build_mixing
from engine.training.out_of_memory import take_step
from train import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def small_state(precision, **changes):
    """Return (config, state) of a run of ResNet-50 as written: to compile it takes minutes, of which few tests need any."""
    config = CONFIG | {"batch_size": 16, "epochs": 4, "warmup_epochs": 1, "swa_start_epoch": 3, "compile": "off"} | changes
    return config, fresh_state(config, precision, 10, 50, "cuda")


def random_batch(config, dtype, resolution=64):
    generator = torch.Generator("cuda").manual_seed(1)
    size = (config["batch_size"], 3, resolution, resolution)
    images = torch.randn(size, device="cuda", generator=generator).to(dtype, memory_format=torch.channels_last)
    return images, torch.randint(10, (config["batch_size"],), device="cuda", generator=generator)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_train_step_never_waits_for_the_device(precision, optimizer):
    config, state = small_state(precision, optimizer=optimizer, micro_batch_size=8)
    sums = MetricAccumulator(torch.device("cuda"))
    images, labels = random_batch(config, AUTOCAST_DTYPES[precision])
    train_step(state, images, labels, config)  # the first step allocates and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            result = train_step(state, images, labels, config)
            sums.add(result.loss, result.correct, result.grad_norm, len(labels))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.read().images == 3 * config["batch_size"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_precision_learns_a_batch_by_heart(precision):
    config, state = small_state(precision, learning_rate=0.003)
    images, labels = random_batch(config, AUTOCAST_DTYPES[precision])
    state.model.train()
    losses = [train_step(state, images, labels, config).loss.item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("recipe", ["fast", "mild", "medium", "hot"])
def test_the_step_of_every_recipe_learns_in_fp16_and_never_waits_for_the_device(recipe):
    shorter = {
        "batch_size": 16,
        "epochs": 4,
        "warmup_epochs": 0,
        "compile": "off",
        "learning_rate": 0.1,
        "label_smoothing": 0.0,
    }
    shorter |= {"sam_rho": min(RECIPES[recipe].get("sam_rho", 0), 0.05), "stochastic_depth": 0.0}  # to learn within 60 steps
    config = CONFIG | RECIPES[recipe] | shorter
    state, mix = fresh_state(config, "fp16", 10, 50, "cuda"), build_mixing(config, 10)
    images, labels = random_batch(config, torch.float16)
    state.model.train()
    losses = []
    for number in range(60):
        if number == 2:  # by then everything is allocated and loaded
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            result = train_step(state, *mix(images, labels), config)
            state.count_step(result, config)
        finally:
            torch.cuda.set_sync_debug_mode("default" if number < 2 or number == 59 else "error")
        losses.append(result.loss)
    losses = [loss.item() for loss in losses]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_fused_sgd_has_no_wild_momentum_after_an_overflow_in_the_first_step():
    config, state = small_state("fp16", optimizer="sgd")
    state.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
    before = [p.detach().clone() for p in state.model.parameters()]
    images, labels = random_batch(config, torch.float16)
    result = train_step(state, images, labels, config)
    assert not torch.isfinite(result.grad_norm)
    for parameter, old in zip(state.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert not state.optimizer.state[parameter]["momentum_buffer"].any()


def test_a_gradient_that_is_not_finite_is_skipped_in_bf16_too():
    config, state = small_state("bf16")
    before = [p.detach().clone() for p in state.model.parameters()]
    images, labels = random_batch(config, torch.bfloat16)
    result = train_step(state, images * float("nan"), labels, config)
    assert not torch.isfinite(result.loss)
    assert all(torch.equal(p, old) for p, old in zip(state.model.parameters(), before, strict=True))


def test_batches_arrive_normalised_channels_last_and_in_the_autocast_dtype():
    pixels = torch.randint(256, (4, 32, 48, 3), dtype=torch.uint8).pin_memory()
    batch = Batch(pixels, torch.arange(4).pin_memory(), [])
    (images, labels), *_ = to_device([batch], torch.device("cuda"), torch.float16)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.float16
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    torch.testing.assert_close(images.cpu().float(), expected, atol=2e-3, rtol=1e-3)
    assert labels.tolist() == [0, 1, 2, 3]


def test_out_of_gpu_memory_halves_the_micro_batch_and_goes_on():
    config, state = small_state("bf16", batch_size=64)
    images, labels = random_batch(config, torch.bfloat16, resolution=128)
    said = []
    state.model.train()
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_allocated() + 500 * 2**20
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(reserved / total)
    try:
        result = take_step(train_step, state, images, labels, config, said.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.isfinite(result.loss)
    assert 1 <= state.micro_batch_size < 64
    assert "micro-batches" in said[0]


def test_scaler_only_rescales_in_fp16():
    assert build_scaler(torch.device("cuda"), "fp16").get_scale() > 1
    assert build_scaler(torch.device("cuda"), "bf16").get_scale() == 1


@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_whole_step_from_the_arrival_of_the_batch_never_waits_for_the_device(compile):
    config, state = small_state("fp16", optimizer="sgd", compile=compile)
    images, labels = random_batch(config, torch.float16)
    state.model.train()
    for _ in range(3):
        train_step(state, images, labels, config)  # compiles, allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = train_step(state, images, labels, config)
        state.sums.add(result.loss, result.correct, result.grad_norm, len(labels))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.schedule.last_epoch == 4


@pytest.mark.parametrize("compile", ["off", "on"])
def test_less_memory_modes_hold_less_and_learn_the_same(compile):
    peaks, losses = {}, {}
    for memory in ("fast", "low", "lowest"):
        # enough images that the activations outweigh cuDNN's workspaces: 0.8, 0.4 and 0.3 GiB of them (calculated)
        changes = {"optimizer": "sgd", "memory": memory, "compile": compile, "learning_rate": 0.01, "batch_size": 64}
        config, state = small_state("fp16", **changes)
        images, labels = random_batch(config, torch.float16, resolution=128)
        state.model.train()
        train_step(state, images, labels, config)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses[memory] = [train_step(state, images, labels, config).loss.item() for _ in range(5)]
        peaks[memory] = torch.cuda.max_memory_allocated() - before
        del state
    assert peaks["low"] < 0.8 * peaks["fast"]
    assert peaks["lowest"] <= peaks["low"]
    assert losses["low"] == pytest.approx(losses["fast"], rel=0.05)
    assert losses["lowest"] == pytest.approx(losses["fast"], rel=0.05)


@pytest.mark.parametrize(("memory", "card_gib"), [("fast", 14.5), ("low", 7.8)])
def test_batch_256_at_224_px_fits_a_t4_by_default_and_a_card_of_8_gb_in_the_low_mode(memory, card_gib):
    """What a T4 or a card of 8 GB shows as its total, less 0.5 GiB for the CUDA context: the allocator may hold no more.

    No bound on the peak itself: cuDNN takes as workspace what it finds free, and does with less where there is less. The bytes
    alive without it are asserted by cuda_without_gpu/proof_memory.py.
    """
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    if total_gib < card_gib:
        pytest.skip(f"this GPU has {total_gib:.1f} GiB")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((card_gib - 0.5) / total_gib)
    try:
        config, state = small_state("fp16", optimizer="sgd", memory=memory, batch_size=256, swa_start_epoch=3)
        images, labels = random_batch(config, torch.float16, resolution=224)
        state.model.train()
        for _ in range(2):
            train_step(state, images, labels, config)
        torch.cuda.synchronize()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_compiled_gradients_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    gradients = {}
    for compile in ("off", "on"):
        config, state = small_state("fp32", optimizer="sgd", compile=compile)
        images, labels = random_batch(config, torch.float32)
        state.model.train()
        train_step(state, images, labels, config)
        gradients[compile] = [p.grad.flatten() for p in state.model.parameters()]
    for ours, theirs in zip(gradients["on"], gradients["off"], strict=True):  # behind a block's zeroed norm they are 0
        assert (ours - theirs).norm() <= 0.04 * theirs.norm()


def test_batches_from_workers_arrive_pinned_and_whole(tmp_path):
    make_demo_data(tmp_path / "images", 60, 20)
    config = CONFIG | {"batch_size": 8, "train_resolution": 64, "val_resolution": 64, "num_workers": 2}
    splits = open_splits(tmp_path / "images")
    requests = [r for epoch in range(3) for r in training_requests(splits["train"], config, epoch)]
    said, seen = [], {}
    for name in ("cpu", "cuda"):
        server = BatchLoader(splits, config, torch.device(name), torch.float32, StopRequest(), said.append)
        assert name == "cpu" or next(server.iterate(requests[:1])).images.is_pinned()
        seen[name] = [(images.cpu(), labels.cpu()) for images, labels in server.training(requests, set())]
        server.close()
    assert said == []
    for (images, labels), (others, other_labels) in zip(seen["cpu"], seen["cuda"], strict=True):
        torch.testing.assert_close(images, others, atol=1e-5, rtol=1e-5)
        assert torch.equal(labels, other_labels)


def test_the_waiting_for_data_is_measured_on_the_device():
    speed = Throughput(torch.device("cuda"), 4)

    def batches():
        for _ in range(3):
            torch.cuda.synchronize()
            time.sleep(0.05)
            yield None, range(4)

    for _ in speed.watch(batches()):
        torch.cuda._sleep(1000)
    assert 0.15 <= speed.waited() < 0.5
    assert speed.images == 12


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_under_torchrun_all_gpus_train_what_one_does(memory, image_tree, tmp_path):
    gpus = torch.cuda.device_count()
    changes = {"device": "cuda", "precision": "fp32", "compile": "off", "sync_batch_norm": "true", "memory": memory}
    exact = {"NVIDIA_TF32_OVERRIDE": "0"}  # TF32 rounds to 3 digits, more coarsely than the bound below
    status, output = run_program("train.py", tiny_run(image_tree, tmp_path / "alone", **changes), environment=exact)
    assert status == 0, output
    together = tiny_run(image_tree, tmp_path / "together", **changes)
    status, output = run_torchrun(gpus, together, environment=exact)
    assert status == 0, output
    assert "cuda:nccl" in output
    for ours, theirs in zip(figures(tmp_path / "together"), figures(tmp_path / "alone"), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-2)


def test_under_torchrun_the_network_is_compiled_as_without(image_tree, tmp_path):
    changes = {"device": "cuda", "compile": "on", "epochs": 1, "swa_start_epoch": 0}
    status, output = run_torchrun(1, tiny_run(image_tree, tmp_path / "run", **changes))
    assert status == 0, output
    assert "the network is compiled" in output


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_deterministic_run_gives_the_same_bits_each_time_and_after_a_resumption(precision, image_tree, tmp_path):
    changes = {"device": "cuda", "precision": precision, "deterministic": "true", "checkpoint_every_epochs": 1}
    changes |= {"architecture": "resnet50", "train_resolution": 64, "mixup_alpha": 0.2, "blur_max_pool": "true"}
    weights = []
    for name in ("once", "again"):
        status, output = run_program("train.py", tiny_run(image_tree, tmp_path / name, **changes))
        assert status == 0, output
        weights.append(checkpoint_files.read(tmp_path / name / "last.pt"))
    resumed = [f"--resume={tmp_path}/once/epoch_001.pt", f"--checkpoint-dir={tmp_path}/resumed", "--device=cuda"]
    status, output = run_program("train.py", resumed)
    assert status == 0, output
    weights.append(checkpoint_files.read(tmp_path / "resumed/last.pt"))
    for kind in ("model", "averaged_model"):
        for name, tensor in weights[0][kind].items():
            assert all(torch.equal(tensor, other[kind][name]) for other in weights[1:]), name
