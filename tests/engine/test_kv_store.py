"""The device tier's memory: taken when it is written, or ahead of that."""

import sys
from pathlib import Path

import pytest
import torch

from engine.cache.kv_store import KVStore


def resident_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="memory is populated on Linux only")
def test_the_first_blocks_of_every_layer_are_populated_and_no_others() -> None:
    before = resident_mib()
    store = KVStore(4, 4096, 2, 32, 64, torch.bfloat16)  # 64 MiB a layer
    assert resident_mib() - before < 8
    store.populate(64 << 20)
    taken = resident_mib() - before
    if taken < 8:
        pytest.skip("this Linux is older than 5.14 and cannot populate memory")
    assert 60 <= taken < 64 + 4 * 2 + 4  # a huge page more at the end of each
    for layer in store.layers:
        layer[:1024] = 1
    assert resident_mib() - before < taken + 4
    store.populate(1 << 40)  # more than there is
    assert 250 <= resident_mib() - before < 270
    assert (store.slab[:, :1024] == 1).all() and not store.slab[:, 1024:].any()
