"""What a process frees stays with it once it is told to, and only where it computes on a CPU."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from shine.host_memory import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from shine.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    # As a forward and a backward pass hold much at once; blocks of more than 32 MB go back to the kernel if nothing is said.
    held = [torch.ones(megabytes << 18) for megabytes in (40, 20, 48)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory(torch.device("cpu"))
for _ in range(6):
    faults()
print(*(faults() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_memory_that_was_freed_is_taken_again_without_asking_the_kernel() -> None:
    def count(way: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    given_back, kept = count("leave"), count("keep")
    # Pages of 2 MB where the kernel takes large ones by itself. Aligned blocks do not fit into holes of just their size, so that
    # now and then one is new all the same.
    assert min(given_back) >= 40
    assert sum(kept) < sum(given_back) / 4


def test_a_gpu_needs_nothing_of_it() -> None:
    assert not keep_freed_memory(torch.device("cuda"))
