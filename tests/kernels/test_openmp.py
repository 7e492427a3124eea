"""Threads that wait for parallel regions end when they are given back."""

import time
from pathlib import Path

import pytest
import torch

from kernels.native.build import supported
from kernels.native.openmp import release_threads


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not supported(), reason="needs the GNU OpenMP that torch brings on Linux on x86-64")
def test_threads_of_this_threads_regions_end_and_come_back_when_needed() -> None:
    x, before = torch.ones(1 << 20), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        x.sum()
        working = num_threads()
        for _ in range(2):
            release_threads()
            deadline = time.monotonic() + 10
            while num_threads() != working - 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert num_threads() == working - 2
            assert float(x.sum()) == x.numel()
            assert num_threads() == working
    finally:
        torch.set_num_threads(before)
