"""One step after the other: plan on the loop, execute on the step thread, apply on the loop.

With `run_ahead` steps planned and launched before the result of the one before is known, a device always has
the next one waiting.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from engine.batch import Collect, StepResult
from engine.core import EngineCore, TokenEvent
from engine.errors import EngineStopped
from engine.scheduler import Step
from engine.step_profile import StepRecorder
from engine.step_thread import StepThread


class StepLoop:
    """An async context manager that owns the loop's task and the step thread.

    `on_step(step, result, events)` is called on the loop after every step and must not block.  If a step
    raises or takes longer than `stall_s` seconds, or turns wait so long while no step can be planned, the
    loop ends, `failed` holds the reason and `on_failure` is called once.  `recorder` is told when there is
    nothing to compute, and closed at the end.
    """

    def __init__(
        self,
        core: EngineCore,
        on_step: Callable[[Step, StepResult, Sequence[TokenEvent]], None],
        on_failure: Callable[[EngineStopped], None],
        *,
        run_ahead: int,
        stall_s: float,
        thread_setup: Callable[[], None],
        recorder: StepRecorder | None = None,
    ) -> None:
        self._core = core
        self._on_step = on_step
        self._on_failure = on_failure
        self._run_ahead = run_ahead
        self._stall_s = stall_s
        self._thread_setup = thread_setup
        self._recorder = recorder or StepRecorder()
        self._wake = asyncio.Event()
        self._is_idle = False
        self._stopping = False
        self._thread: StepThread | None = None
        self._task: asyncio.Task[None] | None = None
        self.failed: EngineStopped | None = None

    async def __aenter__(self) -> "StepLoop":
        self._recorder.start()
        self._thread = StepThread()
        self._task = asyncio.create_task(self._run(self._thread), name="step-loop")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        self.wake()
        assert self._task is not None and self._thread is not None
        await self._task
        self._thread.close(wait=self.failed is None)
        self._recorder.close()

    def wake(self) -> None:
        """There may be something to compute."""
        if self._is_idle:
            self._is_idle = False
            self._recorder.mark("idle")
        self._wake.set()

    async def _run(self, thread: StepThread) -> None:
        try:
            await asyncio.wrap_future(thread.submit(self._thread_setup))
            await self._steps(thread)
        except Exception as error:
            self.failed = EngineStopped(
                f"the engine has failed and the server ends: {error or type(error).__name__}"
            )
            self.failed.__cause__ = error
            self._on_failure(self.failed)

    async def _steps(self, thread: StepThread) -> None:
        loop = asyncio.get_running_loop()
        launched: deque[tuple[Step, Future[Collect] | None]] = deque()  # None: when its turn comes
        while launched or not self._stopping:
            self._wake.clear()
            while len(launched) <= self._run_ahead and not self._stopping:
                step = self._core.plan()
                if step is None:
                    break
                launch = thread.submit(partial(self._core.launch, step)) if self._run_ahead else None
                launched.append((step, launch))
            if not launched:
                await self._nap()
                continue
            step, launch = launched.popleft()
            computing: asyncio.Future[StepResult] = loop.create_future()
            # Behind the launch of the next step, if there is a run-ahead.
            done = thread.submit(partial(self._core.execute, step) if launch is None else _collected(launch))
            done.add_done_callback(partial(_hand_over, loop, computing))
            alarm = loop.call_later(self._stall_s, self._give_up, step, computing)
            try:
                result = await computing
            finally:
                alarm.cancel()
            self._on_step(step, result, self._core.apply(step, result))

    def _give_up(self, step: Step, computing: asyncio.Future[StepResult]) -> None:
        if not computing.done():
            computing.set_exception(
                TimeoutError(
                    f"step {step.plan.number} with {step.plan.num_tokens} tokens "
                    f"made no progress for {self._stall_s:g} s"
                )
            )

    async def _nap(self) -> None:
        """Until something has changed.  Turns that wait while nothing runs must not wait for long."""
        num_waiting = self._core.scheduler.num_waiting
        self._recorder.pause()
        self._is_idle = True
        try:
            await asyncio.wait_for(self._wake.wait(), self._stall_s if num_waiting else None)
        except TimeoutError:
            raise TimeoutError(
                f"{num_waiting} turns wait, and for {self._stall_s:g} s no step could be planned"
            ) from None


def _collected(launch: "Future[Collect]") -> Callable[[], StepResult]:
    """For the thread that launched it, so that the launch has ended by then, well or not."""
    return lambda: launch.result()()


def _hand_over(
    loop: asyncio.AbstractEventLoop, computing: asyncio.Future[StepResult], done: Future[StepResult]
) -> None:
    with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
        loop.call_soon_threadsafe(_settle, computing, done)


def _settle(computing: asyncio.Future[StepResult], done: Future[StepResult]) -> None:
    """Wakes who awaits the step at once: with `wrap_future`, `shield` and `wait_for` between them it takes
    three more turns of the loop, while nothing is computed.
    """
    if computing.done():  # given up
        return
    error = done.exception()
    if error is None:
        computing.set_result(done.result())
    else:
        computing.set_exception(error)
