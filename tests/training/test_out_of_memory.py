"""Out of memory, wherever in a step or a pass it strikes: the result of smaller parts, or an end in words. All on a CPU.

The errors are raised by hand, with the words that CUDA's libraries use; tests/test_gpu.py lets a real GPU run full.
"""

import copy
import json
import math

import pytest
import torch
from conftest import fresh_state, run_here, tiny_run

import lr_finder
import train
from config import CONFIG
from engine.cli.command_line import parse_command_line
from engine.run import checkpoint_files
from engine.system.errors import TrainingStopped
from engine.system.gpu_memory import is_out_of_memory, retry_in_parts_on_oom, retry_pass_on_oom
from engine.training.out_of_memory import take_step

CPU = torch.device("cpu")
QUICK = CONFIG | {"batch_size": 8, "epochs": 4, "warmup_epochs": 1, "swa_start_epoch": 0, "architecture": "resnet18"}
QUICK |= {"stochastic_depth": 0.5, "compile": "off"}
KINDS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.58 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("no valid convolution algorithms available in CuDNN"),
    RuntimeError("Not enough memory for workspace!"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]


def some_batch(images=8, resolution=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, resolution, resolution, generator=generator), torch.arange(images) % 5


def new_state(config=QUICK):
    state = fresh_state(config)
    state.model.train()
    torch.manual_seed(7)
    return state


def everything(state):
    """What the next step depends on."""
    saved = state.state_dict()
    return [saved[key] for key in ("model", "optimizer", "scaler", "schedule", "rng", "micro_batch_size")]


def assert_same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list):
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair)
    else:
        assert ours == theirs


def once(function, error, after=False):
    """The function, failing at its first call: before its work or after it."""
    failed = []

    def fails_once(*arguments, **options):
        if failed:
            return function(*arguments, **options)
        failed.append(True)
        if after:
            function(*arguments, **options)
        raise error

    return fails_once


@pytest.mark.parametrize("error", KINDS, ids=lambda error: str(error)[:40])
def test_all_that_cuda_calls_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


# The step ------------------------------------------------------------------------------------------------------------


def fail_in_forward(state, monkeypatch, error):
    handle = state.model.layer3.register_forward_hook(once(lambda *arguments: None, error))  # norms before it have learned
    return handle.remove


def fail_in_backward(state, monkeypatch, error):
    fails = once(lambda gradient: None, error)
    handle = state.model.layer2.register_forward_hook(lambda module, inputs, output: output.register_hook(fails) and None)
    return handle.remove


def fail_in_unscaling(state, monkeypatch, error):
    monkeypatch.setattr(state.scaler, "unscale_", once(state.scaler.unscale_, error, after=True))


def fail_in_clipping(state, monkeypatch, error):
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", once(clip, error, after=True))


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (fail_in_forward, KINDS[2]),
        pytest.param(fail_in_forward, KINDS[7], marks=pytest.mark.slow),
        (fail_in_backward, KINDS[0]),
        pytest.param(fail_in_backward, KINDS[11], marks=pytest.mark.slow),
        pytest.param(fail_in_unscaling, KINDS[4], marks=pytest.mark.slow),
        (fail_in_clipping, KINDS[1]),
    ],
)
def test_a_step_that_failed_before_the_weights_changed_is_taken_again_as_if_it_had_not_failed(fail, error, monkeypatch):
    state, twin = new_state(), new_state()
    train.train_step(state, *some_batch(), QUICK)
    torch.manual_seed(7)
    train.train_step(twin, *some_batch(), QUICK)
    twin.micro_batch_size = 4
    torch.manual_seed(8)
    expected = train.train_step(twin, *some_batch(), QUICK)
    everything_expected = everything(twin)

    mend, said = fail(state, monkeypatch, error), []
    torch.manual_seed(8)
    result = take_step(train.train_step, state, *some_batch(), QUICK, said.append)
    if mend:
        mend()
    assert len(said) == 1 and said[0].endswith("micro-batches of 4")
    assert_same(everything(state), everything_expected)
    assert_same(list(result), list(expected))


