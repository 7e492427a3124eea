"""`EngineCore` under virtual time: steps are planned, executed and applied as `engine.step_loop` does."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engine.batch import StepResult
from engine.cache.block_pool import BlockPool
from engine.cache.costs import CostTable
from engine.cache.manager import KVCacheManager
from engine.cache.policy import policy_named
from engine.cache.transfer import TransferEngine
from engine.core import EngineCore, Runner, TokenEvent
from engine.errors import InvariantError
from engine.scheduler import Scheduler, Step
from engine.simulation.timeline import Timeline
from engine.simulation.virtual_time import Agenda
from engine.step_budget import Pacing


@dataclass(frozen=True, slots=True)
class CoreSizes:
    """What a core is built with besides its device."""

    num_blocks: int
    num_host_blocks: int = 0
    block_size: int = 32
    policy: str = "retention"
    max_step_tokens: int = 512
    max_concurrent: int = 64
    run_ahead: int = 0
    pacing: Pacing | None = None
    pipelined: bool = True


def build_core(
    sizes: CoreSizes,
    costs: CostTable,
    runner: Runner,
    transfer: TransferEngine,
    clock: Agenda,
    eos_ids: frozenset[int],
    context_tokens: int,
) -> EngineCore:
    """As `engine.loader` puts the parts together."""
    manager = KVCacheManager(
        BlockPool(sizes.num_blocks),
        sizes.block_size,
        policy_named(sizes.policy, costs),
        BlockPool(sizes.num_host_blocks),
        costs,
        pipelined=sizes.pipelined,
    )
    scheduler = Scheduler(manager, sizes.max_step_tokens, sizes.max_concurrent, sizes.pacing)
    return EngineCore(manager, scheduler, runner, clock, eos_ids, context_tokens, transfer)


class SimulatedEngine:
    """`on_step` is told what every step has sampled.  A step is carried out when it is launched, or, where
    `executes_late` says so, when it ends: whatever happens meanwhile must not matter to it.
    """

    def __init__(
        self,
        core: EngineCore,
        timeline: Timeline,
        agenda: Agenda,
        run_ahead: int,
        on_step: Callable[[Sequence[TokenEvent]], None],
        executes_late: Callable[[], bool] = lambda: False,
    ) -> None:
        self.core = core
        self.num_steps = 0
        self._timeline, self._agenda, self._run_ahead = timeline, agenda, run_ahead
        self._on_step, self._executes_late = on_step, executes_late
        self._launched: deque[tuple[Step, StepResult | None, float]] = deque()  # and how long it takes
        self._busy_until = 0.0
        self._is_dead = False

    @property
    def is_idle(self) -> bool:
        """No step is under way."""
        return not self._launched

    def wake(self) -> None:
        """There may be something to compute.  InvariantError if turns wait and yet nothing can be planned."""
        if self._launched:
            return
        self._plan()
        if not self._launched and self.core.scheduler.num_waiting:
            raise InvariantError(
                f"{self.core.scheduler.num_waiting} turns wait, nothing runs, and no step can be planned"
            )

    def crash(self) -> None:
        """The process dies: of the steps under way nothing comes any more."""
        self._is_dead = True

    def _plan(self) -> None:
        while len(self._launched) <= self._run_ahead and (step := self.core.plan()) is not None:
            is_first = all(result is not None for _, result, _ in self._launched)
            result = self.core.execute(step) if is_first and not self._executes_late() else None
            ended = self._timeline.launch(step.plan, self._agenda.now)
            seconds = ended - max(self._busy_until, self._agenda.now)
            self._busy_until = ended
            self._launched.append((step, result, seconds))
            self._agenda.at(ended, self._end_step)

    def _end_step(self) -> None:
        if self._is_dead:
            return
        step, result, seconds = self._launched.popleft()
        if result is None:
            result = self.core.execute(step)
        self.num_steps += 1
        self._on_step(self.core.apply(step, replace(result, seconds=seconds)))
        self._plan()
        self.wake()
