"""A GPU that PyTorch sees and has no code for: a P100, with a wheel of CUDA 13."""

import pytest
import torch
from conftest import run_here, tiny_run

import benchmark
import evaluate
from config import CONFIG
from engine.system.device import choose_device
from engine.system.errors import UserError
from engine.system.gpu_absence import INSTALL_TORCH_FOR_CUDA_12

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's own, of the same


def test_every_program_says_so_with_the_pytorch_that_has_it(image_tree, tmp_path):
    assert "sm_60" not in torch.cuda.get_arch_list()
    run = tiny_run(image_tree, tmp_path / "run", device="auto")
    for program in (
        lambda: run_here(run),
        lambda: run_here([*run, "--plan"]),
        lambda: evaluate.main(evaluate.parse_arguments(["best.pt"])),
        lambda: benchmark.main(benchmark.parse_arguments(["step", "--no-record"])),
        lambda: benchmark.main(benchmark.parse_arguments(["gpu", f"--results={tmp_path / 'gpu.jsonl'}"])),
        lambda: choose_device({"device": "cuda"}),
    ):
        with pytest.raises(UserError, match="none for the Tesla P100 .* of compute capability 6.0") as refused:
            program()
        assert f"Mend it with: {INSTALL_TORCH_FOR_CUDA_12}" in str(refused.value)
    assert not (tmp_path / "run").exists()
    assert choose_device(CONFIG | {"device": "cpu"}).type == "cpu"
