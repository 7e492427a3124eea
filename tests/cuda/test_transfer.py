"""Random steps through CudaTransfer on a virtual device leave what SyncTransfer leaves, step after step; and
they no longer do if any one wait is left out.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from engine.cache.block import BlockMove
from engine.cache.kv_store import HostStore, KVStore
from engine.cache.transfer import SyncTransfer, TransferEngine
from engine.cuda.copies import PinnedStore, RunCopier, Tiers
from engine.cuda.device import TorchDevice
from engine.cuda.transfer import CudaTransfer
from tests.cuda.virtual_device import VirtualDevice

LAYERS, BLOCKS, HOST_BLOCKS = 3, 7, 6
ORDERS = [("compute",), ("loads", "stores"), ("compute", "loads"), ("compute", "stores"), ()]
"""Streams that are early."""


@dataclass
class Plan:
    """Stores, then loads, then in every layer a kernel that first reads and then writes."""

    number: int
    stores: list[BlockMove] = field(default_factory=list)
    loads: list[BlockMove] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)  # device slots
    writes: list[int] = field(default_factory=list)

    @property
    def overwritten(self) -> set[int]:
        return {*self.writes, *(move.device_slot for move in self.loads)}

    @property
    def touched(self) -> set[int]:
        return {*self.overwritten, *self.reads, *(move.device_slot for move in self.stores)}

    @property
    def copied(self) -> set[int]:
        """Host slots."""
        return {move.host_slot for move in (*self.stores, *self.loads)}


def random_plans(rng: random.Random, num: int = 14) -> list[Plan]:
    """As the cache manager plans one step ahead: what the step before touches is neither stored nor given
    away, but for what leaves; a block is loaded when the step that stored it has been collected.
    """
    full, on_host = set(range(3)), set[int]()  # slots that hold a block
    before = Plan(0, writes=list(full))
    plans = [before]
    for number in range(1, num):
        plan = Plan(number)
        at_rest = sorted(full - before.touched)
        rng.shuffle(at_rest)
        host_room = sorted(set(range(HOST_BLOCKS)) - before.copied)
        rng.shuffle(host_room)
        for slot in at_rest[: rng.randint(0, 3)]:
            if host_room:
                plan.stores.append(BlockMove(slot, host_room.pop()))
                if rng.random() < 0.7:
                    full.remove(slot)  # leaves
        loadable = sorted(on_host - plan.copied - before.copied)
        rng.shuffle(loadable)
        free = sorted(set(range(BLOCKS)) - full)
        rng.shuffle(free)
        for host_slot in loadable[: rng.randint(0, 2)]:
            if free:
                plan.loads.append(BlockMove(free.pop(), host_slot))
        full |= {move.device_slot for move in plan.loads}
        if rng.random() < 0.7:
            plan.reads = rng.sample(sorted(full), rng.randint(0, len(full)))
            plan.writes = free[: rng.randint(0, 2)]
            plan.writes += rng.sample(sorted(full), min(len(full), rng.randint(0, 1)))
            full |= set(plan.writes)
        on_host = (on_host | {move.host_slot for move in before.stores}) - {
            move.host_slot for move in plan.stores
        }
        plans.append(plan)
        before = plan
    return plans


@dataclass
class Outcome:
    """Everything that kernels read, and what is on both tiers at the end."""

    seen: list[torch.Tensor]
    near: torch.Tensor
    far: dict[int, torch.Tensor]

    def differs_from(self, other: "Outcome") -> bool:
        pairs = [*zip(self.seen, other.seen, strict=True), (self.near, other.near)]
        pairs += [(block, other.far[slot]) for slot, block in self.far.items()]
        return any(not torch.equal(a, b) for a, b in pairs)


def new_kv() -> KVStore:
    kv = KVStore(LAYERS, BLOCKS, 1, 2, 2, torch.float32)
    kv.slab.view(-1).copy_(torch.arange(kv.slab.numel()))
    return kv


def kernel(kv: KVStore, plan: Plan, layer: int, seen: list[torch.Tensor]) -> None:
    seen += [kv.slab[layer, slot].clone() for slot in plan.reads]
    for slot in plan.writes:
        kv.slab[layer, slot] = 1000.0 * plan.number + 100 * layer + slot


def stored(plans: list[Plan]) -> set[int]:
    return {move.host_slot for plan in plans for move in plan.stores}


def in_order(plans: list[Plan]) -> Outcome:
    """One step after the other in plain memory."""
    kv = new_kv()
    host = HostStore(kv, HOST_BLOCKS)
    transfer, seen = SyncTransfer(kv, host), list[torch.Tensor]()
    for plan in plans:
        transfer.store(plan.stores, plan.overwritten)
        loading = transfer.load(plan.loads)
        for layer in range(LAYERS):
            loading.wait_for(layer)
            kernel(kv, plan, layer, seen)
        loading.finish()
    return Outcome(seen, kv.slab, {slot: host.slab[slot] for slot in stored(plans)})


def on_streams(plans: list[Plan], device: VirtualDevice, run_ahead: int, least_bytes: int = 1) -> Outcome:
    kv = new_kv()
    host = PinnedStore(device, kv, HOST_BLOCKS)
    transfer = new_transfer(device, kv, host, least_bytes)
    seen: list[torch.Tensor] = []
    launched: deque[tuple[Callable[[], None], bool]] = deque()
    for plan in plans:
        copies = bool(plan.stores or plan.loads) or any(copies for _, copies in launched)
        launched.append((launch(plan, device, kv, transfer if copies else None, seen), copies))
        if len(launched) > run_ahead:
            collect, _ = launched.popleft()
            collect()
    for collect, _ in launched:
        collect()
    assert not device.num_lent_events, "events were kept"
    device.finish()
    return Outcome(seen, kv.slab, {slot: host.block(slot) for slot in stored(plans)})


def new_transfer(device: VirtualDevice, kv: KVStore, host: PinnedStore, least_bytes: int) -> CudaTransfer:
    tiers = Tiers(kv, host)
    return CudaTransfer(
        device,
        tiers,
        storing=RunCopier(device, tiers.host, tiers.device),
        loading=RunCopier(device, tiers.device, tiers.host),
        least_bytes=least_bytes,
    )


def launch(
    plan: Plan,
    device: VirtualDevice,
    kv: KVStore,
    transfer: TransferEngine | None,
    seen: list[torch.Tensor],
) -> Callable[[], None]:
    """As core and runner do it."""
    loading = None
    if transfer is not None:
        assert not transfer.store(plan.stores, plan.overwritten)
        loading = transfer.load(plan.loads)
    if plan.reads or plan.writes:
        for layer in range(LAYERS):
            if plan.loads:
                assert loading is not None
                loading.wait_for(layer)

            def run(layer: int = layer) -> None:
                kernel(kv, plan, layer, seen)

            device.launch(device.compute, f"layer {layer} of step {plan.number}", run)
    computed = device.event()
    device.record(computed, device.compute)

    def collect() -> None:
        device.synchronize(computed)
        device.recycle(computed)
        if loading is not None:
            assert not loading.finish()
            assert (loading.seconds > 0) is bool(plan.loads)

    return collect


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("early", ORDERS)
def test_random_steps_leave_what_plain_copies_leave(early: tuple[str, ...], run_ahead: int) -> None:
    num_loads = 0
    for seed in range(60):
        plans = random_plans(random.Random(seed))
        num_loads += sum(len(plan.loads) for plan in plans)
        least_bytes = (1, 64, 1 << 20)[seed % 3]
        found = on_streams(plans, VirtualDevice(early), run_ahead, least_bytes)
        assert not found.differs_from(in_order(plans)), f"seed {seed}"
    assert num_loads > 200


def sites() -> list[str]:
    """Where CudaTransfer waits, or lets a stream wait."""
    found: set[str] = set()
    for seed in range(60):
        device = VirtualDevice()
        on_streams(random_plans(random.Random(seed)), device, run_ahead=1)
        found |= device.sites
    return sorted(site for site in found if site.startswith("transfer.py"))


def test_no_wait_can_be_left_out() -> None:
    all_sites = sites()
    assert len(all_sites) == 6, all_sites
    unnoticed = [site for site in all_sites if not is_noticed(site)]
    assert not unnoticed


def is_noticed(ignored_site: str) -> bool:
    for seed in range(60):
        plans = random_plans(random.Random(seed))
        for early in ORDERS:
            try:
                found = on_streams(plans, VirtualDevice(early, ignored_site=ignored_site), run_ahead=1)
            except AssertionError:
                return True
            if found.differs_from(in_order(plans)):
                return True
    return False


def test_kernels_wait_neither_for_stores_nor_copies_for_kernels_that_do_not_touch_them() -> None:
    device = VirtualDevice()
    kv = new_kv()
    transfer = new_transfer(device, kv, PinnedStore(device, kv, HOST_BLOCKS), least_bytes=1)
    transfer.store([BlockMove(0, 0), BlockMove(1, 1)], {5})
    transfer.load([]).finish()
    transfer.store([BlockMove(2, 2)], {4, 5})
    loading = transfer.load([BlockMove(4, 0)])
    assert [entry for entry in device.trace if entry.what == "wait" and entry.stream != "host"] == []
    loading.wait_for(0)
    assert [entry.stream for entry in device.trace if entry.what == "wait"] == ["host", "compute"]
    loading.finish()


def test_loads_wait_for_what_leaves_their_slots_and_kernels_only_for_the_loads() -> None:
    device = VirtualDevice(early=())
    kv = new_kv()
    transfer = new_transfer(device, kv, PinnedStore(device, kv, HOST_BLOCKS), least_bytes=1)
    transfer.store([BlockMove(0, 0)])
    transfer.load([]).finish()
    device.trace.clear()
    transfer.store([BlockMove(1, 1)], {1})
    loading = transfer.load([BlockMove(1, 0)])
    assert [entry.stream for entry in device.trace if entry.what == "wait"] == ["loads"]
    loading.finish()


@pytest.mark.parametrize(("least_bytes", "num_groups"), [(1, 3), (2 * 16, 2), (1 << 20, 1)])
def test_few_bytes_are_loaded_several_layers_at_once(least_bytes: int, num_groups: int) -> None:
    device = VirtualDevice(early=())
    kv = new_kv()
    assert kv.slab[0, 0].nbytes == 32
    transfer = new_transfer(device, kv, PinnedStore(device, kv, HOST_BLOCKS), 2 * least_bytes)
    loading = transfer.load([BlockMove(0, 0)])
    assert sum(entry.what == "record" for entry in device.trace) == 1 + num_groups
    for layer in (0, 0, 1, 2, 2):
        loading.wait_for(layer)
    waits = [entry for entry in device.trace if entry.what == "wait"]
    assert len(waits) == num_groups, "a layer that was waited for is waited for again"
    loading.finish()


def test_stores_that_nobody_loads_behind_are_waited_for_by_the_next_step() -> None:
    device = VirtualDevice(early=())
    kv = new_kv()
    host = PinnedStore(device, kv, HOST_BLOCKS)
    transfer = new_transfer(device, kv, host, least_bytes=1)
    transfer.store([BlockMove(0, 0)])
    transfer.store([BlockMove(1, 1)])
    transfer.load([]).finish()
    assert torch.equal(host.block(0), kv.slab[:, 0]) and torch.equal(host.block(1), kv.slab[:, 1])
    assert not device.num_lent_events


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_stores_and_loads_in_one_step() -> None:
    device = TorchDevice(torch.device("cuda:0"))
    kv = KVStore(LAYERS, BLOCKS, 2, 32, 64, torch.bfloat16)
    kv.slab = device.empty(tuple(kv.slab.shape), torch.bfloat16)
    kv.slab.normal_()
    before = kv.slab.clone()
    torch.cuda.synchronize()
    host = PinnedStore(device, kv, HOST_BLOCKS)
    tiers = Tiers(kv, host)
    transfer = CudaTransfer(
        device,
        tiers,
        storing=RunCopier(device, tiers.host, tiers.device),
        loading=RunCopier(device, tiers.device, tiers.host),
    )
    transfer.store([BlockMove(slot, slot) for slot in range(3)])
    transfer.load([]).finish()
    transfer.store([BlockMove(3, 3)], {3, 4})
    loading = transfer.load([BlockMove(3, 0), BlockMove(4, 1)])
    with device.on(device.compute):
        for layer in range(LAYERS):
            loading.wait_for(layer)
        seen = kv.slab[:, 3:5] + 0
    loading.finish()
    torch.cuda.synchronize()
    assert loading.seconds > 0
    assert torch.equal(seen, before[:, 0:2])
    assert torch.equal(host.block(3), before[:, 3].cpu())
