"""What the program decides by the card that it meets: a T4, an A100 or an H100, as STANDIN_CAPABILITY says."""

import os

import numpy as np
import pytest
import torch
from conftest import run_here, tiny_run

import train
from benchmarks import step_speed
from config import CONFIG
from engine.data.augmentation import augmented, build_augmentation
from engine.run.telemetry import GpuFigures
from engine.system.device import build_scaler, choose_device, choose_precision, describe_device, precision_remarks
from engine.system.errors import TrainingStopped, UserError
from engine.system.gpu_absence import CURES
from engine.training.compiling import choose_compile
from model import build_model

CAPABILITY = int(os.environ["STANDIN_CAPABILITY"])
NATIVE_BF16 = CAPABILITY >= 80  # by NVIDIA's documents, as TF32
NAME, MIB = {75: ("Tesla T4", "14,918"), 80: ("A100", "40,536"), 90: ("H100", "81,079")}[CAPABILITY]
CUDA = torch.device("cuda")


def test_the_gpu_is_taken_and_named():
    assert choose_device(CONFIG) == CUDA
    version = f"{CAPABILITY // 10}.{CAPABILITY % 10}"
    assert describe_device(CUDA) == f"{NAME} (stand-in), {MIB} MiB, compute capability {version}"


@pytest.mark.parametrize(
    ("error", "complaint", "cure"),
    [
        (46, "busy or unavailable", "sudo nvidia-smi -c 0"),  # another process has it in exclusive mode
        (214, "uncorrectable ECC error", "sudo nvidia-smi --gpu-reset"),
        (2, "out of memory", "nvidia-smi, which lists the processes"),
        (700, "illegal memory access", CURES[""]),  # one that nobody has foreseen
    ],
)
def test_a_gpu_that_is_seen_and_cannot_be_used_is_said_with_the_cure(monkeypatch, error, complaint, cure):
    monkeypatch.setenv("STANDIN_FAILS", str(error))
    torch.cuda.empty_cache()
    assert choose_device(CONFIG, in_this_process=False) == CUDA  # nothing is done on it
    for device in ("auto", "cuda"):
        with pytest.raises(UserError) as refused:
            choose_device(CONFIG | {"device": device})
        said = str(refused.value)
        assert "PyTorch cannot use it" in said and complaint in said and f"Mend it with: {cure}" in said
    assert choose_device(CONFIG | {"device": "cpu"}).type == "cpu"


def test_the_precision_is_what_the_card_computes_natively():
    assert choose_precision(CONFIG, CUDA) == ("bf16" if NATIVE_BF16 else "fp16")
    assert (build_scaler(CUDA, choose_precision(CONFIG, CUDA)).get_scale() > 1) == (not NATIVE_BF16)
    for precision in ("fp32", "fp16", "bf16"):
        assert choose_precision(CONFIG | {"precision": precision}, CUDA) == precision


def test_what_draws_from_a_seed_on_the_cpu_leaves_the_gpus_generator_alone():
    torch.cuda.manual_seed(7)  # a run seeds each rank's own
    on_cpu, on_gpu = torch.get_rng_state(), torch.cuda.get_rng_state()
    build_model(CONFIG | {"architecture": "resnet18", "stochastic_depth": 0.1}, 10)
    augmented(np.zeros((32, 32, 3), np.uint8), build_augmentation(CONFIG | {"random_erasing": 0.5}), np.random.default_rng(0))
    assert torch.equal(torch.get_rng_state(), on_cpu)
    assert torch.equal(torch.cuda.get_rng_state(), on_gpu)


def test_emulated_bf16_is_said_to_be_slow_and_tf32_to_be_used():
    assert precision_remarks("fp16", CUDA) == []
    emulated = precision_remarks("bf16", CUDA)
    assert emulated == [] if NATIVE_BF16 else ("slow" in emulated[0] and "--precision fp16" in emulated[0])
    shortened = precision_remarks("fp32", CUDA)
    assert ("TF32" in shortened[0]) if NATIVE_BF16 else shortened == []
    assert torch.backends.cudnn.allow_tf32  # which the remark speaks of; for products of matrices it is off
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_network_is_compiled_as_asked_for_and_not_where_the_bits_must_repeat():
    assert choose_compile(CONFIG, CUDA)[0] == "measure"
    for asked in ("off", "on"):
        assert choose_compile(CONFIG | {"compile": asked}, CUDA) == (asked, "as asked for")
    chosen, why = choose_compile(CONFIG | {"deterministic": True}, CUDA)
    assert chosen == "off" and "deterministic" in why


