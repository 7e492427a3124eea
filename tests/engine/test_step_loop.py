"""The step loop on its own: what it takes for a failure, and what it does not."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from engine.batch import StepPlan, StepResult
from engine.errors import EngineStopped
from engine.step_loop import StepLoop
from engine.step_profile import StepRecorder
from engine.step_thread import StepThread
from kernels.marks import Part


class ScriptedCore:
    """Plans `num_steps` steps, each computed by `execute` when it is collected; then none, though
    `num_waiting` turns wait.
    """

    def __init__(self, num_steps: int = 0, num_waiting: int = 0, execute=lambda step: StepResult()) -> None:
        self.scheduler = SimpleNamespace(num_waiting=num_waiting)
        self.execute = execute
        self.applied = 0
        self._steps = []
        for _ in range(num_steps):
            self.add_step()

    def add_step(self):
        self._steps.append(SimpleNamespace(plan=StepPlan(len(self._steps), ())))

    def plan(self):
        return self._steps.pop(0) if self._steps else None

    def launch(self, step):
        return lambda: self.execute(step)

    def apply(self, step, result):
        self.applied += 1
        return []


def loop_over(core, stall_s=0.05, thread_setup=lambda: None, recorder=None, run_ahead=0):
    failures: asyncio.Queue[EngineStopped] = asyncio.Queue()
    steps = StepLoop(
        core,
        lambda step, result, events: None,
        failures.put_nowait,
        run_ahead=run_ahead,
        stall_s=stall_s,
        thread_setup=thread_setup,
        recorder=recorder,
    )
    return steps, failures


async def test_turns_that_wait_while_nothing_can_be_planned_are_a_failure() -> None:
    steps, failures = loop_over(ScriptedCore(num_waiting=3))
    async with steps:
        failure = await asyncio.wait_for(failures.get(), 5)
    assert "3 turns wait, and for 0.05 s no step could be planned" in str(failure)
    assert steps.failed is failure


async def test_an_engine_with_nothing_to_do_waits_as_long_as_it_takes() -> None:
    core = ScriptedCore(num_steps=1)
    steps, failures = loop_over(core, stall_s=0.01)
    async with steps:
        await asyncio.sleep(0.1)
    assert core.applied == 1
    assert failures.empty() and steps.failed is None


async def test_with_run_ahead_a_step_is_launched_before_the_one_before_it_is_collected() -> None:
    told: list[str] = []

    class TellingCore(ScriptedCore):
        def launch(self, step):
            told.append(f"launch {step.plan.number}")
            return super().launch(step)

    core = TellingCore(execute=lambda step: told.append(f"collect {step.plan.number}") or StepResult())
    for number in range(3):
        core._steps.append(SimpleNamespace(plan=StepPlan(number, ())))
    steps, _ = loop_over(core, run_ahead=1)
    async with steps:
        await asyncio.sleep(0.1)
    assert told == ["launch 0", "launch 1", "collect 0", "launch 2", "collect 1", "collect 2"]


async def test_a_stuck_step_is_named_and_does_not_hold_up_the_end() -> None:
    released = threading.Event()
    core = ScriptedCore(num_steps=2, execute=lambda step: StepResult(seconds=released.wait()))
    steps, failures = loop_over(core)
    try:
        async with asyncio.timeout(5), steps:
            failure = await failures.get()
    finally:
        released.set()
    assert "step 0 with 0 tokens made no progress for 0.05 s" in str(failure)
    assert core.applied == 0


async def test_a_thread_that_cannot_be_set_up_is_a_failure() -> None:
    def set_up() -> None:
        raise OSError("no such core")

    steps, failures = loop_over(ScriptedCore(num_steps=1), thread_setup=set_up)
    async with steps:
        assert "no such core" in str(await asyncio.wait_for(failures.get(), 5))


def test_jobs_run_in_order_on_one_thread_and_their_errors_come_back() -> None:
    thread = StepThread()
    done: list[str] = []
    names = [thread.submit(lambda: threading.current_thread().name) for _ in range(2)]
    broken = thread.submit(lambda: 1 // 0)
    last = thread.submit(lambda: done.append("after"))
    thread.close(wait=True)
    assert [name.result(0) for name in names] == ["step", "step"]
    with pytest.raises(ZeroDivisionError):
        broken.result(0)
    assert last.done() and done == ["after"]


class Notes(StepRecorder):
    """What the loop told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def start(self) -> None:
        self.told.append("start")

    def mark(self, part: Part) -> None:
        self.told.append(part)

    def pause(self) -> None:
        self.told.append("pause")

    def close(self) -> None:
        self.told.append("close")


async def test_a_loop_is_idle_from_finding_nothing_to_do_until_it_is_woken() -> None:
    notes = Notes()
    core = ScriptedCore(execute=lambda step: notes.told.append("step") or StepResult())
    steps, _ = loop_over(core, recorder=notes)
    async with steps:
        await asyncio.sleep(0.01)
        assert notes.told == ["start", "pause"]
        core.add_step()
        steps.wake()
        assert notes.told == ["start", "pause", "idle"]
        steps.wake()
        await asyncio.sleep(0.05)
    assert notes.told == ["start", "pause", "idle", "step", "pause", "idle", "close"]
