"""Memory that is freed is used again."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Page faults of twenty tensors of 64 MiB, each freed before the next.
FAULTS = """
import resource
import torch
from medmim.memory import keep_freed_memory

if {keep}:
    keep_freed_memory()
for _ in range(20):  # glibc before 2.38 does not at once find a freed block of the same size for aligned memory
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keep: bool) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library's allocator")
def test_what_is_freed_is_used_again():
    assert faults(keep=True) < faults(keep=False) / 10