def test_the_figures_shown_are_those_of_the_runs_own_card():
    """NVML's first card idles; CUDA's first one is NVML's second."""
    gpu = GpuFigures(CUDA)
    assert gpu.text() == {"GPU": "11,701 MiB 98 %"}
    assert gpu.read_all() == {
        "memory_mib": 11701,
        "memory_total_mib": 15360,
        "utilization_percent": 98,
        "power_w": 69.5,
        "temperature_c": 74,
        "throttled": ["power cap"],
    }
    assert gpu.clock_mhz() == 1590


@pytest.fixture
def arithmetic():
    """The process's switches, put back afterwards."""
    yield
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("deterministic", ["false", "true"])
def test_a_run_starts_with_the_cards_precision_and_the_switches_that_were_asked_for(
    arithmetic, image_tree, tmp_path, monkeypatch, capsys, deterministic
):
    seen = {}

    def first_step(state, *_):
        seen.update(
            precision=state.precision,
            benchmark=torch.backends.cudnn.benchmark,
            cudnn=torch.backends.cudnn.deterministic,
            algorithms=torch.are_deterministic_algorithms_enabled(),
            workspace=os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        )
        raise TrainingStopped("far enough")

    monkeypatch.setattr(train, "train_one_epoch", first_step)
    changes = {"device": "auto", "precision": "auto", "deterministic": deterministic, "compile": "off"}
    with pytest.raises(TrainingStopped, match="far enough"):
        run_here(tiny_run(image_tree, tmp_path / "run", **changes))
    repeats = deterministic == "true"
    assert seen.pop("precision") == ("bf16" if NATIVE_BF16 else "fp16")
    assert seen == {
        "benchmark": not repeats,
        "cudnn": repeats,
        "algorithms": repeats,
        "workspace": ":4096:8" if repeats else None,
    }
    said = capsys.readouterr().out
    assert f"{NAME} (stand-in), {MIB} MiB" in said
    assert not repeats or "the network is not compiled: deterministic" in said


@pytest.mark.parametrize("name", ["ours", "ours, deterministic"])
def test_the_step_benchmark_measures_with_the_switches_of_such_a_run(arithmetic, monkeypatch, name):
    def seen(job, device, precision):
        deterministic = torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
        raise TrainingStopped(f"benchmark {torch.backends.cudnn.benchmark}, deterministic {deterministic}")

    monkeypatch.setitem(step_speed.LOOPS, "ours", seen)
    job = step_speed.CONTENDERS[name] | {"device": "cuda", "precision": "auto", "batch_size": 2, "resolutions": [32]}
    repeats = name == "ours, deterministic"
    with pytest.raises(TrainingStopped, match=rf"benchmark {not repeats}, deterministic \({repeats}, {repeats}\)"):
        step_speed.measure(job)


def test_memory_that_another_process_takes_before_the_network_is_there_ends_a_run_in_words(image_tree, tmp_path, monkeypatch):
    def build_without_room(config, num_classes, device):
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
            monkeypatch.setenv("STANDIN_FAILS", "2")
        return real(config, num_classes, device)

    real = train.build_model
    monkeypatch.setattr(train, "build_model", build_without_room)
    with pytest.raises(TrainingStopped, match=r"out of GPU memory outside of a training step.*\(CUDA out of memory"):
        run_here(tiny_run(image_tree, tmp_path / "run", device="cuda", precision="fp16", compile="off"))


def test_a_run_whose_bf16_is_emulated_says_so(image_tree, tmp_path, monkeypatch, capsys):
    def first_step(*_):
        raise TrainingStopped("far enough")

    monkeypatch.setattr(train, "train_one_epoch", first_step)
    with pytest.raises(TrainingStopped):
        run_here(tiny_run(image_tree, tmp_path / "run", device="cuda", precision="bf16", compile="off"))
    assert ("is emulated" in capsys.readouterr().out) == (not NATIVE_BF16)
