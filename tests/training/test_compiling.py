"""torch.compile: chosen aloud, never silently left out, and of no consequence for checkpoints."""

import math
import os
import re

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from conftest import fresh_state, run_program, tiny_run
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import train
from config import CONFIG, RECIPES
from engine.cli.keys import config_problems
from engine.data.batches import resolution_of_epoch
from engine.run import checkpoint_files
from engine.training.compiling import (
    COMPILE_ERRORS,
    choose_compile,
    choose_compiled,
    coarser_step,
    compile_network,
    eager_mode,
    fall_back_to_eager,
    keep_compiled_code_in,
    measured_choice,
    work_left,
)
from engine.training.out_of_memory import take_step
from engine.training.trials import Trials

CPU = torch.device("cpu")
QUICK = CONFIG | {"batch_size": 8, "epochs": 4, "warmup_epochs": 1, "swa_start_epoch": 3, "architecture": "resnet18"}


def some_batch(resolution=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, resolution, resolution, generator=generator), torch.arange(8) % 5


# What auto chooses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "how"), [((6, 1), "off"), ((7, 0), "measure"), ((7, 5), "measure"), ((9, 0), "measure")]
)
def test_auto_measures_on_every_gpu_that_the_compiler_takes(monkeypatch, capability, how):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen, why = choose_compile(CONFIG, torch.device("cuda"))
    assert chosen == how
    assert f"{capability[0]}.{capability[1]}" in why
    for asked in ("on", "off", "measure"):
        assert choose_compile(CONFIG | {"compile": asked}, torch.device("cuda")) == (asked, "as asked for")
        assert choose_compile(CONFIG | {"compile": asked}, CPU) == (asked, "as asked for")
    assert choose_compile(CONFIG, CPU)[0] == "off"


class Machine:
    """A clock, and a step that takes so many seconds as written and compiled; its work is only done at wait()."""

    def __init__(self, as_written, compiled, compilation, fails=False):
        self.now, self.begun, self.steps = 0.0, 0.0, 0
        self.as_written, self.compiled, self.compilation, self.fails = as_written, compiled, compilation, fails
        self.is_compiled = False

    def step(self):
        self.steps += 1
        self.begun += self.compiled if self.is_compiled and not self.fails else self.as_written

    def start_compiling(self):
        self.is_compiled = True
        self.begun += self.compilation

    def wait(self):
        self.now, self.begun = self.now + self.begun, 0.0

    def choice(self, **of_run):
        return measured_choice(
            self.step,
            self.start_compiling,
            lambda: self.is_compiled and not self.fails,
            self.wait,
            clock=lambda: self.now,
            **of_run,
        )


@pytest.mark.parametrize(
    ("machine", "of_run", "compiled", "why"),
    [
        (Machine(0.7, 0.6, 90), {"steps_left": 80_000, "sizes": 1}, True, "faster compiled"),
        (Machine(0.7, 0.8, 90), {"steps_left": 80_000, "sizes": 1}, False, "not faster compiled"),
        (Machine(0.7, 0.6, 90), {"steps_left": 80_000, "sizes": 13}, True, "faster compiled"),  # 8,000 s against 12 * 90
        (Machine(0.7, 0.69, 90), {"steps_left": 80_000, "sizes": 13}, False, "longer than the 800 s that it saves"),
        (Machine(0.7, 0.6, 90, fails=True), {"steps_left": 80_000, "sizes": 1}, False, "could not be compiled"),
        (Machine(0.7, 0.1, 90), {"steps_left": 80, "sizes": 1}, False, "the 56 s that the steps will take are shorter"),
        (Machine(0.7, 0.1, 90), {"steps_left": 80_000, "sizes": 1, "seconds_left": 30}, False, "the 30 s"),
        (Machine(0.7, 0.6, 90), {"steps_left": 80, "sizes": 13, "however_short": True}, True, "faster compiled"),
    ],
)
def test_what_is_faster_over_the_rest_of_the_run_goes_on(machine, of_run, compiled, why):
    choice = machine.choice(**of_run)
    assert (choice["compiled"], choice["step_as_written"]) == (compiled, pytest.approx(0.7))
    assert why in choice["why"]
    if "shorter" in why or "the 30 s" in why:
        assert machine.steps < 20 and not machine.is_compiled  # not even tried
        assert choice["step_compiled"] is None
    elif not machine.fails:
        assert choice["step_compiled"] == pytest.approx(machine.compiled)
        assert choice["compilation"] == pytest.approx(machine.compilation + machine.compiled)


