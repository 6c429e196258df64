"""torch.compile: chosen aloud, never silently left out, and of no consequence for checkpoints."""

import os

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from conftest import run_program, tiny_run

import train
from config import CONFIG
from engine import checkpoint
from engine.compiling import COMPILE_ERRORS, choose_compile, compile_network, give_up_compiling, uncompiled

CPU = torch.device("cpu")
QUICK = CONFIG | {"batch_size": 8, "epochs": 4, "warmup_epochs": 1, "swa_start_epoch": 3, "architecture": "resnet18"}


def some_batch(resolution=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, resolution, resolution, generator=generator), torch.arange(8) % 5


@pytest.mark.parametrize(("capability", "compiles"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_auto_compiles_where_triton_supports_the_gpu(monkeypatch, capability, compiles):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen, why = choose_compile(CONFIG, torch.device("cuda"))
    assert chosen == compiles
    assert f"{capability[0]}.{capability[1]}" in why
    assert choose_compile(CONFIG | {"compile": "on"}, torch.device("cuda")) == (True, "as asked for")
    assert choose_compile(CONFIG, CPU)[0] is False


def test_a_run_says_whether_its_network_is_compiled(image_tree, tmp_path):
    status, output = run_program("train.py", tiny_run(image_tree, tmp_path / "run", epochs=2))
    assert status == 0, output
    assert "the network is not compiled: on a CPU that takes minutes" in output


def test_a_compiled_network_keeps_its_keys_and_so_do_its_averages():
    compiled, plain = (train.new_state(QUICK | {"compile": kind}, 5, 10, CPU, "fp32") for kind in ("on", "off"))
    for part in ("model", "averaged_model"):
        assert list(getattr(compiled, part).state_dict()) == list(getattr(plain, part).state_dict())


def test_without_a_compiler_a_run_that_asks_for_one_stops_and_says_why(image_tree, tmp_path):
    environment = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    arguments = tiny_run(image_tree, tmp_path / "run", compile="on")
    status, output = run_program("train.py", arguments, environment=environment)
    assert status == 1
    assert "train.py: the network could not be compiled (" in output
    assert "try --compile off" in output
    assert "Traceback" not in output.split("train.py: the network")[1]


def test_where_compiling_fails_under_auto_the_same_step_is_taken_as_written_and_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "choose_compile", lambda config, device: (True, "for this test"))
    said = []
    state = train.new_state(QUICK, 5, 10, CPU, "fp32")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        result = train.adapting_train_step(state, *some_batch(), QUICK, said.append)
    monkeypatch.setattr(train, "choose_compile", lambda config, device: (False, "for this test"))
    plain = train.new_state(QUICK, 5, 10, CPU, "fp32")
    expected = train.train_step(plain, *some_batch(), QUICK)
    assert "could not be compiled" in said[0] and "as written from now on" in said[0]
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    train.adapting_train_step(state, *some_batch(), QUICK, said.append)
    assert len(said) == 1


class Broken(torch.nn.Module):
    def forward(self, images):
        torch._dynamo.graph_break()
        return images + 1


def test_what_cannot_be_compiled_as_a_whole_is_an_error_and_no_silent_detour():
    model = Broken()
    compile_network(model, "fast")
    with pytest.raises(COMPILE_ERRORS):
        model(torch.zeros(2))
    with uncompiled():
        assert model(torch.zeros(2)).tolist() == [1, 1]
    give_up_compiling(model)
    assert model(torch.zeros(2)).tolist() == [1, 1]


def test_more_shapes_than_allowed_are_an_error_and_no_silent_detour(monkeypatch):
    monkeypatch.setattr("engine.compiling.SHAPES", 2)
    model = torch.nn.ReLU()
    compile_network(model, "fast")
    for size in (3, 4):
        model(torch.zeros(size))
    with pytest.raises(COMPILE_ERRORS):
        model(torch.zeros(5))


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_compiled_gradients_statistics_and_losses_are_the_plain_ones(memory):
    """As exact as the order of fp32 sums: cosine above 0.999 per tensor, statistics within 1e-3 after 10 steps."""
    config = QUICK | {"learning_rate": 1e-3, "swa_start_epoch": 0, "memory": memory}
    gradients, statistics, losses = {}, {}, {}
    for kind in ("on", "off"):
        state = train.new_state(config | {"compile": kind}, 5, 10, CPU, "fp32")
        state.model.train()
        losses[kind] = [train.train_step(state, *some_batch(), config).loss.item() for _ in range(10)]
        gradients[kind] = [p.grad for p in state.model.parameters()]
        statistics[kind] = [b for name, b in state.model.named_buffers() if "running" in name]
    for ours, theirs in zip(gradients["on"], gradients["off"], strict=True):
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
    for ours, theirs in zip(statistics["on"], statistics["off"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert losses["on"] == pytest.approx(losses["off"], rel=0.01)


@pytest.mark.slow
def test_a_compiled_run_goes_on_as_written_and_the_other_way_round(image_tree, tmp_path):
    for first, second in (("on", "off"), ("off", "on")):
        folder = tmp_path / first
        arguments = tiny_run(image_tree, folder, epochs=2, warmup_epochs=1, compile=first, start_resolution=32)
        status, output = run_program("train.py", arguments, timeout=600)
        assert status == 0, output
        flags = [f"--resume={folder}/last.pt", "--epochs=3", f"--compile={second}"]
        status, output = run_program("train.py", flags, timeout=600)
        assert status == 0, output
        assert f"changed on resume: compile = '{second}', was '{first}'" in output
        assert checkpoint.read(folder / "last.pt")["epoch"] == 3
