"""One step after the other: plan on the loop, execute on the step thread, apply on the loop.

With `run_ahead` steps planned before the result of the one before is known, the thread always has the next
one waiting.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.batch import StepResult
from engine.core import EngineCore, TokenEvent
from engine.errors import EngineStopped
from engine.scheduler import Step


class StepLoop:
    """An async context manager that owns the loop's task and the step thread.

    `on_step(step, result, events)` is called on the loop after every step and must not block.  If a step
    raises, or takes longer than `stall_s` seconds, the loop ends, `failed` holds the reason and
    `on_failure` is called once.
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
    ) -> None:
        self._core = core
        self._on_step = on_step
        self._on_failure = on_failure
        self._run_ahead = run_ahead
        self._stall_s = stall_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step", initializer=thread_setup)
        self._wake = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self.failed: EngineStopped | None = None

    async def __aenter__(self) -> "StepLoop":
        self._task = asyncio.create_task(self._run(), name="step-loop")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        self._wake.set()
        assert self._task is not None
        await self._task
        self._thread.shutdown(wait=self.failed is None, cancel_futures=True)

    def wake(self) -> None:
        """There may be something to compute."""
        self._wake.set()

    async def _run(self) -> None:
        try:
            await self._steps()
        except Exception as error:
            self.failed = EngineStopped(
                f"the engine has failed and the server ends: {error or type(error).__name__}"
            )
            self.failed.__cause__ = error
            self._on_failure(self.failed)

    async def _steps(self) -> None:
        loop = asyncio.get_running_loop()
        launched: deque[tuple[Step, asyncio.Future[StepResult]]] = deque()
        while launched or not self._stopping:
            self._wake.clear()
            while len(launched) <= self._run_ahead and not self._stopping:
                step = self._core.plan()
                if step is None:
                    break
                launched.append((step, loop.run_in_executor(self._thread, self._core.execute, step)))
            if not launched:
                await self._wake.wait()
                continue
            step, future = launched.popleft()
            try:
                result = await asyncio.wait_for(asyncio.shield(future), self._stall_s)
            except TimeoutError:
                raise TimeoutError(
                    f"step {step.plan.number} with {step.plan.num_tokens} tokens "
                    f"made no progress for {self._stall_s:g} s"
                ) from None
            self._on_step(step, result, self._core.apply(step, result))