def test_the_rest_of_a_run_is_counted_in_steps_of_the_size_that_takes_most_of_it():
    config = CONFIG | {"epochs": 8, "start_resolution": 112, "train_resolution": 224, "resolution_step": 112}
    config |= {"resolution_ramp_start": 0.5, "resolution_ramp_end": 0.75}
    assert [resolution_of_epoch(config, epoch) for epoch in range(8)] == [112] * 4 + [224] * 4
    assert work_left(config, 0, 100) == (224, 100 * (4 + 4 / 4), 2)
    assert work_left(config, 6, 100) == (224, 200, 1)
    assert work_left(config | {"epochs": 8, "resolution_ramp_end": 1.0}, 8, 100)[1] == 0


def test_compiled_the_mild_recipe_has_few_sizes_and_as_many_pixels():
    mild = CONFIG | RECIPES["mild"]
    sizes = {
        step: [resolution_of_epoch(mild | {"resolution_step": step}, e) for e in range(29)] for step in (4, coarser_step(mild))
    }
    assert config_problems(mild | {"resolution_step": coarser_step(mild)}) == []
    assert len(set(sizes[4])) == 13
    coarse = sizes[coarser_step(mild)]
    assert len(set(coarse)) <= 5
    assert (coarse[0], coarse[-1]) == (88, 176)
    assert sum(px**2 for px in coarse) == pytest.approx(sum(px**2 for px in sizes[4]), rel=0.03)
    assert coarser_step(CONFIG) == CONFIG["resolution_step"]
    fast = CONFIG | RECIPES["fast"]
    assert coarser_step(fast) == fast["resolution_step"]


def sizes_of(config):
    return sorted({resolution_of_epoch(config, epoch) for epoch in range(config["epochs"])})


@pytest.mark.parametrize(
    ("recipe", "changes", "compiled"),
    [
        *((recipe, {}, None) for recipe in RECIPES),
        ("hot", {"epochs": 271}, [104, 128, 152, 176]),
        ("hot", {"start_resolution": 100, "train_resolution": 224, "epochs": 400}, [100, 224]),  # 31 steps of 4 px
        ("mild", {"start_resolution": 96, "train_resolution": 224, "epochs": 88}, [96, 128, 160, 192, 224]),
        ("mild", {"start_resolution": 36, "train_resolution": 56, "epochs": 88}, [36, 56]),
    ],
)
def test_compiled_no_run_has_more_than_five_sizes_and_they_begin_and_end_as_they_would(recipe, changes, compiled):
    config = CONFIG | RECIPES[recipe] | changes
    coarse = config | {"resolution_step": coarser_step(config)}
    assert config_problems(config) == config_problems(coarse) == []  # also when a checkpoint brings it along
    as_written, sizes = sizes_of(config), sizes_of(coarse)
    assert len(sizes) <= 5 and sizes == (compiled or sizes)
    assert (sizes[0], sizes[-1]) == (as_written[0], as_written[-1])
    assert coarse["resolution_step"] % config["resolution_step"] == 0


