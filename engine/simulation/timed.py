"""A device that takes time and says nothing: for what is measured in turns, not in tokens' values."""

from collections.abc import Callable, Sequence

from engine.batch import StepPlan, StepResult
from engine.cache.block import BlockMove

TOKEN = 1
_NONE: frozenset[BlockMove] = frozenset()


class TimedRunner:
    """Every reply is `TOKEN` over and over.  How long a step takes is the `Timeline`'s business."""

    def run(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> StepResult:
        return StepResult({segment.row: TOKEN for segment in plan.segments if segment.draw is not None})


class TimedTransfer:
    """Copies nothing, and never fails."""

    def store(self, moves: Sequence[BlockMove]) -> frozenset[BlockMove]:
        return _NONE

    def load(self, moves: Sequence[BlockMove]) -> "TimedLoading":
        return TimedLoading()


class TimedLoading:
    seconds = 0.0

    def wait_for(self, layer: int) -> None:
        pass

    def finish(self) -> frozenset[BlockMove]:
        return _NONE
