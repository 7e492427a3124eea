"""Merged copies move the same bytes as one by one; the three ways to carry them out are told the same."""

import ctypes
import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.cache.block import BlockMove
from engine.cache.kv_store import KVStore
from engine.cuda.copies import (
    CHUNK,
    COPIERS,
    BatchCopier,
    GatherCopier,
    NewCopier,
    Pieces,
    PinnedStore,
    RunCopier,
    Runs,
    Tiers,
    batch_function,
    coalesced,
)
from engine.cuda.device import TorchDevice
from tests.cuda.virtual_device import VirtualDevice

LAYERS, BLOCKS, HOST_BLOCKS = 3, 20, 21


def new_tiers(device: VirtualDevice) -> tuple[KVStore, PinnedStore, Tiers]:
    """Every byte pair of the device differs from all others."""
    kv = KVStore(LAYERS, BLOCKS, 2, 4, 1, torch.int16)
    kv.slab.view(-1).copy_(torch.arange(kv.slab.numel()))
    host = PinnedStore(device, kv, HOST_BLOCKS)
    return kv, host, Tiers(kv, host)


@st.composite
def moves(draw: st.DrawFn) -> list[BlockMove]:
    """No slot twice; neighbours often go together."""
    near = draw(st.permutations(range(BLOCKS)))
    far = draw(st.permutations(range(HOST_BLOCKS)))
    if draw(st.booleans()):
        shift = draw(st.integers(0, HOST_BLOCKS - 1))
        far = [(slot + shift) % HOST_BLOCKS for slot in near]
    return list(itertools.starmap(BlockMove, zip(near, far, strict=False)))[: draw(st.integers(0, BLOCKS))]


def bytes_of(runs: Runs) -> dict[int, int]:
    """Where each byte comes from, by where it goes."""
    found: dict[int, int] = {}
    for to, source, size in zip(*runs, strict=True):
        for offset in range(size):
            assert to + offset not in found, "two copies write the same byte"
            found[int(to + offset)] = int(source + offset)
    return found


def one_by_one(pieces: Pieces) -> dict[int, int]:
    each = np.full(len(pieces.to), pieces.num_bytes)
    return bytes_of(Runs(pieces.to, pieces.source, each))


@given(moves(), st.sampled_from([range(LAYERS), range(1), range(1, 3)]), st.randoms())
def test_merged_copies_move_what_the_single_ones_do_in_any_order(
    given_moves: list[BlockMove], layers: range, shuffle: random.Random
) -> None:
    _, _, tiers = new_tiers(VirtualDevice())
    for pieces in (tiers.stores(given_moves, layers), tiers.loads(given_moves, layers)):
        assert len(pieces.to) == len(given_moves) * len(layers)
        runs = coalesced(pieces)
        assert bytes_of(runs) == one_by_one(pieces)
        order = list(range(len(pieces.to)))
        shuffle.shuffle(order)
        again = coalesced(Pieces(pieces.to[order], pieces.source[order], pieces.num_bytes))
        assert all(map(np.array_equal, runs, again))


@given(moves())
def test_what_could_still_be_merged_was(given_moves: list[BlockMove]) -> None:
    _, _, tiers = new_tiers(VirtualDevice())
    to, source, size = coalesced(tiers.loads(given_moves, range(LAYERS)))
    follows = (to[:-1] + size[:-1] == to[1:]) & (source[:-1] + size[:-1] == source[1:])
    assert not follows.any()


def test_neighbours_in_a_chunk_are_one_copy_per_layer() -> None:
    _, _, tiers = new_tiers(VirtualDevice())
    runs = coalesced(tiers.loads([BlockMove(3 + i, i) for i in range(CHUNK)], range(LAYERS)))
    assert runs.num_bytes.tolist() == [CHUNK * tiers.piece_bytes] * LAYERS


