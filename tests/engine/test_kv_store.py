"""The tiers' memory: on a CPU taken when it is written, or ahead of that; elsewhere as a whole, if at all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.cache.kv_store import HostStore, KVStore
from engine.errors import ConfigError


def resident_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="memory is populated on Linux only")
def test_the_first_blocks_of_every_layer_are_populated_and_no_others() -> None:
    before = resident_mib()
    store = KVStore(4, 4096, 2, 32, 64, torch.bfloat16)  # 64 MiB a layer
    assert resident_mib() - before < 8
    store.populate(64 << 20).join()
    taken = resident_mib() - before
    if taken < 8:
        pytest.skip("this Linux is older than 5.14 and cannot populate memory")
    assert 60 <= taken < 64 + 4 * 2 + 4  # a huge page more at the end of each
    for layer in store.layers:
        layer[:1024] = 1
    assert resident_mib() - before < taken + 4
    store.populate(1 << 40).join()  # more than there is
    assert 250 <= resident_mib() - before < 270
    assert (store.slab[:, :1024] == 1).all() and not store.slab[:, 1024:].any()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is populated on Linux only")
def test_a_process_that_ends_early_does_not_wait_for_its_memory_and_is_not_aborted() -> None:
    """The child would need some 20 s, nearly all of them inside torch."""
    child = (
        "import torch, engine.cache.kv_store as kv\n"
        "kv.HUGE_PAGE_BYTES, kv.populate = 1, lambda part: None\n"
        "store = kv.KVStore(64, 200_000, 1, 8, 8, torch.float32)\n"
        "assert store.populate(1 << 40).is_alive()\n"
    )
    ended = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_each_tier_is_one_slab_of_the_memory_it_is_given() -> None:
    def on_the_device(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    store = KVStore(2, 5, 3, 32, 16, torch.float16, on_the_device)
    assert (store.slab.device.type, store.slab.shape) == ("meta", (2, 5, 2, 3, 32, 16))
    assert all(layer.is_meta and layer.is_contiguous() for layer in store.layers)
    host = HostStore(store, 7, lambda shape, dtype: torch.full(shape, 1.0, dtype=dtype))
    assert (host.slab.shape, host.slab.dtype) == ((7, 2, 2, 3, 32, 16), torch.float16)
    assert (host.slab == 1).all()


def test_a_host_tier_that_cannot_be_pinned_is_refused_with_half_of_it() -> None:
    def never(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    store = KVStore(4, 2, 4, 32, 128, torch.bfloat16)  # 1 MiB a block
    with pytest.raises(ConfigError) as refused:
        HostStore(store, 4096, never)
    assert str(refused.value) == (
        "the 1.0 GiB of the host KV cache cannot be had: CUDA error: out of memory; "
        "--host-kv-memory 0.5GiB may fit, and --host-kv-tokens 0 leaves it out"
    )
