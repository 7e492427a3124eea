"""A device that takes time and says nothing: for what is measured in turns, not in tokens' values."""

from collections.abc import Callable, Collection, Sequence

from engine.batch import Collect, StepPlan, StepResult, at_once
from engine.cache.block import BlockMove

TOKEN = 1
_NONE: frozenset[BlockMove] = frozenset()


class TimedRunner:
    """Every reply is `TOKEN` over and over.  How long a step takes is the `Timeline`'s business."""

    def launch(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> Collect:
        rows = [segment.row for segment in plan.segments if segment.draw is not None]
        return at_once(StepResult(dict.fromkeys(rows, TOKEN)))


class TimedTransfer:
    """Copies nothing, and never fails."""

    def store(self, moves: Sequence[BlockMove], overwritten: Collection[int] = ()) -> frozenset[BlockMove]:
        return _NONE

    def load(self, moves: Sequence[BlockMove]) -> "TimedLoading":
        return TimedLoading()


class TimedLoading:
    seconds = 0.0

    def wait_for(self, layer: int) -> None:
        pass

    def finish(self) -> frozenset[BlockMove]:
        return _NONE