@given(moves())
def test_blocks_arrive_whole_and_nothing_else_changes(given_moves: list[BlockMove]) -> None:
    device = VirtualDevice()
    kv, host, tiers = new_tiers(device)
    untouched = host.slab.clone()
    RunCopier(device, tiers.host, tiers.device).copy(tiers.stores(given_moves, range(LAYERS)), device.stores)
    device.finish()
    expected, moved = kv.slab.clone(), {move.host_slot for move in given_moves}
    for slot in range(HOST_BLOCKS):
        if slot not in moved:
            assert torch.equal(host.block(slot), untouched[slot // CHUNK, :, slot % CHUNK])
    for move in given_moves:
        assert torch.equal(host.block(move.host_slot), kv.slab[:, move.device_slot])
        kv.slab[:, move.device_slot] = -7
    back = RunCopier(device, tiers.device, tiers.host)
    for layer in range(LAYERS):
        back.copy(tiers.loads(given_moves, range(layer, layer + 1)), device.loads)
    device.finish()
    assert torch.equal(kv.slab, expected)


class Driver:
    """Stands in for cuMemcpyBatchAsync: copies at once, by the addresses it is given."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.num_copies: list[int] = []

    def __call__(
        self,
        to: int,
        source: int,
        sizes: int,
        count: int,
        attributes: int,
        first: int,
        num_attributes: int,
        failed_at: int,
        stream: int,
    ) -> int:
        assert stream, "the default stream takes no batches"
        assert (num_attributes, ctypes.c_size_t.from_address(first).value) == (1, 0)
        words = (ctypes.c_uint32 * 6).from_address(attributes)
        assert list(words) == [1, 0, 0, 0, 0, 0], "in stream order, without hints or flags"
        if self.error:
            ctypes.c_size_t.from_address(failed_at).value = 1
            return self.error
        arrays = [(ctypes.c_size_t * count).from_address(at) for at in (to, source, sizes)]
        for one_to, one_source, size in zip(*arrays, strict=True):
            ctypes.memmove(one_to, one_source, size)
        self.num_copies.append(count)
        return 0


def test_a_batch_hands_all_runs_to_the_driver_at_once() -> None:
    device, driver = VirtualDevice(), Driver()
    kv, host, tiers = new_tiers(device)
    given_moves = [BlockMove(2, 5), BlockMove(9, 1), BlockMove(3, 6)]
    copier = BatchCopier(device, tiers.host, tiers.device, driver)
    copier.copy(tiers.stores(given_moves, range(LAYERS)), device.stores)
    assert driver.num_copies == [2 * LAYERS]
    for move in given_moves:
        assert torch.equal(host.block(move.host_slot), kv.slab[:, move.device_slot])
    copier.copy(tiers.stores([], range(LAYERS)), device.stores)
    assert len(driver.num_copies) == 1, "a batch of nothing is refused by the driver"


def test_a_batch_that_the_driver_refuses_is_an_error() -> None:
    device = VirtualDevice()
    _, _, tiers = new_tiers(device)
    copier = BatchCopier(device, tiers.host, tiers.device, Driver(error=701))
    with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync failed with error 701 at copy 1"):
        copier.copy(tiers.stores([BlockMove(1, 1)], range(LAYERS)), device.stores)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_there_are_no_batches() -> None:
    device = VirtualDevice()
    _, _, tiers = new_tiers(device)
    with pytest.raises(RuntimeError, match="no CUDA driver that copies in batches"):
        BatchCopier(device, tiers.host, tiers.device)


def test_the_kernel_is_given_offsets_that_stay_until_it_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = pytest.importorskip("kernels.gpu.gather")
    device = VirtualDevice(early=())
    kv, host, tiers = new_tiers(device)
    monkeypatch.setattr(gather, "copy_pieces", late_copies(device))
    copier = GatherCopier(device, tiers.host, tiers.device)
    given_moves = [BlockMove(slot, 20 - slot) for slot in range(BLOCKS)]
    for some in (given_moves[:5], given_moves[5:6], given_moves[6:]):
        copier.copy(tiers.stores(some, range(LAYERS)), device.stores)
    copier.copy(tiers.stores([], range(LAYERS)), device.stores)
    device.finish()
    for move in given_moves:
        assert torch.equal(host.block(move.host_slot), kv.slab[:, move.device_slot])
    num_events = device.num_events
    for _ in range(4):
        copier.copy(tiers.stores(given_moves, range(LAYERS)), device.stores)
        device.finish()
    assert device.num_events == num_events, "room for offsets is not used again"


def late_copies(device: VirtualDevice) -> Callable[..., None]:
    """A kernel that runs when the stream comes to it."""

    def copy(to: Tensor, source: Tensor, to_at: Tensor, source_at: Tensor, num_bytes: int) -> None:
        def run() -> None:
            for a, b in zip(to_at.tolist(), source_at.tolist(), strict=True):
                to[a : a + num_bytes] = source[b : b + num_bytes]

        device.launch(device.stores, "gather", run)

    return copy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", COPIERS)
def test_a_gpu_copies_the_same_bytes_in_every_way(name: str) -> None:
    device, new = TorchDevice(torch.device("cuda:0")), COPIERS[name]
    if name == "batch":
        batch_function()  # a driver without it is an error on the machine that is to measure it
    assert_moves(device, new)


def assert_moves(device: TorchDevice, new: NewCopier) -> None:
    """Blocks go out, and back to other places."""
    num_blocks, size = 64, 4096
    near, far = (
        device.empty((num_blocks * size,), torch.uint8),
        device.pinned((num_blocks * size,), torch.uint8),
    )
    content = torch.randint(256, (num_blocks, size), dtype=torch.uint8)
    near.copy_(content.view(-1))
    torch.cuda.synchronize()
    generator = np.random.default_rng(0)
    there, back = (generator.permutation(num_blocks).astype(np.int64) * size for _ in range(2))
    in_order = np.arange(num_blocks, dtype=np.int64) * size
    event = device.event()
    new(device, far, near).copy(Pieces(there, in_order, size), device.stores)
    device.record(event, device.stores)
    device.wait(device.loads, event)
    new(device, near, far).copy(Pieces(back, there, size), device.loads)
    device.record(event, device.loads)
    device.synchronize(event)
    assert torch.equal(far.view(num_blocks, size)[torch.from_numpy(there // size)], content)
    assert torch.equal(near.cpu().view(num_blocks, size)[torch.from_numpy(back // size)], content)
