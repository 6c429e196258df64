"""What torchrun tells its processes, and what is said where it has not."""

import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, finish, run_program, start_python

import train
from engine.cli.command_line import parse_command_line
from engine.system.distributed import is_torchrun
from engine.system.errors import UserError

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}


@pytest.fixture
def plain_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("RANK", "WORLD", "LOCAL_", "MASTER_", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK = '0', WORLD_SIZE = '2', but not MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE = '1', but not RANK and MASTER_ADDR"),
        ({"RANK": "0"}, "RANK = '0', but not WORLD_SIZE"),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK = '', WORLD_SIZE = '', but not RANK and WORLD_SIZE"),
        (WHOLE | {"RANK": ""}, "not RANK"),
        (WHOLE | {"RANK": "first"}, "RANK = 'first' is no number"),
        (WHOLE | {"WORLD_SIZE": "-2"}, "WORLD_SIZE = '-2' is no number"),
        (WHOLE | {"MASTER_PORT": "x"}, "MASTER_PORT = 'x' is no number"),
        (WHOLE | {"LOCAL_RANK": ""}, "LOCAL_RANK = '' is no number"),
        (WHOLE | {"RANK": "2"}, "RANK = 2 of WORLD_SIZE = 2"),
    ],
)
def test_an_environment_that_torchrun_would_not_leave_is_said_in_one_line(environment, said, plain_environment, tmp_path):
    for name, value in environment.items():
        plain_environment.setenv(name, value)
    command = parse_command_line([f"--checkpoint-dir={tmp_path}", "--device=cpu"], train.OWN_FLAGS)
    with pytest.raises(UserError) as error:
        train.main(command)
    assert said in str(error.value)
    assert "unset RANK WORLD_SIZE" in str(error.value)
    assert "\n" not in str(error.value)


def test_it_costs_a_line_and_no_traceback_whichever_program_it_meets():
    for program, arguments, status in (("train.py", ["--epochs=none"], 2), ("train.py", ["--plan"], 1), ("evaluate.py", [], 1)):
        environment = {"RANK": "", "WORLD_SIZE": ""}
        code, output = run_program(program, arguments, environment=environment)
        assert (code, len(output.splitlines())) == (status, 1), output


def test_docstrings_and_asserts_may_be_stripped():
    code, output = finish(start_python(["-OO", REPOSITORY / "train.py", "--help"]))
    assert code == 0, output
    assert output.startswith("Train ResNet-50 on ImageNet")
    assert "--learning-rate" in output


# Who started this process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "/usr/bin/python3 /venv/bin/torchrun --nproc_per_node=2 train.py",
        "/venv/bin/python3.11 -u /venv/bin/torchrun train.py",
        "python -m torch.distributed.run --standalone train.py",
        "python -u -X faulthandler -W ignore -m torch.distributed.run train.py",
        "python -um torch.distributed.launch train.py",
        "python -mtorch.distributed.run train.py",
    ],
)
def test_torchrun_is_known_by_its_command_line(command):
    assert is_torchrun(command.split(" "))


@pytest.mark.parametrize(
    "command",
    [
        "",
        "/opt/torch/bin/supervisor train.py",
        "bash -c torchrun",
        "vim torchrun",
        "/venvs/torch/bin/python -m jupyter notebook",
        "python /home/me/torch-experiments/sweep.py torchrun",
        "python -c import~torch.distributed.run",
        "python -Wm torch.distributed.run x.py",
        "python -m pytest -m torch.distributed.run",
        "python",
    ],
)
def test_what_only_has_torch_in_its_command_line_is_not_torchrun(command):
    assert not is_torchrun(command.split(" "))


@pytest.mark.slow
def test_a_parent_that_is_not_torchrun_is_left_alone(tmp_path):
    parent = tmp_path / "torch_sweep.py"
    child = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from engine.system.distributed import *; end_launcher()"
    parent.write_text(f"import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)\n")
    environment = WHOLE | {"TORCHELASTIC_RUN_ID": "none"}
    assert finish(start_python([parent], environment=environment)) == (0, "")


@pytest.mark.slow
def test_torchruns_script_is_asked_to_end(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        f"import sys, time; sys.path.insert(0, {str(REPOSITORY)!r})\nfrom engine.system import distributed\n"
        "distributed.end_launcher(); time.sleep(60)"
    )
    torchrun = Path(sys.executable).with_name("torchrun")
    process = start_python([torchrun, "--standalone", "--max-restarts=3", child])
    assert finish(process)[0] in (1, -signal.SIGTERM)
