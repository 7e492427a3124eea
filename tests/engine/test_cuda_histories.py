"""The random histories of test_core_histories with the copies of a GPU, on a virtual one: kernels and copies
run as early or as late as streams allow, and every reply equals a fresh run's.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.batch import Collect, StepPlan, StepResult
from engine.cache.kv_store import KVStore
from engine.cache.tiers import STORE_ALWAYS
from engine.cache.transfer import TransferEngine
from engine.core import EngineCore, Runner
from engine.cuda.copies import PinnedStore, RunCopier, Tiers
from engine.cuda.transfer import CudaTransfer
from engine.scheduler import Scheduler, Step
from engine.types import SamplingParams, TurnId
from tests.cuda.virtual_device import VirtualDevice
from tests.engine.test_core_histories import (
    BLOCK_SIZE,
    HistoriesEvictedFromTheTail,
    HistoriesOnTwoTiers,
    HistoriesOnTwoTiersAheadByOne,
    HistoriesThroughAWindow,
    run,
)
from tests.engine.two_tiers import TwoTiers
from tests.fakes import EOS, FakeRunner, FakeTransfer, stateless_reply

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


def on_device(
    device: VirtualDevice, runner: FakeRunner, num_slots: int, num_host_slots: int
) -> tuple[LateRunner, CudaTransfer]:
    """`runner` with its memory on the device, and what copies from and to there."""
    kv = KVStore(1, num_slots, 1, BLOCK_SIZE // 2, 1, torch.int64, device.empty)
    runner.kv = kv.slab.view(num_slots, BLOCK_SIZE).numpy()
    tiers = Tiers(kv, PinnedStore(device, kv, num_host_slots))
    out, back = RunCopier(device, tiers.host, tiers.device), RunCopier(device, tiers.device, tiers.host)
    return LateRunner(device, runner), CudaTransfer(device, tiers, storing=out, loading=back)


class OnAGpu:
    """To be mixed into a machine."""

    early = LATE_COPIES

    def __init__(self) -> None:
        super().__init__()
        device = VirtualDevice(self.early)
        runner, transfer = on_device(device, self.runner, self.num_slots, self.num_host_slots)
        self.core = LaunchingCore(
            self.manager,
            Scheduler(self.manager, 7, 3),
            runner,
            self.clock,
            frozenset({EOS}),
            self.context,
            transfer,
        )
        self.core.scheduler.on_state = self.state_changed


def on_a_gpu(machine: type, early: tuple[str, ...]) -> Any:
    return type(machine.__name__, (OnAGpu, machine), {"early": early, "seen": Counter()})


class HistoriesStoredEagerly(HistoriesOnTwoTiersAheadByOne):
    def __init__(self) -> None:
        super().__init__()
        self.manager.tiers._store_below = STORE_ALWAYS


MACHINES = [
    HistoriesOnTwoTiers,
    HistoriesOnTwoTiersAheadByOne,
    HistoriesEvictedFromTheTail,
    HistoriesThroughAWindow,
    HistoriesStoredEagerly,
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("early", [LATE_KERNELS, LATE_COPIES, ()])
def test_replies_equal_those_of_fresh_runs(machine: type, early: tuple[str, ...]) -> None:
    on_gpu = on_a_gpu(machine, early)
    run(on_gpu, examples=12)
    assert on_gpu.seen["num_stored"] > 30 and on_gpu.seen["num_loaded"]


@pytest.mark.heavy
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("early", [LATE_KERNELS, LATE_COPIES, ()])
def test_replies_equal_those_of_fresh_runs_over_many_histories(machine: type, early: tuple[str, ...]) -> None:
    run(on_a_gpu(machine, early), examples=300, derandomize=False)


@pytest.mark.parametrize("early", [LATE_KERNELS, LATE_COPIES, ("compute", "loads"), (), None])
def test_what_a_step_only_loads_is_there_for_the_next_one(early: tuple[str, ...] | None) -> None:
    """The turn that runs waits for its token; meanwhile blocks of the next come back.  None: in the host's
    memory, where a step computes when it is launched.
    """
    tiers = TwoTiers(num_slots=8, num_host_slots=8, max_concurrent=1)
    device = VirtualDevice(early or ())
    runner: Runner = tiers.runner
    transfer: TransferEngine = FakeTransfer(tiers.runner, 8)
    if early is not None:
        runner, transfer = on_device(device, tiers.runner, 8, 8)
    tiers.core = core = LaunchingCore(
        tiers.manager, Scheduler(tiers.manager, 64, 1), runner, tiers.clock, frozenset(), 32, transfer
    )
    returning = tiers.tell(20, 4)
    tiers.bring_to_host(returning)
    history = [*returning.tokens, 9]
    slow = SamplingParams(max_tokens=1, presence_penalty=1.0)
    core.begin(tiers.open(), TurnId("slow"), [1, 2, 3], slow, seed=0)
    launched = [core.plan()]
    turn = tiers.begin(returning, [9], num_new=3)
    launched.append(core.plan())
    loads_only = launched[1]
    assert loads_only is not None and loads_only.plan.loads and not loads_only.plan.segments
    while launched:
        step = launched.pop(0)
        if step is not None:
            core.apply(step, core.execute(step))
            launched.append(core.plan())
    assert turn.reply_ids == stateless_reply(history, 3, frozenset())
    assert not device.num_lent_events
