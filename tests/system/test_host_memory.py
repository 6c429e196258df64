"""A step's memory is taken from the system once, not at every step."""

import sys

import pytest
from conftest import finish, start_python

PAGES_OF_A_STEP = 40 * 2**20 // 4096
PROGRAM = """
import resource, sys
import torch
from engine.system.host_memory import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("no glibc")

def step():
    return [torch.ones(10 * 2**20) for _ in range(2)]  # of 40 MiB each

for _ in range(10):  # until the heap holds a hole of the right size for each block
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_memory_that_a_step_frees_serves_the_next_one_without_the_system():
    faults = {}
    for kind in ("kept", "returned"):
        status, output = finish(start_python(["-c", PROGRAM, kind]))
        if "no glibc" in output:
            pytest.skip("no glibc")
        assert status == 0, output
        faults[kind] = int(output)
    assert faults["kept"] < 100
    assert faults["returned"] > 9 * PAGES_OF_A_STEP  # as it is otherwise: both blocks anew at each of the 5 steps
