"""Blocks go between the tiers through the kernel that copies pieces."""

import torch

from engine.cache.block import BlockMove
from engine.cache.kv_store import KVStore
from engine.cuda.copies import GatherCopier, PinnedStore, Tiers
from engine.cuda.transfer import CudaTransfer
from tests.cuda.virtual_device import VirtualDevice


def test_blocks_that_a_kernel_stores_and_loads_are_the_same() -> None:
    device = VirtualDevice()
    kv = KVStore(2, 6, 1, 16, 16, torch.float32, device.empty)
    kv.slab.normal_()
    before = kv.slab.clone()
    host = PinnedStore(device, kv, 9)
    tiers = Tiers(kv, host)
    out, back = GatherCopier(device, tiers.host, tiers.device), GatherCopier(device, tiers.device, tiers.host)
    transfer = CudaTransfer(device, tiers, storing=out, loading=back)
    transfer.store([BlockMove(0, 8), BlockMove(1, 0), BlockMove(5, 3)])
    transfer.load([]).finish()
    assert torch.equal(host.block(8), before[:, 0]) and torch.equal(host.block(3), before[:, 5])
    kv.slab.fill_(torch.nan)
    transfer.store([], {2, 4})
    loading = transfer.load([BlockMove(2, 8), BlockMove(4, 0)])
    loading.wait_for(1)
    assert torch.equal(kv.slab[:, 2], before[:, 0]) and torch.equal(kv.slab[:, 4], before[:, 1])
    assert kv.slab[:, [0, 1, 3, 5]].isnan().all()
    loading.finish()