@pytest.mark.slow
def test_a_run_measures_says_and_remembers_whether_compiled_code_is_faster(image_tree, tmp_path):
    """The real thing on a CPU; as soon as it is remembered, the run goes on to the bits of one that never measured."""
    growing = {"start_resolution": 32, "train_resolution": 96, "resolution_step": 4, "swa_start_epoch": 0}
    arguments = tiny_run(image_tree, tmp_path / "run", compile="measure", **growing)
    status, output = run_program("train.py", arguments, timeout=900)
    assert status == 0, output
    said = re.search(
        r"the network is (not )?compiled: .*as written ([\d,]+) images/s at 96 px, compiled ([\d,]+) images/s", output
    )
    assert said, output
    contents = checkpoint_files.read(tmp_path / "run/last.pt")
    choice = contents["compile_choice"]
    assert choice["compiled"] == (said[1] is None) == (choice["step_compiled"] < choice["step_as_written"])
    assert contents["config"]["resolution_step"] == 4  # which was given, and so is not made coarser
    assert list((tmp_path / "run/compiler_cache").rglob("*.so"))
    assert said[0] in (tmp_path / "run.log").read_text()

    status, again = run_program("train.py", [f"--resume={tmp_path}/run/last.pt", "--epochs=4"], timeout=900)
    assert status == 0, again
    assert f"{said[0]}" in again and "(measured when the run began)" in again
    assert "which takes minutes" in output and "which takes minutes" not in again

    settled = growing | {"compile": "on" if choice["compiled"] else "off"}
    status, output = run_program("train.py", tiny_run(image_tree, tmp_path / "settled", **settled), timeout=900)
    assert status == 0, output
    expected = checkpoint_files.read(tmp_path / "settled/last.pt")
    for key, tensor in contents["model"].items():
        assert torch.equal(tensor, expected["model"][key]), key
    for ours, theirs in zip(contents["rng"], expected["rng"], strict=True):
        assert torch.equal(ours["cpu"], theirs["cpu"])


def test_what_was_measured_before_holds_for_the_same_circumstances_only(monkeypatch, tmp_path):
    monkeypatch.setattr("engine.training.compiling._measured", lambda *arguments: {**figures, "compiled": False})
    figures = {"compiled": True, "why": "", "step_as_written": 2.0, "step_compiled": 1.0, "compilation": 1.0, "resolution": 32}

    def chosen(contents, precision="fp32", **changes):
        config = QUICK | {"compile": "measure"} | changes
        return choose_compiled(config, contents, False, 80, math.inf, Trials(None, None, 10, CPU, precision))[1]

    first = chosen(None)
    assert first.items() >= {"batch_size": 8, "precision": "fp32", "torch": torch.__version__}.items()
    checkpoint_files.write(tmp_path / "last.pt", {"format": checkpoint_files.FORMAT, "compile_choice": first})
    assert checkpoint_files.read(tmp_path / "last.pt")["compile_choice"] == first  # plain values, safe to load
    contents = {"epoch": 1, "compile_choice": first | {"compiled": True}}
    assert chosen(contents)["compiled"] is True
    assert chosen(contents, precision="bf16")["compiled"] is False
    assert chosen(contents, memory="low")["compiled"] is False
    never_compiled = {"epoch": 1, "compile_choice": first | {"compiled": True, "step_compiled": None}}
    assert chosen(never_compiled)["compiled"] is False
    assert chosen({"epoch": 1})["compiled"] is False  # a checkpoint of an earlier release


@pytest.mark.parametrize("when", ["when the run began", "in the run"])
def test_what_could_not_be_compiled_is_not_tried_again_at_each_restart(monkeypatch, when):
    def _measured(*arguments):
        tried.append(1)
        machine = Machine(0.7, 0.6, 90, fails=when == "when the run began")
        return machine.choice(steps_left=80_000, sizes=1) | {"resolution": 224}

    def chosen(contents, **changes):
        config = QUICK | {"compile": "measure"} | changes
        return choose_compiled(config, contents, False, 80, math.inf, Trials(None, None, 10, CPU, "fp32"))[1:]

    tried = []
    monkeypatch.setattr("engine.training.compiling._measured", _measured)
    choice, remarks = chosen(None)
    assert len(tried) == 1 and "--compile on" not in remarks[0]
    contents = {"epoch": 1, "compile_choice": choice, "compile_failed": when == "in the run"}
    for _ in range(2):
        choice, remarks = chosen(contents)
        assert (len(tried), choice["compiled"], choice["why"]) == (1, False, "it could not be compiled")
        assert remarks == [
            "the network is not compiled: it could not be compiled; as written 11 images/s at 224 px (measured when the run "
            "began; --compile on tries again)"
        ]
        contents = {"epoch": 2, "compile_choice": choice, "compile_failed": False}
    assert chosen(contents, memory="low")[0]["compiled"] is (when == "in the run")  # another network: tried again
    assert len(tried) == 2
    assert chosen(contents, compile="on")[0] == {"compiled": True}


