"""Free memory goes back to the system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOLES = """
import psutil
from qpeft.memory import give_back

def resident():
    return psutil.Process().memory_info().rss // 2**20

def scattered():
    blocks = [b"x" * 100_000 for _ in range(2_000)]
    return blocks[::2]

kept = scattered()
before = resident()
print(before, give_back(), resident())
"""


FAULTS = """
import resource, torch
from qpeft.memory import hold

def work(times):
    for _ in range(times):
        torch.ones(30_000_000 // 4)
        torch.ones(20_000_000 // 4)

def faults():
    work(3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work(20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
hold()
print(usual, faults())
"""


@pytest.mark.skipif(not Path("/lib64/ld-linux-x86-64.so.2").exists(), reason="needs glibc")
def test_memory_between_what_is_kept_goes_back() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    told = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    assert told[1] == "True"
    assert int(told[0]) - int(told[2]) > 70  # of 95 MiB that are free between blocks in use


@pytest.mark.skipif(not Path("/lib64/ld-linux-x86-64.so.2").exists(), reason="needs glibc")
def test_memory_is_held_for_what_comes() -> None:
    """A tensor that is freed and made again takes no fresh pages, where otherwise each would."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    told = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment)
    before, after = map(int, told.stdout.split())
    assert after < before / 5
