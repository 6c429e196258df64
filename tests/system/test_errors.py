import pytest
import torch

from engine.data.splits import open_splits
from engine.system.errors import run_program


@pytest.mark.parametrize("fault", ["a name that is too long", "no memory"])
def test_what_the_machine_refuses_is_said_in_a_line_with_status_1(fault, tmp_path, capsys):
    works = {
        "a name that is too long": lambda: open_splits(tmp_path / ("a" * 300)),
        "no memory": lambda: torch.empty(2**60, dtype=torch.uint8),
    }
    assert run_program("evaluate.py", works[fault]) == 1
    said = capsys.readouterr().err
    assert said.startswith("evaluate.py: ") and said.count("\n") == 1
    assert {"a name that is too long": "File name too long", "no memory": "--batch-size"}[fault] in said


def test_a_full_disk_is_said_in_a_line_wherever_it_is_met(capsys):
    def write():
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    assert run_program("prepare_data.py", write) == 1
    assert capsys.readouterr().err == "prepare_data.py: [Errno 28] No space left on device\n"


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a mistake"):
        run_program("train.py", lambda: (_ for _ in ()).throw(RuntimeError("a mistake")))