# The compiler's cache ------------------------------------------------------------------------------------------------


def test_compiled_code_lies_beside_the_checkpoints_and_neither_is_a_run_nor_goes_with_one(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_compiled_code_in(tmp_path / "run", create=False)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ and list(tmp_path.iterdir()) == []
    keep_compiled_code_in(tmp_path / "run")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "run/compiler_cache")
    (tmp_path / "run/compiler_cache/kernel.so").touch()
    checkpoint_files.refuse_to_overwrite(tmp_path / "run")  # code alone is no run
    checkpoint_files.delete_run(tmp_path / "run")
    assert (tmp_path / "run/compiler_cache/kernel.so").exists()  # the next run of this network takes it
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_compiled_code_in(tmp_path / "other")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere" and not (tmp_path / "other").exists()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as PyTorch does when it is imported
    (tmp_path / "file").touch()
    keep_compiled_code_in(tmp_path / "file")  # cannot be: saving a checkpoint will say so
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()
    keep_compiled_code_in(tmp_path / "run")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "run/compiler_cache")


@pytest.mark.slow
def test_a_second_start_takes_the_compiled_code_of_the_first(image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", compile="on", epochs=1, swa_start_epoch=0)

    def compiled():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run/compiler_cache").rglob("*.so")}

    status, output = run_program("train.py", arguments, timeout=900)
    assert status == 0, output
    first = compiled()
    assert first
    status, output = run_program("train.py", [*arguments, "--overwrite"], timeout=900)
    assert status == 0, output
    assert compiled() == first  # nothing was compiled, and nothing anew


# Compiling -----------------------------------------------------------------------------------------------------------


def test_a_run_says_whether_its_network_is_compiled(image_tree, tmp_path):
    status, output = run_program("train.py", tiny_run(image_tree, tmp_path / "run", epochs=2))
    assert status == 0, output
    assert "the network is not compiled: on a CPU that takes minutes" in output


def test_a_compiled_network_keeps_its_keys_and_so_do_its_averages():
    compiled, plain = (fresh_state(QUICK | {"compile": kind}) for kind in ("on", "off"))
    for part in ("model", "averaged_model"):
        assert list(getattr(compiled, part).state_dict()) == list(getattr(plain, part).state_dict())


@pytest.mark.slow
def test_without_a_compiler_a_run_that_asks_for_one_stops_and_says_why(image_tree, tmp_path):
    environment = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    arguments = tiny_run(image_tree, tmp_path / "run", compile="on")
    status, output = run_program("train.py", arguments, environment=environment)
    assert status == 1
    assert "train.py: the network could not be compiled (" in output
    assert "try --compile off" in output
    assert "Traceback" not in output.split("train.py: the network")[1]


@pytest.mark.slow
def test_where_compiling_fails_under_auto_the_same_step_is_taken_as_written_and_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    said = []
    state = fresh_state(QUICK | {"compile": "on"})
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        result = take_step(train.train_step, state, *some_batch(), QUICK, said.append)
    plain = fresh_state(QUICK)
    expected = train.train_step(plain, *some_batch(), QUICK)
    assert "could not be compiled" in said[0] and "as written from now on" in said[0]
    assert state.state_dict()["compile_failed"] is True
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    take_step(train.train_step, state, *some_batch(), QUICK, said.append)
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
    with eager_mode():
        assert model(torch.zeros(2)).tolist() == [1, 1]
    fall_back_to_eager(model)
    assert model(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.slow
def test_more_shapes_than_allowed_are_an_error_and_no_silent_detour(monkeypatch):
    class Doubled(torch.nn.Module):  # torch 2.11 compiles no module of its own
        def forward(self, values):
            return values * 2

    monkeypatch.setattr("engine.training.compiling.SHAPES", 2)
    model = Doubled()
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
        state = fresh_state(config | {"compile": kind})
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
        assert checkpoint_files.read(folder / "last.pt")["epoch"] == 3
