"""What holds on a GPU, shown without one: proof_*.py, each file under pytest in a process that sees the stand-in."""

import subprocess
import sys

import build_standin
import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.skipif(build_standin.why_not() is not None, reason=str(build_standin.why_not()))


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    build_standin.build(folder)
    return folder


def prove(standin, capability, *proofs, only=""):
    """Run the proofs on the stand-in of a capability; fail with pytest's own report."""
    files = [f"tests/cuda_without_gpu/proof_{proof}.py" for proof in proofs]
    options = ["-q", "-o", "addopts=--strict-markers", "-o", "python_files=proof_*.py", "-p", "no:cacheprovider", "-k", only]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=REPOSITORY,
        env=build_standin.environment(standin, capability),
        capture_output=True,
        text=True,
    )
    __tracebackhide__ = True
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


def test_on_a_t4(standin):
    prove(standin, 75, "card", "pinning", "step")


@pytest.mark.slow
def test_on_a_t4_over_epochs_and_in_deterministic_runs(standin):
    prove(standin, 75, "deterministic", "epoch")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_on_an_a100_and_an_h100(standin, capability):
    prove(standin, capability, "card")


@pytest.mark.slow
def test_on_a_p100_which_pytorch_has_no_code_for(standin):
    prove(standin, 60, "old_card")


@pytest.mark.slow
def test_on_an_a100_the_step_keeps_its_layout_in_bf16(standin):
    prove(standin, 80, "step", only="precision and bf16")


@pytest.mark.slow
def test_the_memory_that_a_step_takes(standin):
    prove(standin, 75, "memory")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_compilers_kernels_are_made_for_the_card(standin, capability):
    prove(standin, capability, "compiling")
