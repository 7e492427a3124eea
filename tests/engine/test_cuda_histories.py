"""The random histories of test_core_histories with the copies of a GPU, on a virtual one: kernels and copies
run as early or as late as streams allow, and every reply equals a fresh run's.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.batch import Collect, StepPlan, StepResult
from engine.cache.kv_store import KVStore
from engine.core import EngineCore
from engine.cuda.copies import PinnedStore, RunCopier, Tiers
from engine.cuda.transfer import CudaTransfer
from engine.scheduler import Scheduler, Step
from tests.cuda.virtual_device import VirtualDevice
from tests.engine.test_core_histories import (
    BLOCK_SIZE,
    HistoriesEvictedFromTheTail,
    HistoriesOnABigHost,
    HistoriesOnTwoTiers,
    HistoriesOnTwoTiersAheadByOne,
    HistoriesThroughAWindow,
    run,
)
from tests.fakes import EOS, FakeRunner

LATE_KERNELS = ("loads", "stores", "results")
LATE_COPIES = ("compute",)


class LateRunner:
    """A fake runner as a GPU's: a step is computed when the stream comes to it."""

    def __init__(self, device: VirtualDevice, runner: FakeRunner) -> None:
        self._device, self._runner = device, runner

    def launch(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> Collect:
        device, results = self._device, list[StepResult]()
        if wait_for is not None:
            wait_for(0)
        device.launch(device.compute, f"step {plan.number}", lambda: results.append(self._runner.run(plan)))
        done = device.event()
        device.record(done, device.compute)

        def collect() -> StepResult:
            device.synchronize(done)
            device.recycle(done)
            return results[0]

        return collect


class LaunchingCore(EngineCore):
    """Launches a step as soon as it is planned."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._collects: dict[int, Collect] = {}

    def plan(self) -> Step | None:
        step = super().plan()
        if step is not None:
            self._collects[step.plan.number] = self.launch(step)
        return step

    def execute(self, step: Step) -> StepResult:
        return self._collects.pop(step.plan.number)()


class OnAGpu:
    """To be mixed into a machine."""

    early = LATE_COPIES

    def __init__(self) -> None:
        super().__init__()
        self.device = VirtualDevice(self.early)
        kv = KVStore(1, self.num_slots, 1, BLOCK_SIZE // 2, 1, torch.int64)
        kv.slab.fill_(-1)
        host = PinnedStore(self.device, kv, self.num_host_slots)
        tiers = Tiers(kv, host)
        self.runner.kv = kv.slab.view(self.num_slots, BLOCK_SIZE).numpy()
        transfer = CudaTransfer(
            self.device,
            tiers,
            storing=RunCopier(self.device, tiers.host, tiers.device),
            loading=RunCopier(self.device, tiers.device, tiers.host),
        )
        self.core = LaunchingCore(
            self.manager,
            Scheduler(self.manager, 7, 3),
            LateRunner(self.device, self.runner),
            self.clock,
            frozenset({EOS}),
            self.context,
            transfer,
        )
        self.core.scheduler.on_state = self.state_changed


def on_a_gpu(machine: type, order: tuple[str, ...]) -> type:
    return type(machine.__name__, (OnAGpu, machine), {"early": order})


@pytest.mark.parametrize(
    "machine",
    [
        HistoriesOnTwoTiers,
        HistoriesOnTwoTiersAheadByOne,
        HistoriesOnABigHost,
        HistoriesEvictedFromTheTail,
        HistoriesThroughAWindow,
    ],
)
@pytest.mark.parametrize(
    "order", [LATE_KERNELS, LATE_COPIES, ()], ids=["late-kernels", "late-copies", "late"]
)
def test_replies_equal_those_of_fresh_runs(machine: Any, order: tuple[str, ...]) -> None:
    run(on_a_gpu(machine, order), examples=15)