@pytest.mark.parametrize("after", [False, True])
def test_out_of_memory_while_the_weights_change_is_never_retried(after, monkeypatch):
    state, said = new_state(), []
    monkeypatch.setattr(state.optimizer, "step", once(state.optimizer.step, KINDS[1], after))
    with pytest.raises(TrainingStopped, match=r"while the weights were being changed.*--micro-batch-size 4 --resume auto"):
        take_step(train.train_step, state, *some_batch(), QUICK, said.append)
    assert said == []


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_no_optimizer_allocates_its_state_in_a_step(name):
    state = new_state(QUICK | {"optimizer": name})

    def places():
        return {(id(p), name): tensor.data_ptr() for p, of in state.optimizer.state.items() for name, tensor in of.items()}

    before = places()
    train.train_step(state, *some_batch(), QUICK)
    assert places() == before
    assert len(before) == len(list(state.model.parameters())) * {"sgd": 1, "adam": 3, "adamw": 3}[name]


def test_at_32_px_no_micro_batch_becomes_a_single_image():
    state, said = new_state(), []
    state.model.layer3.register_forward_hook(lambda *arguments: (_ for _ in ()).throw(KINDS[0]))
    with pytest.raises(TrainingStopped, match=r"micro-batches of 2 images of 32 px \(CUDA out of memory. Tried.*batch norm"):
        take_step(train.train_step, state, *some_batch(resolution=32), QUICK, said.append)
    assert [text[-16:] for text in said] == ["micro-batches of 4"[-16:], "micro-batches of 2"[-16:]]


# A gradient whose norm overflows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [math.inf, 1.0])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_finite_gradient_whose_norm_overflows_is_skipped_whatever_the_clip(clip, name):
    config = QUICK | {"grad_clip_value": clip, "optimizer": name, "stochastic_depth": 0.0}
    state = new_state(config)
    train.train_step(state, *some_batch(), config)
    with torch.no_grad():
        state.model.fc.weight *= 1e25
    before = copy.deepcopy([state.model.state_dict()["fc.weight"], *(p.detach() for p in state.model.parameters())])
    moments = copy.deepcopy(state.optimizer.state_dict()["state"])
    train.train_step(state, *some_batch(), config, probe=True)
    gradients = [p.grad for p in state.model.parameters()]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert torch.isinf(torch.nn.utils.get_total_norm(gradients))  # else this test shows nothing
    result = train.train_step(state, *some_batch(), config)
    assert not torch.isfinite(result.grad_norm)
    assert_same(before, [state.model.state_dict()["fc.weight"], *(p.detach() for p in state.model.parameters())])
    assert_same(moments, state.optimizer.state_dict()["state"])
    state.sums.add(result.loss, result.correct, result.grad_norm, 8)
    assert state.sums.read().skipped_steps == 1


# Passes without a gradient -------------------------------------------------------------------------------------------


def test_a_pass_whose_batches_do_not_fit_is_done_in_parts_and_remembers_what_fits():
    sizes = []

    def work(images, labels):
        sizes.append(len(images))
        if len(images) > 3:
            raise KINDS[2]
        return images.sum(0), labels.sum()

    run = retry_in_parts_on_oom(work)
    for _ in range(2):
        images, labels = some_batch(8, 4)
        results = run(images, labels)
        torch.testing.assert_close(sum(part for part, _ in results), images.sum(0))
        assert sum(part for _, part in results) == labels.sum()
    assert sizes == [8, 4, *[2] * 8]
    with pytest.raises(TrainingStopped, match="with a single image"):
        retry_in_parts_on_oom(lambda images: (_ for _ in ()).throw(KINDS[0]))(images)


@pytest.mark.slow
def test_validation_and_recomputed_statistics_that_do_not_fit_are_done_in_parts(image_tree, tmp_path, monkeypatch):
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=2, swa_start_epoch=2, stochastic_depth=0.3)
    assert run_here(arguments) == 0
    whole = checkpoint_files.read(tmp_path / "run/last.pt")
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()

    def tight(model):
        def fail_with_many(module, inputs):
            if len(inputs[0]) > 4 and not (module.training and torch.is_grad_enabled()):
                raise KINDS[0]

        model.conv1.register_forward_pre_hook(fail_with_many)
        return model

    build_model = train.build_model
    monkeypatch.setattr(train, "build_model", lambda *of: tight(build_model(*of)))
    assert run_here([*arguments, "--overwrite"]) == 0
    parted = checkpoint_files.read(tmp_path / "run/last.pt")
    assert_same(parted["model"], whole["model"])
    for ours, theirs in zip((tmp_path / "run/metrics.jsonl").read_text().splitlines(), records, strict=True):
        ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours["val_top1"] == theirs["val_top1"]
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
    ours, theirs = parted["averaged_model"], whole["averaged_model"]
    assert torch.equal(ours["module.conv1.weight"], theirs["module.conv1.weight"])
    assert ours["module.bn1.num_batches_tracked"] == 2 * theirs["module.bn1.num_batches_tracked"]  # in halves of 4
    torch.testing.assert_close(ours["module.bn1.running_mean"], theirs["module.bn1.running_mean"], rtol=0.05, atol=0.05)


def test_a_pass_in_parts_draws_the_same_numbers_however_often_it_is_begun_anew():
    drawn = []

    def run_pass(batches):
        drawn.append([(len(images), torch.rand(()).item()) for images, _ in batches])
        if drawn[-1][0][0] > 2:
            raise KINDS[0]

    torch.manual_seed(3)
    retry_pass_on_oom(run_pass, lambda: [some_batch(8, 4)], 8, CPU)
    assert [[size for size, _ in attempt] for attempt in drawn] == [[8], [4, 4], [2, 2, 2, 2]]
    assert len({attempt[0][1] for attempt in drawn}) == 1
    with pytest.raises(TrainingStopped, match="lower --batch-size"):
        retry_pass_on_oom(lambda batches: (_ for _ in ()).throw(KINDS[0]), lambda: [some_batch(8, 4)], 8, CPU)


def test_what_does_not_fit_outside_of_a_step_ends_in_words(image_tree, tmp_path, monkeypatch):
    def no_room(*arguments):
        raise KINDS[1]
        yield

    arguments = tiny_run(image_tree, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped, match=r"outside of a training step.*\(CUDA error"):
        patch.setattr("engine.data.loader.to_device", no_room)
        run_here(arguments)
    monkeypatch.setattr("engine.training.state.build_optimizer", lambda *of: next(no_room()))
    with pytest.raises(TrainingStopped, match="with the weights and the optimizer's state alone"):
        run_here([*arguments, "--overwrite"])


def test_no_room_for_the_network_or_the_checkpoint_ends_every_program_in_words(image_tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = tiny_run(image_tree, tmp_path / "run")

    def no_room(config, num_classes, device=None):
        if device is not None and torch.device(device).type != "meta":
            raise KINDS[0]
        return real(config, num_classes, device)

    real = train.build_model
    for program in (train, lr_finder):
        monkeypatch.setattr(program, "build_model", no_room)
    for begin in (
        lambda: run_here(arguments),
        lambda: run_here([*arguments, "--plan"]),
        lambda: lr_finder.main(parse_command_line(arguments, lr_finder.OWN_FLAGS)),
    ):
        with pytest.raises(TrainingStopped, match=r"outside of a training step: make room.*nvidia-smi.*\(CUDA out of memory"):
            begin()


@pytest.mark.slow
def test_out_of_memory_between_two_steps_is_said_and_the_state_saved(image_tree, tmp_path, monkeypatch):
    def no_room(*arguments, **options):
        raise KINDS[1]

    arguments = tiny_run(image_tree, tmp_path / "run", epochs=1, swa_start_epoch=0)
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped, match=r"outside of a training step.*--resume auto"):
        patch.setattr("engine.training.validation.evaluate", no_room)
        run_here(arguments)
    assert checkpoint_files.read(tmp_path / "run/last.pt")["batch"] == 7
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped, match=r"outside of a training step.*--resume auto"):
        patch.setattr("engine.training.state.load_scaler", no_room)
        run_here([*arguments, "--resume=auto"])
    assert run_here([*arguments, "--resume=auto"]) == 0
